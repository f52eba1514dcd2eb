"""Mixup: mixed pairs and the losses over them against slow loops; what a step draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from captune.config import Config
from captune.losses import ContrastiveLoss, SigLIPLoss
from captune.matching import Pairs, mix_pairs
from captune.models import CLIPModel
from captune.training.loader import Batch
from captune.training.mixing import Mix, draw_mix, step_mix
from slow_losses import SETTINGS, batch, slow_loss, unit

PARTNER = torch.tensor([2, 0, 3, 3])  # the last image is its own partner
WEIGHT = torch.tensor([0.7, 0.9, 0.5, 0.6])


def share_of(pairs: Pairs, image: int, caption: int) -> float:
    """How much of a mixed image a caption describes, straight from the words of mix_pairs."""
    own = bool(pairs.positive[image, caption])
    partners = bool(pairs.positive[int(PARTNER[image]), caption])
    weight = float(WEIGHT[image])
    return weight * own + (1 - weight) * partners


def is_ignored(pairs: Pairs, image: int, caption: int) -> bool:
    either = pairs.ignored[image, caption] or pairs.ignored[int(PARTNER[image]), caption]
    return bool(either) and share_of(pairs, image, caption) == 0


@pytest.mark.parametrize("duplicates", ["ignore", "positive"])
@pytest.mark.parametrize("seed", range(3))
def test_mixed_pairs_equal_the_slow_loop(seed: int, duplicates: str) -> None:
    _, _, pairs = batch(seed, duplicates)
    mixed = mix_pairs(pairs, PARTNER, WEIGHT)
    assert mixed.share is not None
    for i in range(4):
        for c in range(15):
            assert float(mixed.share[i, c]) == pytest.approx(share_of(pairs, i, c))
            assert bool(mixed.positive[i, c]) == (share_of(pairs, i, c) > 0)
            assert bool(mixed.ignored[i, c]) == is_ignored(pairs, i, c)


def slow_mixed(pairs: Pairs) -> Pairs:
    """What mix_pairs should say, in float64."""
    images, captions = pairs.positive.shape
    share = [[share_of(pairs, i, c) for c in range(captions)] for i in range(images)]
    ignored = [[is_ignored(pairs, i, c) for c in range(captions)] for i in range(images)]
    shares = torch.tensor(share, dtype=torch.float64)
    return pairs._replace(positive=shares > 0, ignored=torch.tensor(ignored), share=shares)


@pytest.mark.parametrize("duplicates", ["ignore", "positive"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("settings", [*SETTINGS, {"temperature": 0.1}])
def test_the_loss_over_mixed_images_and_its_gradients_equal_the_slow_loop(
    settings: dict[str, float], seed: int, duplicates: str
) -> None:
    """Soft targets, whose means weigh captions by their shares, and hard negatives among them."""
    image, text, pairs = batch(seed, duplicates)
    image.requires_grad_(), text.requires_grad_()
    loss = ContrastiveLoss(**settings)  # type: ignore[arg-type]
    found = loss(image, text, mix_pairs(pairs, PARTNER, WEIGHT))
    expected = slow_loss(image, text, slow_mixed(pairs), settings)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(found, (image, text))
    for one, other in zip(ours, torch.autograd.grad(expected, (image, text)), strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_sigmoid_loss_holds_a_pair_true_to_its_share() -> None:
    image, text, pairs = batch(0)
    loss = SigLIPLoss(temperature=0.1, bias=-2.0)
    found = loss(image, text, mix_pairs(pairs, PARTNER, WEIGHT))
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(4):
        for c in range(15):
            if is_ignored(pairs, i, c):
                continue
            logit = image[i].double() @ text[c].double() / 0.1 - 2.0
            true = share_of(pairs, i, c)
            sigmoid = torch.sigmoid(logit)
            expected -= (true * sigmoid.log() + (1 - true) * (1 - sigmoid).log()) / 4
    torch.testing.assert_close(found.detach().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "loss", [ContrastiveLoss(), ContrastiveLoss(soft_targets=0.3), SigLIPLoss()]
)
def test_an_image_mixed_with_nothing_costs_what_it_did(loss: torch.nn.Module) -> None:
    image, text, pairs = batch(1)
    itself = torch.arange(4)
    for mixed in (mix_pairs(pairs, itself, WEIGHT), mix_pairs(pairs, PARTNER, torch.ones(4))):
        if mixed.share is not None and bool((mixed.ignored == pairs.ignored).all()):
            torch.testing.assert_close(loss(image, text, mixed), loss(image, text, pairs))
            break
    else:
        pytest.fail("neither left the pairs as they were")


def test_bad_mixes_are_named() -> None:
    image, text, pairs = batch(0)
    mixed = mix_pairs(pairs, PARTNER, WEIGHT)
    assert mixed.share is not None
    with pytest.raises(ValueError, match="the pairs of 4 images and 15 texts"):
        ContrastiveLoss()(image, text, mixed._replace(share=mixed.share[:, :8]))
    for partner, weight in ((PARTNER[:3], WEIGHT), (PARTNER, WEIGHT[:3])):
        with pytest.raises(ValueError, match="4 partners and weights"):
            mix_pairs(pairs, partner, weight)
    with pytest.raises(ValueError, match="mixed already"):
        mix_pairs(mixed, PARTNER, WEIGHT)


def test_a_draw_is_decided_by_seed_epoch_and_step() -> None:
    def draw(**changes: int) -> tuple[list[int], list[float]]:
        mix = draw_mix(32, 0.5, **{"seed": 0, "epoch": 1, "step": 2, **changes})
        assert mix is not None
        return mix.partner.tolist(), mix.weight.tolist()

    assert draw() == draw()
    assert all(draw() != draw(**{key: 9}) for key in ("seed", "epoch", "step"))
    partner, weights = draw()
    assert sorted(partner) == list(range(32))
    assert all(0.5 <= weight <= 1 for weight in weights) and len(set(weights)) == 32
    assert draw_mix(32, 0.0, seed=0, epoch=0, step=0) is None


def test_features_and_pixels_are_blended() -> None:
    mix = draw_mix(4, 1.0, seed=0, epoch=0, step=0)
    assert mix is not None
    features = unit(4, 3, 0)
    for row, other in enumerate(mix.partner.tolist()):
        weight = float(mix.weight[row])
        expected = weight * features[row] + (1 - weight) * features[other]
        torch.testing.assert_close(mix.blend(features)[row], expected)
    pixels = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    torch.testing.assert_close(mix.blend(pixels), mix.blend(pixels.float() / 255))
    for rows in (slice(0, 1), slice(1, 4)):  # some of the rows, with partners among all
        assert torch.equal(mix.blend(pixels, rows), mix.blend(pixels)[rows])


def batch_of(inputs: Tensor) -> Batch:
    rows = torch.arange(len(inputs))
    return Batch(inputs, unit(len(inputs), 3, 0), rows, rows, len(inputs))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("photos", [True, False])
@torch.no_grad()
def test_what_the_head_is_given_is_mixed_or_the_photos_are(
    tiny_resnet: Path, tiny_sentence: Path, kept: bool, photos: bool
) -> None:
    model = CLIPModel(str(tiny_sentence), image_encoder=str(tiny_resnet), hidden_dim=24).eval()
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    inputs = model.pooled_features(pixels) if kept else pixels
    found = Mix(PARTNER, WEIGHT, photos).embed(model, batch_of(inputs))

    def backbone(one: Tensor) -> Tensor:
        return model.pooled_features(one[None])[0]

    for row, (partner, weight) in enumerate(zip(PARTNER.tolist(), WEIGHT.tolist(), strict=True)):
        if photos and not kept:
            blended = (weight * pixels[row] + (1 - weight) * pixels[partner]) / 255
            features = backbone(blended)
        else:
            one, other = backbone(pixels[row]), backbone(pixels[partner])
            features = weight * one + (1 - weight) * other
        expected = F.normalize(model.head(features), dim=-1)
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_features_are_mixed_as_each_stage_says() -> None:
    def mixed(inputs: Tensor, **values: float) -> Mix | None:
        config = Config.from_mapping({"head_mixup": 0.0, "mixup": 0.0, **values})
        return step_mix(batch_of(inputs), config, 0, 0)

    features, pixels = unit(4, 3, 1), torch.zeros(4, 3, 5, 5, dtype=torch.uint8)
    assert mixed(features, head_mixup=1.0) and not mixed(features, mixup=1.0)
    assert mixed(pixels, mixup=1.0) and not mixed(pixels, head_mixup=1.0)
    for photos in (False, True):
        mix = mixed(pixels, mixup=1.0, mix_photos=photos)
        assert mix is not None and mix.photos == photos
