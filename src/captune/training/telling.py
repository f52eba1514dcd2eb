"""What a training tells of stages and epochs: lines to whoever watches, values to the logger."""

from __future__ import annotations

import importlib.util
from typing import Any

from accelerate.utils import ProjectConfiguration

from captune.errors import MissingExtraError
from captune.training.checkpoint import TrainingParts
from captune.training.run import Run
from captune.training.schedule import warmup_within
from captune.training.stages import Stage


def stage_lines(stage: Stage, parts: TrainingParts, *, several: bool) -> list[str]:
    """What a stage is about to train, how and on what; its number where there are ``several``."""
    count = sum(p.numel() for group in parts.optimizer.param_groups for p in group["params"])
    device, precision = parts.accelerator.device, parts.accelerator.mixed_precision
    lines = [f"stage {stage.number}: {stage.what}"] if several else []
    lines += [
        f"{count:,} trainable parameters · {device} · "
        f"{'fp32' if precision == 'no' else precision} · {stage.steps:,} steps",
        f"train on {stage.train_loader.table.describe()}",
        f"validate on {stage.val_loader.table.describe()}",
    ]
    wanted = stage.config.warmup_steps
    warmup = warmup_within(wanted, stage.steps)
    if warmup < wanted:
        lines.append(f"warm-up cut from {wanted} to {warmup}: a tenth of all steps")
    return lines


def epoch_line(row: dict[str, Any], planned: int, best: bool) -> str:
    """An epoch in one line."""
    image_to_text, text_to_image = row["image_to_text"], row["text_to_image"]
    return (
        f"epoch {row['epoch']}/{planned} · loss {row['train_loss']:.3f} · "
        f"val loss {row['val_loss']:.3f} · image→text R@1 {image_to_text['R@1']:.1f} R@5 "
        f"{image_to_text['R@5']:.1f} · text→image R@1 {text_to_image['R@1']:.1f} R@5 "
        f"{text_to_image['R@5']:.1f} · rsum {row['rsum']:.1f}{' (best)' if best else ''}"
    )


def epoch_values(row: dict[str, Any]) -> dict[str, float]:
    """An epoch's validation, as the logger has it."""
    values = {"val/loss": row["val_loss"], "val/rsum": row["rsum"]}
    for direction in ("image_to_text", "text_to_image"):
        values |= {f"val/{direction}/{key}": value for key, value in row[direction].items()}
    return values


def tracking_options(run: Run) -> dict[str, Any]:
    """accelerate's options for the logger that the config names."""
    name = run.config.log_with
    if name == "none":
        return {}
    if importlib.util.find_spec(name) is None:
        raise MissingExtraError(f"log_with={name}", name, name)
    folders = ProjectConfiguration(
        project_dir=str(run.folder), logging_dir=str(run.folder / "logs")
    )
    return {"log_with": name, "project_config": folders}
