"""Evaluate, search and classify with a run, or with a CLIP of the hub in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from captune.bank import CaptionBank
from captune.config import DEFAULT_CONFIG
from captune.console import say
from captune.data.pixels import UnreadableImageError
from captune.data.table import CaptionTable
from captune.data.tabular import TableOptions
from captune.errors import CaptuneError
from captune.evaluation.embeddings import ImageEmbeddings
from captune.evaluation.intervals import METRICS, QueryHits, paired_bootstrap
from captune.evaluation.plausible import GroundTruth, plausible_matches, split_of_truth
from captune.evaluation.protocols import COCO_5K, FULL, Protocol, find_protocol
from captune.evaluation.retrieval import Hit, evaluate_retrieval, search_images
from captune.evaluation.zeroshot import TEMPLATES, Prediction, classify
from captune.files import write_json
from captune.models import weights_digest
from captune.processes import processes
from captune.ranks import Ranks
from captune.training.checkpoints import BEST
from captune.training.run import SELECTED, TRAINED
from captune.workflow.embed import embed, embed_captions
from captune.workflow.hubness import Querybank, correct_hubness
from captune.workflow.opening import Opened, OwnTowers, open_model, open_table


class Measured(NamedTuple):
    """A metrics object, and what it was computed from."""

    metrics: dict[str, Any]
    embeddings: ImageEmbeddings
    hits: QueryHits
    ranks: Ranks


def measure(opened: Opened, table: CaptionTable, protocol: Protocol = FULL) -> Measured:
    """The metrics object of a model on a table, with what the reader must know about it.

    Raises:
        CaptuneError: the protocol is not defined for the table.
    """
    config = opened.run.config if opened.run else DEFAULT_CONFIG
    embeddings = embed(opened, table)
    if embeddings.unreadable and table.split.startswith("karpathy-"):
        raise CaptuneError(
            f"{table.split} is scored whole or not at all, and {embeddings.unreadable} of its "
            "images cannot be read: fetch them again"
        )
    bank = CaptionBank.build(table.texts(), opened.model.text_encoder, precision=config.precision)
    found = evaluate_retrieval(opened.model, table, embeddings, bank, protocol)
    metrics = {**found.metrics, **said_of_model(opened, table)}
    return Measured(metrics, embeddings, found.hits, found.ranks)


def said_of_model(opened: Opened, table: CaptionTable) -> dict[str, Any]:
    """What every result says of its model: name, fingerprints, and the images of ``table`` that it
    has met before, with ``notes`` on them."""
    overlap = opened.run.overlap(table) if opened.run else {TRAINED: 0, SELECTED: 0}
    chosen = "blend's alpha" if opened.run and opened.run.is_blend else "best epoch"
    return {
        "model": opened.name,
        "fingerprints": {
            "model": weights_digest(opened.model),
            "text": opened.model.text_fingerprint,
        },
        "images_seen_in_training": overlap[TRAINED],
        "images_seen_in_selection": overlap[SELECTED],
        "notes": [*_stream_notes(opened), *overlap_notes(overlap, chosen)],
    }


def _stream_notes(opened: Opened) -> list[str]:
    stream = opened.run.provenance.stream if opened.run else None
    if not stream:
        return []
    return [
        f"trained on {stream['images']:,} images of {stream['pattern']}, which are not remembered "
        "one by one: whether these are among them is not known"
    ]


def overlap_notes(overlap: dict[str, int], chosen: str = "best epoch") -> list[str]:
    """Plain words on images that the run has met before; empty where there are none.

    ``chosen``: what was selected on some of them.
    """
    notes = []
    if overlap[TRAINED]:
        notes.append(
            f"{overlap[TRAINED]:,} of these images were trained on: this is no held-out result"
        )
    if overlap[SELECTED]:
        notes.append(
            f"the {chosen} was chosen on {overlap[SELECTED]:,} of these images: slightly "
            "optimistic, report a test split"
        )
    return notes


def evaluate(
    name: str,
    *,
    data: str | None = None,
    split: str | None = None,
    options: TableOptions | None = None,
    own: OwnTowers | None = None,
    hubness: bool = False,
    protocol: str = FULL.name,
    against: str | None = None,
    truth: GroundTruth | None = None,
) -> dict[str, Any]:
    """Measure a run (or zero-shot CLIP); a run keeps the object as ``metrics{suffix}.json``, which
    is its best model's: that of another checkpoint is only returned.

    With ``hubness`` it also holds ``hubness_corrected``: see
    :func:`captune.workflow.hubness.correct_hubness`. With ``against``, another run or CLIP, it
    holds what :func:`compare_with` says. With ``truth`` it holds ``plausible``: see
    :func:`captune.evaluation.plausible.plausible_matches`. Where no split is named, it is the one
    that the protocol or the ground truth is defined on. Several processes share the photos and
    captions that are embedded and the ranks that are counted, and all return the result.

    Raises:
        CaptuneError: also where hubness is to be corrected without training captions, and where
            the protocol or the ground truth is not defined for the split.
    """
    chosen = find_protocol(protocol)
    split = split or chosen.split or None
    if truth is not None:
        split = split_of_truth(split, chosen)
    if hubness and chosen not in (FULL, COCO_5K):
        raise CaptuneError(
            f"--hubness corrects the whole split, which is protocol {FULL.name}: leave out "
            f"--protocol {chosen.name}, or --hubness"
        )
    here = processes()
    opened = here.main_first(lambda: open_model(name, own))
    other = here.main_first(lambda: open_model(against, own)) if against else None
    table = open_table(opened, data, split, options or TableOptions())
    here.check_same(f"{table.digest} {weights_digest(opened.model)}", "data or model")
    if truth is not None:
        truth.check(table.image_ids, table.caption_ids)  # before a long embedding
    queries = Querybank.of(opened, table) if hubness else None
    measured = measure(opened, table, chosen)
    result, embeddings = measured.metrics, measured.embeddings
    for note in result["notes"]:
        say(f"note: {note}")
    if other is not None:
        result["against"] = compare_with(measured, measure(other, table, chosen))
        for note in result["against"]["notes"]:
            say(f"note on {other.name}: {note}")
    if queries is not None:
        result["hubness_corrected"] = correct_hubness(opened, table, embeddings, queries)
    if truth is not None:
        captions, _ = table.captions_among(embeddings.rows)
        result["plausible"] = plausible_matches(
            embeddings.vectors,
            embed_captions(opened, table, captions),
            table.image_ids[embeddings.rows],
            table.caption_ids[captions],
            truth,
        )
    if opened.run is not None and opened.checkpoint == BEST and here.main:
        write_json(opened.run.output("metrics", ".json"), result)
    return result


def compare_with(ours: Measured, theirs: Measured) -> dict[str, Any]:
    """The difference of two models on the same images, ours less theirs, tested in pairs.

    Returns:
        The other's ``model``, ``fingerprints``, recalls, ``rsum`` and ``notes``; ``difference``:
        for each recall and rsum ``{value, low, high}``, 95 %, bootstrapped over images that both
        sides draw together.
    """
    kept = ("model", "fingerprints", "image_to_text", "text_to_image", "rsum", "notes")
    return {
        **{key: theirs.metrics[key] for key in kept},
        "difference": difference_of(ours.hits, theirs.hits),
    }


def difference_of(ours: QueryHits, theirs: QueryHits) -> dict[str, Any]:
    """Each recall and rsum of ours less theirs, ``{value, low, high}``, in the metrics' shape."""
    found = paired_bootstrap([ours], [theirs])
    difference: dict[str, Any] = {}
    for (direction, key), interval in zip(METRICS, found[:-1], strict=True):
        difference.setdefault(direction, {})[key] = interval.to_dict()
    return {**difference, "rsum": found[-1].to_dict()}


def search(
    name: str,
    query: str,
    *,
    k: int = 5,
    data: str | None = None,
    split: str | None = None,
    options: TableOptions | None = None,
    own: OwnTowers | None = None,
) -> list[Hit]:
    """The ``k`` images that best answer ``query``."""
    opened = open_model(name, own)
    table = open_table(opened, data, split, options or TableOptions())
    embeddings = embed(opened, table)
    return search_images(opened.model, table, embeddings, [query], k=k)[0]


def classify_files(
    name: str,
    images: Sequence[str],
    labels: Sequence[str],
    *,
    templates: Sequence[str] = TEMPLATES,
    own: OwnTowers | None = None,
) -> list[Prediction]:
    """Zero-shot labels of image files.

    Raises:
        CaptuneError: a file that is no readable image, or fewer than two labels.
    """
    model = open_model(name, own).model
    try:
        return classify(model, list(images), list(labels), templates=templates)
    except UnreadableImageError as error:
        raise CaptuneError(f"cannot read the image {error}") from None
