"""compare: the matrix, the runs it keeps, and a table that agrees with their own metrics."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from captune.config import Config
from captune.data.demo import draw_demo
from captune.data.tabular import TableOptions
from captune.errors import CaptuneError
from captune.evaluation.intervals import METRICS
from captune.training.run import Run
from captune.training.stop import TrainingStopped
from captune.workflow.compare import Matrix, _file_name, compare
from captune.workflow.evaluate import evaluate, measure
from captune.workflow.opening import open_model
from conftest import write_scene, write_split

FLAGS = ["use_batch_norm", "use_attention_pooling"]


def test_every_combination_once_the_base_first() -> None:
    matrix = Matrix.of(["use_batch_norm", "batch_size=8,4"])
    assert matrix.combinations == [
        {"use_batch_norm": bn, "batch_size": size} for bn in (False, True) for size in (8, 4)
    ]
    assert [matrix.name(values) for values in matrix.combinations] == [
        "base",
        "batch_size=4",
        "use_batch_norm",
        "use_batch_norm+batch_size=4",
    ]


def test_a_flag_switched_off_has_a_name_of_its_own() -> None:
    matrix = Matrix.of({"augment": (True, False)})
    assert [matrix.name(values) for values in matrix.combinations] == ["base", "augment=false"]


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        ([], "nothing to compare"),
        (["use_batchnorm"], "use_batch_norm"),
        (["batch_size"], "batch_size=a,b"),
        (["batch_size=8"], "two or more"),
        (["batch_size=8,8"], "two or more"),
        (["batch_size=8,many"], "'many'"),
        (["seed=0,1"], "--seeds"),
        (["val_split=val,train"], "--split"),
        (["use_batch_norm", "use-batch-norm"], "twice"),
        ({"batch_size": (0, 8)}, "batch_size must be at least 2"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(
    flags: Any, culprit: str, coco: Path, tiny_config: Config, tmp_path: Path
) -> None:
    with pytest.raises(CaptuneError, match=culprit):
        compare(coco, flags=flags, seeds=1, config=tiny_config, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_seed_is_refused(coco: Path, tiny_config: Config, tmp_path: Path) -> None:
    with pytest.raises(CaptuneError, match="seeds=0"):
        compare(coco, flags=FLAGS, seeds=0, config=tiny_config, out=tmp_path / "out")


def test_complete_runs_are_kept_and_a_stopped_one_goes_on(
    coco: Path, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after two of four runs; the second call trains two, a third call none."""
    trained: list[str] = []

    def spy(*arguments: Any, stop_after: int, **options: Any) -> Any:
        if len(trained) == stop_after:
            raise TrainingStopped(Run(Path(options["out"]), tiny_config, None))  # type: ignore[arg-type]
        trained.append(Path(options["out"]).name)
        return real(*arguments, **options)

    from captune.workflow import compare as module

    real = module.train
    call = {"flags": ["use_batch_norm"], "seeds": 2, "config": tiny_config, "out": tmp_path / "out"}
    monkeypatch.setattr(module, "train", lambda *a, **k: spy(*a, stop_after=2, **k))
    with pytest.raises(TrainingStopped):
        compare(coco, **call)  # type: ignore[arg-type]
    assert trained == ["base-seed0", "use_batch_norm-seed0"]
    monkeypatch.setattr(module, "train", lambda *a, **k: spy(*a, stop_after=99, **k))
    first = compare(coco, **call)  # type: ignore[arg-type]
    assert trained[2:] == ["base-seed1", "use_batch_norm-seed1"]
    again = compare(coco, **call)  # type: ignore[arg-type]
    assert len(trained) == 4
    assert again.to_dict() == first.to_dict()


def test_a_run_of_another_configuration_in_the_way_is_named(
    coco: Path, tiny_config: Config, tmp_path: Path
) -> None:
    call = {"flags": ["use_batch_norm"], "seeds": 1, "out": tmp_path / "out"}
    compare(coco, config=tiny_config, **call)  # type: ignore[arg-type]
    other = tiny_config.replace(learning_rate=0.5)
    with pytest.raises(CaptuneError, match=r"base-seed0.*learning_rate.*--out .*out-2"):
        compare(coco, config=other, **call)  # type: ignore[arg-type]


def test_another_split_is_measured_where_it_is_named(
    outcome: Any, tiny_config: Config, tmp_path: Path
) -> None:
    data = outcome.run.provenance.data
    found = compare(
        data, flags=["augment"], seeds=1, config=tiny_config, out=tmp_path / "out", split="fresh"
    )
    for variant in found.variants:
        path = variant.runs[0].folder / "metrics.json"
        metrics = json.loads(path.read_text(encoding="utf-8"))
        assert (metrics["split"], metrics["images"]) == ("fresh", 6)
        assert variant.runs[0].values[-1] == metrics["rsum"]
    assert "fresh" in found.subject and found.notes == []


def test_metrics_of_other_data_are_not_taken_for_the_comparison_s_own(
    coco: Path, tiny_config: Config, tmp_path: Path
) -> None:
    """`evaluate RUN OTHER_DATA` leaves its metrics in the run; the split's name may be the same."""
    call: dict[str, Any] = {"flags": ["augment"], "seeds": 1, "config": tiny_config}
    first = compare(coco, out=tmp_path / "out", **call)
    other = tmp_path / "other"
    write_split(other, "val", 3, first=5)
    evaluate(str(first.variants[1].runs[0].folder), data=str(other), split="val")
    again = compare(coco, out=tmp_path / "out", **call)
    assert again.to_dict() == first.to_dict()


