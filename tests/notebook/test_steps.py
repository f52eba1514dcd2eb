"""The functions of the notebook, outside IPython: what they print and return."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from captune import notebook as nb
from captune.config import Config
from captune.console import logger
from captune.data.demo import draw_demo
from captune.errors import CaptuneError
from captune.models import CLIPModel
from captune.notebook import machine, steps
from captune.notebook.display import NotebookError
from captune.training.run import Run
from captune.training.stop import TrainingStopped
from captune.workflow.train import Outcome
from conftest import write_scene


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)


# -- the machine ---------------------------------------------------------------------------------


def test_setup_without_a_record_says_that_nothing_was_installed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine = nb.setup("absent.txt")
    assert machine.changed is None and machine.place == "this machine"
    printed = capsys.readouterr().out
    assert "nothing was installed" in printed and machine.versions["torch"] in printed
    assert machine.memory_gib > 0 and machine.free_disk_gib > 0


def test_setup_confirms_versions_that_stayed(capsys: pytest.CaptureFixture[str]) -> None:
    versions = nb.setup("absent.txt").versions
    Path("kept.txt").write_text("".join(f"{name}=={v}\n" for name, v in versions.items()))
    assert nb.setup("kept.txt").changed == {}
    assert "✓ torch, torchvision and numpy are the versions" in capsys.readouterr().out


def test_setup_names_versions_that_the_install_changed(capsys: pytest.CaptureFixture[str]) -> None:
    numpy = np.__version__
    Path("kept.txt").write_text("numpy==1.0.0\ntorchaudio==9.9\n")
    changed = nb.setup("kept.txt").changed
    assert changed == {"numpy": ("1.0.0", numpy), "torchaudio": ("9.9", "not installed")}
    assert f"✗ The install changed numpy 1.0.0 → {numpy}" in capsys.readouterr().out


def test_a_record_of_something_else_is_refused() -> None:
    Path("kept.txt").write_text("numpy\n")
    with pytest.raises(CaptuneError, match="the line 'numpy'"):
        nb.setup("kept.txt")


def test_storage_is_the_local_folder() -> None:
    assert nb.storage() == Path() and Path("runs").is_dir()
    assert nb.storage(google_drive=True) == Path()


@pytest.mark.parametrize("allowed", [True, False])
def test_storage_on_drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
    def mount(where: str) -> None:
        (Path(where) / ("MyDrive" if allowed else "")).mkdir(parents=True)

    drive = types.SimpleNamespace(mount=mount)
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(drive=drive))
    monkeypatch.setattr(machine, "DRIVE", tmp_path / "drive")
    if not allowed:
        with pytest.raises(CaptuneError, match="allow access"):
            nb.storage(google_drive=True)
        return
    folder = nb.storage(google_drive=True)
    assert folder == tmp_path / "drive" / "MyDrive" / "captune"
    assert (folder / "runs").is_dir()


# -- data ------------------------------------------------------------------------------------------


def test_one_word_chooses_data_and_towers(coco: Path) -> None:
    demo, real, own = nb.preset("demo"), nb.preset("coco"), nb.preset(str(coco))
    assert Config.from_mapping(demo.config).towers == "minilm-lite0"
    assert Config.from_mapping(real.config).towers == "clip-resnet50"
    assert "sport" in real.queries and "a cat" in real.queries
    assert own.data == str(coco)
    with pytest.raises(CaptuneError, match="'koko'"):
        nb.preset("koko")


def test_own_data_is_looked_at_where_it_lies(
    coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert nb.prepare_data(nb.preset(str(coco))) == str(coco)
    words = capsys.readouterr().out.split()
    assert words[-6:] == ["train", "24", "120", "val", "8", "40"]


@pytest.mark.parametrize("kind", ["coco", "kaggle"])
def test_downloads_say_their_cost_first_and_go_to_the_folder(
    kind: str, coco: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import captune.download.coco
    import captune.download.kaggle

    asked: list[tuple[Path, int]] = []

    def download(folder: Path, *, shrink: int) -> Path:
        assert "GB" in capfd.readouterr().err
        asked.append((folder, shrink))
        return coco

    module = getattr(captune.download, kind)
    monkeypatch.setattr(module, f"download_{kind}", download)
    assert nb.prepare_data(kind, "disk") == str(coco)
    (found,) = asked
    assert found[0].parent == Path("disk") and found[1] == 256


def test_samples_are_random_by_seed_and_of_the_split(coco: Path) -> None:
    first, again, other = (nb.show_samples(coco, count=5, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert all("train2014" in path for path in first) and len(set(first)) == 5
    assert "val2014" in nb.show_samples(coco, "val", count=99)[0]


# -- the model -------------------------------------------------------------------------------------


def test_the_table_of_a_model_counts_what_is_trained(
    tiny_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"use_batch_norm": True, "use_attention_pooling": True}
    model = nb.describe_model({**tiny_config, **flags})
    assert isinstance(model, CLIPModel)
    printed = capsys.readouterr().out
    trained = sum(p.numel() for p in model.parameters())
    assert f"{trained:,} trainable parameters" in printed
    for words in ("attention pooling", "BatchNorm1d, 1024", "Linear, 32 to 1024", "no, frozen"):
        assert words in printed
    assert nb.describe_model(model) is model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frozen_layers": 0.5}, "the image tower but for its first layers (50%)"),
        ({"frozen_layers": 0.0}, "the whole image tower"),
        ({"freeze_backbone": True, "use_attention_pooling": True}, "trainable parameters"),
        ({"recipe": "best-adapter", "frozen_layers": 0.3}, "the image tower but for"),
    ],
)
def test_the_table_of_a_config_counts_what_it_trains(
    coco: Path,
    tiny_config: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    words: str,
) -> None:
    """The temperature apart, which is the loss's, as many as the last stage says of itself."""
    config = tiny_config.replace(**{"head_epochs": 1, **changes})
    model = nb.describe_model(config)
    printed = capsys.readouterr().out
    assert all(parameter.requires_grad for parameter in model.parameters())  # shown, not changed
    nb.train(coco, config, tmp_path)
    stages = capsys.readouterr().err
    assert words in stages
    said = [line for line in stages.splitlines() if "trainable" in line]
    counts = [int(line.split()[0].replace(",", "")) for line in said]
    assert f"{counts[-1] - 1:,} trainable parameters" in printed
    assert ("text adapter" in printed) == (config.recipe == "best-adapter")


