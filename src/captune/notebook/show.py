"""What there is, shown: samples of the data, the parts of a model, the files of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from captune.config import Config
from captune.data.sources import open_source
from captune.encoders.head import AttentionPooling
from captune.encoders.layers import split_layers
from captune.errors import CaptuneError
from captune.models import CLIPModel
from captune.notebook.display import (
    plainly,
    show_figure,
    show_html,
    show_table,
)
from captune.report.comparison import Comparison
from captune.report.plots import sample_sheet
from captune.training.run import Run

KIB, MIB = 1024, 1024**2
CONTENTS = {
    "config.json": "the configuration",
    "data.json": "where the data lies",
    "best_model": "image tower, head and temperature of the best epoch",
    "image_encoder.json": "architecture of the image tower",
    "preprocess.json": "size and normalisation of its input",
    "text_encoder.json": "name and fingerprint of the frozen text tower",
    "history.jsonl": "a line for each epoch",
    "metrics": "the recalls of 7.1",
    "training_curves": "loss and recall over epochs",
    "retrieval": "answers to queries",
    "before_after": "the first query's pictures before training and after",
    "zero_shot": "zero-shot labels",
    "classification": "how often they are right, on labelled pictures: page and numbers",
    "confusion": "which classes are taken for which",
    "report": "the page with all of it: opens in any browser, offline",
    "checkpoints": "the weights that stage 2 started from, and of epochs where they are kept",
    "seen_images.parquet": "which images it was trained and chosen on",
    "embeddings": "image embeddings, a cache",
    "logs": "TensorBoard",
    "last": "the resume state of a run that is not complete",
    "comparison": "the comparison: page, picture and numbers",
    "blend": "two models blended: picture and numbers",
}


@plainly
def show_samples(data: str | Path, split: str = "", *, count: int = 8, seed: int = 0) -> list[str]:
    """Show random pictures of a split (default: the training one), each with one caption.

    Returns:
        The paths of the pictures.
    """
    source = open_source(data)
    table = source.table(split or source.train_split)
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(table), size=min(count, len(table)), replace=False)
    samples = [
        (str(table.path(row)), table.caption(int(rng.choice(table.captions_of(row)))))
        for row in rows
    ]
    show_figure(sample_sheet(samples, table.describe()))
    return [path for path, _ in samples]


@plainly
def describe_model(model: CLIPModel | Mapping[str, Any]) -> CLIPModel:
    """Show the parts of a model, or of the one that a config names: parameters, trained or not.

    What the config leaves as it is counts as not trained; of a model alone that is not known.
    """
    still: set[nn.Parameter] = set()
    if not isinstance(model, CLIPModel):
        config = Config.from_mapping(model)
        model = CLIPModel.from_config(config)
        still = _left_alone(model, config)
    side = model.preprocess.image_size
    image: Any = model.image_encoder
    parts: list[tuple[str, str, nn.Module]] = [
        ("image tower", f"{image.name}: {side}×{side} pixels to {image.feature_dim} values", image)
    ]
    if isinstance(model.pooling, AttentionPooling):
        parts.append(("attention pooling", f"{model.pooling.heads} heads", model.pooling))
    elif model.pooling is not None:
        parts.append(("generalised-mean pooling", "one exponent, learnt", model.pooling))
    parts += [
        (f"head, {name or 'projection'}", _form(part), part)
        for name, part in model.head.named_modules()
        if not list(part.children()) and _count(part)
    ]
    if model.text_adapter is not None:
        parts.append(("text adapter", _form(model.text_adapter), model.text_adapter))
    rows = [(name, what, f"{_count(part):,}", _trained(part, still)) for name, what, part in parts]
    text = model.text_encoder
    inner = getattr(text, "model", None)
    size = f"{_count(inner):,}" if isinstance(inner, nn.Module) else "its own"
    rows.append(("text tower", f"{text.name}: text to {text.dimension} values", size, "no, frozen"))
    total = f"{_count(model, but=still):,} trainable parameters"
    show_table("Model", ("part", "what", "parameters", "trained"), rows, total)
    return model


def _form(layer: nn.Module) -> str:
    """A layer in a few words: ``Linear, 1280 to 1024``."""
    kind = type(layer).__name__
    if isinstance(layer, nn.Linear):
        return f"{kind}, {layer.in_features} to {layer.out_features}"
    return f"{kind}, {layer.num_features}" if isinstance(layer, nn.BatchNorm1d) else kind


def _left_alone(model: CLIPModel, config: Config) -> set[nn.Parameter]:
    """What a training by ``config`` leaves as it is."""
    if config.freeze_backbone:  # and what pools comes before the features that stage 1 keeps
        pooling = model.pooling.parameters() if model.pooling is not None else ()
        return {*model.image_encoder.parameters(), *pooling}
    frozen, _ = split_layers(model.image_encoder, config.frozen_layers)
    return {parameter for layer in frozen for parameter in layer}


def _trained(part: nn.Module, still: set[nn.Parameter]) -> str:
    trained = _count(part, but=still)
    return "yes" if trained == _count(part) else f"{trained:,}" if trained else "–"


def _count(part: nn.Module, *, but: set[nn.Parameter] | None = None) -> int:
    """Of all parameters; with ``but`` of those that train, these left out."""
    parameters = part.parameters()
    if but is None:
        return sum(p.numel() for p in parameters)
    return sum(p.numel() for p in parameters if p.requires_grad and p not in but)


@plainly
def show_comparison(comparison: Comparison) -> Comparison:
    """Show the table and the figure of a comparison of flags."""
    show_html(comparison._repr_html_(), comparison.to_text())
    show_figure(comparison.figure())
    return comparison


@plainly
def summary(*runs: Run | str | Path) -> list[Path]:
    """What lies where: a table for each run, or for the folder of a comparison.

    Returns:
        The files and folders listed.
    """
    listed: list[Path] = []
    for run in runs:
        folder = run_folder(run)
        found = [path for path in sorted(folder.iterdir()) if _bytes(path)]
        rows = [(path.name, _what(path), _size(_bytes(path))) for path in found]
        total = f"{_size(sum(map(_bytes, found)))} in {folder.resolve()}"
        show_table(str(folder), ("file", "what", "size"), rows, total)
        listed += found
    return listed


def _what(path: Path) -> str:
    stem = path.name.removesuffix(path.suffix)
    for key, words in CONTENTS.items():
        if path.name == key or stem in (key, f"{key}_bn", f"{key}_attn", f"{key}_bn_attn"):
            return words
    return "a run of the comparison" if (path / "config.json").is_file() else ""


def _size(count: int) -> str:
    return f"{count / MIB:.1f} MiB" if count >= MIB else f"{count / KIB:.1f} KiB"


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def run_folder(run: Run | str | Path) -> Path:
    """The folder of a run.

    Raises:
        CaptuneError: it is not there.
    """
    folder = run.folder if isinstance(run, Run) else Path(run)
    if not folder.is_dir():
        raise CaptuneError(f"no run at {folder}: train one first")
    return folder
