"""The captions of a step: own ones first, never twice, further ones of the bank after them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from captune.data.table import CaptionTable, Rows
from captune.training.captions import CaptionDraw, StepCaptions

IMAGES = np.array([7, 0, 4, 11, 3], dtype=np.int64)


@pytest.fixture
def table() -> CaptionTable:
    """12 images of one to five captions, those of one image not side by side."""
    owners = [image for turn in range(5) for image in range(12) if image % 5 >= turn]
    return CaptionTable.build(
        [(100 + image, f"{image}.jpg", Path(f"{image}.jpg")) for image in range(12)],
        [(place, f"caption {place}", owner) for place, owner in enumerate(owners)],
        name="made",
        split="train",
    )


def first_of_each(table: CaptionTable, images: Rows = IMAGES) -> Rows:
    return np.array([table.captions_of(int(image))[-1] for image in images], dtype=np.int64)


def draw(
    table: CaptionTable, each: int, bank: int, *, epoch: int = 0, step: int = 0, seed: int = 0
) -> StepCaptions:
    maker = CaptionDraw(table, captions_per_image=each, bank_negatives=bank, seed=seed)
    return maker.draw(IMAGES, first_of_each(table), epoch, step)


def test_all_captions_of_each_image_those_that_were_drawn_first(table: CaptionTable) -> None:
    found = draw(table, 0, 0)
    assert found.own == len(found.rows) == len(found.images)
    assert found.rows[:5].tolist() == first_of_each(table).tolist()
    assert found.images[:5].tolist() == IMAGES.tolist()
    assert len(set(found.rows.tolist())) == found.own
    for image in range(12):
        mine = sorted(found.rows[found.images == image].tolist())
        expected = sorted(table.captions_of(image).tolist()) if image in IMAGES else []
        assert mine == expected
    assert found.images.tolist() == table.image_of_caption[found.rows].tolist()


@pytest.mark.parametrize("each", [1, 2, 3, 4, 9])
def test_so_many_of_an_image_and_no_more_than_it_has(table: CaptionTable, each: int) -> None:
    found = draw(table, each, 0)
    assert found.rows[:5].tolist() == first_of_each(table).tolist()
    assert len(set(found.rows.tolist())) == len(found.rows) == found.own
    for image in IMAGES:
        assert (found.images == image).sum() == min(each, len(table.captions_of(int(image))))


def test_further_captions_change_with_the_epoch_and_come_all_in_turn(table: CaptionTable) -> None:
    """Image 4 has five captions, of which two are shown."""
    shown = [draw(table, 2, 0, epoch=epoch) for epoch in range(40)]
    others = {int(f.rows[5:][f.images[5:] == 4][0]) for f in shown}
    assert others == set(table.captions_of(4).tolist()) - {int(table.captions_of(4)[-1])}


@pytest.mark.parametrize("each", [0, 1, 2])
@pytest.mark.parametrize("bank", [1, 7, 20, 1000])
def test_captions_of_the_bank_are_never_among_the_own(
    table: CaptionTable, each: int, bank: int
) -> None:
    total = table.captions.num_rows
    for step in range(20):
        found = draw(table, each, bank, step=step)
        further = found.rows[found.own :]
        assert len(set(found.rows.tolist())) == len(found.rows)
        assert not set(further.tolist()) & set(found.rows[: found.own].tolist())
        assert max(0, min(bank, total) - found.own) <= len(further) <= bank
        assert found.images.tolist() == table.image_of_caption[found.rows].tolist()
        assert found.rows[: found.own].tolist() == draw(table, each, 0, step=step).rows.tolist()
        if bank >= total:
            assert len(found.rows) == total


def test_a_draw_follows_from_seed_epoch_and_step_alone(table: CaptionTable) -> None:
    once = draw(table, 2, 8, epoch=3, step=5, seed=1)
    np.random.default_rng().random(5)
    again = draw(table, 2, 8, epoch=3, step=5, seed=1)
    assert once.rows.tolist() == again.rows.tolist() and once.own == again.own
    for other in (
        draw(table, 2, 8, epoch=3, step=6, seed=1),
        draw(table, 2, 8, epoch=4, step=5, seed=1),
        draw(table, 2, 8, epoch=3, step=5, seed=2),
    ):
        assert set(other.rows[other.own :].tolist()) != set(once.rows[once.own :].tolist())


def test_every_caption_of_the_bank_comes_about_as_often(table: CaptionTable) -> None:
    counts = np.zeros(table.captions.num_rows)
    for step in range(600):
        found = draw(table, 1, 8, step=step)
        counts[found.rows[found.own :]] += 1
    further = np.delete(counts, first_of_each(table))
    expected = 600 * 8 / table.captions.num_rows
    assert np.abs(further - expected).max() < 5 * np.sqrt(expected)
