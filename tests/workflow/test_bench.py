"""bench: parts that add up, a slow disk that is noticed, advice that follows from the figures."""

from __future__ import annotations

import time
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch

from captune.config import Config
from captune.data import dataset as dataset_module
from captune.errors import CaptuneError
from captune.models import CLIPModel
from captune.workflow.bench import PARTS, advice, bench
from conftest import write_scene


@pytest.fixture
def config(tiny_config: Config) -> Config:
    return tiny_config.replace(batch_size=4)


def test_every_part_takes_its_time_and_they_make_up_the_step(
    coco: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an optimiser that takes a tenth of a second, beside which the machine's moods are small:
    the parts and the speed are of different steps."""
    real = torch.optim.AdamW.step

    @wraps(real)
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.1)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", slow)
    found = bench(str(coco), config=config, steps=3)
    assert tuple(found["step"]) == PARTS
    assert all(seconds > 0 for seconds in found["step"].values())
    assert found["step"]["optimiser"] > 0.1
    whole = sum(found["step"][part] for part in PARTS[1:])
    speed = found["images_per_second"]
    assert speed["from memory"] == pytest.approx(4 / whole, rel=0.8)  # of other steps
    assert found["share_of_ceiling"] == pytest.approx(speed["from disk"] / speed["from memory"])
    assert all(rate > 0 for rate in speed.values())
    assert speed["features"] > speed["from memory"]  # forward alone
    assert found["photo"] == [40.0, 40.0] and found["format_version"] == 3


def test_a_slow_disk_is_the_finding(
    coco: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = dataset_module.load_image

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)  # far longer than a step, other work beside or not
        return real(*args, **kwargs)

    monkeypatch.setattr(dataset_module, "load_image", slow)
    found = bench(str(coco), config=config, steps=3)
    assert found["images_per_second"]["decoded by one process"] < 5
    assert found["share_of_ceiling"] < 0.5 and found["step"]["decode"] > 4 * 0.2 / 4
    assert "goes into waiting for photos" in found["advice"][0]


@pytest.fixture
def model(tiny_clip: Path) -> CLIPModel:
    return CLIPModel.zero_shot(str(tiny_clip))


def figures(**changes: Any) -> dict[str, Any]:
    speed = {"from memory": 100.0, "decoded by the loader": 300.0}
    base = {
        "images_per_second": speed,
        "share_of_ceiling": 0.6,
        "photo": [40.0, 40.0],
        "workers": 2,
        "precision": "bf16",
        "batch_size": 50,
        "step": {"decode": 0.5},  # as long as a step from memory
    }
    return {**base, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"share_of_ceiling": 0.97}, "nothing waits for photos"),
        ({}, "40 % of the time goes into waiting for photos: decoding takes the cores"),
        (
            {"photo": [640.0, 480.0]},
            "where the model sees 32: store them smaller once, by captune data pack",
        ),
        (
            {"images_per_second": {"from memory": 100.0, "decoded by the loader": 50.0}},
            "2 workers decode too slowly",
        ),
        (
            {
                "images_per_second": {"from memory": 100.0, "decoded by the loader": 50.0},
                "workers": 0,
            },
            "decoding takes the cores",
        ),
        (
            {"workers": 0, "share_of_ceiling": 0.3},
            "70 % of the time is lost and decoding explains 50 %: other work keeps this machine",
        ),
    ],
)
def test_advice_follows_from_the_figures(
    changes: dict[str, Any], words: str, model: CLIPModel
) -> None:
    (said,) = advice(figures(**changes), model)
    assert words in said


def test_a_machine_that_computes_in_bf16_is_told_so(
    model: CLIPModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for able in (True, False):
        monkeypatch.setattr("captune.workflow.bench.has_native_bf16", lambda _, able=able: able)
        said = advice(figures(precision="fp32", share_of_ceiling=1.0), model)
        assert (said == ["this machine computes in bf16, which is faster: precision=auto"]) is able


def test_too_few_images_for_two_batches_are_refused(coco: Path, config: Config) -> None:
    with pytest.raises(CaptuneError, match=r"fewer than two batches of 16 images"):
        bench(str(coco), config=config.replace(batch_size=16))
    with pytest.raises(CaptuneError, match="steps=0"):
        bench(str(coco), config=config, steps=0)


def test_an_unreadable_photo_does_not_end_it(coco: Path, config: Config) -> None:
    sorted((coco / "train2014").iterdir())[3].write_bytes(b"no picture")
    write_scene(coco / "train2014" / "more.jpg", "red", "blue")
    assert bench(str(coco), config=config, steps=2)["images_per_second"]["from disk"] > 0


def test_chunks_are_timed_one_at_a_time_and_no_run_is_written(
    coco: Path, config: Config, tmp_path: Path
) -> None:
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    found = bench(str(coco), config=config.replace(batch_size=8, chunk_size=4), steps=2)
    assert found["batch_size"] == 4
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before


def test_one_readable_photo_a_batch_is_nothing_to_measure(coco: Path, config: Config) -> None:
    for path in sorted((coco / "train2014").iterdir())[1:]:
        path.write_bytes(b"no picture")
    with pytest.raises(CaptuneError, match="at least two readable images"):
        bench(str(coco), config=config, steps=2)
