"""The losses over pairs against slow loops written from their formulas."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from captune.losses import ContrastiveLoss, ImageQueue, InfoNCELoss, SigLIPLoss
from captune.matching import Pairs, match_pairs

Queue = list[tuple[int, Tensor]]


def unit(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=-1)


def batch(
    seed: int, duplicates: str = "ignore", threshold: float = 0.8
) -> tuple[Tensor, Tensor, Pairs]:
    """Four images with 1 to 3 captions, a bank of 7 captions of which one is image 11's."""
    images = torch.tensor([11, 3, 8, 5])
    owners = torch.tensor([11, 3, 3, 3, 8, 8, 5, 5, 20, 11, 21, 22, 23, 24, 25])
    text = unit(15, 3, seed)
    pairs = match_pairs(
        images, owners, text, own=8, duplicate_threshold=threshold, duplicates=duplicates
    )
    return unit(4, 3, seed + 1000), text, pairs


def slow_query(
    cosine: list[Tensor],
    positive: list[bool],
    left_out: list[bool],
    temperature: float,
    beta: float = 0.0,
    share: float = 0.0,
    likeness: list[Tensor] | None = None,
) -> Tensor:
    """One query against its candidates, in float64."""
    every = range(len(cosine))
    negatives = [k for k in every if not positive[k] and not left_out[k]]
    weight = dict.fromkeys(every, 1.0)
    if negatives:
        hardness = {k: math.exp(beta * cosine[k].item()) for k in negatives}
        mean = sum(hardness.values()) / len(negatives)
        weight |= {k: hardness[k] / mean for k in negatives}
    parts = {k: weight[k] * torch.exp(cosine[k] / temperature) for k in every if not left_out[k]}
    total = torch.stack(list(parts.values())).sum()
    count = sum(positive)
    loss = torch.zeros((), dtype=torch.float64)
    likely = {}
    if likeness is not None:
        likely = {
            k: math.exp(float(likeness[k]) / temperature)
            for k in range(len(likeness))
            if not left_out[k]
        }
    for k in parts:
        target = (1 - share) * (1 / count if positive[k] else 0.0)
        if k in likely:
            target += share * likely[k] / sum(likely.values())
        loss = loss - target * torch.log(parts[k] / total)
    return loss


def slow_contrastive(
    image: Tensor,
    text: Tensor,
    pairs: Pairs,
    temperature: float = 0.07,
    beta: float = 0.0,
    share: float = 0.0,
    queue: Queue | None = None,
) -> tuple[Tensor, Tensor]:
    """Image→text and text→image."""
    image, text = image.double(), text.double()
    rows, ids = range(len(image)), pairs.images.tolist()
    owners = pairs.caption_images.tolist()
    like: list[list[Tensor]] = []
    for i in rows:
        mine = [text[j].detach() for j in range(pairs.own) if owners[j] == ids[i]]
        mean = torch.stack(mine).mean(0)
        like.append([mean @ text[k].detach() / mean.norm() for k in range(len(text))])
    soft = bool(share)

    to_text = [
        slow_query(
            [image[i] @ text[j] for j in range(len(text))],
            pairs.positive[i].tolist(),
            pairs.ignored[i].tolist(),
            temperature,
            beta,
            share,
            like[i] if soft else None,
        )
        for i in rows
    ]
    to_image = []
    for j in range(pairs.own):
        described = {ids[i] for i in rows if pairs.positive[i, j] or pairs.ignored[i, j]}
        further = [row for number, row in queue or [] if number not in described]
        nothing = [False] * len(further)
        to_image.append(
            slow_query(
                [image[i] @ text[j] for i in rows] + [row.double() @ text[j] for row in further],
                pairs.positive[:, j].tolist() + nothing,
                pairs.ignored[:, j].tolist() + nothing,
                temperature,
                beta,
                share,
                [like[i][j] for i in rows] if soft else None,
            )
        )
    return torch.stack(to_text).mean(), torch.stack(to_image).mean()


