"""train: data on disk in, a trained, measured run with its page out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captune.config import Config
from captune.console import say
from captune.data.sources import Source, open_source
from captune.data.table import CaptionTable
from captune.data.tabular import TableOptions
from captune.device import give_back_freed_memory
from captune.files import write_json
from captune.processes import alone, processes
from captune.training.fit import fit
from captune.training.run import Provenance, Run
from captune.workflow.embed import embed
from captune.workflow.opening import OwnTowers, open_model
from captune.workflow.story import Subject, sample_subject, tell


@dataclass(frozen=True)
class Outcome:
    """A trained run, its metrics object, its page, and what to type next."""

    run: Run
    metrics: dict[str, Any]
    page: Path
    commands: Sequence[tuple[str, str]]


def default_out(data: str, config: Config) -> Path:
    """``runs/<data>{suffix}``."""
    path = Path(data)
    return Path("runs") / f"{path.stem if path.is_file() else path.resolve().name}{config.suffix}"


def train(
    data: str,
    *,
    config: Config,
    out: str | Path | None = None,
    options: TableOptions | None = None,
    resume: bool = False,
    on_epoch: Callable[[Run], None] | None = None,
) -> Outcome:
    """Train on ``data``, measure on its validation split, and write pictures and page.

    ``on_epoch`` is called after each epoch, as :func:`captune.training.fit.fit` says.

    Raises:
        CaptuneError: wrong data, an occupied folder, a tower that cannot be loaded.
        TrainingStopped: Ctrl-C; everything is saved.
    """
    options = (options or TableOptions()).resolved()
    source = open_source(data, options)
    say(config.describe())
    return train_and_tell(
        source,
        Provenance(
            str(Path(data).expanduser().resolve()),
            options,
            config.train_split,
            config.val_split or source.val_split,
        ),
        config=config,
        out=Path(out) if out else default_out(data, config),
        resume=resume,
        on_epoch=on_epoch,
    )


def train_and_tell(
    source: Source,
    provenance: Provenance,
    *,
    config: Config,
    out: Path,
    resume: bool,
    subject: Subject | None = None,
    on_epoch: Callable[[Run], None] | None = None,
) -> Outcome:
    """Train, then tell: ``subject`` is what the page is about, default the validation split.

    The caller has said ``config``: what is said here and by the tables comes after the recipe.
    """
    train_table = source.table(provenance.train_split)
    val_table = source.table(provenance.val_split)
    give_back_freed_memory()  # of parsing: all loader processes would start with it
    _warn_of_shared_images(train_table, val_table)
    run = fit(
        train_table,
        val_table,
        out=out,
        config=config,
        resume=resume,
        provenance=provenance,
        on_epoch=on_epoch,
        announce=False,
    )
    return tell_together(run, subject or sample_subject(run, val_table))


def tell_together(run: Run, told: Subject) -> Outcome:
    """Measure a trained run and write metrics, pictures and page; of several processes the main one
    writes, and tells the others."""
    here = processes()
    if here.count > 1:  # together what is long; the rest is on disk then, or done by one
        embed(open_model(str(run.folder), OwnTowers.of(run.config)), told.table)

    def tell_alone() -> tuple[dict[str, Any], str]:
        with alone():
            metrics, page = tell(run, told)
            write_json(run.output("metrics", ".json"), metrics)
        return metrics, str(page)

    metrics, page = here.from_main(tell_alone)
    return Outcome(run, metrics, Path(page), told.commands)


def _warn_of_shared_images(train: CaptionTable, val: CaptionTable) -> None:
    shared = set(train.file_keys()) & set(val.file_keys())
    if shared:
        say(
            f"note: {len(shared):,} images of {val.split} are in {train.split} too: validation "
            "will look better than it is"
        )
