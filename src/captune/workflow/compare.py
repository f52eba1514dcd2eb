"""compare: every combination of some config values, over seeds, and whether they truly differ."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from captune.config import FIELDS, Config, parse_value
from captune.console import say
from captune.data.sources import open_source
from captune.data.table import CaptionTable
from captune.data.tabular import TableOptions
from captune.errors import CaptuneError, nearest
from captune.evaluation.intervals import METRICS
from captune.evaluation.variants import SeedRun, Variant
from captune.files import read_json, write_json
from captune.report.comparison import Comparison, write_comparison
from captune.training.run import Provenance, Run, free_name
from captune.workflow.evaluate import Measured, measure
from captune.workflow.opening import OwnTowers, open_model
from captune.workflow.train import default_out, train

BASE = "base"


@dataclass(frozen=True)
class Matrix:
    """The combinations to compare: each value of each flag with each of the others.

    Args:
        flags: config keys with the values that each takes, the first being the base.
    """

    flags: Mapping[str, Sequence[Any]]

    @classmethod
    def of(cls, flags: Sequence[str] | Mapping[str, Sequence[Any]]) -> Matrix:
        """From words: a boolean key (``use_batch_norm``), or ``key=value,value``.

        Raises:
            CaptuneError: an unknown key, a key that is not boolean without values, or fewer than
                two different values.
        """
        if isinstance(flags, str):
            flags = [flags]
        pairs = flags.items() if isinstance(flags, Mapping) else map(_parse_flag, flags)
        values: dict[str, Sequence[Any]] = {}
        for key, found in pairs:
            if key not in FIELDS:
                raise CaptuneError(f"unknown config key {key!r}{nearest(key, FIELDS)}")
            if key == "seed":
                raise CaptuneError("seeds are compared over, not between: use seeds=N (--seeds N)")
            if key == "val_split":
                raise CaptuneError(
                    "variants are compared on one split: name it with split=... (--split)"
                )
            if key in values:
                raise CaptuneError(f"{key} is to be compared twice: name all its values at once")
            if len(set(found)) < 2 or len(set(found)) < len(found):
                raise CaptuneError(
                    f"{key} needs two or more different values to compare, found {list(found)}"
                )
            values[key] = tuple(found)
        if not values:
            raise CaptuneError("nothing to compare: name a boolean config key, or key=value,value")
        return cls(values)

    @cached_property
    def combinations(self) -> list[dict[str, Any]]:
        """All of them, the base first."""
        rows = itertools.product(*self.flags.values())
        return [dict(zip(self.flags, row, strict=True)) for row in rows]

    def name(self, values: Mapping[str, Any]) -> str:
        """``base``, ``use_batch_norm``, ``use_batch_norm+batch_size=64``, …"""
        words = [
            key if value is True else f"{key}={str(value).lower() if value is False else value}"
            for key, value in values.items()
            if value != self.flags[key][0]
        ]
        return "+".join(words) or BASE


def _parse_flag(word: str) -> tuple[str, Sequence[Any]]:
    key, equals, listed = word.partition("=")
    key = key.replace("-", "_")
    if equals:
        return key, tuple(parse_value(key, value) for value in listed.split(","))
    if key in FIELDS and not isinstance(FIELDS[key].default, bool):
        raise CaptuneError(f"{key} is no on/off flag: list its values, {key}=a,b")
    return key, (False, True)


@dataclass(frozen=True)
class _Job:
    """What all runs of one comparison share; ``table`` is what they are measured on."""

    data: str
    folder: Path
    options: TableOptions
    table: CaptionTable


def compare(
    data: str | Path,
    *,
    flags: Sequence[str] | Mapping[str, Sequence[Any]],
    seeds: int = 3,
    config: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    options: TableOptions | None = None,
    split: str | None = None,
) -> Comparison:
    """Train and measure every combination of ``flags`` with every seed, and compare them.

    Runs lie in ``out``; those complete already are kept, an interrupted one goes on where it
    stopped. Seeds come in the outer loop: whatever is stopped early has whole rows to compare.

    Args:
        data: as :func:`captune.workflow.train.train` takes it.
        flags: boolean config keys, ``key=value,value`` words, or a mapping of keys to values.
        seeds: runs of each combination, with seeds ``config["seed"]``, +1, …
        config: what all runs share.
        out: the comparison's folder; default ``runs/<data>-compare``.
        options: of an own table.
        split: what to measure on; default the validation split (on which each run also chose its
            best epoch: the page says so).

    Returns:
        The comparison, written as ``comparison.json``, ``.png`` and ``.html`` in ``out``.

    Raises:
        CaptuneError: nothing to compare, a wrong key or value, wrong data.
        TrainingStopped: Ctrl-C; the same call goes on.
    """
    if seeds < 1:
        raise CaptuneError(f"at least one seed is needed, found seeds={seeds}")
    matrix = Matrix.of(flags)
    shared = dict(config or {})
    first = int(Config.from_mapping(shared).seed)
    wanted = [
        (values, seed, Config.from_mapping({**shared, **values, "seed": seed}))
        for seed in range(first, first + seeds)
        for values in matrix.combinations
    ]
    options = (options or TableOptions()).resolved()
    source = open_source(data, options)  # a wrong name must not wait for the first run
    table = source.table(split or wanted[0][2].val_split or source.val_split)
    folder = Path(out) if out else _default_folder(str(data))
    job = _Job(str(data), folder, options, table)
    found: dict[str, list[SeedRun]] = {matrix.name(v): [] for v in matrix.combinations}
    bar = tqdm(wanted, desc="comparing", unit="run")
    for values, seed, run_config in bar:
        name = matrix.name(values)
        bar.set_postfix_str(f"{name} seed {seed}")
        found[name].append(_one_run(job, name, seed, run_config))
    variants = [
        Variant(matrix.name(values), values, tuple(found[matrix.name(values)]))
        for values in matrix.combinations
    ]
    # As the run was trained, which may have been on another machine in another precision.
    stated = Run.open(variants[0].runs[0].folder).config.describe()
    comparison = Comparison(folder, stated, tuple(variants))
    write_comparison(comparison)
    return comparison


def _default_folder(data: str) -> Path:
    plain = default_out(data, Config())
    return plain.with_name(f"{plain.name}-compare")


def _one_run(job: _Job, name: str, seed: int, config: Config) -> SeedRun:
    """Train one run where it is not complete, and read its figures."""
    folder = job.folder / f"{_file_name(name)}-seed{seed}"
    run = _complete_run(folder, config, job)
    if run is None:
        say(f"{name}, seed {seed}: {folder}")
        run = train(
            job.data, config=config, out=folder, options=job.options, resume=_has_state(folder)
        ).run
    else:
        say(f"{name}, seed {seed}: {folder} is complete already")
    opened = open_model(str(folder), OwnTowers.of(config))
    measured = measure(opened, job.table)
    return SeedRun(folder, seed, _metrics(run, measured, job), run.history(), measured.hits)


def _metrics(run: Run, measured: Measured, job: _Job) -> dict[str, Any]:
    """The run's metrics file, written anew where it is not of these images or not of this model."""
    path = run.output("metrics", ".json")
    kept = read_json(path, what="metrics")
    table = job.table
    stated = [kept.get(key) for key in ("data", "split", "split_digest")]
    if stated == [table.name, table.split, table.digest]:
        recalls = [kept[direction][key] for direction, key in METRICS]
        if np.allclose(recalls, measured.hits.recalls()):
            return dict(kept)
    write_json(path, measured.metrics)
    return measured.metrics


def _file_name(name: str) -> str:
    """A variant's name without what a file system may refuse; still one folder a name."""
    clean = re.sub(r"[^\w.+=-]", "_", name)
    return clean if clean == name else f"{clean}-{hashlib.blake2b(name.encode()).hexdigest()[:6]}"


def _has_state(folder: Path) -> bool:
    return (folder / "last" / "state.safetensors").is_file()


def _complete_run(folder: Path, config: Config, job: _Job) -> Run | None:
    """The run in ``folder`` if nothing is left to do there.

    Raises:
        CaptuneError: it is a run of another configuration, or on other data.
    """
    if not Run.is_begun(folder):
        return None
    run = Run.open(folder)
    provenance = Provenance(str(Path(job.data).expanduser().resolve()), job.options)
    differing = run.differences(Run(folder, config, provenance))
    if differing:
        raise CaptuneError(
            f"{folder} holds a run of another configuration ({', '.join(differing)}): "
            f"take --out {free_name(job.folder)}"
        )
    told = run.output("metrics", ".json").is_file() and run.output("report", ".html").is_file()
    return run if run.is_complete and told else None
