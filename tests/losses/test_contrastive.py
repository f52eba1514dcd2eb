"""The loss over pairs against a slow loop written from its formula."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from captune.losses import ContrastiveLoss, InfoNCELoss
from captune.matching import Pairs, match_pairs
from slow_losses import SETTINGS, batch, slow_contrastive, slow_loss, slow_query, unit


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("duplicates", ["ignore", "positive"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_value_and_gradients_equal_the_slow_loop(
    seed: int, duplicates: str, settings: dict[str, float]
) -> None:
    image, text, pairs = batch(seed, duplicates)
    assert pairs.positive[0, 9]  # the bank's caption of an image of the batch
    image.requires_grad_()
    text.requires_grad_()
    fast = ContrastiveLoss(**settings)(image, text, pairs)  # type: ignore[arg-type]
    slow = slow_loss(image, text, pairs, settings)
    assert fast.item() == pytest.approx(slow.item(), rel=1e-5)
    for found, want in zip(
        torch.autograd.grad(fast, (image, text)),
        torch.autograd.grad(slow, (image, text)),
        strict=True,
    ):
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_the_batches_of_these_tests_hold_duplicates() -> None:
    for seed in range(6):
        assert batch(seed)[2].ignored[:, :8].any() and batch(seed)[2].ignored[:, 8:].any()
        assert (batch(seed, "positive")[2].positive.sum(0) > 1).any()


@pytest.mark.parametrize("seed", range(3))
def test_a_bank_of_all_captions_gives_the_gradients_of_the_whole_matrix(seed: int) -> None:
    """Image→text does not care which captions are the batch's own and which the bank's."""
    images, dim = 5, 6
    owners = torch.tensor([i for i in range(images) for _ in range(1 + i % 3)])
    frozen = unit(len(owners), dim, seed)
    image = unit(images, dim, seed + 50).requires_grad_()
    adapter = (torch.eye(dim) + 0.1 * unit(dim, dim, seed + 90)).requires_grad_()
    ids = torch.arange(images)

    def whole() -> Tensor:
        text = F.normalize(frozen.double() @ adapter.double().T, dim=-1)
        total = torch.zeros((), dtype=torch.float64)
        for i in range(images):
            scores = [image[i].double() @ text[k] / 0.07 for k in range(len(owners))]
            mine = [scores[k] for k in range(len(owners)) if owners[k] == i]
            total = total + (torch.logsumexp(torch.stack(scores), 0) - sum(mine) / len(mine))
        return total / images

    # Own: the first caption of each image. Bank: all others, which are positives there.
    first = [owners.tolist().index(i) for i in range(images)]
    order = torch.tensor(first + [k for k in range(len(owners)) if k not in first])
    text = F.normalize(frozen[order] @ adapter.T, dim=-1)
    pairs = match_pairs(ids, owners[order], frozen[order], own=images)
    both = ContrastiveLoss()(image, text, pairs)
    other_way = slow_contrastive(image, text, pairs)[1]
    fast, slow = 2 * both.double() - other_way, whole()

    assert float(fast) == pytest.approx(float(slow), rel=1e-5)
    found = torch.autograd.grad(fast, (image, adapter))
    for a, b in zip(found, torch.autograd.grad(slow, (image, adapter)), strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_without_pairs_it_is_info_nce() -> None:
    for rows in (2, 7, 33):
        image, text = unit(rows, 8, rows), unit(rows, 8, rows + 1)
        want = float(InfoNCELoss(temperature=0.1)(image, text))
        for learnt in (False, True):
            loss = ContrastiveLoss(temperature=0.1, learn_temperature=learnt)
            assert float(loss(image, text)) == pytest.approx(want, rel=2e-6)
        assert float(ContrastiveLoss(temperature=0.1, queue=4, dimension=8)(image, text)) == want


@pytest.mark.parametrize("settings", SETTINGS)
def test_uninformative_embeddings_cost_the_log_of_the_candidates(
    settings: dict[str, float],
) -> None:
    _, _, pairs = batch(0, threshold=0.0)
    image, text = torch.ones(4, 1), torch.ones(15, 1)
    loss = ContrastiveLoss(**settings)(image, text, pairs)  # type: ignore[arg-type]
    assert float(loss) == pytest.approx((math.log(15) + math.log(4)) / 2, rel=1e-6)


def test_random_embeddings_cost_about_the_log_of_the_candidates() -> None:
    rows, captions = 64, 512
    owners = torch.cat((torch.arange(rows).repeat(2), torch.arange(1000, 1384)))
    pairs = match_pairs(torch.arange(rows), owners, unit(captions, 512, 1), own=2 * rows)
    loss = ContrastiveLoss(temperature=0.5)(unit(rows, 512, 0), unit(captions, 512, 1), pairs)
    assert float(loss) == pytest.approx((math.log(rows) + math.log(captions)) / 2, abs=0.05)


def test_positives_in_the_bank_do_not_push() -> None:
    """Nearer to the image they lower the loss; counted as negatives they would raise it."""
    image, text, pairs = batch(2, threshold=0.0)
    nearer = text.clone()
    nearer[9] = F.normalize(text[9] + 0.2 * image[0], dim=-1)
    loss = ContrastiveLoss()
    assert float(loss(image, nearer, pairs)) < float(loss(image, text, pairs))

    positive = pairs.positive.clone()
    positive[0, 9] = False
    wrong = pairs._replace(positive=positive)
    assert float(loss(image, nearer, wrong)) > float(loss(image, text, wrong))


def test_swapped_marks_change_the_loss() -> None:
    image, text, pairs = batch(1)
    swapped = pairs._replace(positive=pairs.positive.roll(1, 0), ignored=pairs.ignored.roll(1, 0))
    loss = ContrastiveLoss()
    assert abs(float(loss(image, text, pairs)) - float(loss(image, text, swapped))) > 0.1


def test_an_ignored_pair_has_no_gradient_in_either_direction() -> None:
    cosine_gradients = []
    for ignore in (True, False):
        image, text, pairs = batch(0, threshold=0.0)
        ignored = pairs.ignored.clone()
        ignored[1, 0] = ignore  # image 3 and the caption of image 11, a query text→image
        # Image 1 alone points along a fourth axis, and so alone does caption 0.
        image, text = F.pad(image, (0, 1)), F.pad(text, (0, 1))
        image[1, 3] = 0.5
        text.requires_grad_()
        ContrastiveLoss(temperature=0.5)(image, text, pairs._replace(ignored=ignored)).backward()
        assert text.grad is not None
        cosine_gradients.append(float(text.grad[0, 3]))
    assert cosine_gradients[0] == 0 and cosine_gradients[1] > 0


def likeness_of_first(text: Tensor, pairs: Pairs) -> list[Tensor]:
    """Cosine of each image's mean own caption with caption 0."""
    means = [
        text[: pairs.own][pairs.caption_images[: pairs.own] == number].double().mean(0)
        for number in pairs.images
    ]
    return [mean @ text[0].double() / mean.norm() for mean in means]


