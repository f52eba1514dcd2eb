"""Evaluate, search and classify with a run, or with a CLIP of the hub in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captune.bank import CaptionBank
from captune.config import DEFAULT_CONFIG, Config
from captune.console import say
from captune.data.pixels import UnreadableImageError
from captune.data.sources import Source, open_source
from captune.data.table import CaptionTable
from captune.data.tabular import TableOptions
from captune.device import best_device
from captune.encoders.hub import is_factory, read_checkpoint_config
from captune.encoders.image import load_image_encoder
from captune.encoders.text import load_text_encoder
from captune.errors import CaptuneError
from captune.evaluation.embeddings import ImageEmbeddings, embed_images
from captune.evaluation.hubness import hubness_corrected
from captune.evaluation.intervals import METRICS, QueryHits, paired_bootstrap
from captune.evaluation.plausible import GroundTruth, plausible_matches, split_of_truth
from captune.evaluation.protocols import COCO_5K, FULL, Protocol, find_protocol
from captune.evaluation.retrieval import Hit, caption_embeddings, evaluate_retrieval, search_images
from captune.evaluation.zeroshot import TEMPLATES, Prediction, classify
from captune.files import write_json
from captune.models import CLIPModel, weights_digest
from captune.training.run import SELECTED, TRAINED, Run

# Of more training captions than this, as many at even distances: hubs show in far fewer, and the
# querybank of all of COCO would not fit small machines.
MAX_QUERIES = 50_000


@dataclass(frozen=True)
class OwnTowers:
    """Factories, named by the user, of the towers that a run's files cannot rebuild."""

    image_encoder: str = ""
    text_encoder: str = ""

    @classmethod
    def of(cls, config: Config) -> OwnTowers:
        """The factories in a config that the user has just given (never one read from a run)."""
        named = (config.image_encoder, config.text_encoder)
        return cls(*(name if is_factory(name) else "" for name in named))


@dataclass(frozen=True)
class Opened:
    """A model ready to use, and the run it is from (none for zero-shot CLIP)."""

    model: CLIPModel
    run: Run | None
    name: str

    @property
    def cache(self) -> Path | None:
        """Where its image embeddings are kept."""
        return self.run.folder / "embeddings" if self.run else None


def open_model(name: str, own: OwnTowers | None = None) -> Opened:
    """A run folder, or a CLIP checkpoint (folder or hub name) as it is.

    Raises:
        CaptuneError: it is neither, or cannot be loaded.
    """
    own = own or OwnTowers()
    folder = Path(name).expanduser()
    device = best_device()
    if (folder / "data.json").is_file():
        run = Run.open(folder)
        image = load_image_encoder(own.image_encoder) if own.image_encoder else None
        text = load_text_encoder(own.text_encoder) if own.text_encoder else None
        model = run.load_model(image_encoder=image, text_encoder=text)
        return Opened(model.to(device), run, str(folder))
    if folder.is_dir() and "model_type" not in read_checkpoint_config(folder):
        raise CaptuneError(f"{folder} is neither a run of `captune train` nor a CLIP checkpoint")
    if not folder.is_dir() and (folder.exists() or name.count("/") != 1 or name[0] in "./~"):
        raise CaptuneError(f"no run at {name}: give a folder that `captune train` made")
    return Opened(CLIPModel.zero_shot(name).to(device), None, name)


def open_table(
    opened: Opened, data: str | None, split: str | None, options: TableOptions
) -> CaptionTable:
    """The table that a command works on: named, or the run's validation split.

    Raises:
        CaptuneError: nothing is named and no run says where its data lies.
    """
    if data is not None:
        source: Source = open_source(data, options)
        return source.table(split or source.evaluation_split)
    if opened.run is None:
        raise CaptuneError(f"{opened.name} is no run: name the data to evaluate on")
    return opened.run.source().table(split or opened.run.provenance.val_split)


def embed(opened: Opened, table: CaptionTable) -> ImageEmbeddings:
    """The table's images, embedded in the precision that the run was validated in."""
    config = opened.run.config if opened.run else DEFAULT_CONFIG
    return embed_images(
        opened.model,
        table,
        cache=opened.cache,
        precision=config.precision,
        num_workers=config.num_workers,
    )


class Measured(NamedTuple):
    """A metrics object, and what it was computed from."""

    metrics: dict[str, Any]
    embeddings: ImageEmbeddings
    hits: QueryHits


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
    result, hits = evaluate_retrieval(opened.model, table, embeddings, bank, protocol)
    overlap = opened.run.overlap(table) if opened.run else {TRAINED: 0, SELECTED: 0}
    told = {
        **result,
        "model": opened.name,
        "fingerprints": {
            "model": weights_digest(opened.model),
            "text": opened.model.text_fingerprint,
        },
        "images_seen_in_training": overlap[TRAINED],
        "images_seen_in_selection": overlap[SELECTED],
        "notes": overlap_notes(overlap),
    }
    return Measured(told, embeddings, hits)


