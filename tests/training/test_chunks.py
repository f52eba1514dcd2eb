"""A batch in chunks against the same batch at once, and against a loop that keeps every graph."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from captune.bank import CaptionBank
from captune.config import Config
from captune.data.augment import colour_factors, jitter_colours
from captune.data.dataset import COCOClipDataset
from captune.data.table import CaptionTable
from captune.encoders.image import Features
from captune.losses import ContrastiveLoss, Criterion, InfoNCELoss
from captune.models import CLIPModel
from captune.preprocess import Preprocess
from captune.training import steps as steps_module
from captune.training.chunks import PooledChunks, even_slices
from captune.training.criteria import make_criterion
from captune.training.fit import fit
from captune.training.loader import Batch, make_loader
from captune.training.mixing import Mix, draw_mix
from captune.training.run import Run
from captune.training.steps import make_accelerator, train_epoch, train_step
from captune.training.stop import TrainingStopped
from captune.training.validation import validate

Tables = tuple[CaptionTable, CaptionTable]
IMAGES, CAPTIONS, CHUNK = 8, 24, 3  # chunks of 2, 3 and 3


@pytest.fixture
def best(best: Config) -> Config:
    """One epoch of stage 1, two of stage 2."""
    return best.replace(head_epochs=1)


class DrawingTower(nn.Module):
    """A backbone that draws: dropout between two convolutions, and a BatchNorm."""

    name, feature_dim, preprocess = "drawing", 12, Preprocess(32)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.4)
        self.second = nn.Conv2d(8, 12, 3, stride=2)

    def forward(self, pixels: Tensor) -> Features:
        maps = self.second(self.dropout(torch.relu(self.norm(self.first(pixels)))))
        return Features(maps.mean((2, 3)), maps)

    def description(self) -> dict[str, Any]:
        return {"kind": "own", "name": "drawing"}


class OwnLoss(nn.Module):
    """A loss of one's own that knows no pairs, with a weight to train."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return InfoNCELoss(temperature=1.0)(image * self.scale, text)


def batch_of(seed: int = 0) -> Batch:
    """Noise, three captions an image, the first eight one of each."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (IMAGES, 3, 32, 32), generator=generator, dtype=torch.uint8)
    text = F.normalize(torch.randn(CAPTIONS, 16, generator=generator), dim=-1)
    rows = torch.arange(IMAGES)
    return Batch(pixels, text, rows, rows.repeat(3), CAPTIONS)


def training_model(config: Config, tower: type[nn.Module] | None = None) -> CLIPModel:
    """As `train_epoch` prepares it; the seed decides its weights."""
    torch.manual_seed(0)
    model = CLIPModel(
        config.text_encoder,
        image_encoder=tower() if tower else config.image_encoder,
        hidden_dim=32,
        dropout=config.dropout,
        feature_dropout=config.feature_dropout,
        use_batch_norm=config.use_batch_norm,
        use_attention_pooling=config.use_attention_pooling,
        generalised_pooling=config.generalised_pooling,
        text_adapter=config.text_adapter,
    ).train()
    if config.freeze_batch_norm:
        for module in model.image_encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    return model


class Step:
    """What one step gave: loss, gradients before the optimiser, weights and draws after it."""

    def __init__(
        self,
        model: CLIPModel,
        config: Config,
        criterion: Criterion,
        mix: Mix | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        accelerator = accelerator or make_accelerator(config)
        own = list(criterion.parameters()) if isinstance(criterion, nn.Module) else []
        optimizer = torch.optim.SGD([*model.parameters(), *own], lr=0.1)
        self.gradients: list[Tensor | None] = []
        optimizer.register_step_pre_hook(
            lambda done, *_: self.gradients.extend(
                None if p.grad is None else p.grad.clone()
                for group in done.param_groups
                for p in group["params"]
            )
        )
        prepared = accelerator.prepare_optimizer(optimizer, device_placement=False)
        torch.manual_seed(1)
        self.loss, self.accuracy = train_step(
            model, batch_of(), criterion, prepared, accelerator, config, mix
        )
        self.weights = [*(p.detach().clone() for p in model.parameters())]
        self.next_draw = torch.rand(4)


def assert_same(one: Step, other: Step, **tolerance: float) -> None:
    close = tolerance or {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close([one.loss, one.accuracy], [other.loss, other.accuracy], **close)
    assert len(one.gradients) == len(other.gradients) > 0
    for a, b in zip(one.gradients, other.gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, **close)
    torch.testing.assert_close(one.weights, other.weights, **close)
    assert torch.equal(one.next_draw, other.next_draw)


def test_the_pairs_are_gone_when_the_chunks_pass_again(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a batch of 4,096 they take half a gigabyte."""
    pairs: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    class Watched(ContrastiveLoss):
        def forward(self, image: Tensor, text: Tensor, known: Any = None) -> Tensor:
            pairs.append(weakref.ref(known.positive))
            return super().forward(image, text, known)

    real = PooledChunks.backward

    def backward(self: PooledChunks, *rest: Any) -> None:
        alive.extend(pair() is not None for pair in pairs)
        real(self, *rest)

    monkeypatch.setattr(PooledChunks, "backward", backward)
    config = config.replace(chunk_size=CHUNK)
    Step(training_model(config), config, Watched())
    assert alive == [False]


