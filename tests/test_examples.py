"""The examples run as their first lines say, and are as short as promised."""

from __future__ import annotations

from pathlib import Path

import pytest

from captune.cli.main import main

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_examples_are_about_twenty_lines() -> None:
    for path in EXAMPLES.glob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        code = [line for line in lines if line.strip() and not line.startswith(("from", "import"))]
        assert len(code) <= 22, path.name


@pytest.mark.parametrize("key", ["image_encoder", "text_encoder", "criterion"])
def test_example_trains_and_is_evaluated(
    key: str,
    coco: Path,
    tmp_path: Path,
    tiny_resnet: Path,
    tiny_sentence: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(EXAMPLES)
    factory = f"own_{key}:make"
    assert f"captune train DATA {key}={factory}" in Path(f"own_{key}.py").read_text("utf-8")
    towers = {"image_encoder": str(tiny_resnet), "text_encoder": str(tiny_sentence), key: factory}
    values = [f"{name}={value}" for name, value in towers.items()]
    out = str(tmp_path / "run")
    rest = ["batch_size=8", "num_epochs=1", "num_workers=0", "log_with=none"]
    assert main(["train", str(coco), "--out", out, *values, *rest]) == 0
    if key != "criterion":
        assert main(["evaluate", out]) == 2
        assert f"--{key.replace('_', '-')} package.module:factory" in capsys.readouterr().err
        assert main(["evaluate", out, f"--{key.replace('_', '-')}", factory]) == 0
