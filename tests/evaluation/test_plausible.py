"""Ranked lists against a slow full sort, and the figures against eccv_caption on full sorts."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from captune.data.coco import karpathy_ids
from captune.errors import CaptuneError, MissingExtraError
from captune.evaluation import plausible
from captune.evaluation.plausible import GroundTruth, Ids, plausible_matches, ranked_lists


def normal(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=generator)


def slow_lists(
    query: Tensor, gallery: Tensor, query_ids: Ids, gallery_ids: Ids, matches: dict[int, list[int]]
) -> dict[int, list[int]]:
    """All of the gallery sorted by score, then matches last, then place."""
    found = {}
    for name, row in zip(query_ids.tolist(), (query @ gallery.T).tolist(), strict=True):
        if name in matches:
            keys = [
                (-s, i in matches[name]) for s, i in zip(row, gallery_ids.tolist(), strict=True)
            ]
            order = sorted(range(len(row)), key=lambda place: keys[place])
            length = max(10, len(matches[name]))
            found[name] = [int(gallery_ids[place]) for place in order[:length]]
    return found


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    queries=st.integers(1, 12),
    gallery=st.integers(1, 60),
    dim=st.integers(1, 3),
    block=st.integers(1, 5),
)
def test_lists_equal_a_full_sort_however_many_tie(
    seed: int, queries: int, gallery: int, dim: int, block: int
) -> None:
    """Small whole numbers: scores are exact, and most of them occur many times."""
    rng = np.random.default_rng(seed)
    query = torch.from_numpy(rng.integers(-1, 2, (queries, dim))).float()
    items = torch.from_numpy(rng.integers(-1, 2, (gallery, dim))).float()
    query_ids = rng.permutation(1000)[:queries].astype(np.int64)
    gallery_ids = rng.permutation(1000)[:gallery].astype(np.int64)
    matches = {
        int(name): rng.choice(gallery_ids, rng.integers(1, gallery + 1), replace=False).tolist()
        for name in query_ids[: 1 + queries // 2]
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plausible, "rows_per_block", lambda columns: block)
        found = ranked_lists(query, items, query_ids, gallery_ids, matches)
    expected = slow_lists(query, items, query_ids, gallery_ids, matches)
    assert {name: ids.tolist() for name, ids in found.items()} == expected


@pytest.mark.parametrize("gallery", [77, 1003, 4999])
@pytest.mark.parametrize("queries", [1, 2, 7])
def test_equal_embeddings_tie_wherever_they_lie(queries: int, gallery: int) -> None:
    """The match is found behind all of its twins, those in the gallery's last columns included."""
    own = F.normalize(normal(8, 384, 1), dim=-1)
    kinds = torch.arange(gallery) % 8
    gallery_ids = np.arange(gallery, dtype=np.int64)
    query_ids = np.arange(queries, dtype=np.int64)
    twins = {q: np.flatnonzero(kinds.numpy() == q).tolist() for q in range(queries)}
    for place in (0, -1):
        matches = {q: [twins[q][place], *range(gallery, gallery + 2000)] for q in range(queries)}
        found = ranked_lists(own[:queries], own[kinds], query_ids, gallery_ids, matches)
        for q, ids in found.items():
            last = len(twins[q]) - 1
            assert set(ids[:last].tolist()) == set(twins[q]) - {twins[q][place]}
            assert ids[last] == twins[q][place]


@pytest.fixture(scope="module")
def truth() -> GroundTruth:
    return GroundTruth.load()


@pytest.fixture(scope="module")
def embeddings() -> tuple[Tensor, Tensor, Ids, Ids]:
    """Of the Karpathy test split, noise around the truth so that figures are not near zero."""
    ids = karpathy_ids()
    image = F.normalize(normal(5000, 24, 10), dim=-1)
    text = F.normalize(image.repeat_interleave(5, 0) + 0.25 * normal(25000, 24, 11), dim=-1)
    return image, text, ids["test"].astype(np.int64), ids["test_captions"].astype(np.int64)