def test_training_again_goes_on_and_another_config_gets_its_own_folder(
    coco: Path, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dict(tiny_config) | {"num_epochs": 2}
    stops = iter([True])
    real = steps.training_curves

    def stop_once(history: list[Any], title: str) -> Any:
        if next(stops, False):
            raise TrainingStopped(Run.open(Path("runs") / "squares"))
        return real(history, title)

    monkeypatch.setattr(steps, "training_curves", stop_once)
    with pytest.raises(NotebookError, match="run this cell again"):
        nb.train(coco, config, "runs")
    run = nb.train(coco, config, "runs")
    assert run.folder == Path("runs") / "squares" and run.is_complete
    assert nb.train(coco, config, "runs").folder == run.folder
    other = nb.train(coco, {**config, "num_epochs": 1}, "runs")
    assert other.folder == Path("runs") / "squares-2"
    assert nb.train(coco, {**config, "num_epochs": 1}, "runs").folder == other.folder


# -- evaluation ------------------------------------------------------------------------------------


def test_recall_is_of_a_test_split_where_there_is_one(
    run: Path, outcome: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    result = nb.show_recall(str(run))
    assert result == json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert result["split"] == "val"  # this data has no test split
    assert nb.show_recall(str(run), "fresh")["images"] == 6
    printed = capsys.readouterr().out
    assert "image→text" in printed and "chance" in printed


def test_search_labels_and_heat_maps_of_a_run(run: Path) -> None:
    hits = nb.search(run, ["a red square", "blue"], k=3)
    assert [len(found) for found in hits] == [3, 3]
    rows = nb.zero_shot(run, [0, hits[0][0].image], ["red", "blue"])
    assert [set(row.probabilities) for row in rows] == [{"red", "blue"}] * 2
    assert len(nb.zero_shot(run)) == 4
    heat = nb.explain(run, ["red", "blue"])
    assert [[cell.query for cell in row] for row in heat] == [["red", "blue"]] * 2
    assert nb.explain(run, "red", [1], method="gradient")[0][0].method == "gradient"


def test_zero_shot_labels_are_held_against_known_classes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert nb.zero_shot_accuracy(run) == {}  # these squares say no objects
    assert "no labels beside these pictures" in capsys.readouterr().err
    for square in ("red", "blue"):
        for ground in ("black", "white", "green"):
            write_scene(tmp_path / "pets" / square / f"{ground}.jpg", ground, square)
    found = nb.zero_shot_accuracy(run, tmp_path / "pets")
    assert found["images"] == 6 and "linear_probe" in found["baselines"]
    printed = capsys.readouterr().out
    assert f"{found['zero_shot']['top1']:.1f}" in printed and "majority" in printed


def test_the_summary_lists_what_a_run_holds(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = {path.name for path in nb.summary(run)}
    assert {"best_model.safetensors", "report.html", "history.jsonl"} <= listed
    printed = capsys.readouterr().out
    assert "opens in any browser" in printed and str(run) in printed


def test_the_demo_is_marked_right_and_wrong(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_demo("demo", train=24, val=8, test=20, size=32, progress=False)
    run = nb.train("demo", tiny_config, "runs")
    sheets: list[Any] = []
    monkeypatch.setattr(steps, "retrieval_sheet", lambda answers, title: sheets.append(answers))
    monkeypatch.setattr(steps, "show_figure", lambda figure: None)
    nb.search(run, ["animals", "something else"])
    ((known, unknown),) = sheets
    assert len(known.right) == 5 and None not in known.right
    assert unknown.right is None
    assert nb.show_recall(run)["split"] == "test"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: nb.search("nowhere", "red"), "no run at nowhere"),
        (lambda: nb.summary("nowhere"), "no run at nowhere"),
        (lambda: nb.show_samples("nowhere"), "no data at nowhere"),
        (lambda: nb.describe_model({"use_batchnorm": True}), "did you mean 'use_batch_norm'"),
    ],
)
def test_users_errors_are_one_line(call: Any, words: str) -> None:
    with pytest.raises(NotebookError, match=words) as caught:
        call()
    assert caught.value._render_traceback_() == [f"captune: {caught.value}"]


def test_words_of_many_trainings_are_brief_and_their_errors_one_line() -> None:
    before = logger.handlers[:]
    with pytest.raises(NotebookError, match="no such"), nb.brief():
        raise CaptuneError("no such")
    assert logger.handlers == before
