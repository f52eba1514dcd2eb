"""Zero-shot classification of a labelled set: how often the nearest label is the right one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captune.console import say
from captune.data.labelled import LabelledImages, open_labelled, training_part
from captune.data.table import Rows
from captune.data.tabular import TableOptions
from captune.encoders.hub import is_factory
from captune.encoders.image import load_image_encoder
from captune.errors import CaptuneError
from captune.evaluation.baselines import chance, linear_probe, majority
from captune.evaluation.classification import (
    accuracy,
    calibration,
    class_ranks,
    confusion_counts,
    mean_average_precision,
    per_class,
    worst_confusions,
)
from captune.evaluation.embeddings import ImageEmbeddings
from captune.evaluation.retrieval import Hit
from captune.evaluation.zeroshot import TEMPLATES, label_embeddings
from captune.features import FeatureStore
from captune.files import write_json
from captune.models import CLIPModel
from captune.preprocess import Preprocess
from captune.report.classes import ClassPage, Confusion, write_class_page
from captune.training.checkpoints import BEST
from captune.workflow.embed import embed
from captune.workflow.evaluate import said_of_model
from captune.workflow.opening import Opened, OwnTowers, open_model

VERSION = 1
CONFUSIONS = 8  # the commonest ones, that are told
PICTURES = 5  # of each of them


@dataclass(frozen=True)
class ZeroShotOutcome:
    """The metrics object, and the page where one was written."""

    metrics: dict[str, Any]
    page: Path | None


def zero_shot(
    name: str,
    data: str,
    *,
    split: str | None = None,
    options: TableOptions | None = None,
    own: OwnTowers | None = None,
    templates: Sequence[str] = TEMPLATES,
    names: Mapping[str, str] | None = None,
    probe: bool = True,
    out: str | None = None,
) -> ZeroShotOutcome:
    """Classify labelled pictures by their classes' names alone, beside baselines.

    Args:
        name: a run, or a CLIP.
        data, split, options: see :func:`captune.data.labelled.open_labelled`.
        own: towers that a run's files cannot rebuild.
        templates: prompts with ``{}``; a class is the mean over them.
        names: other words for some classes.
        probe: also train a linear probe on the frozen backbone's features.
        out: folder for ``classification{suffix}.json``, ``.html`` and ``confusion{suffix}.png``;
            default: the run, for its best model.

    Raises:
        CaptuneError: no such model, or no labelled pictures there.
    """
    opened = open_model(name, own)
    labelled = open_labelled(data, split, options).named(names or {})
    embeddings = embed(opened, labelled.table)
    text = label_embeddings(opened.model, labelled.names, templates).cpu()
    cosines = embeddings.vectors @ text.T  # (n, C)
    metrics = {
        **_told(opened, labelled, embeddings, templates),
        **_measure(opened, labelled, embeddings.rows, cosines),
    }
    metrics["baselines"] = _baselines(
        opened, own or OwnTowers(), data, options, labelled, embeddings.rows, probe
    )
    for note in metrics["notes"]:
        say(f"note: {note}")
    # What lies in a run is of its best model.
    own_folder = opened.run.folder if opened.run and opened.checkpoint == BEST else None
    folder = Path(out) if out else own_folder
    return ZeroShotOutcome(
        metrics, _write(folder, opened, labelled, embeddings.rows, cosines, metrics)
    )


def _told(
    opened: Opened,
    labelled: LabelledImages,
    embeddings: ImageEmbeddings,
    templates: Sequence[str],
) -> dict[str, Any]:
    """What a reader must know: data, classes, prompts, model."""
    table = labelled.table
    return {
        "format_version": VERSION,
        "data": table.name,
        "split": table.split,
        "split_digest": table.digest,
        "unreadable_images": embeddings.unreadable,
        "classes": len(labelled.keys),
        "class_rule": labelled.rule,
        "ties": "ties count against the true class",
        "templates": list(templates),
        **said_of_model(opened, table),
    }


def _measure(
    opened: Opened, labelled: LabelledImages, rows: Rows, cosines: Tensor
) -> dict[str, Any]:
    """Single-label figures of the images that are of one class, multi-label ones of all."""
    single = np.flatnonzero(labelled.target[rows] >= 0)
    if not len(single):
        raise CaptuneError(f"no picture of one class in {labelled.table.describe()} could be read")
    target = torch.from_numpy(labelled.target[rows][single])
    scores = cosines[torch.from_numpy(single)]
    confusion = confusion_counts(scores.argmax(dim=1), target, len(labelled.keys))
    classes = [
        {"class": name, **row}
        for name, row in zip(labelled.keys, per_class(confusion), strict=True)
    ]
    for row in classes:
        other = row["confused_with"]
        row["confused_with"] = None if other is None else labelled.keys[other]
    recalls = [row["recall"] for row in classes if row["recall"] is not None]
    found: dict[str, Any] = {
        "images": len(single),
        "zero_shot": {
            **accuracy(class_ranks(scores, target)),
            "mean_class_recall": sum(recalls) / len(recalls),
        },
        "calibration": calibration(scores, target, 1 / float(opened.model.logit_scale)),
        "per_class": classes,
        "worst_confusions": [
            {"class": labelled.keys[true], "called": labelled.keys[called], "images": count}
            for true, called, count in worst_confusions(confusion, CONFUSIONS)
        ],
        # Of many classes nearly all pairs are empty: (true, called, images), places in per_class.
        "confusion": [
            [int(true), int(called), int(confusion[true, called])]
            for true, called in np.argwhere(confusion)
        ],
    }
    if labelled.present is not None:
        found["multi_label"] = mean_average_precision(cosines, labelled.present[rows])
    return found


def _baselines(
    opened: Opened,
    own: OwnTowers,
    data: str,
    options: TableOptions | None,
    labelled: LabelledImages,
    rows: Rows,
    probe: bool,
) -> dict[str, Any]:
    """Chance, the commonest class, and the linear probe where it is wanted and can be had."""
    kept = rows[labelled.target[rows] >= 0]
    target = labelled.target[kept]
    train = training_part(data, labelled, options)
    learnt = train.target[train.target >= 0] if train else target
    found = {
        "chance": chance(len(labelled.keys)),
        "majority": {
            **majority(target, learnt, len(labelled.keys)),
            "learnt_from": "the training split" if train else "these images",
        },
    }
    found["majority"]["class"] = labelled.keys[found["majority"]["class"]]
    if not probe:
        return found
    try:
        found["linear_probe"] = _probe(_frozen_backbone(opened, own), labelled, kept, train)
    except CaptuneError as error:  # no network, say: the figures above stand without it
        say(f"no linear probe: {error}")
        found["linear_probe"] = {"left_out": str(error)}
    return found


def _probe(
    backbone: CLIPModel, labelled: LabelledImages, kept: Rows, train: LabelledImages | None
) -> dict[str, Any]:
    """A linear probe's figures on the image rows ``kept``."""
    store = FeatureStore.build(labelled.table, backbone)
    train_features = train_target = None
    if train is not None:
        train_store = FeatureStore.build(train.table, backbone)
        rows = np.flatnonzero((train.target >= 0) & train_store.readable)
        if not len(rows):
            raise CaptuneError(f"no labelled picture of {train.table.describe()} can be read")
        train_features, train_target = train_store.all()[rows].numpy(), train.target[rows]
    found = linear_probe(
        store.all()[kept].numpy(),
        labelled.target[kept],
        train_features,
        train_target,
        classes=len(labelled.keys),
    )
    return {**found, "backbone": backbone.backbone_name}


