"""The queue of images: a ring, and what a loss makes of it against the slow loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from captune.losses import ContrastiveLoss, ImageQueue
from captune.matching import Likeness, match_pairs
from slow_losses import SETTINGS, Queue, Written, batch, slow_loss, unit


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
    written: Written = {}
    left_out = 0
    for step, shift in enumerate((100, 200, 0, 0)):
        image, frozen, pairs = batch(step)
        pairs = pairs._replace(
            images=pairs.images + shift, caption_images=pairs.caption_images + shift
        )
        image.requires_grad_()
        text = frozen @ adapter.T
        fast = loss(image, text, pairs)
        kept = memory[-10:]
        want = slow_loss(image, text, pairs, settings, kept, written)
        left_out += bool(want < slow_loss(image, text, pairs, settings, kept))
        assert float(fast) == pytest.approx(float(want), rel=1e-5)
        if step and not settings:  # the queue's rows are negatives
            assert float(want) > float(slow_loss(image, text, pairs, settings))
        found = torch.autograd.grad(fast, (image, adapter), retain_graph=True)
        for a, b in zip(found, torch.autograd.grad(want, (image, adapter)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
        memory += list(zip(pairs.images.tolist(), image.detach(), strict=True))
        owners = pairs.caption_images[: pairs.own].tolist()
        written |= {
            number: [frozen[j] for j, owner in enumerate(owners) if owner == number]
            for number in pairs.images.tolist()
        }
    assert left_out >= 2  # there were near-duplicates of captions of images in the queue


def test_captions_are_kept_as_long_as_their_images() -> None:
    queue = ImageQueue(4, 2)
    captions = unit(12, 3, 0)

    def add(images: list[int], writers: list[int], rows: list[int]) -> set[tuple[int, int]]:
        queue.append(unit(len(images), 2, 1), torch.tensor(images))
        queue.remember(torch.tensor(writers), captions[rows])
        found = (queue.written @ captions.T).argmax(1).tolist()
        return set(zip(queue.writers.tolist(), found, strict=True))

    assert add([1, 2], [1, 2, 1], [0, 1, 2]) == {(1, 0), (2, 1), (1, 2)}
    assert add([3], [3], [3]) == {(1, 0), (2, 1), (1, 2), (3, 3)}
    assert add([2], [2], [4]) == {(1, 0), (1, 2), (3, 3), (2, 4)}  # drawn anew
    assert add([5, 6], [5, 6], [5, 6]) == {(3, 3), (2, 4), (5, 5), (6, 6)}
    assert add(list(range(10, 16)), list(range(10, 16)), list(range(6))) == {
        (image, image - 10) for image in range(12, 16)
    }
    alike = Likeness(captions[:0], captions, 0.99, "ignore")
    assert sorted(queue.near(alike).nonzero()[:, 1].tolist()) == [2, 3, 4, 5]
    assert not ImageQueue(4, 2).near(alike).any()


def test_a_near_duplicate_of_a_caption_of_an_image_in_the_queue_is_no_negative() -> None:
    """Its image, as near as can be, neither costs anything nor pushes the caption away."""
    frozen, image = torch.eye(4), torch.eye(4)[:2]

    def value(caption: Tensor, threshold: float) -> float:
        loss = ContrastiveLoss(queue=2, dimension=4)
        for ids, text in (([1, 2], frozen), ([3, 4], torch.stack((caption, frozen[3])))):
            numbers = torch.tensor(ids)
            pairs = match_pairs(numbers, numbers, text[:2], own=2, duplicate_threshold=threshold)
            found = float(loss(image, text[:2], pairs))
        return found

    same = frozen[0]
    # One of two queries had a second candidate as near as its own, in one of two directions.
    assert value(same, 0.0) - value(same, 0.9) == pytest.approx(math.log(2) / 4, abs=1e-4)
    other = frozen[2]
    assert value(other, 0.9) == value(other, 0.0)


def test_a_queue_at_rest_is_filled_and_not_used() -> None:
    image, text, pairs = batch(0)
    other = pairs._replace(images=pairs.images + 50, caption_images=pairs.caption_images + 50)
    loss, bare = ContrastiveLoss(queue=8, dimension=3), ContrastiveLoss()
    loss.queue_rests = True
    assert [float(loss(image, text, p)) for p in (pairs, other)] == [
        float(bare(image, text, p)) for p in (pairs, other)
    ]
    assert loss.queue is not None and (loss.queue.images >= 0).all()
    loss.queue_rests = False
    assert float(loss(image, text, other)) > float(bare(image, text, other))


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
    names = ("embeddings", "images", "position", "writers", "written")
    assert set(one.state_dict()) == {f"queue.{name}" for name in names}
    assert len(one.state_dict()["queue.writers"]) == 8
    other.load_state_dict(one.state_dict())
    for seed in range(2, 5):
        image, text, pairs = batch(seed)
        pairs = pairs._replace(images=pairs.images + 100 * seed)
        assert float(other(image, text, pairs)) == float(one(image, text, pairs))
    assert float(ContrastiveLoss()(image, text, pairs)) != float(one(image, text, pairs))
