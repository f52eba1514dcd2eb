"""fit: from tables and a config to a trained run, resumable from the middle of an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from captune.config import DEFAULT_CONFIG, Config
from captune.console import say
from captune.data.stream_table import StreamTable
from captune.data.table import CaptionTable
from captune.device import best_device
from captune.errors import CaptuneError
from captune.losses import Criterion
from captune.models import CLIPModel
from captune.processes import processes
from captune.training.average import MovingAverage
from captune.training.checkpoint import TrainingParts, load_state, read_progress, save_state
from captune.training.checkpoints import keep_epoch, keep_stage
from captune.training.criteria import make_criterion, remember_temperature, temperature_of
from captune.training.memory import validate_within
from captune.training.optimizer import make_optimizer
from captune.training.progress import EpochMeter, EpochProgress
from captune.training.run import Provenance, Run, free_name
from captune.training.schedule import (
    finished,
    planned_epochs,
    rate_factor,
    warmup_cosine,
    warmup_within,
)
from captune.training.sharing import copy_from_main
from captune.training.soup import Soup
from captune.training.stages import WHOLE, Plan, Stage
from captune.training.steps import STEPS_BETWEEN_READINGS, make_accelerator, train_epoch
from captune.training.stop import StopRequest
from captune.training.stream_loader import position_in_stream
from captune.training.telling import epoch_line, epoch_values, tracking_options
from captune.training.validation import validate
from captune.training.watch import EpochSigns, Watchdog


class TrainingStopped(Exception):
    """Ctrl-C or a polite kill: the state is saved and the run can be used and resumed."""

    def __init__(self, run: Run) -> None:
        super().__init__(f"stopped; {run.folder} can be used, and resumed with --resume")
        self.run = run


def fit(
    train: CaptionTable | StreamTable,
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
        train: images with captions, or a stream of them, for stage 2 alone.
        val: images with captions.
        out: the run's directory.
        config: or any mapping with its keys.
        model: towers of one's own; default: the ones that ``config`` names.
        criterion: a loss of one's own; default: what ``config`` names.
        resume: go on where the run in ``out`` stopped.
        provenance: where the tables came from, so that later commands find the data.
        on_epoch: called with the run after each epoch, when all of it is saved; what it raises
            ends the training, which can be resumed. Of several processes, each calls it.

    Started by ``torchrun`` or ``accelerate launch``, several processes share each batch
    (:mod:`captune.training.sharing`): all must call ``fit`` with the same arguments, and see the
    same folder ``out``. The first one alone writes.

    Returns:
        The run, complete: best weights (by rsum on ``val``), history, seen images.

    Raises:
        CaptuneError: ``out`` is occupied, a tower cannot be loaded, the loss is not finite.
        TrainingStopped: Ctrl-C; everything is saved.
    """
    config = Config.from_mapping(config)
    here = processes()
    smallest = min(config.batch_size, config.head_batch_size)
    if smallest < here.count:
        raise CaptuneError(
            f"batches of {smallest} images cannot be shared by {here.count} processes: take "
            "batch_size and head_batch_size at least as large, or fewer processes"
        )
    say(config.describe())
    run = Run(Path(out), config, provenance or Provenance())
    here.check_same("\0".join([config.to_json(), train.digest, val.digest]), "data or config")
    if here.from_main(lambda: _claim(run, resume)):
        say(f"{run.folder} is complete already: nothing to train")
        return run
    torch.manual_seed(config.seed)
    device = best_device(config.device)
    model = model or here.main_first(lambda: CLIPModel.from_config(config, device=device))
    if here.main:
        run.write_identity()
        run.write_seen(train.file_keys(), val.file_keys())
    job = _Fit(run, model, criterion, train, val)
    return job.run_all(resume=resume, on_epoch=on_epoch)


def _claim(run: Run, resume: bool) -> bool:
    """Whether the run is complete already.

    Raises:
        CaptuneError: its folder is occupied, or holds an unfinished run that is not to be resumed.
    """
    Run.claim(run.folder, run.config, run.provenance)
    if run.is_complete:
        return True
    if run.state_path.is_file() and not resume:
        raise CaptuneError(
            f"{run.folder} holds an unfinished run: go on with --resume, or take "
            f"--out {free_name(run.folder)}"
        )
    return False


