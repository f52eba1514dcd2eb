"""On a CUDA card (make test-gpu): the CPU's numbers, and the same ones each time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from captune.bank import CaptionBank
from captune.config import Config
from captune.data.dataset import COCOClipDataset
from captune.data.table import CaptionTable
from captune.device import best_device
from captune.evaluation.embeddings import embed_images
from captune.models import CLIPModel
from captune.ranks import TILE_ON_GPU, retrieval_ranks
from captune.training.criteria import make_criterion
from captune.training.fit import fit
from captune.training.loader import make_loader
from captune.training.run import Run
from captune.training.steps import make_accelerator, train_epoch
from captune.training.stop import TrainingStopped

Tables = tuple[CaptionTable, CaptionTable]


@pytest.fixture(autouse=True)
def card() -> torch.device:
    """All tests here need one; without it they shall fail, for it was asked for."""
    device = best_device()
    assert device.type == "cuda", "no CUDA card here"
    return device


def weights(run: Run) -> dict[str, torch.Tensor]:
    return dict(CLIPModel.from_pretrained(run.folder).state_dict())


def same_weights(one: Run, other: Run) -> bool:
    first, second = weights(one), weights(other)
    return all(torch.equal(first[key], second[key]) for key in first)


def gradients(
    config: Config, table: CaptionTable, cache: Path, **changes: Any
) -> tuple[float, torch.Tensor]:
    """Loss of the first step, and the backbone's gradients as the optimiser would see them."""
    torch.manual_seed(0)
    config = config.replace(augment=False, dropout=0.0, feature_dropout=0.0, mixup=0.0, **changes)
    accelerator = make_accelerator(config)
    model = CLIPModel.from_config(config, device=accelerator.device)
    bank = CaptionBank.build(table.texts(), model.text_encoder, cache=cache, progress=False)
    dataset = COCOClipDataset(table=table, image_size=32, augment=False)
    loader = make_loader(dataset, bank, config)
    found: dict[str, torch.Tensor] = {}

    class Optimizer(torch.optim.SGD):
        def step(self, *rest: Any) -> None:  # type: ignore[override]
            parts = [p.grad for p in model.image_encoder.parameters() if p.grad is not None]
            found["all"] = torch.cat([part.float().flatten().cpu() for part in parts])

    optimizer = accelerator.prepare_optimizer(Optimizer(model.parameters(), lr=0.0))
    criterion = make_criterion(config, model.dimension)
    done = train_epoch(
        model, loader, criterion, optimizer, None, 0, config, accelerator=accelerator
    )
    return done["train_loss"], found["all"]


@pytest.mark.parametrize("changes", [{}, {"chunk_size": 3}], ids=["at once", "in chunks"])
def test_loss_and_gradients_are_the_cpus(
    best: Config, tables: Tables, tmp_path: Path, changes: dict[str, Any]
) -> None:
    one = best.replace(batch_size=24)  # an epoch is one step
    expected = gradients(one.replace(device="cpu"), tables[0], tmp_path)
    found = gradients(one, tables[0], tmp_path, **changes)
    assert found[0] == pytest.approx(expected[0], rel=1e-3)
    # TF32 in convolutions rounds to ten bits.
    assert (found[1] - expected[1]).norm() < 0.01 * expected[1].norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_same_seed_gives_the_same_weights_in_both_stages(
    best: Config, tables: Tables, tmp_path: Path, precision: str
) -> None:
    config = best.replace(precision=precision, augment=True)
    runs = [fit(*tables, out=tmp_path / str(number), config=config) for number in range(2)]
    assert same_weights(*runs)
    other = fit(*tables, out=tmp_path / "other", config=config.replace(seed=1))
    assert not same_weights(runs[0], other)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stop_at", [4, 8])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    best: Config,
    tables: Tables,
    tmp_path: Path,
    ctrl_c_in_step: Callable[[int], None],
    precision: str,
    stop_at: int,
) -> None:
    """Three steps an epoch, two epochs a stage: stopped in the middle of each."""
    config = best.replace(precision=precision, augment=True)
    whole = fit(*tables, out=tmp_path / "whole", config=config)
    ctrl_c_in_step(stop_at)
    with pytest.raises(TrainingStopped):
        fit(*tables, out=tmp_path / "run", config=config)
    torch.manual_seed(99)
    run = fit(*tables, out=tmp_path / "run", config=config, resume=True)
    assert same_weights(whole, run)


@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-3), ("bf16", 0.05)])
def test_a_runs_embeddings_are_the_cpus(
    best: Config, tables: Tables, tmp_path: Path, precision: str, error: float
) -> None:
    run = fit(*tables, out=tmp_path / "run", config=best)
    model = CLIPModel.from_pretrained(run.folder)
    expected = embed_images(model.to("cpu"), tables[1], precision="fp32", num_workers=0).vectors
    found = embed_images(model.to("cuda"), tables[1], precision=precision, num_workers=1).vectors
    assert (found.cpu() - expected).abs().max() < error


def test_equal_pictures_tie_on_the_card_wherever_they_lie(card: torch.device) -> None:
    """Equal embeddings in other tiles, the last of which are smaller, score the same bits."""
    images = TILE_ON_GPU[0] + 300
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(images, 384, generator=generator), dim=-1)
    image[-1] = image[0]
    owner = torch.arange(images).repeat_interleave(5)
    noise = F.normalize(torch.randn(5 * images, 384, generator=generator), dim=-1)
    found = retrieval_ranks(image, F.normalize(image[owner] + 0.1 * noise), owner, device=card)
    twins = (owner == 0) | (owner == images - 1)
    assert bool((found.caption[twins] == 2).all())
    assert bool((found.caption[~twins] == 1).all())


def test_ranks_are_the_cpus_ties_included(card: torch.device) -> None:
    """Tiles of a card's size; scores of few levels, which are exact in fp32."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 4, (5000, 16), generator=generator).float()
    text = torch.randint(0, 4, (25_000, 16), generator=generator).float()
    owner = torch.arange(25_000) % 5000
    expected = retrieval_ranks(image, text, owner, every_caption=True)
    torch.cuda.reset_peak_memory_stats()
    found = retrieval_ranks(image, text, owner, every_caption=True, device=card)
    assert torch.cuda.max_memory_allocated() > 4 * TILE_ON_GPU[0] * TILE_ON_GPU[1]  # it was there
    for one, other in zip(found, expected, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_a_batch_too_large_for_the_card_is_done_in_chunks(
    best: Config,
    tables: Tables,
    tmp_path: Path,
    card: torch.device,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The card is told that it has little memory; the gradients are those of the whole batch."""
    towers = best.replace(batch_size=24, image_size=256, precision="fp32")
    expected = gradients(towers, tables[0], tmp_path)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    again = gradients(copy.deepcopy(towers), tables[0], tmp_path)
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(card).total_memory
    torch.cuda.set_per_process_memory_fraction((held + 0.6 * (peak - held)) / total)
    try:
        found = gradients(towers, tables[0], tmp_path)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(again[1], expected[1])
    assert "going on with chunk_size=" in capsys.readouterr().err
    assert (found[1] - expected[1]).norm() < 0.01 * expected[1].norm()
