"""Commands, options and overrides; what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import captune
from captune.cli.main import main, parse_overrides
from captune.cli.parser import build_parser
from captune.cli.printing import print_bench
from captune.config import FIELDS
from captune.errors import CaptuneError
from captune.evaluation.plausible import GroundTruth
from conftest import write_scene

KEPT = ("best_model.safetensors", "history.jsonl")
HEAVY = ("torch", "transformers", "numpy", "pyarrow", "sentence_transformers", "matplotlib", "PIL")


def overrides(*words: str) -> dict[str, Any]:
    """What the command line makes of ``words``, without running the command."""
    arguments, rest = build_parser().parse_known_args(words)
    return parse_overrides(rest, arguments)


def config_of(run: Path) -> dict[str, Any]:
    stated = json.loads((run / "config.json").read_text(encoding="utf-8"))
    return dict(stated["config"])


# -- a quick answer ---------------------------------------------------------------------------
def test_help_answers_in_under_half_a_second() -> None:
    """The best of several: the machine may be busy with other things."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        answer = subprocess.run(
            [sys.executable, "-m", "captune", "--help"], capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - start)
        kinds = {
            "demo",
            "train",
            "evaluate",
            "blend",
            "search",
            "classify",
            "zeroshot",
            "bench",
            "data",
        }
        assert kinds <= set(re.findall(r"^ {4}(\w+)", answer.stdout, re.MULTILINE))
        if seconds[-1] < 0.4:
            break
    assert min(seconds) < 0.5


def test_building_the_parser_imports_nothing_heavy() -> None:
    code = (
        "import sys, captune.cli.main as cli; cli.build_parser().format_help(); "
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_the_module_can_be_run_and_says_its_version() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "captune", "--version"], capture_output=True, text=True, check=True
    )
    assert answer.stdout == f"captune {captune.__version__}\n"