def mixed(config: Config) -> Mix | None:
    mix = draw_mix(IMAGES, config.mixup, seed=0, epoch=0, step=0)
    return mix and mix._replace(photos=config.mix_photos)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mix_photos": True},
        {"mixup": 0.0},
        {"use_batch_norm": True, "text_adapter": True},
        {"use_attention_pooling": True},
        {"generalised_pooling": True},
        {"loss": "siglip", "mixup": 0.0},
    ],
)
def test_a_step_in_chunks_is_the_step_at_once(
    best: Config, changes: dict[str, Any], clipped: bool
) -> None:
    """Dropout of the head included, and the generator stands where it would."""
    config = best.replace(**changes, max_grad_norm=0.1 if clipped else 1e9)
    steps = [
        Step(training_model(c), c, make_criterion(c), mixed(c))
        for c in (config, config.replace(chunk_size=CHUNK))
    ]
    assert_same(*steps)
    norm = torch.stack([g.norm() for g in steps[1].gradients if g is not None]).norm()
    assert clipped == bool(norm < 0.11)


def test_a_loss_of_ones_own_works_in_chunks(best: Config) -> None:
    one, other = (
        Step(training_model(c), c, OwnLoss(), mixed(c))
        for c in (best, best.replace(chunk_size=CHUNK))
    )
    assert_same(one, other)