def overlap_notes(overlap: dict[str, int]) -> list[str]:
    """Plain words on images that the run has met before; empty where there are none."""
    notes = []
    if overlap[TRAINED]:
        notes.append(
            f"{overlap[TRAINED]:,} of these images were trained on: this is no held-out result"
        )
    if overlap[SELECTED]:
        notes.append(
            f"the best epoch was chosen on {overlap[SELECTED]:,} of these images: slightly "
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
    """Measure a run (or zero-shot CLIP); a run keeps the object as ``metrics{suffix}.json``.

    With ``hubness`` it also holds ``hubness_corrected``: see :func:`correct_hubness`. With
    ``against``, another run or CLIP, it holds what :func:`compare_with` says. With ``truth`` it
    holds ``plausible``: see :func:`captune.evaluation.plausible.plausible_matches`. Where no split
    is named, it is the one that the protocol or the ground truth is defined on.

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
    opened = open_model(name, own)
    other = open_model(against, own) if against else None
    table = open_table(opened, data, split, options or TableOptions())
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
            _caption_embeddings(opened, table, captions),
            table.image_ids[embeddings.rows],
            table.caption_ids[captions],
            truth,
        )
    if opened.run is not None:
        write_json(opened.run.output("metrics", ".json"), result)
    return result


def compare_with(ours: Measured, theirs: Measured) -> dict[str, Any]:
    """The difference of two models on the same images, ours less theirs, tested in pairs.

    Returns:
        The other's ``model``, ``fingerprints``, recalls, ``rsum`` and ``notes``; ``difference``:
        for each recall and rsum ``{value, low, high}``, 95 %, bootstrapped over images that both
        sides draw together.
    """
    found = paired_bootstrap([ours.hits], [theirs.hits])
    difference: dict[str, Any] = {}
    for (direction, key), interval in zip(METRICS, found[:-1], strict=True):
        difference.setdefault(direction, {})[key] = interval.to_dict()
    kept = ("model", "fingerprints", "image_to_text", "text_to_image", "rsum", "notes")
    return {
        **{key: theirs.metrics[key] for key in kept},
        "difference": {**difference, "rsum": found[-1].to_dict()},
    }


@dataclass(frozen=True)
class Querybank:
    """Training captions to find hubs with: ``rows`` of ``table``; ``left_out`` were evaluated."""

    table: CaptionTable
    rows: npt.NDArray[np.int64]
    left_out: int

    @classmethod
    def of(cls, opened: Opened, evaluated: CaptionTable) -> Querybank:
        """The captions that a run was trained on, but for those of images in ``evaluated``.

        Raises:
            CaptuneError: no run, or no caption remains.
        """
        if opened.run is None:
            raise CaptuneError(
                f"--hubness corrects with the captions that a run was trained on, and "
                f"{opened.name} is no run"
            )
        if not opened.run.provenance.data:
            raise CaptuneError(
                f"--hubness needs the training captions, and {opened.name} does not say where its "
                "data lies"
            )
        train = opened.run.source().table(opened.run.provenance.train_split)
        taken = set(evaluated.file_keys())
        apart = [row for row, key in enumerate(train.file_keys()) if key not in taken]
        rows, _ = train.captions_among(apart)
        left_out = train.captions.num_rows - len(rows)
        if not len(rows):
            raise CaptuneError(
                f"--hubness needs training captions of other images than the evaluated ones, and "
                f"all images of {train.describe()} are evaluated: name another split"
            )
        if left_out:
            say(f"hubness: {left_out:,} training captions left out, their images are evaluated")
        if len(rows) > MAX_QUERIES:
            rows = rows[np.linspace(0, len(rows) - 1, MAX_QUERIES).astype(np.int64)]
        return cls(train, rows, left_out)


def correct_hubness(
    opened: Opened, table: CaptionTable, embeddings: ImageEmbeddings, queries: Querybank
) -> dict[str, Any]:
    """What :func:`captune.evaluation.hubness.hubness_corrected` says, and ``queries_left_out``."""
    captions, owner = table.captions_among(embeddings.rows)
    corrected = hubness_corrected(
        embeddings.vectors,
        _caption_embeddings(opened, table, captions),
        torch.from_numpy(owner),
        _caption_embeddings(opened, queries.table, queries.rows),
    )
    return {**corrected, "queries_left_out": queries.left_out}


def _caption_embeddings(
    opened: Opened, table: CaptionTable, captions: npt.NDArray[np.int64]
) -> Tensor:
    """``(m, D)`` of some caption rows; the bank of all is on disk from training and measuring."""
    config = opened.run.config if opened.run else DEFAULT_CONFIG
    bank = CaptionBank.build(table.texts(), opened.model.text_encoder, precision=config.precision)
    return caption_embeddings(opened.model, bank, captions)


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
