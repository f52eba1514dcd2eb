"""The loop of a training: epochs of both stages, and what happens between two steps or epochs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

import torch
from torch import nn

from captune.config import Config
from captune.console import say
from captune.data.stream_table import StreamTable
from captune.data.table import CaptionTable
from captune.losses import Criterion
from captune.models import CLIPModel
from captune.processes import processes
from captune.training.average import MovingAverage
from captune.training.checkpoint import TrainingParts, load_state, read_progress, save_state
from captune.training.compiling import BackboneCompiler, backbone_compiler
from captune.training.criteria import make_criterion, temperature_of
from captune.training.keeping import Keeper
from captune.training.memory import validate_within
from captune.training.optimizer import make_optimizer
from captune.training.progress import EpochMeter, EpochProgress
from captune.training.run import Run
from captune.training.schedule import finished, planned_epochs, warmup_cosine
from captune.training.sharing import copy_from_main
from captune.training.stages import WHOLE, Plan, Stage
from captune.training.steps import STEPS_BETWEEN_READINGS, make_accelerator, train_epoch
from captune.training.stop import StopRequest, TrainingStopped
from captune.training.stream_loader import position_in_stream
from captune.training.telling import epoch_line, epoch_values, stage_lines, tracking_options
from captune.training.validation import validate
from captune.training.watch import EpochSigns, Watchdog

SAVING = 0.02  # of the time, at most, goes into saving states inside of an epoch
LONGEST_UNSAVED = 1800.0  # seconds; a disk that hung once must not hold the next one back for hours


class TrainingLoop:
    """The objects of one training, and what happens at the end of a step and of an epoch.

    Args:
        run: what it is written to; its config decides all else.
        model: what is trained.
        criterion: a loss of the user's own; None: what the config names.
        train, val: as in :func:`captune.training.fit.fit`.
    """

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
        self.kept = self.average.model if self.average else model  # validated and saved
        self._align()
        self.plan = Plan(model, train, val, config)
        self.keeper = Keeper(run, self.kept, self.criterion, self.accelerator.device)
        self.stop = StopRequest()
        self._saved_at = self._save_took = 0.0
        self.stage: Stage
        self.parts: TrainingParts
        self.compiler: BackboneCompiler | None

    def _align(self) -> None:
        """The main process's weights and draws, in all: what they share starts from the same."""
        parts = (self.model, self.criterion, self.average.model if self.average else None)
        modules = [part for part in parts if isinstance(part, nn.Module)]
        copy_from_main(modules, self.accelerator.device)

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
        if self.average:
            self.average.follow(optimizer)
        self.compiler = None
        if stage.number == WHOLE:
            self.compiler = backbone_compiler(self.model, config, self.accelerator.device)
        for line in stage_lines(stage, self.parts, several=len(self.plan) > 1):
            say(line)

    def run_all(self, *, resume: bool, on_epoch: Callable[[Run], None] | None) -> Run:
        """All epochs that remain; arguments, result and errors as those of ``fit``."""
        progress = self._resume() if resume else self._begin()
        history = self.here.from_main(self.run.history)[: progress.epoch]
        if self.here.main:
            self.run.write_history(history)
        for row in history[self.stage.first :]:
            self.watchdog.look(self._signs(row))  # what it said of them has been said
        with self.stop:
            while not finished(self.run.config, history):
                history.append(self._epoch(progress))
                self._end_epoch(history)
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
            self.keeper.taste_soup(history, partial(self._measure, self.run.config))
        self.keeper.clear()
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

    def _may_save(self) -> bool:
        """Large states are left for later where steps are short."""
        wait = min(self._save_took / SAVING, LONGEST_UNSAVED)
        return monotonic() - self._saved_at >= wait

    def _save_state(self, progress: EpochProgress) -> None:
        progress.compiling = self.compiler.verdict if self.compiler else None
        if self.here.main:
            began = monotonic()
            save_state(self.run.state_path, self.parts, progress)
            self._saved_at = monotonic()
            self._save_took = self._saved_at - began

    def _resume(self) -> EpochProgress:
        """Go on from the state that the run has, or from the first step where it has none."""
        path = self.run.state_path
        if not self.here.from_main(path.is_file):
            say(f"nothing to resume in {self.run.folder}: starting from the first step")
            return self._begin()
        progress = read_progress(path)
        self.here.check_same(str(progress), f"state of the run at {path}")
        self._enter(self.plan.stage_of(progress.epoch))
        if self.compiler is not None:
            self.compiler.verdict = progress.compiling
        load_state(path, self.parts)
        self._align()  # each card has a state of its own in the file, of the main process's
        progress.chunk_size = 0  # here may be more memory than where it was found
        loader, first = self.stage.train_loader, self.stage.first
        progress = position_in_stream(progress, loader, self.parts.scheduler, first)
        say(f"resuming in epoch {progress.epoch + 1} after step {progress.step}")
        return progress

    def _begin(self) -> EpochProgress:
        """The first stage, on features brought to mean 0 and deviation 1 where that is wanted."""
        statistics = self.plan.feature_statistics()
        if statistics is not None:
            self.model.set_feature_statistics(*statistics)
            if self.average:
                self.average.model.set_feature_statistics(*statistics)
        self._enter(self.plan.stage_of(0))
        return EpochProgress(0)

    def _next_stage(self, history: list[dict[str, Any]]) -> None:
        """Go on from the best weights so far, not from the last."""
        best = max(history, key=lambda r: float(r["rsum"]))
        say(
            f"stage {self.stage.number} ends: best rsum {best['rsum']:.1f} in epoch {best['epoch']}"
        )
        models = list({id(m): m for m in (self.model, self.kept)}.values())
        self.keeper.end_stage(self.stage.number, models)
        self._enter(self.plan.stage_of(self.stage.last))

    def _epoch(self, progress: EpochProgress) -> dict[str, Any]:
        """Train and validate once; the row of the history."""
        self.stage.prepare(self.criterion if self.made else None, progress.epoch)
        progress.layout = getattr(self.stage.train_loader, "layout", "")
        if self.compiler is not None:
            self.compiler.begin(self.stage.steps_alike(progress.epoch) - progress.step)
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
            compiler=self.compiler,
        )
        config = self.run.config
        if progress.chunk_size:  # what did not fit then may not fit here
            config = config.replace(chunk_size=progress.chunk_size)
        validated = validate_within(config, self._measure)
        return {
            "epoch": progress.epoch + 1,
            "stage": self.stage.number,
            "step": self._global_step(progress),
            "learning_rate": self.stage.rate_at_start(progress.epoch),
            "temperature": temperature_of(self.model, self.criterion),
            **trained,
            "seconds": progress.seconds,
            "compiled_steps": progress.compiled_steps,
            "unreadable_images": len(self.stage.train_loader.unreadable),
            **{("val_loss" if key == "loss" else key): v for key, v in validated.items()},
        }

    def _measure(self, config: Config) -> dict[str, Any]:
        return validate(self.kept, self.stage.val_loader, self.criterion, config)

    def _global_step(self, progress: EpochProgress) -> int:
        return self.plan.steps_before(progress.epoch) + progress.step

    def _after_step(self, meter: EpochMeter) -> None:
        """Log now and then; save now and then; leave when asked to."""
        progress = meter.progress
        if self.average:
            done = (progress.epoch - self.stage.first) * self.stage.train_loader.steps
            self.average.update(self.model, done + progress.step - 1)
        stopping = self._stopping()
        due = progress.step % self.run.config.save_steps == 0
        if stopping or due:
            meter.settle()
            if stopping or self._may_save():
                self._save_state(progress)
        if progress.step % STEPS_BETWEEN_READINGS == 0 and self.logs:
            meter.settle()
            rate = float(self.parts.optimizer.param_groups[0]["lr"])
            values = {"train/loss": meter.last_loss, "train/learning_rate": rate}
            self.accelerator.log(values, step=self._global_step(progress))
        if stopping:
            if not self.run.weights_path.is_file():
                say("no epoch is done yet: keeping the weights of this moment, not validated")
                self.keeper.save()
            raise self._halted()

    def _end_epoch(self, history: list[dict[str, Any]]) -> None:
        """Keep what is to be kept of an epoch, and tell of it."""
        row = history[-1]
        best = self.keeper.keep(history)
        if self.stage.is_told(row["epoch"]):
            say(epoch_line(row, planned_epochs(self.run.config), best))
        for warning in self.watchdog.look(self._signs(row)):
            say(warning)
        if self.logs:
            self.accelerator.log(epoch_values(row), step=row["step"])

    def _signs(self, row: dict[str, Any]) -> EpochSigns:
        """What the watchdog looks at; of a user's own loss it knows no figures."""
        return EpochSigns.of(
            row,
            chance_loss=self.stage.chance_loss if self.made else math.inf,
            temperature_learnt=self.run.config.learn_temperature and self.made,
            dimension=self.model.dimension,
        )
