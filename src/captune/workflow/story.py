"""The pictures and the page of a run: the same queries before and after, results, failures."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from captune import __version__
from captune.bank import CaptionBank
from captune.config import Config
from captune.console import say
from captune.data.table import CaptionTable
from captune.device import best_device
from captune.evaluation.embeddings import ImageEmbeddings, embed_images
from captune.evaluation.retrieval import Hit, evaluate_retrieval, search_images
from captune.evaluation.zeroshot import classify
from captune.features import FeatureStore
from captune.metrics import RECALL_AT
from captune.models import CLIPModel
from captune.report.html import Report, ResultRow, write_report
from captune.report.plots import (
    QueryAnswer,
    before_and_after,
    retrieval_sheet,
    save_figure,
    training_curves,
    zero_shot_bars,
)
from captune.training.checkpoints import STAGE_ONE, checkpoints
from captune.training.run import Run
from captune.workflow.analysis import Retrieval, analyse
from captune.workflow.evaluate import measure
from captune.workflow.opening import OwnTowers, open_model

SAMPLE_QUERIES = 6
LABELS = ("a person", "an animal", "food", "a vehicle", "a building", "a landscape", "an object")

Judge = Callable[[str, Hit], bool | None]
"""Whether a picture truly answers a query; None where nobody knows."""


@dataclass(frozen=True)
class Subject:
    """What a page is about, beside the run: the table it reports and what is asked of it.

    ``queries`` with ``judge`` (which pictures truly match); ``labels``, to tell apart on
    ``pictures``: image rows with their true labels, where known; ``commands`` to type next.
    """

    table: CaptionTable
    title: str
    queries: Sequence[str]
    queries_note: str
    judge: Judge | None
    query_notes: Sequence[str]
    labels: Sequence[str]
    pictures: Sequence[tuple[int, str | None]]
    commands: Sequence[tuple[str, str]]
    attribution: str = ""


@dataclass(frozen=True)
class Before:
    """The same measurements by the towers as they were before training."""

    metrics: dict[str, Any]
    hits: list[list[Hit]]


def sample_subject(run: Run, table: CaptionTable) -> Subject:
    """A page for any data: some of its own captions as queries, each with the picture it is of."""
    step = max(1, len(table) // SAMPLE_QUERIES)
    rows = list(range(0, len(table), step))[:SAMPLE_QUERIES]
    captions = [table.caption(int(table.captions_of(row)[0])) for row in rows]
    own = {caption: str(table.path(row)) for caption, row in zip(captions, rows, strict=True)}
    return Subject(
        table=table,
        title=f"captune: {table.name}",
        queries=captions,
        queries_note=(
            f"Captions of {table.split} pictures as queries; ✓ marks the picture that the caption "
            "was written for. Others may fit as well. The number is the cosine similarity."
        ),
        judge=lambda query, hit: True if own[query] == hit.image else None,
        query_notes=[""] * len(captions),
        labels=LABELS,
        pictures=[(row, None) for row in rows[:4]],
        commands=[
            (
                "Search these pictures:",
                f'captune search {shlex.quote(str(run.folder))} "a dog on a beach"',
            )
        ],
    )


def measure_before(run: Run, subject: Subject) -> Before:
    """What the same towers answer before they are trained: the head is still random (seeded)."""
    model = CLIPModel.from_config(run.config, device=best_device(run.config.device)).eval()
    embeddings = _embed_before(run.config, model, subject.table)
    texts = subject.table.texts()
    bank = CaptionBank.build(texts, model.text_encoder, precision=run.config.precision)
    metrics = evaluate_retrieval(model, subject.table, embeddings, bank).metrics
    hits = search_images(model, subject.table, embeddings, subject.queries)
    return Before(metrics, hits)


@torch.no_grad()
def _embed_before(config: Config, model: CLIPModel, table: CaptionTable) -> ImageEmbeddings:
    """By the head of an untrained ``model``, from the features that stage 1 was given where there
    was one: of the split that it validated on they are on disk."""
    kept: dict[str, Any] = {"precision": config.precision, "num_workers": config.num_workers}
    if not config.head_epochs:
        return embed_images(model, table, **kept)
    store = FeatureStore.build(table, model, **kept)
    rows = np.flatnonzero(store.readable).astype(np.int64)
    vectors = model.project_image(store.lookup(rows).to(model.device)).cpu()
    return ImageEmbeddings(rows, vectors, len(table) - len(rows))


def tell(run: Run, subject: Subject) -> tuple[dict[str, Any], Path]:
    """Measure the run on the subject's table and write its pictures and page.

    Args:
        run: one whose config the user has just given: factories that it names are called.
        subject: what the page is about.

    Returns:
        The metrics object and the path of the page.
    """
    say(f"measuring on {subject.table.describe()}, before training and after")
    before = measure_before(run, subject)
    opened = open_model(str(run.folder), OwnTowers.of(run.config))
    model = opened.model
    metrics, embeddings, _, ranks = measure(opened, subject.table)
    hits = search_images(model, subject.table, embeddings, subject.queries)
    answers = _answers(subject, hits)
    first = _answers(subject, before.hits)
    save_figure(before_and_after(first[0], answers[0]), run.output("before_after", ".png"))
    figures = _draw(run, subject, model, answers, set(embeddings.rows.tolist()))
    page = run.output("report", ".html")
    results_note = (
        f"{subject.table.describe()}. Recall in percent, below it its 95 % interval, bootstrapped "
        "over images; ties count against the query. The best epoch was chosen on "
        f"{run.provenance.val_split}."
    )
    write_report(
        page,
        Report(
            title=subject.title,
            summary=run.config.describe(),
            before=first,
            after=answers,
            queries_note=subject.queries_note,
            results=_results(metrics, before, _after_stage_one(run, subject.table)),
            results_note=results_note,
            notes=metrics["notes"],
            analysis=analyse(Retrieval.of(opened, subject.table, embeddings, ranks)),
            figures=figures,
            commands=subject.commands,
            facts=_facts(run, metrics),
            attribution=subject.attribution,
        ),
    )
    return metrics, page


def chance_metrics(images: int, captions: int) -> dict[str, Any]:
    """What random ranking gives: K in N for a caption; for an image, any of its share of M."""
    per_image = captions / images

    def image_to_text(k: int) -> float:
        miss = 1.0
        for place in range(min(k, captions)):
            miss *= max(0.0, 1 - per_image / (captions - place))
        return 100 * (1 - miss)

    both = {
        "image_to_text": {f"R@{k}": image_to_text(k) for k in RECALL_AT},
        "text_to_image": {f"R@{k}": 100 * min(1.0, k / images) for k in RECALL_AT},
    }
    rsum = sum(sum(direction.values()) for direction in both.values())
    middle = round(captions * (1 - 0.5 ** (1 / per_image)))
    both["image_to_text"]["median_rank"] = max(1, middle)
    both["text_to_image"]["median_rank"] = (images + 1) / 2
    return {**both, "rsum": rsum}


def _answers(subject: Subject, hits: Sequence[Sequence[Hit]]) -> list[QueryAnswer]:
    judge = subject.judge
    return [
        QueryAnswer(q, found, [judge(q, hit) for hit in found] if judge else None, note)
        for q, found, note in zip(subject.queries, hits, subject.query_notes, strict=True)
    ]


def _after_stage_one(run: Run, table: CaptionTable) -> list[ResultRow]:
    """The model that stage 2 started from, where the run has both stages."""
    if STAGE_ONE not in checkpoints(run):
        return []
    opened = open_model(f"{run.folder}@{STAGE_ONE}", OwnTowers.of(run.config))
    return [ResultRow("after stage 1 (backbone frozen)", measure(opened, table).metrics)]


def _results(
    metrics: dict[str, Any], before: Before, stage_one: Sequence[ResultRow]
) -> list[ResultRow]:
    chance = chance_metrics(metrics["images"], metrics["captions"])
    return [
        ResultRow("this run", metrics),
        *stage_one,
        ResultRow("before training (ImageNet backbone, random head)", before.metrics),
        ResultRow("chance", chance),
        ResultRow(
            "zero-shot CLIP ViT-B/32",
            None,
            "not measured here: captune evaluate openai/clip-vit-base-patch32 DATA",
        ),
    ]


def _draw(
    run: Run,
    subject: Subject,
    model: CLIPModel,
    answers: Sequence[QueryAnswer],
    readable: set[int],
) -> list[tuple[str, Path]]:
    """The three pictures of a run; those that the page does not show in another form."""
    curves = run.output("training_curves", ".png")
    sheet = run.output("retrieval", ".png")
    bars = run.output("zero_shot", ".png")
    save_figure(training_curves(run.history(), run.config.describe()), curves)
    save_figure(retrieval_sheet(answers, f"{subject.table.describe()}: top pictures"), sheet)
    shown = [(row, truth) for row, truth in subject.pictures if row in readable]
    predictions = classify(model, [subject.table.path(row) for row, _ in shown], subject.labels)
    truths = [truth for _, truth in shown]
    save_figure(zero_shot_bars(predictions, truths, "zero-shot labels"), bars)
    return [("Training", curves), ("Zero-shot classification", bars)]


def _best(history: list[dict[str, Any]]) -> str:
    """The epoch whose weights were kept, or those of which they are the mean."""
    soup = history[-1].get("soup", {"kept": False})
    if soup["kept"]:
        return f"the mean of {', '.join(map(str, soup['epochs']))}"
    return str(max(history, key=lambda row: float(row["rsum"]))["epoch"])


def _facts(run: Run, metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """What somebody needs to repeat it."""
    config = run.config
    history = run.history()
    return [
        ("recipe and towers", config.describe()),
        ("image tower", config.image_encoder_name),
        ("text tower (frozen)", config.text_encoder_name),
        ("epochs", f"{len(history)}, best by rsum on {run.provenance.val_split}: {_best(history)}"),
        ("training time", f"{sum(row['seconds'] for row in history) / 60:.1f} minutes"),
        ("seed", str(config.seed)),
        ("reported on", f"{metrics['data']} {metrics['split']} ({metrics['split_digest'][:8]})"),
        (
            "versions",
            f"captune {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        ),
        ("machine", f"{platform.machine()}, {'CUDA' if torch.cuda.is_available() else 'CPU'}"),
    ]