def count_images(model: CLIPModel, patch: pytest.MonkeyPatch) -> list[int]:
    """How many images each pass through the backbone has."""
    seen: list[int] = []
    real = model.pooled_features

    def pooled(pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return real(pixels)

    patch.setattr(model, "pooled_features", pooled)
    return seen


@pytest.mark.parametrize(
    ("chunk_size", "passes"),
    [(0, [8]), (8, [8]), (100, [8]), (4, [4] * 4), (3, [2, 3, 3] * 2), (1, [1] * 16)],
)
def test_the_backbone_is_passed_twice_only_where_the_batch_is_cut(
    best: Config, monkeypatch: pytest.MonkeyPatch, chunk_size: int, passes: list[int]
) -> None:
    config = best.replace(chunk_size=chunk_size)
    model = training_model(config)
    seen = count_images(model, monkeypatch)
    Step(model, config, make_criterion(config), mixed(config))
    assert seen == passes


def test_a_backbone_of_which_nothing_trains_is_passed_once(
    best: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = best.replace(chunk_size=CHUNK)
    steps = []
    for c in (best, config):
        model = training_model(c)
        model.image_encoder.requires_grad_(False)
        seen = count_images(model, monkeypatch)
        steps.append(Step(model, c, make_criterion(c), mixed(c)))
    assert seen == [2, 3, 3]
    assert_same(*steps)


def test_gradual_unfreezing_reaches_the_open_layers_alone(best: Config) -> None:
    steps = []
    for c in (best, best.replace(chunk_size=CHUNK)):
        model = training_model(c)
        closed = list(model.image_encoder.parameters())[:3]
        for parameter in closed:
            parameter.requires_grad_(False)
        steps.append(Step(model, c, make_criterion(c), mixed(c)))
    assert_same(*steps)
    assert sum(gradient is None for gradient in steps[1].gradients) == 3


def test_kept_features_are_not_cut(best: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = best.replace(chunk_size=CHUNK)
    model = training_model(config)
    seen = count_images(model, monkeypatch)
    batch = batch_of()._replace(inputs=torch.randn(IMAGES, 32))
    accelerator = make_accelerator(config)
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    train_step(model, batch, make_criterion(config), optimizer, accelerator, config)
    assert seen == []


def slow_step(model: CLIPModel) -> tuple[list[Tensor], Tensor]:
    """Gradients by a loop over the chunks that keeps every graph until one backward; and what is
    drawn next."""
    torch.manual_seed(1)
    batch = batch_of()
    pooled = [model.pooled_features(batch.inputs[rows]) for rows in even_slices(IMAGES, CHUNK)]
    image = model.project_image(torch.cat(pooled))
    InfoNCELoss()(image, batch.text[:IMAGES]).backward()
    return [p.grad for p in model.parameters() if p.grad is not None], torch.rand(4)


@pytest.mark.parametrize("frozen", [True, False])
def test_both_passes_draw_alike_and_a_live_batch_norm_counts_each_chunk_once(
    best: Config, frozen: bool
) -> None:
    """With statistics that move, those of a chunk are taken in both passes."""
    config = best.replace(chunk_size=CHUNK, freeze_batch_norm=frozen, max_grad_norm=1e9)
    model = training_model(config, DrawingTower)
    reference = copy.deepcopy(model)
    expected, next_draw = slow_step(reference)
    step = Step(model, config, InfoNCELoss())
    torch.testing.assert_close(step.gradients, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(step.next_draw, next_draw)
    norm, slow_norm = model.image_encoder.norm, reference.image_encoder.norm
    assert isinstance(norm, nn.BatchNorm2d) and isinstance(slow_norm, nn.BatchNorm2d)
    assert int(norm.num_batches_tracked or 0) == (0 if frozen else 3)
    torch.testing.assert_close(dict(norm.named_buffers()), dict(slow_norm.named_buffers()))
    assert norm.track_running_stats and norm.training != frozen


def test_in_bf16_gradients_agree_within_its_noise(best: Config) -> None:
    """None is missing: weights that autocast casts without a gradient are not used for one."""
    config = best.replace(precision="bf16", dropout=0.0, feature_dropout=0.0, max_grad_norm=1e9)
    exact, plain, chunked = (
        Step(training_model(c), c, make_criterion(c), mixed(c))
        for c in (config.replace(precision="fp32"), config, config.replace(chunk_size=CHUNK))
    )

    def distance(step: Step) -> float:
        pairs = zip(step.gradients, exact.gradients, strict=True)
        flat = [(a - b).flatten() for a, b in pairs if a is not None and b is not None]
        assert len(flat) == sum(gradient is not None for gradient in exact.gradients)
        return float(torch.cat(flat).norm())

    assert distance(plain) > 0
    assert distance(chunked) < 1.5 * distance(plain)


def test_a_scaled_loss_is_not_scaled_twice(best: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """As fp16 scales it: the gradients are unscaled once, before they are clipped."""
    plain = Step(training_model(best), best, make_criterion(best), mixed(best))
    for config in (best, best.replace(chunk_size=CHUNK)):
        accelerator = make_accelerator(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        monkeypatch.setattr(
            accelerator, "autocast", nullcontext
        )  # fp16's scaling without its noise
        model = training_model(config)
        assert_same(Step(model, config, make_criterion(config), mixed(config), accelerator), plain)


def flat(numbers: dict[str, Any]) -> dict[str, Any]:
    """One level in place of two, to be compared within float noise."""
    levels = {k: v if isinstance(v, dict) else {"": v} for k, v in numbers.items()}
    return {f"{k} {inner}".strip(): v for k, level in levels.items() for inner, v in level.items()}


def test_validation_is_cut_too(
    tables: Tables, best: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = training_model(best)
    dataset = COCOClipDataset(table=tables[1], image_size=32)
    bank = CaptionBank.build(tables[1].texts(), model.text_encoder, precision="fp32")
    loader = make_loader(dataset, bank, best, shuffle=False)
    plain = validate(model, loader, InfoNCELoss(), best)
    seen = count_images(model, monkeypatch)
    chunked = validate(model, loader, InfoNCELoss(), best.replace(chunk_size=CHUNK))
    assert seen == [2, 3, 3]
    assert flat(chunked) == pytest.approx(flat(plain), rel=1e-5)


def test_colours_vary_as_in_the_batch_at_once(
    tables: Tables, best: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image's own; a whole batch of floats, which jittering needs, would take its memory."""
    config = best.replace(colour_jitter=0.4, chunk_size=CHUNK)
    model = training_model(config)
    bank = CaptionBank.build(tables[0].texts(), model.text_encoder, precision="fp32")
    loader = make_loader(COCOClipDataset(table=tables[0], image_size=32), bank, config)
    jittered: list[int] = []
    seen: list[Tensor] = []

    def jitter(pixels: Tensor, factors: Tensor) -> Tensor:
        jittered.append(len(pixels))
        return jitter_colours(pixels, factors)

    def pooled(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return real(pixels)

    real = model.pooled_features
    monkeypatch.setattr(steps_module, "jitter_colours", jitter)
    monkeypatch.setattr(model, "pooled_features", pooled)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_epoch(model, loader, InfoNCELoss(), optimizer, epoch=2, config=config)
    assert max(jittered) == CHUNK and sum(jittered) == 24
    for step, batch in enumerate(loader.batches(2)):
        ids = tables[0].image_ids[batch.images.numpy()]
        expected = jitter_colours(batch.inputs, colour_factors(ids, config.seed, 2, 0.4))
        for turn in (0, 3):  # both passes
            found = torch.cat(seen[6 * step + turn : 6 * step + turn + 3])
            assert torch.equal(found, expected)


def history_of(run: Run) -> list[dict[str, Any]]:
    """Its numbers without what the clock decides, flat."""
    clock = ("images_per_second", "seconds")
    return [flat({k: v for k, v in row.items() if k not in clock}) for row in run.history()]


def test_a_run_in_chunks_has_the_history_of_one_without(
    tables: Tables, best: Config, tmp_path: Path
) -> None:
    runs = [
        fit(*tables, out=tmp_path / str(size), config=best.replace(chunk_size=size))
        for size in (0, CHUNK)
    ]
    plain, chunked = map(history_of, runs)
    assert [row["stage"] for row in chunked] == [1, 2, 2]
    for a, b in zip(plain, chunked, strict=True):
        assert b == pytest.approx(a, rel=1e-3)


@pytest.mark.parametrize("tower", [None, DrawingTower])
def test_a_run_in_chunks_is_resumed_to_the_very_weights(
    tables: Tables,
    best: Config,
    tmp_path: Path,
    ctrl_c_in_step: Callable[[int], None],
    tower: type[nn.Module] | None,
) -> None:
    config = best.replace(chunk_size=CHUNK, freeze_batch_norm=False)

    def train(out: str, *, resume: bool = False) -> Run:
        model = training_model(config, tower)
        return fit(*tables, out=tmp_path / out, config=config, model=model, resume=resume)

    whole = train("whole")
    ctrl_c_in_step(5)  # three steps of stage 1, two of three in stage 2's first epoch
    with pytest.raises(TrainingStopped):
        train("run")
    resumed = train("run", resume=True)
    assert history_of(resumed) == history_of(whole)
    ended = [load_file(run.weights_path) for run in (resumed, whole)]
    torch.testing.assert_close(*ended, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [(8, 4, [4, 4]), (8, 3, [2, 3, 3]), (130, 128, [65, 65]), (5, 1, [1] * 5), (7, 6, [3, 4])],
)
def test_chunks_are_few_and_even_and_hold_every_row(
    count: int, size: int, sizes: list[int]
) -> None:
    rows = list(range(count))
    chunks = [rows[part] for part in even_slices(count, size)]
    assert [len(chunk) for chunk in chunks] == sizes
    assert [row for chunk in chunks for row in chunk] == rows
