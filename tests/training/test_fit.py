"""fit: learns, keeps the best, resumes exactly, stops politely."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from captune.config import Config
from captune.data.table import CaptionTable
from captune.encoders.image import Features
from captune.errors import CaptuneError
from captune.losses import InfoNCELoss
from captune.models import CLIPModel
from captune.preprocess import Preprocess
from captune.training import loop as loop_module
from captune.training import telling as telling_module
from captune.training.checkpoint import read_progress
from captune.training.fit import fit
from captune.training.run import Provenance, Run
from captune.training.stop import TrainingStopped

Tables = tuple[CaptionTable, CaptionTable]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.weights_path)


def same_weights(one: Run, other: Run) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def timeless(run: Run) -> list[dict[str, Any]]:
    """The history without what the clock decides."""
    clock = ("images_per_second", "seconds")
    return [{k: v for k, v in row.items() if k not in clock} for row in run.history()]


def test_learns_to_tell_scenes_apart(tables: Tables, config: Config, tmp_path: Path) -> None:
    train, val = tables
    run = fit(train, val, out=tmp_path / "run", config=config.replace(num_epochs=30))
    history = run.history()
    assert [row["epoch"] for row in history] == list(range(1, 31))
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    # 8 images with 5 captions each: ranking by chance has an rsum of 315.
    assert history[0]["rsum"] < 400 and max(row["rsum"] for row in history) > 450
    assert run.is_complete and not run.state_path.exists()


def test_the_best_epoch_by_rsum_is_kept(
    tables: Tables, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[dict[str, torch.Tensor]] = []
    scores = iter([10.0, 30.0, 20.0])
    real = loop_module.validate

    def validate(model: CLIPModel, *rest: Any) -> dict[str, Any]:
        saved.append({k: v.clone() for k, v in model.state_dict().items()})
        return {**real(model, *rest), "rsum": next(scores)}

    monkeypatch.setattr(loop_module, "validate", validate)
    run = fit(*tables, out=tmp_path / "run", config=config)
    kept = weights(run)
    assert all(torch.equal(kept[key], saved[1][key]) for key in kept)
    assert not all(torch.equal(kept[key], saved[2][key]) for key in kept)


def test_the_same_seed_gives_the_same_weights(
    tables: Tables, config: Config, tmp_path: Path
) -> None:
    runs = [
        fit(*tables, out=tmp_path / str(i), config=config.replace(seed=seed, num_epochs=2))
        for i, seed in enumerate((0, 0, 1))
    ]
    assert same_weights(runs[0], runs[1]) and not same_weights(runs[0], runs[2])


@pytest.mark.parametrize("stop_at", [1, 3, 4, 8])
def test_resuming_from_the_middle_of_an_epoch_changes_nothing(
    tables: Tables,
    config: Config,
    tmp_path: Path,
    ctrl_c_in_step: Callable[[int], None],
    stop_at: int,
) -> None:
    """3 steps an epoch, augmented, BatchNorm: stopped after step `stop_at`, then resumed."""
    config = config.replace(augment=True, use_batch_norm=True)
    whole = fit(*tables, out=tmp_path / "whole", config=config)
    ctrl_c_in_step(stop_at)
    with pytest.raises(TrainingStopped) as stopped:
        fit(*tables, out=tmp_path / "run", config=config)
    assert CLIPModel.from_pretrained(stopped.value.run.folder).encode_text("x").shape == (1, 16)
    torch.manual_seed(99)  # whatever happened in between
    run = fit(*tables, out=tmp_path / "run", config=config, resume=True)
    assert same_weights(whole, run)
    assert timeless(run) == timeless(whole)


def test_ctrl_c_in_the_last_validation_is_told_to_the_caller_and_the_run_is_complete(
    tables: Tables, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever trains many runs in turn must hear of it; the same call finds all done."""
    real = loop_module.validate

    def validate(*arguments: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    config = config.replace(num_epochs=1)
    monkeypatch.setattr(loop_module, "validate", validate)
    with pytest.raises(TrainingStopped) as stopped:
        fit(*tables, out=tmp_path / "run", config=config)
    assert stopped.value.run.is_complete
    assert fit(*tables, out=tmp_path / "run", config=config).is_complete


EACH = [(epoch, step) for epoch in range(3) for step in (1, 2, 3)] + [(1, 0), (2, 0), (3, 0)]
FEW = [(0, 1), (1, 0), (1, 3), (2, 0), (2, 3), (3, 0)]


@pytest.mark.parametrize(("took", "saved"), [(0, sorted(EACH)), (5, FEW)])
def test_states_that_take_long_are_saved_less_often(
    tables: Tables,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    took: int,
    saved: list[tuple[int, int]],
) -> None:
    """Steps of 100 seconds: 5 seconds of saving are 2 % of three of them. Ends are always saved."""
    now = 0
    found: list[tuple[int, int]] = []

    def save(path: Path, parts: Any, progress: Any) -> None:
        nonlocal now
        found.append((progress.epoch, progress.step))
        now += took

    real = loop_module.TrainingLoop._after_step

    def after_step(self: Any, meter: Any) -> None:
        nonlocal now
        now += 100
        real(self, meter)

    monkeypatch.setattr(loop_module, "save_state", save)
    monkeypatch.setattr(loop_module, "monotonic", lambda: now)
    monkeypatch.setattr(loop_module.TrainingLoop, "_after_step", after_step)
    fit(*tables, out=tmp_path / "run", config=config.replace(save_steps=1))
    assert found == saved


def test_a_kill_loses_no_more_than_the_steps_since_the_last_state(
    tables: Tables, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.replace(save_steps=1)
    monkeypatch.setattr(loop_module, "SAVING", 1e9)  # however long it takes
    whole = fit(*tables, out=tmp_path / "whole", config=config)
    real = loop_module.train_epoch

    def dies(model: CLIPModel, *rest: Any, **options: Any) -> dict[str, float]:
        on_step = options["on_step"]

        def after(meter: Any) -> None:
            on_step(meter)
            if (meter.progress.epoch, meter.progress.step) == (1, 2):
                raise MemoryError("killed")

        return real(model, *rest, **{**options, "on_step": after})

    monkeypatch.setattr(loop_module, "train_epoch", dies)
    with pytest.raises(MemoryError):
        fit(*tables, out=tmp_path / "run", config=config)
    kept = read_progress(Run(tmp_path / "run", config, Provenance()).state_path)
    assert (kept.epoch, kept.step) == (1, 2)
    monkeypatch.undo()
    monkeypatch.setenv("CAPTUNE_CACHE", str(tmp_path / "cache"))
    run = fit(*tables, out=tmp_path / "run", config=config, resume=True)
    assert same_weights(whole, run)


def test_stopping_before_the_first_validation_leaves_a_usable_run(
    tables: Tables,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = loop_module.TrainingLoop._after_step

    def after_step(self: Any, meter: Any) -> None:
        self.stop.requested = True
        real(self, meter)

    monkeypatch.setattr(loop_module.TrainingLoop, "_after_step", after_step)
    with pytest.raises(TrainingStopped, match="--resume"):
        fit(*tables, out=tmp_path / "run", config=config)
    assert "not validated" in capsys.readouterr().err
    run = Run.open(tmp_path / "run")
    assert run.load_model() and not run.is_complete
    with pytest.raises(CaptuneError, match="unfinished run: go on with --resume"):
        fit(*tables, out=tmp_path / "run", config=config)


def test_the_signal_handlers_are_put_back(tables: Tables, config: Config, tmp_path: Path) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    fit(*tables, out=tmp_path / "run", config=config.replace(num_epochs=1))
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_finished_run_is_not_trained_again(
    tables: Tables, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(*tables, out=tmp_path / "run", config=config)
    written = run.weights_path.stat().st_mtime_ns
    fit(*tables, out=tmp_path / "run", config=config.replace(num_workers=1))
    assert run.weights_path.stat().st_mtime_ns == written
    assert "complete already" in capsys.readouterr().err


def test_unreadable_images_are_named_counted_and_skipped(
    tables: Tables, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = tables
    train.path(4).write_bytes(b"broken")
    val.path(1).write_bytes(b"")
    run = fit(train, val, out=tmp_path / "run", config=config)
    said = capsys.readouterr().err
    assert said.count(f"skipped an unreadable image: {train.path(4)}") == 1
    row = run.history()[-1]
    assert row["unreadable_images"] == 1
    assert (row["images"], row["captions"]) == (7, 35)


def test_frozen_text_tower_is_not_optimised_or_changed(
    tables: Tables, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimised: list[torch.optim.Optimizer] = []
    real = torch.optim.AdamW

    def adamw(*args: Any, **options: Any) -> torch.optim.Optimizer:
        optimised.append(real(*args, **options))
        return optimised[-1]

    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    model = CLIPModel.from_config(config)
    text = model.text_encoder.model  # type: ignore[attr-defined]
    before = {key: value.clone() for key, value in text.state_dict().items()}
    fit(*tables, out=tmp_path / "run", config=config, model=model)
    assert all(torch.equal(before[key], value) for key, value in text.state_dict().items())
    own = {id(p) for p in text.parameters()}
    trained = [p for group in optimised[0].param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in model.parameters()}
    assert not own & {id(p) for p in trained}


class OwnTower(nn.Module):
    """An image tower of one's own."""

    name, feature_dim, preprocess = "own", 8, Preprocess(16)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, pixels: torch.Tensor) -> Features:
        maps = torch.relu(self.conv(pixels))
        return Features(maps.mean((2, 3)), maps)

    def description(self) -> dict[str, Any]:
        return {"kind": "own", "name": "own"}


class LearntTemperature(nn.Module):
    """A loss of one's own, with a weight to train."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return InfoNCELoss(temperature=1.0)(image * self.log_scale.exp(), text)


def test_own_towers_and_losses_are_handed_in(
    tables: Tables, config: Config, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = CLIPModel(config.text_encoder, image_encoder=OwnTower(), use_attention_pooling=True)
    criterion = LearntTemperature()
    config = config.replace(use_attention_pooling=True)
    run = fit(*tables, out=tmp_path / "run", config=config, model=model, criterion=criterion)
    assert float(criterion.log_scale.detach()) != 2.0
    with pytest.raises(CaptuneError, match="hand it in"):
        run.load_model()
    assert run.load_model(image_encoder=OwnTower()).suffix == "_attn"


def test_tensorboard_gets_the_curves(tables: Tables, config: Config, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fit(*tables, out=tmp_path / "run", config=config.replace(log_with="tensorboard"))
    folder = next(path.parent for path in (run.folder / "logs").rglob("events*"))
    events = EventAccumulator(str(folder))
    events.Reload()
    logged = [event.value for event in events.Scalars("val/rsum")]
    assert logged == pytest.approx([row["rsum"] for row in run.history()])


def test_a_logger_that_is_not_installed_names_its_extra(
    tables: Tables, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CaptuneError, match=r"captune\[wandb\]"):
        fit(*tables, out=tmp_path / "run", config=config.replace(log_with="wandb"))


def test_warm_up_is_cut_aloud(
    tables: Tables, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(*tables, out=tmp_path / "run", config=config.replace(num_epochs=4))
    said = capsys.readouterr().err
    assert "warm-up cut from 500 to 1: a tenth of all steps" in said
    assert said.startswith("recipe plain · towers clip-resnet50 · image_encoder=")
    assert said.count("recipe plain") == 1


def test_a_loss_that_is_no_number_stops_the_run(
    tables: Tables, config: Config, tmp_path: Path
) -> None:
    class Broken(nn.Module):
        def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return (image * float("nan")).sum()

    with pytest.raises(CaptuneError, match="the loss is nan in epoch 1"):
        fit(*tables, out=tmp_path / "run", config=config, criterion=Broken())


def test_a_run_keeps_what_it_saw(tables: Tables, config: Config, tmp_path: Path) -> None:
    train, val = tables
    run = fit(train, val, out=tmp_path / "run", config=config.replace(num_epochs=1))
    assert run.overlap(train) == {"trained": 24, "selected": 0}
    assert run.overlap(val.take_images([0, 1, 2])) == {"trained": 0, "selected": 3}
    stated = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    assert stated["config"]["batch_size"] == 8 and stated["format_version"] == 1


def test_after_each_epoch_the_run_is_handed_over_with_history_weights_and_state(
    tables: Tables, config: Config, tmp_path: Path
) -> None:
    seen: list[tuple[int, bool, bool]] = []

    def look(run: Run) -> None:
        seen.append((len(run.history()), run.weights_path.is_file(), run.state_path.is_file()))

    fit(*tables, out=tmp_path / "run", config=config, on_epoch=look)
    assert seen == [(1, True, True), (2, True, True), (3, True, True)]


def test_what_the_hook_raises_ends_the_training_which_goes_on_later(
    tables: Tables, config: Config, tmp_path: Path
) -> None:
    whole = fit(*tables, out=tmp_path / "whole", config=config)

    def fail(run: Run) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        fit(*tables, out=tmp_path / "run", config=config, on_epoch=fail)
    resumed = fit(*tables, out=tmp_path / "run", config=config, resume=True)
    assert resumed.is_complete and same_weights(whole, resumed)
