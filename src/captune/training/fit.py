"""fit: from tables and a config to a trained run, resumable from the middle of an epoch."""

from __future__ import annotations

import importlib.util
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate.utils import ProjectConfiguration

from captune.bank import CaptionBank
from captune.config import DEFAULT_CONFIG, Config
from captune.console import say
from captune.data.dataset import COCOClipDataset
from captune.data.table import CaptionTable
from captune.device import best_device
from captune.encoders.hub import call_factory
from captune.errors import CaptuneError, MissingExtraError
from captune.losses import Criterion, InfoNCELoss
from captune.models import CLIPModel
from captune.training.checkpoint import TrainingParts, load_state, save_state
from captune.training.loader import BatchLoader, make_loader
from captune.training.run import Provenance, Run, free_name
from captune.training.schedule import rate_factor, warmup_cosine, warmup_within
from captune.training.steps import (
    STEPS_BETWEEN_READINGS,
    EpochMeter,
    EpochProgress,
    make_accelerator,
    train_epoch,
    validate,
)


class TrainingStopped(Exception):
    """Ctrl-C or a polite kill: the state is saved and the run can be used and resumed."""

    def __init__(self, run: Run) -> None:
        super().__init__(f"stopped; {run.folder} can be used, and resumed with --resume")
        self.run = run


def fit(
    train: CaptionTable,
    val: CaptionTable,
    *,
    out: str | Path,
    config: Config | Mapping[str, Any] = DEFAULT_CONFIG,
    model: CLIPModel | None = None,
    criterion: Criterion | None = None,
    resume: bool = False,
    provenance: Provenance | None = None,
    on_epoch: Callable[[Run], None] | None = None,
) -> Run:
    """Train an image tower on ``train``, keep the model that is best on ``val``.

    Args:
        train, val: images with captions.
        out: the run's directory.
        config: or any mapping with its keys.
        model: towers of one's own; default: the ones that ``config`` names.
        criterion: a loss of one's own; default: what ``config`` names.
        resume: go on where the run in ``out`` stopped.
        provenance: where the tables came from, so that later commands find the data.
        on_epoch: called with the run after each epoch, when all of it is saved; what it raises
            ends the training, which can be resumed.

    Returns:
        The run, complete: best weights (by rsum on ``val``), history, seen images.

    Raises:
        CaptuneError: ``out`` is occupied, a tower cannot be loaded, the loss is not finite.
        TrainingStopped: Ctrl-C; everything is saved.
    """
    config = Config.from_mapping(config)
    say(config.describe())
    run = Run.claim(out, config, provenance or Provenance())
    if run.is_complete:
        say(f"{run.folder} is complete already: nothing to train")
        return run
    if run.state_path.is_file() and not resume:
        raise CaptuneError(
            f"{run.folder} holds an unfinished run: go on with --resume, or take "
            f"--out {free_name(run.folder)}"
        )
    torch.manual_seed(config.seed)
    model = model or CLIPModel.from_config(config, device=best_device(config.device))
    criterion = criterion or make_criterion(config)
    run.write_identity()
    run.write_seen(train, val)
    job = _Fit(run, model, criterion, train, val)
    return job.run_all(resume=resume, on_epoch=on_epoch)


def make_criterion(config: Config) -> Criterion:
    """The loss that ``config`` names: a factory's, or the recipe's InfoNCE."""
    if config.criterion:
        criterion: Criterion = call_factory(config.criterion)
        return criterion
    return InfoNCELoss(temperature=config.temperature)


