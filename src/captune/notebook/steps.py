"""Training, measuring and asking: sections 6 and 7 of main.ipynb."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from captune.config import Config
from captune.console import say
from captune.data.table import CaptionTable
from captune.evaluation.explain import HeatMap, explain_image
from captune.evaluation.retrieval import Hit, search_images
from captune.evaluation.zeroshot import Prediction, classify
from captune.notebook.display import LiveFigure, plainly, show_figure, show_table
from captune.notebook.show import run_folder
from captune.report.plots import (
    QueryAnswer,
    heat_maps,
    recall_bars,
    retrieval_sheet,
    training_curves,
    zero_shot_bars,
)
from captune.training.run import Provenance, Run, free_name
from captune.workflow import train as training
from captune.workflow.demo import demo_subject
from captune.workflow.embed import embed
from captune.workflow.evaluate import evaluate
from captune.workflow.opening import Opened, OwnTowers, open_model
from captune.workflow.story import Subject, chance_metrics, sample_subject


@plainly
def train(data: str | Path, config: Mapping[str, Any], out: str | Path) -> Run:
    """Train, with a bar for each epoch and curves that grow; then measure and write the page.

    Run again, it goes on where a lost session stopped, and returns at once what is complete.

    Args:
        data: as :func:`prepare_data` returns it.
        config: a Config or a dict.
        out: the folder of all runs; each configuration gets a folder of its own in it.

    Raises:
        CaptuneError: wrong data or config, or stopped by hand (all is kept).
    """
    config = Config.from_mapping(config)
    folder = _folder_of(data, config, Path(out))
    live = LiveFigure("curves appear here after the first epoch")

    def draw(run: Run) -> None:
        live.update(training_curves(run.history(), config.describe()))

    outcome = training.train(
        str(data),
        config=config,
        out=folder,
        resume=(folder / "last" / "state.safetensors").is_file(),
        on_epoch=draw,
    )
    draw(outcome.run)
    say(f"run {outcome.run.folder} · page {outcome.page}")
    return outcome.run


def _folder_of(data: str | Path, config: Config, out: Path) -> Path:
    """The folder of this very run in ``out``, be it new, unfinished or complete."""
    folder = out / training.default_out(str(data), config).name
    wanted = Run(folder, config, Provenance(str(Path(data).expanduser().resolve())))
    number = 1
    while Run.is_begun(folder) and Run.open(folder).differences(wanted):
        number += 1
        folder = wanted.folder.with_name(f"{wanted.folder.name}-{number}")
    if folder.exists() and any(folder.iterdir()) and not Run.is_begun(folder):
        folder = free_name(wanted.folder)
    if number > 1:
        say(f"{wanted.folder} holds another configuration: this run is kept in {folder}")
    return folder


@plainly
def show_recall(run: Run | str, split: str = "", *, own: OwnTowers | None = None) -> dict[str, Any]:
    """Recall@K both ways on a split the run neither trained nor chose its epoch on, if any.

    Args:
        run: a run or its folder.
        split: default ``karpathy-test`` or ``test`` where there is one, else the validation split.
        own: factories of own towers.

    Returns:
        The metrics object, which is also written to the run's ``metrics{suffix}.json``.
    """
    folder = run_folder(run)
    split = split or held_out(Run.open(folder))
    result = evaluate(str(folder), split=split, own=own)
    chance = chance_metrics(result["images"], result["captions"])
    where = f"{result['data']} {split}: {result['images']:,} images"
    rows = [
        [name, *(f"{metrics[key][at]:.1f}" for at in ("R@1", "R@5", "R@10")), rank]
        for metrics, mark in ((result, ""), (chance, ", chance"))
        for key, direction in (("image_to_text", "image→text"), ("text_to_image", "text→image"))
        for name, rank in [(direction + mark, f"{metrics[key]['median_rank']:g}")]
    ]
    note = f"percent; rsum {result['rsum']:.1f}, chance {chance['rsum']:.1f}"
    header = ("", "R@1", "R@5", "R@10", "median rank")
    show_table(f"{where}, {result['captions']:,} captions", header, rows, note)
    show_figure(recall_bars(result, chance, f"Recall on {where}"))
    return result


@plainly
def search(
    run: Run | str,
    queries: str | Sequence[str],
    *,
    k: int = 5,
    split: str = "",
    own: OwnTowers | None = None,
) -> list[list[Hit]]:
    """The ``k`` pictures that best answer each query; ✓ and ✗ where the truth is known."""
    opened, subject = _open(run, split, own)
    queries = [queries] if isinstance(queries, str) else list(queries)
    embeddings = embed(opened, subject.table)
    hits = search_images(opened.model, subject.table, embeddings, queries, k=k)
    answers = [
        QueryAnswer(query, found, _marks(subject, query, found))
        for query, found in zip(queries, hits, strict=True)
    ]
    title = f"{subject.table.describe()}: best pictures and their cosine similarity"
    show_figure(retrieval_sheet(answers, title))
    return hits


def _marks(subject: Subject, query: str, hits: Sequence[Hit]) -> list[bool | None] | None:
    if subject.judge is None or query not in subject.queries:
        return None
    return [subject.judge(query, hit) for hit in hits]


@plainly
def zero_shot(
    run: Run | str,
    images: Sequence[str | Path | int] | None = None,
    labels: Sequence[str] | None = None,
    *,
    split: str = "",
    own: OwnTowers | None = None,
) -> list[Prediction]:
    """Label pictures with words that the model was never taught as classes.

    Args:
        run: a run or its folder.
        images: files, or rows of the split; default: some of the split.
        labels: words to choose from; default: some that suit the data.
        split: as for :func:`show_recall`.
        own: factories of own towers.
    """
    opened, subject = _open(run, split, own)
    table = subject.table
    chosen = [row for row, _ in subject.pictures] if images is None else list(images)
    paths = [table.path(item) if isinstance(item, int) else Path(item) for item in chosen]
    known = {str(table.path(row)): truth for row, truth in subject.pictures}
    predictions = classify(opened.model, paths, labels or subject.labels)
    truths = [known.get(str(path)) for path in paths] if labels is None else []
    title = "Zero-shot labels" + (", the true one in green" if any(truths) else "")
    show_figure(zero_shot_bars(predictions, truths, title))
    return predictions


@plainly
def explain(
    run: Run | str,
    queries: str | Sequence[str],
    images: Sequence[str | Path | int] | None = None,
    *,
    method: str = "auto",
    split: str = "",
    own: OwnTowers | None = None,
) -> list[list[HeatMap]]:
    """Where each query finds support in each picture; default: the best picture of each query."""
    opened, subject = _open(run, split, own)
    queries = [queries] if isinstance(queries, str) else list(queries)
    table = subject.table
    if images is None:
        embeddings = embed(opened, table)
        hits = search_images(opened.model, table, embeddings, queries, k=1)
        images = [found[0].image for found in hits]
    paths = [table.path(item) if isinstance(item, int) else Path(item) for item in images]
    rows = [
        [explain_image(opened.model, path, query, method=method) for query in queries]
        for path in paths
    ]
    show_figure(heat_maps(rows, f"Why? Heat by {rows[0][0].method}, and cosine similarity"))
    return rows


def held_out(run: Run) -> str:
    """A split for the end, where the data has one; else the validation split."""
    source, val = run.source(), run.provenance.val_split
    if val == "karpathy-val":
        return "karpathy-test"
    free = "test" in source.splits and run.provenance.train_split != "test"
    return "test" if free else val


def _open(run: Run | str, split: str, own: OwnTowers | None) -> tuple[Opened, Subject]:
    """The model of a run, and what there is to ask of the split."""
    opened = open_model(str(run_folder(run)), own)
    assert opened.run is not None
    table: CaptionTable = opened.run.source().table(split or held_out(opened.run))
    data = Path(opened.run.provenance.data)
    if (data / "demo.json").is_file():
        return opened, demo_subject(opened.run.folder, data, table)
    return opened, sample_subject(opened.run, table)