def test_queries_without_a_positive_are_left_out() -> None:
    image, text, pairs = batch(3)
    positive = pairs.positive.clone()
    positive[2] = False  # image 8, and with it the queries 4 and 5
    image.requires_grad_()
    loss = ContrastiveLoss(soft_targets=0.3, hard_negatives=1.0)
    nothing_left = pairs._replace(positive=positive, ignored=~positive)
    found = loss(image, text, nothing_left)
    assert torch.isfinite(found)
    assert torch.isfinite(torch.autograd.grad(found, image)[0]).all()
    # Not by its soft target either.
    keep_ignored = pairs._replace(positive=positive)
    keep_ignored.positive[:, pairs.own :] = False
    keep_ignored.positive[1:] = False
    only = loss(image, text, keep_ignored)
    want = sum(
        slow_query(cosine, row, left_out, 0.07, 1.0, 0.3, like)
        for cosine, row, left_out, like in (
            (
                [image[0].double() @ row.double() for row in text],
                keep_ignored.positive[0].tolist(),
                pairs.ignored[0].tolist(),
                [text[0].double() @ row.double() for row in text],
            ),
            (
                [row.double() @ text[0].double() for row in image],
                keep_ignored.positive[:, 0].tolist(),
                pairs.ignored[:, 0].tolist(),
                likeness_of_first(text, pairs),
            ),
        )
    )
    assert keep_ignored.positive.sum() == 1
    assert float(only) == pytest.approx(float(want) / 2, rel=1e-5)


def test_queries_without_a_positive_do_not_count() -> None:
    image, text, pairs = batch(3)
    positive = pairs.positive.clone()
    positive[2] = False  # image 8, and with it the queries 4 and 5
    keep = torch.tensor([0, 1, 3])
    to_text, _ = slow_contrastive(
        image[keep],
        text,
        pairs._replace(
            images=pairs.images[keep], positive=positive[keep], ignored=pairs.ignored[keep]
        ),
    )
    queries = [j for j in range(8) if positive[:, j].any()]
    to_image = [
        slow_query(
            [image[i].double() @ text[j].double() for i in range(4)],
            positive[:, j].tolist(),
            pairs.ignored[:, j].tolist(),
            0.07,
        )
        for j in queries
    ]
    want = (to_text + torch.stack(to_image).mean()) / 2
    found = ContrastiveLoss()(image, text, pairs._replace(positive=positive))
    assert len(queries) < 8
    assert float(found) == pytest.approx(float(want), rel=1e-5)


def test_hard_negatives_may_change_and_keep_their_mean() -> None:
    image, text, pairs = batch(5)
    loss = ContrastiveLoss(hard_negatives=0.0)
    values = []
    for loss.hard_negatives in (0.0, 1.0, 3.0):
        values.append(float(loss(image, text, pairs)))
    # Weight moves to where e^s is greatest, so the denominator grows.
    assert all(low < high for low, high in pairwise(values))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 0.9, "learn_temperature": True}, "between 0.01 and 0.5"),
        ({"hard_negatives": -1.0}, "hard_negatives"),
        ({"soft_targets": 1.0}, "soft_targets"),
        ({"queue": 8}, "dimension"),
        ({"queue": -1, "dimension": 3}, "queue"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ContrastiveLoss(**settings)  # type: ignore[arg-type]
