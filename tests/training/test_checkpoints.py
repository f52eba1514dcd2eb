"""Checkpoints of a run: which are kept, under which names, whatever interrupts the training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from captune.config import Config
from captune.data.table import CaptionTable
from captune.errors import CaptuneError
from captune.models import CLIPModel
from captune.training import loop as loop_module
from captune.training.checkpoints import checkpoint_weights, checkpoints, split_name
from captune.training.fit import fit
from captune.training.run import Run
from captune.training.stop import TrainingStopped

Tables = tuple[CaptionTable, CaptionTable]
State = dict[str, torch.Tensor]


@pytest.fixture
def best(best: Config) -> Config:
    """Three epochs of stage 2, each of which is kept."""
    return best.replace(num_epochs=3, keep_epochs=True)


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> list[State]:
    """The weights that each validation saw; of five epochs the second and the fourth are best."""
    seen: list[State] = []
    real = loop_module.validate
    scores = [10.0, 20.0, 15.0, 30.0, 25.0]

    def validate(model: CLIPModel, *rest: Any) -> dict[str, Any]:
        seen.append({key: value.clone() for key, value in model.state_dict().items()})
        return {**real(model, *rest), "rsum": scores[len(seen) - 1]}

    monkeypatch.setattr(loop_module, "validate", validate)
    return seen


def kept(run: Run) -> dict[str, State]:
    return {path.stem: load_file(path) for path in sorted((run.folder / "checkpoints").iterdir())}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def but_temperature(state: State) -> State:
    """A state as it was validated; the learnt temperature is written when it is saved."""
    return {key: value for key, value in state.items() if key != "logit_scale"}


def test_the_end_of_stage_1_and_each_epoch_of_stage_2_are_kept_as_they_were_validated(
    tables: Tables, best: Config, tmp_path: Path, validated: list[State]
) -> None:
    run = fit(*tables, out=tmp_path / "run", config=best)
    found = kept(run)
    assert checkpoints(run) == ["stage-1", "epoch-3", "epoch-4", "epoch-5", "best"]
    epochs = {"stage-1": 2, "epoch-3": 3, "epoch-4": 4, "epoch-5": 5}
    assert found.keys() == epochs.keys()
    history = run.history()
    for name, epoch in epochs.items():
        assert same(but_temperature(found[name]), but_temperature(validated[epoch - 1])), name
        temperature = history[epoch - 1]["temperature"]
        assert 1 / float(found[name]["logit_scale"]) == pytest.approx(temperature, rel=1e-5)
    assert same(found["epoch-4"], load_file(run.weights_path))


def test_without_keep_epochs_only_the_end_of_stage_1_is_kept(
    tables: Tables, best: Config, tmp_path: Path
) -> None:
    plain = fit(*tables, out=tmp_path / "run", config=best.replace(keep_epochs=False))
    assert checkpoints(plain) == ["stage-1", "best"]
    whole = fit(*tables, out=tmp_path / "whole", config=best)
    assert same(load_file(plain.weights_path), load_file(whole.weights_path))


@pytest.mark.parametrize("changes", [{"freeze_backbone": True}, {"head_epochs": 0}])
def test_a_run_of_one_stage_has_no_end_of_stage_1(
    tables: Tables, best: Config, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = best.replace(keep_epochs=False, num_epochs=1, **changes)
    assert checkpoints(fit(*tables, out=tmp_path / "run", config=config)) == ["best"]


@pytest.mark.parametrize(
    ("stop_at", "changes"), [(6, {}), (7, {"ema_decay": 0.0}), (11, {}), (15, {"soup": 2})]
)
def test_a_resumed_run_ends_with_the_same_checkpoints(
    tables: Tables,
    best: Config,
    tmp_path: Path,
    ctrl_c_in_step: Callable[[int], None],
    stop_at: int,
    changes: dict[str, Any],
) -> None:
    """Three steps an epoch; stopped in both stages, in the middle and before a validation."""
    config = best.replace(**changes)
    whole = fit(*tables, out=tmp_path / "whole", config=config)
    ctrl_c_in_step(stop_at)
    with pytest.raises(TrainingStopped):
        fit(*tables, out=tmp_path / "run", config=config)
    run = fit(*tables, out=tmp_path / "run", config=config, resume=True)
    expected, found = kept(whole), kept(run)
    assert expected.keys() == found.keys()
    assert all(same(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("when", ["before the state", "after the state"])
def test_killed_between_the_stages_the_end_of_stage_1_is_the_same(
    tables: Tables, best: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    whole = fit(*tables, out=tmp_path / "whole", config=best)
    save = loop_module.save_state

    def kills(path: Path, parts: Any, progress: Any) -> None:
        due = (progress.epoch, progress.step) == (2, 0)
        if not due or when == "after the state":
            save(path, parts, progress)
        if due:
            raise MemoryError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "save_state", kills)
        with pytest.raises(MemoryError):
            fit(*tables, out=tmp_path / "run", config=best)
    run = fit(*tables, out=tmp_path / "run", config=best, resume=True)
    assert same(kept(whole)["stage-1"], kept(run)["stage-1"])


def test_keeping_epochs_may_be_decided_when_a_run_is_resumed_and_old_runs_lack_the_key(
    tables: Tables, best: Config, tmp_path: Path
) -> None:
    run = fit(*tables, out=tmp_path / "run", config=best.replace(keep_epochs=False, num_epochs=1))
    assert (
        run.differences(Run(run.folder, run.config.replace(keep_epochs=True), run.provenance)) == []
    )
    path = run.folder / "config.json"
    stated = json.loads(path.read_text(encoding="utf-8"))
    del stated["config"]["keep_epochs"]
    path.write_text(json.dumps(stated), encoding="utf-8")
    assert Run.open(run.folder).config == run.config


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("runs/x", ("runs/x", "best")),
        ("runs/x@stage-1", ("runs/x", "stage-1")),
        ("runs/x@best", ("runs/x", "best")),
        ("runs/x@", ("runs/x", "")),
        ("a@b/run", ("a@b/run", "best")),
        ("a@b/run@epoch-7", ("a@b/run", "epoch-7")),
        ("@stage-1", ("@stage-1", "best")),
        ("mine@home", ("mine@home", "best")),  # a folder of that name is there
    ],
)
def test_a_name_is_a_folder_and_a_checkpoint(
    name: str, expected: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine@home").mkdir()
    assert split_name(name) == expected


def test_a_wrong_name_says_which_there_are(config: Config, tmp_path: Path) -> None:
    from captune.training.run import Provenance

    run = Run(tmp_path / "run", config, Provenance())
    folder = run.folder / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("epoch-10", "epoch-9", "stage-1", "notes"):
        (folder / f"{name}.safetensors").touch()
    with pytest.raises(
        CaptuneError,
        match=r"run holds no checkpoint 'epoch-8': there are stage-1, epoch-9, epoch-10, best",
    ):
        checkpoint_weights(run, "epoch-8")
    for name in ("notes", "../best_model", ""):
        with pytest.raises(CaptuneError, match="holds no checkpoint"):
            checkpoint_weights(run, name)
    assert checkpoint_weights(run, "best") == run.weights_path
