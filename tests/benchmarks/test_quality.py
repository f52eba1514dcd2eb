"""benchmarks/quality.py in tiny form: it goes on where it was, each machine by itself."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from captune.config import FIELDS, Config
from captune.data.table import CaptionTable
from captune.files import read_versioned

Script = Callable[[str], ModuleType]
SMALL = {
    **{"recipe": "best", "batch_size": 8, "head_batch_size": 8, "image_size": 32},
    **{"head_epochs": 1, "num_epochs": 1, "num_workers": 0, "device": "cpu", "precision": "fp32"},
}


@pytest.fixture
def quality(
    script: Script,
    tmp_path: Path,
    tiny_resnet: Path,
    tiny_sentence: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> ModuleType:
    """Two parts on tiny towers, results in a folder of their own."""
    module = script("quality")
    parts = {"whole": {}, "stage 1": {"freeze_backbone": True}}
    towers = {"image_encoder": str(tiny_resnet), "text_encoder": str(tiny_sentence)}
    monkeypatch.setattr(module, "PARTS", {"head": (SMALL, parts)})
    monkeypatch.setattr(module, "SHARED", {**towers, "log_with": "none"})
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return module


def whole(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the part ``whole``, by seed."""
    return sorted((r for r in rows if r["part"] == "whole"), key=lambda row: row["seed"])


def test_what_is_measured_stays_and_each_machine_is_measured_by_itself(
    quality: ModuleType,
    coco: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "results" / "quality-head.json"

    def call(*words: str) -> list[dict[str, Any]]:
        out = ["--out", str(tmp_path / "runs")]
        monkeypatch.setattr(sys, "argv", ["quality.py", str(coco), *out, *words])
        quality.main()
        return list(read_versioned(path, what="results", version=1)["rows"])

    first = call("--seeds", "0", "--only", "stage 1")
    assert [(row["part"], row["seed"]) for row in first] == [("stage 1", 0)]
    both = call("--seeds", "0", "1")
    assert both[0] == first[0]  # not measured again
    assert {(row["part"], row["seed"]) for row in both} == {
        *(("stage 1", seed) for seed in (0, 1)),
        *(("whole", seed) for seed in (0, 1)),
    }
    parts = quality.PARTS["head"][1]
    monkeypatch.setitem(parts, "stage 1", {**parts["stage 1"], "hidden_dim": 48})
    changed = call("--seeds", "0", "1")  # another config: measured anew, in place of the old rows
    assert len(changed) == 4 and whole(changed) == whole(both)
    assert [row["config"].get("hidden_dim") for row in changed].count(48) == 2
    again = call("--seeds", "1", "--only", "whole", "--again")
    assert [row for row in changed if row not in again] == [whole(changed)[1]]
    assert whole(again)[1]["rsum"] == whole(changed)[1]["rsum"] and len(again) == 4
    both = again

    monkeypatch.setattr(quality, "_machine", lambda config: "another card")
    capsys.readouterr()
    more = call("--seeds", "0", "--only", "whole")
    assert more[:-1] == both and more[-1]["machine"] == "another card"
    tables = dict(re.findall(r"^(.+):\n((?:\|.*\n)+)", capsys.readouterr().out, re.MULTILINE))
    assert [line.split(" | ")[0] for line in tables["another card"].splitlines()[2:]] == ["| whole"]
    rest = tables[both[0]["machine"]].splitlines()[2:]
    assert [line.split(" | ")[0] for line in rest] == ["| whole", "| stage 1"]


def test_a_key_that_came_later_leaves_what_was_measured_without_it_measured(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("quality")
    config = Config(dropout=0.25)
    of_then = {key: value for key, value in config.items() if key != "flip"}
    digest = hashlib.blake2b(json.dumps(of_then).encode(), digest_size=8).hexdigest()
    assert module.digest_of(config) == digest
    others = [config.replace(flip=False), config.replace(dropout=0.3), config.replace(seed=1)]
    assert len({digest, *map(module.digest_of, others)}) == 4
    assert set(module.BEFORE) <= set(FIELDS)
    # What counts is what went for it then, not what is its default now.
    monkeypatch.setitem(module.BEFORE, "flip", False)
    assert module.digest_of(config) != digest == module.digest_of(config.replace(flip=False))


def test_every_part_of_every_table_is_a_config(script: Script) -> None:
    module = script("quality")
    for base, parts in module.PARTS.values():
        parts = {name: own for name, own in parts.items() if name != module.CONTROL}  # other data
        configs = [Config.from_mapping({**base, **module.SHARED, **own}) for own in parts.values()]
        digests = {module.digest_of(config) for config in configs}
        assert len(digests) == len(parts)  # no two parts are the same training


def test_the_control_trains_on_captions_of_other_images(
    quality: ModuleType, coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[CaptionTable]] = {}

    def measure(name: str, config: Config, folder: Path, tables: Any, model: Any) -> dict[str, Any]:
        seen[name] = list(tables)
        machine = quality._machine(config)
        return {
            **{"part": name, "seed": config.seed, "machine": machine, "rsum": 1.0},
            **{"image_to_text": 1.0, "text_to_image": 1.0, "processor_seconds": 1.0},
        }

    parts = {"whole": {}, quality.CONTROL: {}}
    monkeypatch.setattr(quality, "PARTS", {"head": (SMALL, parts)})
    monkeypatch.setattr(quality, "measure", measure)
    out = ["--out", str(tmp_path / "runs"), "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", ["quality.py", str(coco), *out])
    quality.main()
    (right, val), (wrong, same_val) = seen["whole"], seen[quality.CONTROL]
    assert same_val is val and wrong.texts() == right.texts()
    assert wrong.file_keys() == right.file_keys()
    assert (wrong.image_of_caption != right.image_of_caption).all()
    assert sorted(wrong.caption_counts) == sorted(right.caption_counts)