def test_the_help_of_train_lists_every_config_key_with_its_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["train", "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    for key, spec in FIELDS.items():
        assert re.search(rf"^ +{key} +{re.escape(repr(spec.default))} ", shown, re.MULTILINE), key


# -- --json -----------------------------------------------------------------------------------
def test_train_prints_exactly_one_json_object(
    tiny: list[str], squares: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Read at the file descriptor: libraries that print by themselves would show."""
    assert main(["train", str(squares), "--out", str(tmp_path / "run"), "--json", *tiny]) == 0
    printed, said = capfd.readouterr()
    metrics = json.loads(printed)
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert "recipe best" in said and "epoch 30/31" in said and "epoch 31/31" in said


@pytest.mark.parametrize("recipe", ["plain", "best-adapter"])
def test_the_first_line_of_train_and_its_page_name_the_recipe(
    tiny: list[str],
    squares: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    recipe: str,
) -> None:
    """Two that are not the default, which a page could name without looking."""
    run = tmp_path / "run"
    assert main(["train", str(squares), "--out", str(run), "--recipe", recipe, *tiny]) == 0
    assert capfd.readouterr().err.startswith(f"recipe {recipe} · towers ")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f'<p class="lead">recipe {recipe} · towers ' in page
    assert re.search(rf"<td>recipe and towers</td><td[^>]*>recipe {recipe} · ", page)


def test_evaluate_prints_exactly_the_object_of_its_file(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), "--json"]) == 0
    printed, said = capfd.readouterr()
    result = json.loads(printed)
    assert result == json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert (result["images"], result["captions"], result["split"]) == (8, 40, "val")
    for direction in ("image_to_text", "text_to_image"):
        percent = {"R@1", "R@5", "R@10", "MRR", "mAP@R"}
        assert set(result[direction]) == percent | {"median_rank", "mean_rank"}
    assert "note: " in said


def test_blend_prints_exactly_the_object_of_its_file_and_its_best_is_a_run(
    run: Path, squares: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """DATA may stand behind the options, as with evaluate."""
    folder = tmp_path / "blend"
    ends = [f"{run}@stage-1", str(run)]
    words = ["blend", *ends, "--steps", "3", "--out", str(folder), str(squares)]
    assert main([*words, "--json"]) == 0
    printed, said = capfd.readouterr()
    found = json.loads(printed)
    assert found == json.loads((folder / "blend.json").read_text(encoding="utf-8"))
    assert [row["alpha"] for row in found["rows"]] == [0.0, 0.5, 1.0]
    assert "blending" in said
    assert main(words) == 0
    table = capfd.readouterr().out
    assert f"alpha 0 is {ends[0]}, alpha 1 is {ends[1]}" in table and "note: alpha was" in table
    assert table.endswith(f"run     {folder}\npicture {folder / 'blend.png'}\n")
    assert main(["search", str(folder), "a red square", "-k", "1"]) == 0


def test_search_prints_one_json_list_best_first(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", str(run), "a red square", "-k", "3", "--json"]) == 0
    hits = json.loads(capfd.readouterr().out)
    assert [set(hit) for hit in hits] == [{"image", "score", "caption"}] * 3
    assert all(Path(hit["image"]).is_file() for hit in hits)
    assert [h["score"] for h in hits] == sorted((h["score"] for h in hits), reverse=True)


def test_search_gives_five_pictures_unless_told(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", str(run), "a red square", "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)) == 5


def test_classify_prints_one_json_list_with_all_probabilities(
    run: Path, squares: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = [str(path) for path in sorted((squares / "val2014").iterdir())[:2]]
    assert main(["classify", str(run), *images, "--labels", "a person", "food", "--json"]) == 0
    predictions = json.loads(capfd.readouterr().out)
    assert [p["image"] for p in predictions] == images
    for prediction in predictions:
        assert set(prediction) == {"image", "label", "probabilities"}
        assert list(prediction["probabilities"]) == ["a person", "food"]
        assert sum(prediction["probabilities"].values()) == pytest.approx(1, abs=1e-4)


def test_letters_of_other_languages_are_printed_as_they_are(
    run: Path, squares: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    image = str(next((squares / "val2014").iterdir()))
    assert main(["classify", str(run), image, "--labels", "Straße", "東京", "--json"]) == 0
    assert '"Straße"' in (printed := capfd.readouterr().out) and '"東京"' in printed


# -- without --json ---------------------------------------------------------------------------
def test_evaluate_prints_a_small_table_of_the_same_numbers(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run)]) == 0
    rows = capsys.readouterr().out.splitlines()
    result = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert rows[0] == "squares val: 8 images, 40 captions (percent)"
    for row, direction in zip(rows[2:4], ("image_to_text", "text_to_image"), strict=True):
        expected = [result[direction][key] for key in ("R@1", "R@5", "R@10", "median_rank")]
        assert [float(word) for word in row.split()[3:]] == pytest.approx(expected, abs=0.051)
    assert float(rows[4].split()[1]) == pytest.approx(result["rsum"], abs=0.051)


def test_the_table_says_how_sure_rsum_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run)]) == 0
    last = capsys.readouterr().out.splitlines()[5]
    result = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    low, high = result["intervals"]["rsum"]
    assert last.split("95")[0].strip() == f"[{low:.1f}, {high:.1f}]"
    assert low <= result["rsum"] <= high


@pytest.mark.parametrize(
    ("form", "mark"), [("markdown", "| image to text |"), ("latex", "tabular")]
)
def test_evaluate_prints_the_table_of_a_paper(
    run: Path, capsys: pytest.CaptureFixture[str], form: str, mark: str
) -> None:
    assert main(["evaluate", str(run), "--format", form]) == 0
    printed = capsys.readouterr().out
    assert mark in printed and "protocol full" in printed
    assert main(["evaluate", str(run), "--format", form, "--json"]) == 2


def test_a_run_against_itself_differs_by_nothing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), "--against", str(run)]) == 0
    printed, said = capsys.readouterr()
    rows = [line for line in printed.splitlines() if line.endswith("within noise")]
    assert len(rows) == 7 and all("+0.0  [+0.0, +0.0]" in row for row in rows)
    assert f"note on {run}: the best epoch was chosen on 8" in said


def test_plausible_matches_are_printed_under_a_title_of_their_own(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Around made-up figures: the real ones need all of COCO's test split."""
    recalls = {"R@1": 12.34, "R@5": 45.6, "R@10": 100.0, "queries": 5000}
    eccv = {"mAP@R": 1.0, "R-Precision": 2.0, "R@1": 3.0, "queries": 1261}
    figures = {
        "cxc": {"image_to_text": recalls, "text_to_image": {**recalls, "queries": 24972}},
        "eccv": {"image_to_text": eccv, "text_to_image": eccv},
        "ties": "ties count against the query",
        "package": "eccv_caption 1.2",
    }
    with monkeypatch.context() as patch:
        patch.setattr(GroundTruth, "check", lambda *_: None)
        patch.setattr("captune.workflow.evaluate.plausible_matches", lambda *_: figures)
        patch.setattr("captune.workflow.evaluate.split_of_truth", lambda *_: "val")
        assert main(["evaluate", str(run), "--eccv"]) == 0
    printed = capsys.readouterr().out
    result = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert result["plausible"] == figures
    assert main(["evaluate", str(run)]) == 0
    plain = capsys.readouterr().out
    assert printed.startswith(plain + "\n")
    rows = [line.split() for line in printed[len(plain) + 1 :].splitlines()]
    assert rows[0][-2:] == ["1.2,", "percent)"] and len(rows) == 7
    assert rows[1] == ["CxC", "R@1", "R@5", "R@10", "queries"]
    assert rows[3] == ["text", "to", "image", "12.3", "45.6", "100.0", "24,972"]
    assert rows[4] == ["ECCV", "Caption", "mAP@R", "R-Precision", "R@1", "queries"]


def test_hubness_adds_a_block_and_a_key_and_changes_no_plain_figure(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run)]) == 0
    plain = capsys.readouterr().out
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert main(["evaluate", str(run), "--hubness"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(plain + "\n")
    block = printed[len(plain) + 1 :].splitlines()
    assert block[0] == (
        "corrected for hubs with 120 train captions (inverted softmax, temperature 0.05)"
    )
    assert main(["evaluate", str(run), "--hubness", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    corrected = result.pop("hubness_corrected")
    assert result == metrics
    assert corrected["image_to_text"] == metrics["image_to_text"]
    assert block[2].startswith("text to image") and len(block) == 5
    assert float(block[3].split()[1]) == pytest.approx(corrected["rsum"], abs=0.051)
    skewness = corrected["skewness_before"]["text_to_image"]
    assert block[4].endswith(f", {skewness:.2f} before: 0 where there are no hubs")


def test_search_prints_score_path_and_caption(
    run: Path, squares: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", str(run), "a red square", "-k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for first, second in zip(lines[::2], lines[1::2], strict=True):
        score, path = first.split(maxsplit=1)
        assert -1 <= float(score) <= 1 and Path(path).is_file()
        assert re.fullmatch(r" +a \w+ square on a \w+ ground \(0\)", second)


def test_classify_prints_labels_in_percent_likeliest_first(
    run: Path, squares: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(next((squares / "val2014").iterdir()))
    assert main(["classify", str(run), image, "--labels", "x", "food", "a house"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == image
    shown = [float(line.split(" %")[0]) for line in lines[1:]]
    assert len(shown) == 3 and shown == sorted(shown, reverse=True)
    assert sum(shown) == pytest.approx(100, abs=0.2)


def test_zeroshot_prints_the_table_of_its_file_and_one_json_object(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for square in ("red", "blue"):
        for ground in ("black", "white", "green"):
            write_scene(tmp_path / "squares" / square / f"{ground}.jpg", ground, square)
    words = ["zeroshot", str(run), str(tmp_path / "squares")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    stated = json.loads((run / "classification.json").read_text(encoding="utf-8"))
    assert printed.startswith("squares all: 6 images of 2 classes (percent)\n")
    top1 = re.search(r"^zero-shot +([\d.]+)", printed, re.MULTILINE)
    assert top1 and float(top1.group(1)) == pytest.approx(stated["zero_shot"]["top1"], abs=0.051)
    assert re.search(r"^linear probe +", printed, re.MULTILINE)
    assert printed.endswith(f"page {run / 'classification.html'}\n")
    assert main([*words, "--no-probe", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["zero_shot"] == stated["zero_shot"]
    assert set(found["baselines"]) == {"chance", "majority"}


def test_bench_prints_parts_speeds_and_advice(
    squares: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", str(squares), "--steps", "2", *tiny]
    assert main(words) == 0
    printed = capsys.readouterr().out
    for part in ("decode", "copy", "forward and loss", "backward", "optimiser", "a step"):
        assert re.search(rf"^{part} +[\d.]+ ms( +[\d.]+ %)?$", printed, re.MULTILINE)
    assert re.search(r"^from disk at \d\.\d\d of the speed from memory$", printed, re.MULTILINE)
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 2
    print_bench({**found, "workers": 3})
    printed = capsys.readouterr().out
    assert re.search(r"^decode +[\d.]+ ms   meanwhile, by the workers$", printed, re.MULTILINE)


def test_templates_of_the_command_line_replace_the_usual_ones(
    run: Path, squares: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(next((squares / "val2014").iterdir()))
    words = ["classify", str(run), image, "--labels", "a cat", "a dog", "--json"]
    found = []
    for more in ([], ["--template", "zzz {}"], ["--template", "zzz {}", "--template", "{}"]):
        assert main([*words, *more]) == 0
        found.append(json.loads(capsys.readouterr().out)[0]["probabilities"]["a cat"])
    assert len(set(found)) == 3


# -- overrides --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["batch_size=4"], {"batch_size": 4}),
        (["--batch_size=4"], {"batch_size": 4}),
        (["--batch-size=4"], {"batch_size": 4}),
        (["--batch-size", "4"], {"batch_size": 4}),
        (["--learning-rate", "1e-3", "seed=7"], {"learning_rate": 1e-3, "seed": 7}),
        (["--use-batch-norm"], {"use_batch_norm": True}),
        (["--use-batch-norm", "false"], {"use_batch_norm": False}),
        (["--use-batch-norm", "seed=7"], {"use_batch_norm": True, "seed": 7}),
        (["--use-batch-norm", "--seed", "7"], {"use_batch_norm": True, "seed": 7}),
        (["use_batch_norm=yes"], {"use_batch_norm": True}),
        (["use_batch_norm=0"], {"use_batch_norm": False}),
        (["image_encoder=a=b"], {"image_encoder": "a=b"}),
        (["image_encoder="], {"image_encoder": ""}),
        (["--towers", "minilm-lite0", "--recipe", "plain"],
         {"towers": "minilm-lite0", "recipe": "plain"}),
        (["seed=1", "seed=2"], {"seed": 2}),
        (["--num-workers", "-1"], {"num_workers": -1}),
    ],
)  # fmt: skip
def test_config_values_are_written_in_any_usual_way(
    words: list[str], expected: dict[str, Any]
) -> None:
    assert overrides("train", "data", *words) == expected


@pytest.mark.parametrize(
    "words",
    [
        ["seed=7", "--batch-size", "4", "--use-batch-norm", "--out", "here", "--json"],
        ["--out", "here", "seed=7", "--json", "--batch-size", "4", "--use-batch-norm"],
        ["--json", "--use-batch-norm", "--out", "here", "--batch-size", "4", "seed=7"],
        ["--batch-size", "4", "--out", "here", "--use-batch-norm", "--json", "seed=7"],
    ],
)
def test_config_values_stand_anywhere_after_the_data(words: list[str]) -> None:
    arguments, rest = build_parser().parse_known_args(["train", "data", *words])
    assert (arguments.data, arguments.out, arguments.json) == ("data", "here", True)
    assert parse_overrides(rest, arguments) == {
        "seed": 7,
        "batch_size": 4,
        "use_batch_norm": True,
    }


@pytest.mark.parametrize(
    "words",
    [["RUN", "DATA", "--json"], ["--json", "RUN", "DATA"], ["RUN", "--json", "DATA"],
     ["RUN", "--split", "val", "DATA", "--json"]],
)  # fmt: skip
def test_evaluate_takes_its_data_wherever_the_options_stand(
    words: list[str], run: Path, squares: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"RUN": str(run), "DATA": str(squares)}
    assert main(["evaluate", *(names.get(word, word) for word in words)]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 8


@pytest.mark.parametrize(
    ("command", "wrong", "right"),
    [
        ("train", ["batch_sise=4"], "batch_size"),
        ("train", ["--learning-rte", "1"], "--learning-rate"),
        ("train", ["--use-bach-norm"], "--use-batch-norm"),
        ("train", ["recipe=plian"], "plain"),
        ("train", ["--towers", "minilm-lite"], "minilm-lite0"),
        ("train", ["precision=fp23"], "fp32"),
        ("train", ["--resum"], "--resume"),
        ("train", ["--jsn"], "--json"),
        ("train", ["--caption-colum", "title"], "--caption-column"),
        ("evaluate", ["--splt", "val"], "--split"),
        ("search", ["a dog", "--dta", "folder"], "--data"),
        ("classify", ["a.jpg", "--labels", "a", "b", "--templte", "{}"], "--template"),
    ],
)
def test_an_unknown_key_option_or_choice_is_refused_with_the_nearest_name(
    command: str, wrong: list[str], right: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "somewhere", *wrong]) == 2
    error = capsys.readouterr().err
    assert error.startswith("captune: error: ") and f"did you mean {right!r}?" in error


def test_an_argument_without_dashes_is_not_proposed_as_an_option() -> None:
    with pytest.raises(CaptuneError, match="no option '--data'") as raised:
        overrides("evaluate", "runs/x", "--data", "x")
    assert "mean '--data'" not in str(raised.value)


def test_a_command_that_trains_nothing_takes_no_config_values() -> None:
    with pytest.raises(
        CaptuneError, match="captune evaluate takes no config values: 'batch_size=4'"
    ):
        overrides("evaluate", "run", "data", "batch_size=4")


@pytest.mark.parametrize("words", [["--batch-size"], ["--batch-size", "--seed", "7"]])
def test_a_key_without_its_value_is_named(words: list[str]) -> None:
    with pytest.raises(CaptuneError, match="--batch-size wants a value"):
        overrides("train", "data", *words)


def test_a_stray_word_is_named() -> None:
    with pytest.raises(CaptuneError, match="unexpected word 'more-data'"):
        overrides("train", "data", "more-data")


# -- the run's folder -------------------------------------------------------------------------
def test_an_occupied_folder_is_refused_and_the_suggested_name_is_free(
    tiny: list[str], run: Path, squares: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (run / "best_model.safetensors").read_bytes()
    words = ["train", str(squares), *tiny, "temperature=0.2"]
    assert main([*words, "--out", str(run)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "temperature 0.07 -> 0.2" in error
    suggested = error.split("--out ")[1]
    assert main([*words, "--out", suggested]) == 0
    assert config_of(Path(suggested))["temperature"] == 0.2
    assert (run / "best_model.safetensors").read_bytes() == weights
    assert config_of(run)["temperature"] == 0.07


def test_a_run_on_other_data_is_refused_by_the_name_of_the_data(
    tiny: list[str], run: Path, coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(coco), *tiny, "--out", str(run)]) == 2
    assert f"-> {coco.resolve()}" in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_of_other_things_is_left_alone(
    tiny: list[str], squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious", encoding="utf-8")
    assert main(["train", str(squares), *tiny, "--out", str(tmp_path / "mine")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "is not empty and holds no run" in error and f"--out {tmp_path / 'mine-2'}" in error
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_finished_run_of_the_same_configuration_is_not_trained_again(
    tiny: list[str], run: Path, squares: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: (run / name).stat().st_mtime_ns for name in KEPT}
    assert main(["train", str(squares), *tiny, "--out", str(run)]) == 0
    said = capsys.readouterr().err
    assert "complete already" in said and "epoch 1/1" not in said
    assert {name: (run / name).stat().st_mtime_ns for name in KEPT} == before


@pytest.mark.parametrize(
    ("flags", "suffix"),
    [
        ([], ""),
        (["--use-batch-norm"], "_bn"),
        (["use_attention_pooling=true"], "_attn"),
        (["--use-batch-norm", "--use-attention-pooling"], "_bn_attn"),
    ],
)
def test_every_output_and_the_default_folder_carry_the_suffix_of_the_flags(
    flags: list[str],
    suffix: str,
    tiny: list[str],
    squares: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", os.path.relpath(squares), *tiny, *flags]) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [f"squares{suffix}"]
    assert main(["evaluate", f"runs/squares{suffix}"]) == 0
    outputs = {
        f"best_model{suffix}.safetensors",
        f"metrics{suffix}.json",
        f"training_curves{suffix}.png",
        f"retrieval{suffix}.png",
        f"zero_shot{suffix}.png",
        f"report{suffix}.html",
    }
    found = {path.name for path in (tmp_path / "runs" / f"squares{suffix}").iterdir()}
    kinds = ("best_model", "metrics", "training_curves", "retrieval", "zero_shot", "report")
    assert {name for name in found if name.startswith(kinds)} == outputs


# -- data demo --------------------------------------------------------------------------------
def test_data_demo_draws_a_folder_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The drawing itself is tested where it lives; here, what the command asks of it."""
    from captune.data import demo

    asked: dict[str, Any] = {}

    def draw(folder: str, **named: Any) -> demo.DemoScenes:
        asked.update(named, folder=folder)
        return demo.DemoScenes(Path(folder), named["train"], 300, 500, named["seed"])

    monkeypatch.setattr(demo, "draw_demo", draw)
    assert main(["data", "demo", "scenes", "--images", "40", "--seed", "3"]) == 0
    assert asked == {"folder": "scenes", "train": 40, "seed": 3}
    printed, said = capsys.readouterr()
    assert printed == "scenes: 40 train, 300 val, 500 test scenes\n"
    assert "OpenMoji" in said and "CC BY-SA 4.0" in said


# -- leaving early ----------------------------------------------------------------------------
def test_ctrl_c_ends_without_a_traceback_and_with_its_own_code(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("captune.workflow.evaluate.evaluate", interrupted)
    assert main(["evaluate", str(run)]) == 130
    assert capsys.readouterr().err == "captune: stopped\n"