def test_metrics_of_other_weights_are_measured_anew(
    coco: Path, tiny_config: Config, tmp_path: Path
) -> None:
    call: dict[str, Any] = {"flags": ["augment"], "seeds": 1, "config": tiny_config}
    first = compare(coco, out=tmp_path / "out", **call)
    path = tmp_path / "out" / "base-seed0" / "metrics.json"
    stale = json.loads(path.read_text(encoding="utf-8"))
    stale["rsum"], stale["image_to_text"]["R@1"] = 600.0, 99.0
    path.write_text(json.dumps(stale), encoding="utf-8")
    assert compare(coco, out=tmp_path / "out", **call).to_dict() == first.to_dict()


def test_a_relative_table_to_validate_on_is_the_same_at_the_second_call(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train", "val"):
        rows = ["image,caption"]
        for number, colour in enumerate(("red", "green", "blue", "white", "black") * 2):
            write_scene(tmp_path / name / f"{number}.jpg", "yellow", colour)
            rows.append(f"{name}/{number}.jpg,{colour} square {number}")
        (tmp_path / f"{name}.csv").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    call: dict[str, Any] = {
        "flags": ["augment"],
        "seeds": 1,
        "config": tiny_config,
        "options": TableOptions(val="val.csv"),
    }
    assert compare("train.csv", **call).to_dict() == compare("train.csv", **call).to_dict()


def test_a_tower_of_one_s_own_may_be_one_of_the_values(
    coco: Path, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "examples")
    towers = (tiny_config.text_encoder, "own_text_encoder:make")
    call: dict[str, Any] = {"flags": {"text_encoder": towers}, "seeds": 1, "config": tiny_config}
    found = compare(coco, out=tmp_path / "out", **call)
    assert len(found.variants) == 2
    assert compare(coco, out=tmp_path / "out", **call).to_dict() == found.to_dict()


def test_a_start_cut_short_does_not_block_its_folder(
    coco: Path, tiny_config: Config, tmp_path: Path
) -> None:
    for number, name in enumerate(("base-seed0", "augment-seed0")):
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        (folder / ("config.json", "data.json")[number]).write_text("{}", encoding="utf-8")
        (folder / ".data.json.abc.tmp").touch()
    found = compare(coco, flags=["augment"], seeds=1, config=tiny_config, out=tmp_path / "out")
    assert [len(variant.runs) for variant in found.variants] == [1, 1]


def test_the_page_states_the_precision_that_the_runs_were_trained_in(
    coco: Path, tiny_config: Config, tmp_path: Path
) -> None:
    call: dict[str, Any] = {"flags": ["augment"], "seeds": 1, "out": tmp_path / "out"}
    compare(coco, config=tiny_config.replace(precision="fp32"), **call)
    found = compare(coco, config=tiny_config.replace(precision="bf16"), **call)
    assert "precision=fp32" in found.config


def test_names_that_a_file_system_refuses_still_get_a_folder_each() -> None:
    names = ["text_encoder=a/b", "text_encoder=a:b", "text_encoder=a_b"]
    assert len({_file_name(name) for name in names}) == 3
    assert _file_name("use_batch_norm+batch_size=4") == "use_batch_norm+batch_size=4"


def test_hits_of_a_run_give_the_recalls_of_its_metrics(outcome: Any) -> None:
    table = outcome.run.source().table("val")
    hits = measure(open_model(str(outcome.run.folder)), table).hits
    expected = [outcome.metrics[direction][key] for direction, key in METRICS]
    assert hits.recalls() == pytest.approx(expected)


def test_two_flags_and_two_seeds_on_the_embedded_data_agree_with_each_run(tmp_path: Path) -> None:
    """The real towers on drawn scenes; every figure of the table is that of a metrics file."""
    data = tmp_path / "scenes"
    draw_demo(data, train=48, val=24, test=2, size=64, progress=False)
    config = {
        "towers": "minilm-lite0",
        "image_size": 64,
        "batch_size": 16,
        "num_epochs": 1,
        "learning_rate": 1e-3,
        "num_workers": 0,
        "log_with": "none",
    }
    found = compare(data, flags=FLAGS, seeds=2, config=config, out=tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert len(found.variants) == 4 and found.seeds == [0, 1]
    for row, (bn, attn) in zip(
        stated["variants"], itertools.product((False, True), repeat=2), strict=True
    ):
        suffix = ("_bn" if bn else "") + ("_attn" if attn else "")
        measured = []
        for seed, run in enumerate(row["runs"]):
            folder = tmp_path / "out" / run["folder"]
            metrics = json.loads((folder / f"metrics{suffix}.json").read_text(encoding="utf-8"))
            assert Run.open(folder).config.seed == seed == run["seed"]
            assert run["rsum"] == metrics["rsum"]
            assert all(run[f"{d}/{k}"] == metrics[d][k] for d, k in METRICS)
            measured.append(metrics["rsum"])
        assert row["mean"]["rsum"]["value"] == pytest.approx(sum(measured) / 2)
    assert found.page.is_file() and found.picture.is_file()
