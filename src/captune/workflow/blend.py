"""blend: measure the models on the line between two, and keep the best of them as a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from captune.data.table import CaptionTable
from captune.data.tabular import TableOptions
from captune.errors import CaptuneError
from captune.evaluation.intervals import METRICS, QueryHits
from captune.files import read_versioned, write_json
from captune.models import weights_digest
from captune.report.blend import Blend
from captune.report.plots import save_figure
from captune.training.blending import blend_weights, even_alphas, refuse_unlike, seen_by_any
from captune.training.run import BLEND, SELECTED, TRAINED, Run, free_name
from captune.workflow.evaluate import Measured, difference_of, measure, overlap_notes
from captune.workflow.opening import Opened, OwnTowers, open_model, open_table

VERSION = 1


def blend(
    first: str,
    second: str,
    *,
    data: str | None = None,
    split: str | None = None,
    options: TableOptions | None = None,
    own: OwnTowers | None = None,
    steps: int = 11,
    out: str | Path | None = None,
) -> Blend:
    """Measure ``steps`` models from ``first`` to ``second``, and keep the best by rsum as a run.

    What ``out`` holds of the same blend already is not computed again.

    Args:
        first: a run, a checkpoint of one, or a CLIP: alpha 0.
        second: a run or a checkpoint of one: alpha 1. The blend takes its configuration.
        data, split, options: what to measure and choose on; default the second's validation split.
        own: factories of own towers, those of both.
        steps: even shares of the second, both ends included.
        out: default ``runs/<the second's name>-blend``.

    Raises:
        CaptuneError: models that cannot be blended, or an occupied folder; a free name is
            suggested.
    """
    alphas = even_alphas(steps)
    ends = open_model(first, own), open_model(second, own)
    last = ends[1].run
    if last is None:
        raise CaptuneError(f"{second} is no run: name the CLIP first and what became of it second")
    refuse_unlike(ends[0].model, ends[1].model, [end.name for end in ends])
    table = open_table(ends[1], data, split, options or TableOptions())
    folder = Path(out) if out else Path("runs") / f"{last.folder.resolve().name}-blend"
    run = Run(folder, last.config, last.provenance)
    told = _claim(folder, _stated(ends, table, steps))
    run.write_identity()
    run.write_seen(*seen_by_any([e.run for e in ends if e.run is not None], table.file_keys()))
    line = _Line(ends, table, run)
    done = {row["alpha"]: row for row in told["rows"]}
    missing = [alpha for alpha in alphas if alpha not in done]
    for alpha in tqdm(missing, desc="blending", unit="alpha", initial=len(done), total=len(alphas)):
        measured = line.measure(alpha)
        done[alpha] = _row(alpha, measured)
        told |= {key: measured.metrics[key] for key in ("images", "captions", "protocol")}
        told["rows"] = [done[each] for each in alphas if each in done]
        write_json(folder / BLEND, told)
    if missing or "best" not in told or not run.weights_path.is_file():
        _finish(line, told)
    return Blend(folder, told)


def _stated(ends: tuple[Opened, Opened], table: CaptionTable, steps: int) -> dict[str, Any]:
    """What says which blend it is, with no row yet."""
    return {
        "format_version": VERSION,
        "models": [{"model": end.name, "fingerprint": weights_digest(end.model)} for end in ends],
        "data": table.name,
        "split": table.split,
        "split_digest": table.digest,
        "steps": steps,
        "rows": [],
    }


def _claim(folder: Path, stated: dict[str, Any]) -> dict[str, Any]:
    """Begin the blend in ``folder``, or take what is there of the very same one.

    Raises:
        CaptuneError: another blend is there, or something else.
    """
    path = folder / BLEND
    if not path.is_file():
        # A process killed in its first moment leaves an unfinished file, and nothing else.
        if folder.exists() and not (
            folder.is_dir() and all(file.suffix == ".tmp" for file in folder.iterdir())
        ):
            raise CaptuneError(
                f"{folder} is not empty and holds no blend: take --out {free_name(folder)}"
            )
        write_json(path, stated)
        return stated
    kept = read_versioned(path, what="blend", version=VERSION)
    try:
        wanted, found = _identity(stated), _identity(kept)
        differing = [what for what in wanted if wanted[what] != found[what]]
    except (KeyError, TypeError) as error:
        raise CaptuneError(f"blend {path} is damaged: it lacks {error}") from None
    if differing:
        raise CaptuneError(
            f"{folder} holds another blend ({', '.join(differing)} differ): "
            f"take --out {free_name(folder)}"
        )
    return {**kept, "models": stated["models"]}  # their folders may have moved


def _identity(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a blend's rows depend on."""
    return {
        "models": [model["fingerprint"] for model in told["models"]],
        "split": told["split_digest"],
        "steps": told["steps"],
    }


class _Line:
    """The models between two ends, made of the second's and measured as the blended run."""

    def __init__(self, ends: tuple[Opened, Opened], table: CaptionTable, run: Run) -> None:
        self.model = ends[1].model
        self.states = [
            {key: value.detach().cpu().clone() for key, value in end.model.state_dict().items()}
            for end in ends
        ]
        self.table = table
        self.run = run
        self.hits: dict[float, QueryHits] = {}

    def go_to(self, alpha: float) -> None:
        """Give the model the weights at ``alpha``."""
        self.model.load_state_dict(blend_weights(self.states[0], self.states[1], alpha))

    def measure(self, alpha: float) -> Measured:
        """As `captune evaluate` measures; of many models only one is used again, so no
        embeddings are kept."""
        self.go_to(alpha)
        measured = measure(Opened(self.model, self.run, f"alpha {alpha:.3g}"), self.table)
        self.hits[alpha] = measured.hits
        return measured

    def hits_at(self, alpha: float) -> QueryHits:
        """Those of an alpha that an earlier call measured are made anew."""
        return self.hits[alpha] if alpha in self.hits else self.measure(alpha).hits


def _row(alpha: float, measured: Measured) -> dict[str, Any]:
    metrics = measured.metrics
    recalls: dict[str, Any] = {}
    for direction, key in METRICS:
        recalls.setdefault(direction, {})[key] = metrics[direction][key]
    return {
        "alpha": alpha,
        "fingerprint": metrics["fingerprints"]["model"],
        **recalls,
        "rsum": metrics["rsum"],
        "intervals": metrics["intervals"],
    }


def _finish(line: _Line, told: dict[str, Any]) -> None:
    """Keep the best model, draw the picture, and say last which it is: then all is there."""
    run, table = line.run, line.table
    best = max(told["rows"], key=lambda row: float(row["rsum"]))
    hits = line.hits_at(best["alpha"])
    told["best"] = {
        "alpha": best["alpha"],
        "rsum": best["rsum"],
        "fingerprint": best["fingerprint"],
        "less_first": difference_of(hits, line.hits_at(0.0)),
        "less_second": difference_of(hits, line.hits_at(1.0)),
    }
    told["notes"] = [
        *overlap_notes({TRAINED: run.overlap(table)[TRAINED], SELECTED: 0}),
        f"alpha was chosen on {table.split}: the best one's figures there are slightly optimistic, "
        "report a test split",
    ]
    line.go_to(best["alpha"])
    line.model.save_pretrained(run.folder)
    shown = Blend(run.folder, told)
    save_figure(shown.figure(), shown.picture)
    write_json(run.folder / BLEND, told)