class _Fit:
    """The objects of one training, and what happens at the end of a step and of an epoch."""

    def __init__(
        self,
        run: Run,
        model: CLIPModel,
        criterion: Criterion,
        train: CaptionTable,
        val: CaptionTable,
    ) -> None:
        config = run.config
        self.run = run
        self.model = model
        self.criterion = criterion
        self.train_loader = _loader(train, model, config, training=True)
        self.val_loader = _loader(val, model, config, training=False)
        self.accelerator = make_accelerator(config, **_tracking(run))
        if config.log_with != "none":
            self.accelerator.init_trackers("captune", config=dict(config))
        model.to(self.accelerator.device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if isinstance(criterion, torch.nn.Module):
            criterion.to(self.accelerator.device)
            parameters += list(criterion.parameters())
        optimizer = torch.optim.AdamW(
            parameters, lr=config.learning_rate, weight_decay=config.weight_decay
        )
        total = self.train_loader.steps * config.num_epochs
        scheduler = warmup_cosine(optimizer, warmup_steps=config.warmup_steps, total_steps=total)
        prepared = self.accelerator.prepare_optimizer(optimizer, device_placement=False)
        self.parts = TrainingParts(model, criterion, prepared, scheduler, self.accelerator)
        self.stop = _StopRequest()
        self._describe(total)

    def _describe(self, total_steps: int) -> None:
        config = self.run.config
        count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        device, precision = self.accelerator.device, self.accelerator.mixed_precision
        say(
            f"{count:,} trainable parameters · {device} · "
            f"{'fp32' if precision == 'no' else precision} · {total_steps:,} steps"
        )
        say(f"train on {self.train_loader.dataset.table.describe()}")
        say(f"validate on {self.val_loader.dataset.table.describe()}")
        warmup = warmup_within(config.warmup_steps, total_steps)
        if warmup < config.warmup_steps:
            say(f"warm-up cut from {config.warmup_steps} to {warmup}: a tenth of all steps")

    def run_all(self, *, resume: bool, on_epoch: Callable[[Run], None] | None) -> Run:
        """All epochs that remain."""
        progress = EpochProgress(0)
        if resume and self.run.state_path.is_file():
            progress = load_state(self.run.state_path, self.parts)
            say(f"resuming in epoch {progress.epoch + 1} after step {progress.step}")
        elif resume:
            say(f"nothing to resume in {self.run.folder}: starting from the first step")
        history = self.run.history()[: progress.epoch]
        self.run.write_history(history)
        with self.stop:
            while progress.epoch < self.run.config.num_epochs:
                history.append(self._epoch(progress))
                self._keep(history)
                progress = EpochProgress(progress.epoch + 1)
                save_state(self.run.state_path, self.parts, progress)
                if on_epoch is not None:
                    on_epoch(self.run)
                if self.stop.requested and progress.epoch < self.run.config.num_epochs:
                    raise TrainingStopped(self.run)
        self.run.state_path.unlink(missing_ok=True)  # three times the weights, and of no more use
        if self.run.config.log_with != "none":
            self.accelerator.end_training()
        if self.stop.requested:  # in the last validation: whoever called must not go on
            raise TrainingStopped(self.run)
        return self.run

    def _epoch(self, progress: EpochProgress) -> dict[str, Any]:
        """Train and validate once; the row of the history."""
        trained = train_epoch(
            self.model,
            self.train_loader,
            self.criterion,
            self.parts.optimizer,
            self.parts.scheduler,
            progress.epoch,
            self.run.config,
            accelerator=self.accelerator,
            progress=progress,
            on_step=self._after_step,
        )
        validated = validate(self.model, self.val_loader, self.criterion, self.run.config)
        return {
            "epoch": progress.epoch + 1,
            "step": self._global_step(progress),
            "learning_rate": self._rate_at_start(progress.epoch),
            **trained,
            "unreadable_images": len(self.train_loader.unreadable),
            **{("val_loss" if key == "loss" else key): v for key, v in validated.items()},
        }

    def _rate_at_start(self, epoch: int) -> float:
        """The rate of an epoch's first step, from the schedule: a resumed epoch has the same."""
        config, steps = self.run.config, self.train_loader.steps
        total = steps * config.num_epochs
        warmup = warmup_within(config.warmup_steps, total)
        return config.learning_rate * rate_factor(epoch * steps, warmup, total)

    def _global_step(self, progress: EpochProgress) -> int:
        return progress.epoch * self.train_loader.steps + progress.step

    def _after_step(self, meter: EpochMeter) -> None:
        """Log now and then; save now and then; leave when asked to."""
        progress = meter.progress
        due = progress.step % self.run.config.save_steps == 0
        if due or self.stop.requested:
            meter.settle()
            save_state(self.run.state_path, self.parts, progress)
        if progress.step % STEPS_BETWEEN_READINGS == 0 and self.run.config.log_with != "none":
            meter.settle()
            rate = float(self.parts.optimizer.param_groups[0]["lr"])
            values = {"train/loss": meter.last_loss, "train/learning_rate": rate}
            self.accelerator.log(values, step=self._global_step(progress))
        if self.stop.requested:
            if not self.run.weights_path.is_file():
                say("no epoch is done yet: keeping the weights of this moment, not validated")
                self.model.save_pretrained(self.run.folder)
            raise TrainingStopped(self.run)

    def _keep(self, history: list[dict[str, Any]]) -> None:
        """Write the history, and the weights where this epoch is the best so far."""
        row = history[-1]
        best = max(history, key=lambda r: float(r["rsum"]))
        if best is row:
            self.model.save_pretrained(self.run.folder)
        self.run.write_history(history)
        image_to_text, text_to_image = row["image_to_text"], row["text_to_image"]
        say(
            f"epoch {row['epoch']}/{self.run.config.num_epochs} · loss {row['train_loss']:.3f} · "
            f"val loss {row['val_loss']:.3f} · image→text R@1 {image_to_text['R@1']:.1f} R@5 "
            f"{image_to_text['R@5']:.1f} · text→image R@1 {text_to_image['R@1']:.1f} R@5 "
            f"{text_to_image['R@5']:.1f} · rsum {row['rsum']:.1f}{' (best)' if best is row else ''}"
        )
        if self.run.config.log_with != "none":
            values = {"val/loss": row["val_loss"], "val/rsum": row["rsum"]}
            for direction in ("image_to_text", "text_to_image"):
                values |= {f"val/{direction}/{k}": v for k, v in row[direction].items()}
            self.accelerator.log(values, step=row["step"])


def _loader(
    table: CaptionTable, model: CLIPModel, config: Config, *, training: bool
) -> BatchLoader:
    dataset = COCOClipDataset(
        table=table,
        image_size=model.preprocess.image_size,
        augment=config.augment and training,
        seed=config.seed,
    )
    bank = CaptionBank.build(table.texts(), model.text_encoder, precision=config.precision)
    return make_loader(dataset, bank, config, shuffle=training)


def _tracking(run: Run) -> dict[str, Any]:
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


class _StopRequest:
    """Ctrl-C asks for a stop after the step at hand; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        say("stopping after this step (once more: at once)")
