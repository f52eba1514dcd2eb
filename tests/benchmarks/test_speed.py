"""Benchmarks in tiny form: they run, measure what they say, and tell what is met and what not."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from captune import device, open_source
from captune.config import Config
from captune.encoders.text import SentenceEncoder
from captune.training import steps as steps_module

Script = Callable[[str], ModuleType]


def test_ways_take_turns_and_ratios_are_of_one_repeat(script: Script) -> None:
    record = script("record")
    called: list[str] = []
    taken = record.in_turns({name: lambda n=name: called.append(n) for name in "ab"}, 3)
    assert called == ["a", "b"] * 3 and all(len(turns) == 3 for turns in taken.values())
    slow = [record.Taken(*pair) for pair in ((8.0, 4.0), (90.0, 4.0), (8.0, 4.0))]
    quick = [record.Taken(*pair) for pair in ((2.0, 2.0), (9.0, 2.0), (1.0, 2.0))]
    found = record.summary({"plain": slow, "own": quick})["own"]
    assert (found["times as fast"], found["times as fast, processor"]) == (8.0, 2.0)
    assert found["seconds"] == 2.0


def test_a_result_says_when_where_and_with_what(script: Script, tmp_path: Path) -> None:
    record = script("record")
    record.keep("thing", record.heading("numpy") | {"value": 1}, tmp_path / "results")
    kept = json.loads((tmp_path / "results" / "thing.json").read_text(encoding="utf-8"))
    assert kept["value"] == 1 and kept["machine"]["threads"] == torch.get_num_threads()
    assert kept["versions"]["torch"] == torch.__version__ and "numpy" in kept["versions"]


def test_stage_1_trains_all_its_steps(script: Script, tmp_path: Path) -> None:
    found = script("stage1").measure(tmp_path, images=300, captions=1500, epochs=2, steps=0)
    assert found["steps of an epoch"] == found["steps measured"] == 2
    assert len(found["losses"]) == 2 and found["epoch, seconds"] > 0
    assert found["peak memory, GB"] > 0


def test_the_synthetic_captions_are_alike_where_real_ones_are(
    script: Script, tmp_path: Path
) -> None:
    """Those of an image, and of images that show the same; else they are unlike."""
    bank = script("stage1").write_bank(tmp_path / "bank.npy", images=400, captions=2000)
    text = bank.all()
    cosine = text @ text.T
    same = cosine[torch.arange(400), torch.arange(400) + 400].mean()
    other = cosine[torch.arange(399), torch.arange(399) + 1].mean()
    assert 0.9 > same > 0.7 > 0.6 > other > 0.3
    torch.testing.assert_close(F.normalize(text, dim=-1), text)


def test_the_bank_is_compared_with_a_plain_loop(script: Script, tiny_sentence: Path) -> None:
    texts = [f"a dog number {number % 150}" for number in range(200)]
    found = script("bank").measure(texts, SentenceEncoder(str(tiny_sentence)), repeats=1)
    assert (found["captions"], found["distinct"]) == (200, 150)
    assert found["least cosine with the plain loop"] > 0.999
    assert set(found["ways"]) == {"plain loop", "bank"}


@pytest.mark.parametrize(("held", "workers"), [(False, 0), (False, 1), (True, 0)])
def test_both_loops_train_the_same(script: Script, coco: Path, held: bool, workers: int) -> None:
    """In fp32 they differ by rounding alone: same photos, captions, order and weights.

    AdamW divides small gradients by themselves, so that rounding grows from step to step.
    """
    steps = script("steps")
    values = {"batch_size": 8, "num_workers": workers, "precision": "fp32", "device": "cpu"}
    size = {"layers": (1, 1, 1, 1), "image_size": 32}
    found = steps.measure(coco, steps=3, repeats=1, held=held, values=values, **size)
    plain, own, seeds = found["losses"].values()
    assert len(set(plain)) == 6 and plain == pytest.approx(own, abs=0.03)
    assert plain[:2] == pytest.approx(own[:2], abs=1e-3)
    apart = found["mean difference from the plain loop's losses"]
    assert len(seeds) == 6 and apart["plain loop, another seed"] > apart["captune"]


@pytest.mark.parametrize("packed", [False, True])
def test_training_from_photos_is_compared_with_memory(
    script: Script, coco: Path, tiny_resnet: Path, tiny_sentence: Path, packed: bool
) -> None:
    towers = {"image_encoder": str(tiny_resnet), "text_encoder": str(tiny_sentence)}
    values = {**towers, "batch_size": 4, "num_workers": 0, "image_size": 32}
    found = script("endtoend").measure(str(coco), values, steps=2, repeats=2, packed=packed)
    assert len(found["shares"]) == 2 and found["batch_size"] == 4
    assert min(found["shares"]) <= found["share of the speed from memory"] <= max(found["shares"])


def test_two_nodes_share_a_step_over_a_cable(script: Script) -> None:
    nodes = script("nodes")
    try:
        with nodes.two_nodes():
            pass
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces are not permitted here: {error}")
    config = Config.from_mapping(
        {
            "recipe": "plain",
            "image_encoder": "standins:small",
            "text_encoder": "standins:text",
            "batch_size": 8,
            "chunk_size": 2,
        }
    )
    found = nodes.measure(config, steps=2, repeats=1, rates=[0.01])["ways"]
    assert found["apart"]["share of the speed apart"] == 1.0
    slow = found["together, 0.01 Gbit/s"]["seconds a step"]
    # 0.6 million weights, 2.3 MB each way: a cable of 10 Mbit/s takes nearly two seconds for them.
    assert slow > 1 > found["together, no limit"]["seconds a step"] > 0


def test_photos_are_taken_again_where_there_are_too_few(
    script: Script, coco: Path, tmp_path: Path
) -> None:
    table = open_source(script("standins").copies(coco, tmp_path / "many", 30)).table("train")
    own = open_source(coco).table("train")
    assert len(own) == 24 and len(table) == 30
    pairs = [(table.path(row), own.path(row % 24)) for row in (0, 23, 24, 29)]
    assert all(copy.read_bytes() == photo.read_bytes() for copy, photo in pairs)


def test_growth_trains_as_the_command_does(
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    growth = script("growth")
    monkeypatch.setattr(growth, "VALIDATION", 10)
    monkeypatch.setattr(device, "MEMORY_TO_SPARE", device.MEMORY_TO_SPARE)  # put back afterwards
    growth.write_data(tmp_path / "coco", 200)
    growth.train(str(tmp_path / "coco"))
    found = json.loads(capsys.readouterr().out)
    assert found["code"] == 0 and found["bytes"] > 1e8
    assert (tmp_path / "coco-run" / "report.html").is_file()


def test_the_first_step_is_where_the_clock_stops(
    script: Script,
    coco: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = script("start")
    monkeypatch.setattr(steps_module, "train_step", None)  # put back afterwards
    words = ["train", str(coco), "--out", str(tmp_path / "run"), "head_epochs=0", "log_with=none"]
    towers = ["image_encoder=standins:small", "text_encoder=standins:text", "batch_size=8"]
    with pytest.raises(SystemExit) as left:
        start.first_step([*words, *towers, "num_workers=0"])
    assert left.value.code == 130
    assert json.loads(capsys.readouterr().out)["processor seconds"] > 0


def part(script: Script, tmp_path: Path, needs: str = "", **found: Any) -> Any:
    """A part whose one target is at most 2 of ``value``."""
    every = script("all")
    target = every.Target("thing", 2, "s", lambda result: result["value"])
    made = every.Part("thing.py", "thing", (target,), needs)
    if found:
        made.path.write_text(json.dumps(found), encoding="utf-8")
    return made


@pytest.fixture
def results(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(script("all"), "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("value", "words"),
    [(1.5, "1.5 s     met"), (2.5, "2.5 s     NOT met"), (None, "-         not")],
)
def test_the_summary_says_what_is_met(
    script: Script, results: Path, value: float | None, words: str
) -> None:
    found = {} if value is None else {"value": value, "date": "2026-01-02"}
    found |= {"machine": {"processor": "a processor"}} if found else {}
    line = script("all").table((part(script, results, **found),)).splitlines()[1]
    assert words in line and ("2026-01-02, a processor" in line) == (value is not None)


def test_what_was_measured_is_not_measured_again(
    script: Script,
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    every = script("all")
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        ran.append(command[2:])
        return subprocess.CompletedProcess(command, int(command[-1] == "bad"))

    monkeypatch.setattr(every.subprocess, "run", run)
    none, some = {"photos": "", "captions": ""}, {"photos": "folder", "captions": "bad"}
    assert every.run((part(script, results, "photos"),), none, False) == []
    assert not ran and "DATA=folder" in capsys.readouterr().out
    assert every.run((part(script, results, "photos"),), some, False) == []
    assert every.run((part(script, results, "captions"),), some, False) == ["thing"]
    assert ran == [["folder"], ["bad"]]
    known = (part(script, results, value=1, date="2026-01-02"),)
    every.run(known, none, False)
    assert len(ran) == 2
    every.run(known, none, True)
    assert ran[2:] == [[]]


def test_a_cards_figures_lie_beside_the_processors(
    script: Script,
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And neither is measured on the other one."""
    every, record = script("all"), script("record")
    seen: list[str | None] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        seen.append(env.get("CUDA_VISIBLE_DEVICES"))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(every.subprocess, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    parts = [dataclasses.replace(part(script, results), card=card) for card in (False, True)]
    none = {"": ""}
    for there in (False, True):
        monkeypatch.setattr(every.torch.cuda, "is_available", lambda there=there: there)
        every.run(tuple(parts), none, True)
    assert seen == ["", "", "0"] and "thing-gpu: left out" in capsys.readouterr().out
    for name in ("cpu", "NVIDIA T4"):
        found = {"date": "2026-01-02", "machine": {"processor": "a processor"}, "device": name}
        record.keep("thing", found, results)
        assert record.where(found).endswith("a processor" if name == "cpu" else "NVIDIA T4")
    assert [one.found()["device"] for one in parts] == ["cpu", "NVIDIA T4"]


def test_every_promise_is_read_from_a_result_that_a_script_writes(script: Script) -> None:
    """Those that lie in benchmarks/results have what the summary reads."""
    every = script("all")
    for one in every.PARTS:
        assert (every.RESULTS.parent / one.script.split()[0]).is_file()
        found = one.found()
        if found is not None:
            assert all(isinstance(target.read(found), float | int) for target in one.targets)
            assert str(found["date"]) in script("record").where(found)
