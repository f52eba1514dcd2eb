"""train, from shards: a stream of pictures and captions in, a trained, measured run out."""

from __future__ import annotations

from pathlib import Path

from captune.config import Config
from captune.console import say
from captune.data.sources import open_source
from captune.data.stream_shards import is_pattern
from captune.data.stream_table import StreamTable, pattern_name
from captune.data.tabular import TableOptions
from captune.errors import CaptuneError
from captune.processes import processes
from captune.training.fit import fit
from captune.training.run import Provenance
from captune.workflow.story import sample_subject
from captune.workflow.train import Outcome, tell_together


def train_on_shards(
    pattern: str,
    *,
    val_data: str,
    config: Config,
    out: str | Path | None = None,
    options: TableOptions | None = None,
    resume: bool = False,
) -> Outcome:
    """Train on WebDataset shards, measure on ``val_data``, and write pictures and page.

    Args:
        pattern: paths or URLs of tar files, with braces or wildcards.
        val_data: what :func:`captune.data.sources.open_source` reads; its validation split is used.
        config: without stage 1, which would keep features of every photo.
        out: the run's folder; default ``runs/<the pattern's name>{suffix}``.
        options: columns of ``val_data``.
        resume: go on where the run in ``out`` stopped.

    Raises:
        CaptuneError: no such shards, no validation data, an occupied folder, a tower that cannot
            be loaded.
        TrainingStopped: Ctrl-C; everything is saved.
    """
    if not is_pattern(pattern):
        raise CaptuneError(
            f"--val-data belongs to shards, and {pattern} names none: give tar files, or leave it "
            "out (a table is validated on --val FILE)"
        )
    if not val_data:
        raise CaptuneError(
            "shards have no validation split: give --val-data DATA, a COCO 2014 folder, a pack or "
            "a table"
        )
    wanted, config = config, _without_stage_one(config)
    say(config.describe())
    if wanted.head_epochs:
        say("a stream keeps no features, so it has no stage 1: head_epochs=0")
    options = (options or TableOptions()).resolved()
    source = open_source(val_data, options)
    val_split = config.val_split or source.val_split
    val_table = source.table(val_split)
    here = processes()
    stream = StreamTable.open(pattern, rank=here.rank, world_size=here.count)
    provenance = Provenance(
        str(Path(val_data).expanduser().resolve()),
        options,
        train_split="",
        val_split=val_split,
        stream=stream.record(),
    )
    run = fit(
        stream,
        val_table,
        out=Path(out) if out else Path("runs") / f"{pattern_name(pattern)}{config.suffix}",
        config=config,
        resume=resume,
        provenance=provenance,
        announce=False,
    )
    return tell_together(run, sample_subject(run, val_table))


def _without_stage_one(config: Config) -> Config:
    """The config of a stream.

    Raises:
        CaptuneError: it wants features of all photos, or a split of them.
    """
    if config.standardise_features:
        raise CaptuneError(
            "standardise_features needs features of all photos, which a stream does not keep: "
            "leave it out"
        )
    if config.train_split != Config().train_split:
        raise CaptuneError("shards have no splits: leave out train_split, and name other shards")
    if config.freeze_backbone:
        raise CaptuneError("freeze_backbone stops after stage 1, which a stream has not")
    return config.replace(head_epochs=0)
