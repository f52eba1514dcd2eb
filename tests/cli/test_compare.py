"""captune compare on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from captune.cli.main import main
from captune.config import Config
from captune.training.run import Provenance, Run
from captune.training.stop import TrainingStopped


def test_a_table_for_reading_and_where_picture_and_page_are(
    squares: Path, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config value may follow the flags: only lists of values are compared."""
    out = tmp_path / "out"
    words = ["--flags", "use_batch_norm", "learning_rate=0.1", "--seeds", "1", "--out", str(out)]
    assert main(["compare", str(squares), *words, *tiny]) == 0
    printed = capsys.readouterr().out
    assert "squares val: 8 images, 40 captions (percent, one seed)" in printed
    assert "base" in printed and "use_batch_norm" in printed
    assert f"page    {out / 'comparison.html'}" in printed
    assert (out / "comparison.png").is_file() and (out / "comparison.html").is_file()
    config = json.loads((out / "base-seed0" / "config.json").read_text(encoding="utf-8"))["config"]
    assert config["learning_rate"] == 0.1

    assert main(["compare", str(squares), *words, *tiny, "--json"]) == 0
    stated = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == stated


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (["--flags", "use_batch_nrom"], "use_batch_norm"),
        (["--flags", "hidden_dim"], "hidden_dim=a,b"),
        (["--flags", "use_batch_norm", "--seeds", "0"], "seeds=0"),
        (["--flags", "use_batch_norm", "batch_size=many"], "'many'"),
        (["--flags", "use_batch_norm", "--split", "tset"], "tset"),
        (["--flags", "use_batch_norm", "use_batch_norm=true"], "cannot be set as well"),
        ([], "--flags"),
    ],
)
def test_wrong_words_are_one_line_and_code_2(
    words: list[str],
    culprit: str,
    squares: Path,
    tiny: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert main(["compare", str(squares), *words, "--out", str(out), *tiny]) == 2
    error = capsys.readouterr().err
    assert culprit in error and error.startswith("captune: error: ") and error.count("\n") == 1
    assert not out.exists()


def test_ctrl_c_says_that_the_same_command_goes_on(
    squares: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise TrainingStopped(Run(tmp_path / "base-seed0", Config(), Provenance()))

    monkeypatch.setattr("captune.workflow.compare.train", stop)
    assert main(["compare", str(squares), "--flags", "augment", "--out", str(tmp_path)]) == 130
    assert "base-seed0: the same command goes on" in capsys.readouterr().err
