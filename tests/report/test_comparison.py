"""The comparison's numbers, words, picture and page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from captune.evaluation.intervals import METRICS, QueryHits
from captune.evaluation.variants import SeedRun, Variant
from captune.report.comparison import Comparison, write_comparison

IMAGES = 400


def seed_run(folder: Path, name: str, seed: int, chance: float, *, noise: int = 0) -> SeedRun:
    """A run that answers each query with probability ``chance``; ``noise`` changes which."""
    rng = np.random.default_rng([seed, noise])
    image_rank = np.where(rng.random(IMAGES) < chance, 1, 99)
    owner = torch.arange(IMAGES).repeat_interleave(2)
    caption_rank = np.where(rng.random(2 * IMAGES) < chance, 1, 99)
    hits = QueryHits.from_ranks(torch.from_numpy(image_rank), torch.from_numpy(caption_rank), owner)
    recalls = hits.recalls()
    metrics: dict[str, Any] = {
        "data": "squares",
        "split": "val",
        "images": IMAGES,
        "captions": 2 * IMAGES,
        "split_digest": "abc",
        "rsum": float(recalls.sum()),
        "notes": ["the best epoch was chosen on these images"],
    }
    for (direction, key), value in zip(METRICS, recalls, strict=True):
        metrics.setdefault(direction, {})[key] = float(value)
    history = [{"epoch": e, "rsum": float(recalls.sum()) * e / 2} for e in (1, 2)]
    return SeedRun(folder / f"{name}-seed{seed}", seed, metrics, history, hits)


def variant(folder: Path, name: str, chances: list[float], *, noise: int = 0) -> Variant:
    runs = (seed_run(folder, name, s, chance, noise=noise) for s, chance in enumerate(chances))
    return Variant(name, {"use_batch_norm": name != "base"}, tuple(runs))


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """A base, a twin of it by other draws, and one that is far better with every seed."""
    return Comparison(
        tmp_path,
        "recipe plain · <towers> & co",
        (
            variant(tmp_path, "base", [0.3, 0.31, 0.29]),
            variant(tmp_path, "twin", [0.3, 0.29, 0.31], noise=1),
            variant(tmp_path, "use_batch_norm", [0.6, 0.61, 0.59]),
        ),
    )


def verdicts(comparison: Comparison) -> list[str]:
    return [found.verdict for found in comparison.differences if found is not None]


def test_a_twin_is_within_noise_and_a_better_variant_is_better(comparison: Comparison) -> None:
    assert verdicts(comparison) == ["within noise", "better"]


def test_a_worse_variant_is_worse(comparison: Comparison, tmp_path: Path) -> None:
    base, _, best = comparison.variants
    assert verdicts(Comparison(tmp_path, "", (best, base))) == ["worse"]


def test_seeds_that_disagree_are_noise_whatever_the_images_say(tmp_path: Path) -> None:
    base = variant(tmp_path, "base", [0.3, 0.3, 0.3])
    erratic = variant(tmp_path, "use_batch_norm", [0.9, 0.25, 0.2], noise=1)
    (found,) = verdicts(Comparison(tmp_path, "", (base, erratic)))
    assert found == "within noise: the seeds disagree by as much"


def test_one_seed_never_makes_a_verdict_alone(tmp_path: Path) -> None:
    base, better = variant(tmp_path, "base", [0.3]), variant(tmp_path, "other", [0.6])
    (found,) = verdicts(Comparison(tmp_path, "", (base, better)))
    assert found.startswith("better on these images; one seed only")


def test_the_files_say_the_same_as_the_object(comparison: Comparison) -> None:
    write_comparison(comparison)
    stated = json.loads((comparison.folder / "comparison.json").read_text(encoding="utf-8"))
    assert stated == comparison.to_dict()
    assert stated["format_version"] == 1
    rows = stated["variants"]
    assert [row["name"] for row in rows] == ["base", "twin", "use_batch_norm"]
    assert "difference" not in rows[0]
    mean = np.mean([run["rsum"] for run in rows[2]["runs"]])
    assert rows[2]["mean"]["rsum"]["value"] == pytest.approx(mean)
    base = np.mean([run["rsum"] for run in rows[0]["runs"]])
    assert rows[2]["difference"]["rsum"]["value"] == pytest.approx(mean - base)
    assert comparison.picture.read_bytes().startswith(b"\x89PNG")


def test_one_seed_s_missing_interval_is_null_in_json(tmp_path: Path) -> None:
    single = Comparison(tmp_path, "", (variant(tmp_path, "base", [0.3]),))
    text = json.dumps(single.to_dict(), allow_nan=False)
    assert json.loads(text)["variants"][0]["mean"]["rsum"]["low"] is None


def test_the_page_stands_alone_and_holds_every_run(comparison: Comparison) -> None:
    write_comparison(comparison)
    page = comparison.page.read_text(encoding="utf-8")
    assert 'src="http' not in page and "data:image/png;base64," in page
    assert "recipe plain · &lt;towers&gt; &amp; co" in page
    for row in comparison.variants:
        for run in row.runs:
            assert run.folder.name in page
            assert f"{run.values[-1]:.1f}" in page
    assert "within noise" in page and "the best epoch was chosen on these images" in page


def test_a_notebook_shows_the_table_and_a_terminal_the_text(comparison: Comparison) -> None:
    html, text = comparison._repr_html_(), comparison.to_text()
    assert "<html" not in html and html.count("<tr>") == 4
    for row in comparison.variants:
        assert row.name in html and row.name in text
        assert f"{row.means[-1].value:.1f}" in html and f"{row.means[-1].value:.1f}" in text
    assert "note: the best epoch was chosen on these images" in text


def test_the_picture_has_a_row_for_each_variant_and_a_dot_for_each_run(
    comparison: Comparison,
) -> None:
    rsum, difference, epochs = comparison.figure().axes
    dots = [len(line.get_xdata()) for line in rsum.lines if line.get_marker() == "o"]
    assert dots == [3, 3, 3]
    assert [label.get_text() for label in rsum.get_yticklabels()] == [
        "base",
        "twin",
        "use_batch_norm",
    ]
    shown = [line.get_xdata()[0] for line in difference.lines if line.get_marker() == "o"]
    expected = [found.images[-1].value for found in comparison.differences if found is not None]
    assert shown == pytest.approx(expected)
    assert len(epochs.lines) == 9