@pytest.fixture(scope="module")
def pmrp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up ground truth in PMRP's files: matches of every 50th image and 500th caption."""
    folder, ids = tmp_path_factory.mktemp("pmrp"), karpathy_ids()
    rng = np.random.default_rng(0)
    captions = {
        int(i): rng.choice(ids["test_captions"], 300, replace=False).tolist()
        + ids["test_captions"][5 * row : 5 * row + 5].tolist()
        for row, i in enumerate(ids["test"])
        if row % 50 == 0
    }
    images = {
        int(i): [int(ids["test"][row // 5]), *rng.choice(ids["test"], row % 7).tolist()]
        for row, i in enumerate(ids["test_captions"])
        if row % 500 == 0
    }
    for name, matches in zip(plausible.PMRP_FILES, (captions, images), strict=True):
        (folder / name).write_text(json.dumps(matches), encoding="utf-8")
    return folder


def sorted_lists(matrix: Tensor, query_ids: Ids, gallery_ids: Ids) -> dict[int, list[int]]:
    """The first 400 of each row's whole sort; no query has more matches, and no scores tie."""
    best = gallery_ids[matrix.topk(400, dim=1).indices.numpy()]
    return dict(zip(query_ids.tolist(), best.tolist(), strict=True))


def test_figures_equal_the_packages_own_on_full_sorts(
    embeddings: tuple[Tensor, Tensor, Ids, Ids], pmrp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    image, text, image_ids, caption_ids = embeddings
    truth = GroundTruth.load(pmrp)
    found = plausible_matches(image, text, image_ids, caption_ids, truth)
    assert capfd.readouterr() == ("", "")

    matrix = image @ text.T
    lists = {
        "i2t": sorted_lists(matrix, image_ids, caption_ids),
        "t2i": sorted_lists(matrix.T, caption_ids, image_ids),
    }
    wanted = ["cxc_recalls", "eccv_map_at_r", "eccv_rprecision", "eccv_r1"]
    theirs = truth.package.compute_all_metrics(lists["i2t"], lists["t2i"], wanted, Ks=(1, 5, 10))
    theirs["pmrp"] = truth.package.pmrp(lists, "all")
    names = {
        **{f"cxc_r{k}": ("cxc", f"R@{k}") for k in (1, 5, 10)},
        **{key: ("eccv", name) for key, name in plausible.ECCV_METRICS.items()},
        "pmrp": ("pmrp", "R-Precision"),
    }
    assert set(theirs) == set(names)
    for key, (block, figure) in names.items():
        for short, direction in plausible.DIRECTIONS.items():
            assert found[block][direction][figure] == pytest.approx(100 * theirs[key][short])
            assert 0.4 < found[block][direction][figure] < 99.6
    assert found["eccv"]["image_to_text"]["queries"] == 1261
    assert found["package"].startswith("eccv_caption ") and "against the query" in found["ties"]


def test_where_all_embeddings_are_equal_nothing_is_found(
    embeddings: tuple[Tensor, Tensor, Ids, Ids], truth: GroundTruth
) -> None:
    """A collapsed model has no rank but the last; a sort that keeps places would find some."""
    _, _, image_ids, caption_ids = embeddings
    same = torch.ones(1, 2)
    found = plausible_matches(
        same.expand(5000, 2), same.expand(25000, 2), image_ids, caption_ids, truth
    )
    assert set(found) == {"cxc", "eccv", "ties", "package"}  # no PMRP without its folder
    for block in ("cxc", "eccv"):
        for figures in found[block].values():
            assert not any(value for name, value in figures.items() if name != "queries")


def test_real_captions_belong_to_the_ground_truth(shared_data: Path, truth: GroundTruth) -> None:
    """COCO's own file of the split: its ids are those that the ground truth is written in."""
    path = shared_data / "coco_karpathy" / "captions_karpathy_test5k.json"
    entries = json.loads(path.read_text(encoding="utf-8"))["annotations"]
    own = {(entry["image_id"], entry["id"]) for entry in entries}
    images = np.array([*{image for image, _ in own}])
    truth.check(images, np.array([caption for _, caption in own]))
    listed = {(i, c) for i, captions in truth.package.cxc_gts["i2t"].items() for c in captions}
    assert len(own & listed) > 24_900 and len(listed - own) > 1_000


def test_other_images_are_refused(embeddings: tuple[Tensor, Tensor, Ids, Ids]) -> None:
    image, text, image_ids, caption_ids = embeddings
    truth = GroundTruth.load()
    for images, captions in (
        (image_ids[:-1], caption_ids),
        (image_ids, caption_ids[:-5]),
        (image_ids + 1, caption_ids),
    ):
        with pytest.raises(CaptuneError, match=r"25,000 captions of karpathy-test, and by"):
            plausible_matches(image, text, images, captions, truth)


# -- ground truth that cannot be used ---------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("[1, 2]", "cannot be read"),
        ('{"a dog": [1]}', "cannot be read"),
        ('{"391895": 5}', "cannot be read"),
        ('{"391895": [null]}', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("{}", "holds nothing"),
        ('{"5": [770337]}', "holds query 5"),
    ],
)
@pytest.mark.parametrize("name", plausible.PMRP_FILES)
def test_a_broken_ground_truth_is_named(content: str, words: str, name: str, pmrp: Path) -> None:
    sound = (pmrp / name).read_text(encoding="utf-8")
    try:
        (pmrp / name).write_text(content, encoding="utf-8")
        with pytest.raises(CaptuneError, match=words) as caught:
            GroundTruth.load(pmrp)
    finally:
        (pmrp / name).write_text(sound, encoding="utf-8")
    said = str(caught.value)
    assert str(pmrp) in said and all(file in said for file in plausible.PMRP_FILES)
    assert "\n" not in said


def test_a_query_without_a_match_is_refused(pmrp: Path, tmp_path: Path) -> None:
    for name in plausible.PMRP_FILES:
        content = json.loads((pmrp / name).read_text(encoding="utf-8"))
        content[next(iter(content))] = []
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CaptuneError, match="a query without a match"):
        GroundTruth.load(tmp_path)


@pytest.mark.parametrize("gone", plausible.PMRP_FILES)
def test_a_missing_file_is_named(gone: str, tmp_path: Path) -> None:
    for name in set(plausible.PMRP_FILES) - {gone}:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(CaptuneError, match=f"holds no {gone}: PMRP needs"):
        GroundTruth.load(tmp_path)


def test_without_the_package_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    with pytest.raises(MissingExtraError, match=r'pip install "captune\[eccv\]"'):
        GroundTruth.load()


def test_importing_the_package_warns_nobody(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Its advice to install another JSON parser, given at every first import, is no user's."""
    for name in ("eccv_caption", "eccv_caption.metrics", "eccv_caption._metrics"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    real = builtins.__import__

    def without_ujson(name: str, *rest: Any, **more: Any) -> Any:
        if name == "ujson":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_ujson)
    GroundTruth.load()
    assert [str(warning.message) for warning in recwarn] == []
