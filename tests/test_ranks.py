"""Ranks against a slow reference straight from the definition."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from captune import ranks as ranks_module
from captune.ranks import retrieval_ranks

Slow = tuple[list[int], list[int], list[int]]


def slow_ranks(similarity: np.ndarray, owner: np.ndarray) -> Slow:
    """One query at a time; ties count against the query."""
    images, captions = similarity.shape
    of_images, of_captions, of_own = [], [], []
    for i in range(images):
        own = [c for c in range(captions) if owner[c] == i]
        best = max(similarity[i, c] for c in own)
        rivals = [c for c in range(captions) if owner[c] != i and similarity[i, c] >= best]
        of_images.append(1 + len(rivals))
    for c in range(captions):
        mine, score = owner[c], similarity[owner[c], c]
        rivals = [i for i in range(images) if i != mine and similarity[i, c] >= score]
        of_captions.append(1 + len(rivals))
        others = [d for d in range(captions) if owner[d] != mine and similarity[mine, d] >= score]
        same = [d for d in range(captions) if owner[d] == mine]
        before = [d for d in same if (-similarity[mine, d], d) < (-score, c)]
        of_own.append(1 + len(others) + len(before))
    return of_images, of_captions, of_own


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    images = draw(st.integers(1, 9))
    extra = draw(st.lists(st.integers(0, images - 1), max_size=30))
    owner = np.array(draw(st.permutations([*range(images), *extra])), dtype=np.int64)
    levels = draw(st.sampled_from([1, 2, 5, 1000]))  # few levels: many ties
    flat = draw(
        st.lists(st.integers(0, levels), min_size=images * len(owner), max_size=images * len(owner))
    )
    similarity = np.array(flat, dtype=np.float32).reshape(images, len(owner)) / levels
    return similarity, owner, (draw(st.integers(1, 10)), draw(st.integers(1, 40)))


@settings(max_examples=2000, deadline=None)
@given(cases())
def test_ranks_equal_the_slow_reference(
    case: tuple[np.ndarray, np.ndarray, tuple[int, int]],
) -> None:
    similarity, owner, tile = case
    # Images along the axes, so that a caption's coordinates are its scores, exactly.
    image, text = torch.eye(len(similarity)), torch.from_numpy(similarity.T.copy())
    for every_caption in (False, True):
        found = retrieval_ranks(
            image, text, torch.from_numpy(owner), every_caption=every_caption, tile=tile
        )
        of_images, of_captions, of_own = slow_ranks(similarity, owner)
        assert found.image.tolist() == of_images
        assert found.caption.tolist() == of_captions
        if every_caption:
            assert found.of_own is not None and found.of_own.tolist() == of_own
        else:
            assert found.of_own is None


def random_unit(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=-1)


@pytest.mark.parametrize("tile", [(1, 1), (7, 3), (64, 100), (1000, 1000), None])
@pytest.mark.parametrize("band", [1, 5, 64, 256])
def test_tiles_and_bands_change_nothing(
    tile: tuple[int, int] | None, band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_module, "BAND", band)
    image, text = random_unit(100, 16, 0), random_unit(260, 16, 1)
    owner = torch.cat([torch.arange(100), torch.randint(0, 100, (160,))])
    similarity = (image @ text.T).numpy()
    found = retrieval_ranks(image, text, owner, every_caption=True, tile=tile)
    assert found.of_own is not None
    listed = (found.image.tolist(), found.caption.tolist(), found.of_own.tolist())
    assert listed == slow_ranks(similarity, owner.numpy())


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_several_threads_share_the_tiles(three_threads: None) -> None:
    image, text = random_unit(90, 16, 8), random_unit(300, 16, 9)
    owner = torch.cat([torch.arange(90), torch.randint(0, 90, (210,))])
    with torch.inference_mode():
        found = retrieval_ranks(image, text, owner, every_caption=True, tile=(16, 32))
    assert found.of_own is not None
    listed = (found.image.tolist(), found.caption.tolist(), found.of_own.tolist())
    assert listed == slow_ranks((image @ text.T).numpy(), owner.numpy())
    assert torch.get_num_threads() == 3


def test_what_ends_one_thread_ends_all(
    three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    def add(self: object, place: tuple[int, int]) -> None:
        done.append(place)
        raise KeyboardInterrupt

    monkeypatch.setattr(ranks_module._Rivals, "add", add)
    owner = torch.arange(160)
    with pytest.raises(KeyboardInterrupt):
        retrieval_ranks(random_unit(160, 8, 1), random_unit(160, 8, 2), owner, tile=(16, 16))
    assert len(done) <= 3  # of 100 tiles
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("images", [511, 512, 513, 700])
def test_equal_pictures_tie_wherever_they_lie(images: int) -> None:
    """Equal embeddings in other tiles, the last of which are smaller, score the same bits."""
    image = random_unit(images, 384, 2)
    image[-1] = image[0]
    owner = torch.arange(images).repeat_interleave(5)
    text = F.normalize(image[owner] + 0.1 * random_unit(5 * images, 384, 3), dim=-1)
    found = retrieval_ranks(image, text, owner)
    twins = (owner == 0) | (owner == images - 1)
    assert bool((found.caption[twins] == 2).all())
    assert bool((found.caption[~twins] == 1).all())


@pytest.mark.parametrize(
    ("device", "free", "place"),
    [("cuda", 2**40, "cuda"), ("cuda", 2**20, "cpu"), ("mps", 2**40, "cpu"), ("cpu", 0, "cpu")],
)
def test_a_card_ranks_where_it_has_the_memory(
    device: str, free: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_module, "free_memory", lambda _: free)
    moved: list[str] = []
    real = Tensor.to

    def to(self: Tensor, where: torch.device) -> Tensor:
        moved.append(where.type)
        return real(self, "cpu")

    image, text = random_unit(30, 8, 1), random_unit(60, 8, 2)
    owner = torch.arange(30).repeat(2)
    expected = retrieval_ranks(image, text, owner)
    with monkeypatch.context() as here:
        here.setattr(Tensor, "to", to)
        found = retrieval_ranks(image, text, owner, device=torch.device(device))
    assert moved[:2] == [place, place]
    assert found.image.tolist() == expected.image.tolist()
    assert found.caption.tolist() == expected.caption.tolist()


def test_one_image_with_a_hundred_captions() -> None:
    image, text = random_unit(3, 8, 4), random_unit(102, 8, 5)
    owner = torch.tensor([0] * 100 + [1, 2])
    found = retrieval_ranks(image, text, owner, every_caption=True)
    assert found.of_own is not None
    listed = (found.image.tolist(), found.caption.tolist(), found.of_own.tolist())
    assert listed == slow_ranks((image @ text.T).numpy(), owner.numpy())


def test_the_matrix_never_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []
    real = torch.mm

    def watched(one: Tensor, other: Tensor, *, out: Tensor) -> Tensor:
        made.append((len(one), other.shape[1]))
        return real(one, other, out=out)

    monkeypatch.setattr(ranks_module.torch, "mm", watched)
    owner = torch.arange(1200).repeat_interleave(5)
    retrieval_ranks(random_unit(1200, 4, 6), random_unit(6000, 4, 7), owner)
    assert set(made) == {ranks_module.TILE}
    # All tiles once, and those that hold own pairs once before.
    assert len(made) == 2 * 5 + 5


@pytest.mark.parametrize("what", ["image", "text"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_refused(what: str, value: float) -> None:
    image, text = random_unit(4, 8, 6), random_unit(4, 8, 7)
    (image if what == "image" else text)[2, 3] = value
    with pytest.raises(ValueError, match=f"the {what} embeddings hold NaN or infinite"):
        retrieval_ranks(image, text, torch.arange(4))


def test_what_does_not_fit_is_refused() -> None:
    image, text = random_unit(3, 8, 8), random_unit(2, 8, 9)
    with pytest.raises(ValueError, match="at least one caption"):
        retrieval_ranks(image, text, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="2 captions and 3 owners"):
        retrieval_ranks(image, text, torch.arange(3))
    with pytest.raises(ValueError, match="rows of the 3 images"):
        retrieval_ranks(image, text, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"\(3, 8\) and \(2, 7\)"):
        retrieval_ranks(image, text[:, :7], torch.tensor([0, 1]))
