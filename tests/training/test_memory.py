"""A step that does not fit: done again in smaller chunks, as if the first try had never been."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captune.bank import CaptionBank
from captune.config import Config
from captune.data.dataset import COCOClipDataset
from captune.data.table import CaptionTable
from captune.encoders.image import Features
from captune.errors import CaptuneError
from captune.models import CLIPModel
from captune.preprocess import Preprocess
from captune.training import steps as steps_module
from captune.training.checkpoint import read_progress
from captune.training.criteria import make_criterion
from captune.training.fit import fit
from captune.training.loader import make_loader
from captune.training.memory import is_out_of_memory
from captune.training.progress import EpochProgress
from captune.training.run import Run
from captune.training.steps import make_accelerator, train_epoch
from captune.training.stop import TrainingStopped

Tables = tuple[CaptionTable, CaptionTable]
FITS = 2  # images at a time


class Tower(nn.Module):
    """A backbone that draws, with a BatchNorm; above ``fits`` images it finds no memory.

    ``where``: in the forward pass, behind the BatchNorm, or in the backward pass, where the
    weights behind have their gradient already.
    """

    name, feature_dim, preprocess = "tower", 12, Preprocess(32)

    def __init__(self, where: str = "forward") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.4)
        self.second = nn.Conv2d(8, 12, 3, stride=2)
        self.fits = 10**6
        self.where = where
        self.failed = 0
        self.seen: list[int] = []

    def forward(self, pixels: Tensor) -> Features:
        self.seen.append(len(pixels))
        hidden = self.norm(self.first(pixels))
        if len(pixels) > self.fits:
            if self.where == "forward":
                self._fail()
            elif hidden.requires_grad:
                hidden.register_hook(lambda gradient: self._fail())
        maps = self.second(self.dropout(torch.relu(hidden)))
        return Features(maps.mean((2, 3)), maps)

    def _fail(self) -> None:
        self.failed += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    def description(self) -> dict[str, Any]:
        return {"kind": "own", "name": "tower"}


@pytest.fixture
def config(best: Config) -> Config:
    """Stage 2 alone, whose backbone draws nothing that chunks would draw otherwise."""
    return best.replace(head_epochs=0, num_epochs=2, mixup=0.0, bank_negatives=8)


def model_of(config: Config, tower: Tower) -> CLIPModel:
    torch.manual_seed(0)
    model = CLIPModel(config.text_encoder, image_encoder=tower, hidden_dim=32, dropout=0.3)
    tower.dropout.p = 0.0  # each chunk would draw masks of its own
    return model


class Epoch:
    """One epoch of three steps, and all that it leaves."""

    def __init__(
        self, tables: Tables, config: Config, tower: Tower, *, chunk_size: int | None = None
    ) -> None:
        config = config if chunk_size is None else config.replace(chunk_size=chunk_size)
        model = model_of(config, tower)
        bank = CaptionBank.build(tables[0].texts(), model.text_encoder, precision="fp32")
        loader = make_loader(COCOClipDataset(table=tables[0], image_size=32), bank, config)
        criterion = make_criterion(config, model.dimension)
        accelerator = make_accelerator(config)
        own = list(criterion.parameters()) if isinstance(criterion, nn.Module) else []
        inner = torch.optim.AdamW([*model.parameters(), *own], lr=0.01)
        optimizer = accelerator.prepare_optimizer(inner, device_placement=False)
        self.progress = EpochProgress(1)
        torch.manual_seed(1)
        self.result = train_epoch(
            model,
            loader,
            criterion,
            optimizer,
            epoch=1,
            config=config,
            accelerator=accelerator,
            progress=self.progress,
        )
        self.state = [
            copy.deepcopy(model.state_dict()),
            criterion.state_dict() if isinstance(criterion, nn.Module) else {},
            inner.state_dict()["state"],
            torch.rand(4),
        ]
        self.hooks = len(inner._optimizer_step_pre_hooks)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_step_done_again_is_the_step_of_smaller_chunks(
    tables: Tables, config: Config, where: str, frozen: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, the optimiser's moments and steps, BatchNorm's and the queue's memory, and what is
    drawn next: to the bit those of a run that had the chunk size from the start."""
    config = config.replace(freeze_batch_norm=frozen, image_queue=16, head_mixup=0.0)
    expected = Epoch(tables, config, Tower(), chunk_size=FITS)
    capsys.readouterr()
    tower = Tower(where)
    tower.fits = FITS
    found = Epoch(tables, config, tower)
    torch.testing.assert_close(found.state, expected.state, rtol=0, atol=0)
    assert found.result["train_loss"] == expected.result["train_loss"]
    assert tower.failed == 2 and max(tower.seen[-12:]) == FITS
    assert found.progress.chunk_size == FITS
    assert found.hooks == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "chunk_size=" in line]
    assert len(said) == 2
    assert "8 images, 8 at a time" in said[0] and "chunk_size=4" in said[0]
    assert "8 images, 4 at a time" in said[1] and "chunk_size=2" in said[1]
    assert all(("BatchNorm" in line) != frozen for line in said)