SETTINGS = [
    {},
    {"temperature": 0.3},
    {"hard_negatives": 1.5},
    {"soft_targets": 0.3},
    {"hard_negatives": 0.5, "soft_targets": 0.1, "temperature": 0.2},
]


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
    slow = sum(
        slow_contrastive(
            image,
            text,
            pairs,
            settings.get("temperature", 0.07),
            settings.get("hard_negatives", 0.0),
            settings.get("soft_targets", 0.0),
        )
    )
    assert isinstance(slow, Tensor)
    assert fast.item() == pytest.approx((slow / 2).item(), rel=1e-5)
    for found, want in zip(
        torch.autograd.grad(fast, (image, text)),
        torch.autograd.grad(slow / 2, (image, text)),
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


@pytest.mark.parametrize(
    "loss", [ContrastiveLoss(hard_negatives=1.0, soft_targets=0.2), SigLIPLoss()]
)
def test_what_is_ignored_for_all_images_has_no_gradient(loss: torch.nn.Module) -> None:
    image, text, pairs = batch(0, threshold=0.0)
    ignored = pairs.ignored.clone()
    ignored[:, 12] = True
    text.requires_grad_()
    loss(image, text, pairs._replace(ignored=ignored)).backward()
    assert text.grad is not None
    assert (text.grad[12] == 0).all() and (text.grad[11] != 0).all()


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


@pytest.mark.parametrize("loss", [ContrastiveLoss(hard_negatives=1.0), SigLIPLoss()])
def test_order_does_not_matter(loss: torch.nn.Module) -> None:
    image, text, pairs = batch(4)
    rows = torch.tensor([2, 0, 3, 1])
    columns = torch.tensor([5, 1, 7, 0, 2, 6, 3, 4, 14, 8, 10, 9, 13, 11, 12])
    other = Pairs(
        pairs.images[rows],
        pairs.caption_images[columns],
        pairs.own,
        pairs.positive[rows][:, columns],
        pairs.ignored[rows][:, columns],
    )
    assert float(loss(image[rows], text[columns], other)) == pytest.approx(
        float(loss(image, text, pairs)), rel=1e-6
    )


def test_hard_negatives_may_change_and_keep_their_mean() -> None:
    image, text, pairs = batch(5)
    loss = ContrastiveLoss(hard_negatives=0.0)
    values = []
    for loss.hard_negatives in (0.0, 1.0, 3.0):
        values.append(float(loss(image, text, pairs)))
    # Weight moves to where e^s is greatest, so the denominator grows.
    assert all(low < high for low, high in pairwise(values))


# -- the temperature ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ContrastiveLoss, SigLIPLoss])
def test_a_learnt_temperature_has_a_gradient_and_stays_in_its_limits(
    kind: type[ContrastiveLoss] | type[SigLIPLoss],
) -> None:
    image, text, pairs = batch(0)
    for start, step, end in [(0.02, 50.0, 0.01), (0.3, -50.0, 0.5)]:
        loss = kind(temperature=start, learn_temperature=True)
        assert loss.temperature == pytest.approx(start, rel=1e-6)
        assert loss.log_scale is not None
        loss(image, text, pairs).backward()
        assert loss.log_scale.grad is not None and loss.log_scale.grad != 0
        with torch.no_grad():
            loss.log_scale += step
        assert loss.temperature == pytest.approx(end, rel=1e-6)
        loss.log_scale.grad = None
        found = loss(image, text, pairs)
        assert float(found) == pytest.approx(
            float(kind(temperature=end, learn_temperature=False)(image, text, pairs)), rel=1e-5
        )
        found.backward()  # at the limit too, or there would be no way back
        assert loss.log_scale.grad != 0


def test_the_gradient_of_the_temperature_is_right() -> None:
    image, text, pairs = batch(3)
    loss = ContrastiveLoss(temperature=0.2, learn_temperature=True, soft_targets=0.0)
    loss(image, text, pairs).backward()

    def value(log_scale: float) -> float:
        return float(sum(slow_contrastive(image, text, pairs, math.exp(-log_scale)))) / 2

    at = math.log(5)
    assert loss.log_scale is not None and loss.log_scale.grad is not None
    slope = (value(at + 1e-4) - value(at - 1e-4)) / 2e-4
    assert float(loss.log_scale.grad) == pytest.approx(slope, rel=1e-3)


def test_a_fixed_temperature_leaves_no_state() -> None:
    loss = ContrastiveLoss(temperature=0.1)
    assert not loss.state_dict() and not list(loss.parameters())
    assert loss.temperature == 0.1 and float(loss.logit_scale) == pytest.approx(10)


def test_the_state_brings_the_temperature_back() -> None:
    one, other = (ContrastiveLoss(temperature=t, learn_temperature=True) for t in (0.1, 0.3))
    other.load_state_dict(one.state_dict())
    assert other.temperature == one.temperature == pytest.approx(0.1)


@pytest.mark.parametrize("loss", [ContrastiveLoss(), SigLIPLoss()])
def test_half_precision_around_it_changes_nothing(loss: torch.nn.Module) -> None:
    image, text, pairs = batch(0)
    want = float(loss(image, text, pairs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(image, text, pairs)
    assert found.dtype == torch.float32 and float(found) == want
    assert loss(image.half(), text.half(), pairs).dtype == torch.float32


# -- the queue ------------------------------------------------------------------------------------


def test_the_queue_is_a_ring() -> None:
    queue = ImageQueue(5, 2)
    assert queue.images.tolist() == [-1] * 5
    written: Queue = []
    for start, count in [(0, 3), (3, 3), (6, 1), (7, 9)]:
        rows = unit(count, 2, start)
        queue.append(rows, torch.arange(start, start + count))
        written += [(start + k, rows[k]) for k in range(count)]
        kept = dict(written[-5:])
        held = {int(n): row for n, row in zip(queue.images, queue.embeddings, strict=True)}
        held.pop(-1, None)
        assert 0 <= int(queue.position) < 5
        assert held.keys() == kept.keys()
        assert all(torch.equal(held[number], kept[number]) for number in kept)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_queue_equals_the_slow_loop(settings: dict[str, float]) -> None:
    """Three steps; in the last one images of the batch lie in the queue from before."""
    loss = ContrastiveLoss(queue=10, dimension=3, **settings)  # type: ignore[arg-type]
    adapter = torch.eye(3, requires_grad=True)
    memory: Queue = []
    for step, shift in enumerate((100, 200, 0, 0)):
        image, frozen, pairs = batch(step)
        pairs = pairs._replace(
            images=pairs.images + shift, caption_images=pairs.caption_images + shift
        )
        image.requires_grad_()
        text = frozen @ adapter.T
        fast = loss(image, text, pairs)
        slow = slow_contrastive(
            image,
            text,
            pairs,
            settings.get("temperature", 0.07),
            settings.get("hard_negatives", 0.0),
            settings.get("soft_targets", 0.0),
            memory[-10:],
        )
        bare = slow_contrastive(image, text, pairs)
        want = (slow[0] + slow[1]) / 2
        assert float(fast) == pytest.approx(float(want), rel=1e-5)
        if step and not settings:
            assert float(slow[1]) > float(bare[1])  # the queue's rows are negatives
        found = torch.autograd.grad(fast, (image, adapter), retain_graph=True)
        for a, b in zip(found, torch.autograd.grad(want, (image, adapter)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
        memory += list(zip(pairs.images.tolist(), image.detach(), strict=True))


def test_the_same_image_in_the_queue_is_no_negative() -> None:
    image, text, pairs = batch(0, threshold=0.0)
    pairs.positive[1:] = False  # the caption of image 11 is the only query text→image

    def value(number: int) -> float:
        loss = ContrastiveLoss(queue=4, dimension=3)
        assert loss.queue is not None
        if number >= 0:  # an embedding right where that caption is
            loss.queue.append(text[:1], torch.tensor([number]))
        return float(loss(image, text, pairs))

    assert value(11) == value(-1) < value(99)


def test_the_queue_rests_outside_training_and_without_pairs() -> None:
    image, text, pairs = batch(0)
    loss = ContrastiveLoss(queue=8, dimension=3)
    assert loss.queue is not None
    fresh = float(loss(image, text, pairs))
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    assert (loss.queue.images >= 0).sum() == 4
    loss.eval()
    other = pairs._replace(images=pairs.images + 50, caption_images=pairs.caption_images + 50)
    assert float(loss(image, text, other)) == fresh
    loss.train()
    loss(image, text[:4])
    assert all(torch.equal(before[key], value) for key, value in loss.state_dict().items())
    assert float(loss(image, text, other)) > fresh


def test_the_state_brings_the_queue_back() -> None:
    one, other = (ContrastiveLoss(queue=6, dimension=3) for _ in range(2))
    for seed in range(2):
        one(*batch(seed))
    assert set(one.state_dict()) == {"queue.embeddings", "queue.images", "queue.position"}
    other.load_state_dict(one.state_dict())
    for seed in range(2, 5):
        image, text, pairs = batch(seed)
        pairs = pairs._replace(images=pairs.images + 100 * seed)
        assert float(other(image, text, pairs)) == float(one(image, text, pairs))
    assert float(ContrastiveLoss()(image, text, pairs)) != float(one(image, text, pairs))


# -- the sigmoid loss -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("duplicates", ["ignore", "positive"])
def test_siglip_equals_the_slow_loop(seed: int, duplicates: str) -> None:
    image, text, pairs = batch(seed, duplicates)
    loss = SigLIPLoss(temperature=0.2, bias=-3.0)
    image.requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(4):
        for j in range(15):
            if not pairs.ignored[i, j]:
                sign = 1 if pairs.positive[i, j] else -1
                score = image[i].double() @ text[j].double() / 0.2 - 3
                total = total + torch.log(1 + torch.exp(-sign * score)) / 4
    found = loss(image, text, pairs)
    assert float(found) == pytest.approx(float(total), rel=1e-5)
    grads = [torch.autograd.grad(value, image, retain_graph=True)[0] for value in (found, total)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    found.backward()
    assert loss.bias.grad is not None and loss.bias.grad != 0


def test_siglip_without_pairs_is_the_diagonal() -> None:
    image, text = unit(6, 4, 0), unit(6, 4, 1)
    sign = 2 * torch.eye(6) - 1
    want = -F.logsigmoid(sign * (image @ text.T / 0.1 - 10)).sum() / 6
    assert float(SigLIPLoss()(image, text)) == pytest.approx(float(want), rel=1e-6)


# -- what is refused ------------------------------------------------------------------------------


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


@pytest.mark.parametrize("loss", [ContrastiveLoss(), SigLIPLoss()])
def test_shapes_that_do_not_fit_are_named(loss: torch.nn.Module) -> None:
    image, text, pairs = batch(0)
    with pytest.raises(ValueError, match="4 images, 15 texts"):
        loss(image, text)
    with pytest.raises(ValueError, match="4 images and 14 texts"):
        loss(image, text[1:], pairs)
    with pytest.raises(ValueError, match="4 images and 15 texts"):
        loss(image, text, pairs._replace(ignored=pairs.ignored[:1]))


def test_only_losses_over_pairs_say_so() -> None:
    assert ContrastiveLoss.takes_pairs and SigLIPLoss.takes_pairs
    assert not getattr(InfoNCELoss(), "takes_pairs", False)