class _Fit:
    """The objects of one training, and what happens at the end of a step and of an epoch."""

    def __init__(
        self,
        run: Run,
        model: CLIPModel,
        criterion: Criterion | None,
        train: CaptionTable | StreamTable,
        val: CaptionTable,
    ) -> None:
        config = run.config
        self.here = processes()
        self.made = criterion is None and not config.criterion  # by captune: its figures are known
        self.run = run
        self.model = model
        self.criterion = criterion or make_criterion(config, model.dimension)
        self.accelerator = make_accelerator(config, **tracking_options(run))
        self.logs = config.log_with != "none" and self.here.main
        if self.logs:
            self.accelerator.init_trackers("captune", config=dict(config))
        model.to(self.accelerator.device)
        if isinstance(self.criterion, torch.nn.Module):
            self.criterion.to(self.accelerator.device)
        self.average = MovingAverage(model, decay=config.ema_decay) if config.ema_decay else None
        self._align()
        self.plan = Plan(model, train, val, config)
        self.soup = Soup(run.state_path.parent, size=config.soup)
        self.stop = StopRequest()
        self.stage: Stage
        self.parts: TrainingParts

    def _align(self) -> None:
        """The main process's weights and draws, in all: what they share starts from the same."""
        parts = (self.model, self.criterion, self.average.model if self.average else None)
        modules = [part for part in parts if isinstance(part, nn.Module)]
        copy_from_main(modules, self.accelerator.device)

    @property
    def kept(self) -> CLIPModel:
        """The weights that are validated and saved: the moving average, where there is one."""
        return self.average.model if self.average else self.model

    def _enter(self, stage: Stage) -> None:
        """Make optimiser and schedule of a stage; both start afresh in each."""
        self.stage = stage
        self.watchdog = Watchdog()  # losses of two stages cannot be compared
        # fp16 unscales gradients for each optimiser it knows: the head's twice in stage 2.
        self.accelerator.free_memory()
        config = self.run.config
        optimizer = make_optimizer(stage, self.model, self.criterion, self.accelerator, config)
        scheduler = warmup_cosine(
            optimizer.optimizer, warmup_steps=config.warmup_steps, total_steps=stage.steps
        )
        self.parts = TrainingParts(
            self.model,
            self.criterion,
            optimizer,
            scheduler,
            self.accelerator,
            self.average.model if self.average else None,
        )
        self._describe()

    def _describe(self) -> None:
        config, stage = self.run.config, self.stage
        groups = self.parts.optimizer.param_groups
        count = sum(p.numel() for group in groups for p in group["params"])
        device, precision = self.accelerator.device, self.accelerator.mixed_precision
        if len(self.plan) > 1:
            say(f"stage {stage.number}: {stage.what}")
        say(
            f"{count:,} trainable parameters · {device} · "
            f"{'fp32' if precision == 'no' else precision} · {stage.steps:,} steps"
        )
        say(f"train on {stage.train_loader.table.describe()}")
        say(f"validate on {stage.val_loader.table.describe()}")
        warmup = warmup_within(config.warmup_steps, stage.steps)
        if warmup < config.warmup_steps:
            say(f"warm-up cut from {config.warmup_steps} to {warmup}: a tenth of all steps")

    def run_all(self, *, resume: bool, on_epoch: Callable[[Run], None] | None) -> Run:
        """All epochs that remain."""
        progress = EpochProgress(0)
        if resume and self.here.from_main(self.run.state_path.is_file):
            progress = read_progress(self.run.state_path)
            self.here.check_same(str(progress), f"state of the run at {self.run.state_path}")
            self._enter(self.plan.stage_of(progress.epoch))
            load_state(self.run.state_path, self.parts)
            self._align()  # each card has a state of its own in the file, of the main process's
            progress.chunk_size = 0  # here may be more memory than where it was found
            loader, first = self.stage.train_loader, self.stage.first
            progress = position_in_stream(progress, loader, self.parts.scheduler, first)
            say(f"resuming in epoch {progress.epoch + 1} after step {progress.step}")
        else:
            if resume:
                say(f"nothing to resume in {self.run.folder}: starting from the first step")
            self._begin()
        history = self.here.from_main(self.run.history)[: progress.epoch]
        if self.here.main:
            self.run.write_history(history)
        for row in history[self.stage.first :]:
            self.watchdog.look(self._signs(row))  # what it said of them has been said
        with self.stop:
            while not finished(self.run.config, history):
                history.append(self._epoch(progress))
                self._keep(history)
                progress = EpochProgress(
                    progress.epoch + 1, chunk_size=progress.chunk_size, layout=progress.layout
                )
                # Before the state is saved: what stage 2 starts from may be overwritten by its own.
                if progress.epoch == self.stage.last and len(history) < planned_epochs(
                    self.run.config
                ):
                    self._next_stage(history)
                self._save_state(progress)
                if on_epoch is not None:
                    on_epoch(self.run)
                if self._stopping() and not finished(self.run.config, history):
                    raise self._halted()
            self._taste_soup(history)
        if self.here.main:  # three times the weights, and of no more use
            self.run.state_path.unlink(missing_ok=True)
        for tracker in self.accelerator.trackers if self.logs else ():
            tracker.finish()  # end_training would leave the other processes, too
        if self._stopping():  # in the last validation: whoever called must not go on
            raise self._halted()
        return self.run

    def _stopping(self) -> bool:
        """Whether any process was asked to stop: all stop together, after the same step."""
        return self.here.any(self.stop.requested)

    def _halted(self) -> TrainingStopped:
        self.here.wait_for_main()  # a process that ends makes the launcher end the others
        return TrainingStopped(self.run)

    def _save_state(self, progress: EpochProgress) -> None:
        if self.here.main:
            save_state(self.run.state_path, self.parts, progress)

    def _begin(self) -> None:
        """The first stage, on features brought to mean 0 and deviation 1 where that is wanted."""
        statistics = self.plan.feature_statistics()
        if statistics is not None:
            self.model.set_feature_statistics(*statistics)
            if self.average:
                self.average.model.set_feature_statistics(*statistics)
        self._enter(self.plan.stage_of(0))

    def _next_stage(self, history: list[dict[str, Any]]) -> None:
        """Go on from the best weights so far, not from the last."""
        best = max(history, key=lambda r: float(r["rsum"]))
        say(
            f"stage {self.stage.number} ends: best rsum {best['rsum']:.1f} in epoch {best['epoch']}"
        )
        models = list({id(m): m for m in (self.model, self.kept)}.values())
        if self.here.main:  # the others might still see an older file
            keep_stage(self.run, self.stage.number)
            for model in models:
                model.load_weights(self.run.weights_path)
        copy_from_main(models, self.accelerator.device)
        self._enter(self.plan.stage_of(self.stage.last))

    def _epoch(self, progress: EpochProgress) -> dict[str, Any]:
        """Train and validate once; the row of the history."""
        self.stage.prepare(self.criterion if self.made else None, progress.epoch)
        progress.layout = getattr(self.stage.train_loader, "layout", "")
        trained = train_epoch(
            self.model,
            self.stage.train_loader,
            self.criterion,
            self.parts.optimizer,
            self.parts.scheduler,
            progress.epoch,
            self.run.config,
            accelerator=self.accelerator,
            progress=progress,
            on_step=self._after_step,
        )
        config = self.run.config
        if progress.chunk_size:  # what did not fit then may not fit here
            config = config.replace(chunk_size=progress.chunk_size)
        measure = partial(validate, self.kept, self.stage.val_loader, self.criterion)
        validated = validate_within(config, self.accelerator.num_processes, measure)
        return {
            "epoch": progress.epoch + 1,
            "stage": self.stage.number,
            "step": self._global_step(progress),
            "learning_rate": self._rate_at_start(progress.epoch),
            "temperature": temperature_of(self.model, self.criterion),
            **trained,
            "seconds": progress.seconds,
            "unreadable_images": len(self.stage.train_loader.unreadable),
            **{("val_loss" if key == "loss" else key): v for key, v in validated.items()},
        }

    def _rate_at_start(self, epoch: int) -> float:
        """The rate of an epoch's first step, from the schedule: a resumed epoch has the same."""
        stage = self.stage
        warmup = warmup_within(self.run.config.warmup_steps, stage.steps)
        step = (epoch - stage.first) * stage.train_loader.steps
        return stage.learning_rate * rate_factor(step, warmup, stage.steps)

    def _global_step(self, progress: EpochProgress) -> int:
        return self.plan.steps_before(progress.epoch) + progress.step

    def _after_step(self, meter: EpochMeter) -> None:
        """Log now and then; save now and then; leave when asked to."""
        progress = meter.progress
        if self.average:
            done = (progress.epoch - self.stage.first) * self.stage.train_loader.steps
            self.average.update(self.model, done + progress.step - 1)
        due, stopping = progress.step % self.run.config.save_steps == 0, self._stopping()
        if due or stopping:
            meter.settle()
            self._save_state(progress)
        if progress.step % STEPS_BETWEEN_READINGS == 0 and self.logs:
            meter.settle()
            rate = float(self.parts.optimizer.param_groups[0]["lr"])
            values = {"train/loss": meter.last_loss, "train/learning_rate": rate}
            self.accelerator.log(values, step=self._global_step(progress))
        if stopping:
            if not self.run.weights_path.is_file():
                say("no epoch is done yet: keeping the weights of this moment, not validated")
                self._save()
            raise self._halted()

    def _taste_soup(self, history: list[dict[str, Any]]) -> None:
        """Keep the mean of the best epochs where validation finds it better than the best one."""
        epochs = self.here.from_main(lambda: self.soup.pour(self.kept))
        copy_from_main([self.kept], self.accelerator.device)
        if epochs:
            best = max(float(row["rsum"]) for row in history)
            found = validate(self.kept, self.stage.val_loader, self.criterion, self.run.config)
            better = found["rsum"] > best
            history[-1]["soup"] = {"epochs": epochs, "rsum": found["rsum"], "kept": better}
            say(
                f"soup of epochs {', '.join(map(str, epochs))}: rsum {found['rsum']:.1f}, the best "
                f"epoch {best:.1f}: {'the soup' if better else 'the epoch'} is kept"
            )
            if better:
                self._save()
            if self.here.main:
                self.run.write_history(history)
        if self.here.main:
            self.soup.clear()

    def _save(self) -> None:
        """Write the weights that are kept, with the temperature that belongs to them."""
        remember_temperature(self.kept, self.criterion)
        if self.here.main:
            self.kept.save_pretrained(self.run.folder)

    def _signs(self, row: dict[str, Any]) -> EpochSigns:
        """What the watchdog looks at."""
        learnt = self.run.config.learn_temperature and self.made
        return EpochSigns(
            epoch=row["epoch"],
            train_loss=row["train_loss"],
            chance_loss=self.stage.chance_loss if self.made else math.inf,
            val_loss=row["val_loss"],
            rsum=row["rsum"],
            temperature=row["temperature"] if learnt else None,
            spread=row["spread"],
            effective_rank=row["effective_rank"],
            dimension=self.model.dimension,
            images=row["images"],
        )

    def _keep(self, history: list[dict[str, Any]]) -> None:
        """Write the history, and the weights where this epoch is the best so far."""
        row = history[-1]
        best = max(history, key=lambda r: float(r["rsum"]))
        if best is row:
            self._save()
        if self.run.config.keep_epochs and row["stage"] == WHOLE:
            remember_temperature(self.kept, self.criterion)
            if self.here.main:
                keep_epoch(self.run, row["epoch"], self.kept)
        if self.here.main:
            self.run.write_history(history)
        if self.run.config.soup and self.here.main:
            self.soup.add(self.kept, history)
        if self.stage.is_told(row["epoch"]):
            say(epoch_line(row, planned_epochs(self.run.config), best is row))
        for warning in self.watchdog.look(self._signs(row)):
            say(warning)
        if self.logs:
            self.accelerator.log(epoch_values(row), step=row["step"])
