"""The queue of images: a ring, and what a loss makes of it against the slow loop."""

from __future__ import annotations

import pytest
import torch

from captune.losses import ContrastiveLoss, ImageQueue
from slow_losses import SETTINGS, Queue, batch, slow_loss, unit


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
        want = slow_loss(image, text, pairs, settings, memory[-10:])
        assert float(fast) == pytest.approx(float(want), rel=1e-5)
        if step and not settings:  # the queue's rows are negatives
            assert float(want) > float(slow_loss(image, text, pairs, settings))
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