def test_a_step_that_fits_is_left_alone(
    tables: Tables, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Epoch(tables, config, Tower())
    assert found.progress.chunk_size == 0 and "chunk_size" not in capsys.readouterr().err


def test_one_image_that_does_not_fit_is_an_error(tables: Tables, config: Config) -> None:
    tower = Tower()
    tower.fits = 0
    with pytest.raises(CaptuneError, match=r"1 at a time, does not fit .*\(CUDA out of memory"):
        Epoch(tables, config, tower)
    assert tower.failed == 4  # with 8, 4, 2 and 1


def test_memory_that_runs_out_while_weights_change_is_an_error(
    tables: Tables, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of them may have changed already: the step cannot be done again."""

    def step(self: Any, closure: Any = None) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(torch.optim.AdamW, "step", torch.optim.Optimizer.profile_hook_step(step))
    with pytest.raises(CaptuneError, match=r"ran out while the weights were changed.*chunk_size=4"):
        Epoch(tables, config, Tower())


def test_kept_features_have_no_chunks(
    tables: Tables, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def head(self: Any, pooled: Tensor) -> Tensor:
        if self.training and pooled.requires_grad is False and torch.is_grad_enabled():
            raise MemoryError
        return real(self, pooled)

    real = CLIPModel.project_image
    monkeypatch.setattr(CLIPModel, "project_image", head)
    with pytest.raises(CaptuneError, match="give a smaller head_batch_size"):
        fit(*tables, out=tmp_path / "run", config=config.replace(head_epochs=1))


@pytest.mark.parametrize("threads", [1, 2])
def test_pairs_that_do_not_fit_are_told_like_the_step_they_are_for(
    tables: Tables,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
) -> None:
    """On two threads they are found by another one, ahead of the step."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(steps_module, "match_pairs", partial(raise_it, MemoryError))
    with pytest.raises(CaptuneError, match=r"head_batch_size or fewer bank_negatives"):
        fit(*tables, out=tmp_path / "run", config=config.replace(head_epochs=1))
    monkeypatch.setattr(steps_module, "match_pairs", partial(raise_it, RuntimeError("no such")))
    with pytest.raises(RuntimeError, match="no such"):
        fit(*tables, out=tmp_path / "again", config=config.replace(head_epochs=1))


def raise_it(error: BaseException | type[BaseException], *_: object, **__: object) -> None:
    raise error


def test_other_errors_pass(tables: Tables, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, pixels: Tensor) -> Features:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Tower, "forward", broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        Epoch(tables, config, Tower())


def test_what_allocators_say_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)  # no machine has it
    assert is_out_of_memory(caught.value)
    windows = "[enforce fail at alloc_cpu.cpp:115] data. DefaultCPUAllocator: not enough memory"
    assert is_out_of_memory(RuntimeError(windows))
    assert is_out_of_memory(torch.OutOfMemoryError("")) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("could not create a primitive"))  # oneDNN, of memory too
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_run_keeps_the_smaller_chunks_and_a_resumed_one_tries_again(
    tables: Tables,
    config: Config,
    tmp_path: Path,
    ctrl_c_in_step: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another machine may have more memory; the config of the run is what it was."""

    def train(out: str, *, resume: bool = False, fits: int = FITS) -> Run:
        tower = Tower()
        tower.fits = fits
        model = model_of(config, tower)
        return fit(*tables, out=tmp_path / out, config=config, model=model, resume=resume)

    train("whole")
    assert capsys.readouterr().err.count("going on with chunk_size") == 2  # in the first epoch
    ctrl_c_in_step(4)
    with pytest.raises(TrainingStopped) as stopped:
        train("run")
    run = stopped.value.run
    assert read_progress(run.state_path).chunk_size == FITS
    capsys.readouterr()
    train("run", resume=True, fits=8)
    assert "going on with" not in capsys.readouterr().err
    assert Run.open(run.folder).config.chunk_size == 0


@pytest.mark.parametrize("fits", [2, 0])
def test_a_validation_that_does_not_fit_is_done_again(
    tables: Tables,
    config: Config,
    tmp_path: Path,
    fits: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def forward(self: Any, pixels: Tensor) -> Features:
        if not self.training and len(pixels) > fits:
            self._fail()
        return real(self, pixels)

    def train(out: str) -> list[float]:
        tower = Tower()
        run = fit(*tables, out=tmp_path / out, config=config, model=model_of(config, tower))
        return [row["rsum"] for row in run.history()]

    whole = train("whole")
    real = Tower.forward
    monkeypatch.setattr(Tower, "forward", forward)
    if fits:
        assert train("run") == pytest.approx(whole)
        said = capsys.readouterr().err
        assert said.count("it is done again with 4") == said.count("it is done again with 2") == 2
    else:
        with pytest.raises(CaptuneError, match="validation of 1 images at a time does not fit"):
            train("run")