def _frozen_backbone(opened: Opened, own: OwnTowers) -> CLIPModel:
    """The run's image tower as it was before training; CLIP's own as it is.

    Raises:
        CaptuneError: it cannot be loaded.
    """
    if opened.run is None:
        return opened.model
    config = opened.run.config
    name = own.image_encoder or config.image_encoder_name
    if is_factory(name) and not own.image_encoder:
        raise CaptuneError("the image tower is its author's own: name it with --image-encoder")
    encoder = load_image_encoder(
        name,
        preprocess=Preprocess() if config.clip_normalisation else None,
        image_size=config.image_size,
    )
    model = CLIPModel(opened.model.text_encoder, image_encoder=encoder)
    return model.to(opened.model.device).eval()


def _write(
    folder: Path | None,
    opened: Opened,
    labelled: LabelledImages,
    rows: Rows,
    cosines: Tensor,
    metrics: dict[str, Any],
) -> Path | None:
    """The object, the picture and the page, where there is a place for them."""
    if folder is None:
        return None
    suffix = opened.model.suffix
    write_json(folder / f"classification{suffix}.json", metrics)
    page = folder / f"classification{suffix}.html"
    write_class_page(
        ClassPage(
            path=page,
            picture=folder / f"confusion{suffix}.png",
            subject=f"{labelled.table.name} {labelled.table.split}",
            metrics=metrics,
            confusions=_pictured(labelled, rows, cosines, metrics["worst_confusions"]),
        )
    )
    return page


def _pictured(
    labelled: LabelledImages,
    rows: Rows,
    cosines: Tensor,
    worst: Sequence[Mapping[str, Any]],
) -> list[Confusion]:
    """The commonest confusions with the pictures that lean furthest to the wrong class."""
    target = labelled.target[rows]
    called = cosines.argmax(dim=1).numpy()
    found = []
    for row in worst:
        true, other = labelled.keys.index(row["class"]), labelled.keys.index(row["called"])
        places = torch.from_numpy(np.flatnonzero((target == true) & (called == other)))
        lean = cosines[places, other] - cosines[places, true]
        order = lean.argsort(descending=True, stable=True)[:PICTURES]
        hits = [
            Hit(str(labelled.table.path(int(rows[place]))), float(cosines[place, other]), true_name)
            for place in places[order].tolist()
            for true_name in [labelled.keys[true]]
        ]
        found.append(Confusion(row["class"], row["called"], row["images"], hits))
    return found
