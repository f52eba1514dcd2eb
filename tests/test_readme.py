"""Every command and the program printed in the README run, on tiny data in place of the real."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from captune.cli.main import main
from captune.workflow import demo as demo_module
from conftest import write_scene
from shards import sample, tar_of

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
NEEDS_NETWORK = ("data/coco2014", "openai/")
# Where they end without: at COCO's host, at the hub, or at the run that would have been made.
OFFLINE = ("no connection to", "could not be fetched", "no run at runs/coco2014")
# The same comparison, with towers that train in a second and one seed; the same blend in three.
SMALLER = {
    "compare": ["--seeds", "1", "num_epochs=1", "image_size=32", "batch_size=8"],
    "blend": ["--steps", "3"],
    "bench": ["batch_size=8"],
}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("captune ")]


def words(command: str) -> list[str]:
    # Squares stand in for COCO, so the download that would make it goes elsewhere.
    command = command.replace("coco data/coco2014", "coco data/coco2014-new")
    return shlex.split(command.replace("$DATA", "flickr8k"))[1:]


@pytest.fixture
def folder(coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with all that the README's commands name, made of coloured squares."""
    home = tmp_path / "home"
    shutil.copytree(coco, home / "flickr8k")
    (home / "data").mkdir()
    shutil.copytree(coco, home / "data" / "coco2014")
    rows = []
    for number in range(12):
        write_scene(home / "pictures" / f"{number}.jpg", "red", "blue")
        rows.append(f"pictures/{number}.jpg,shoe number {number},blue")
    (home / "photos.csv").write_text(
        "\n".join(["image,caption", *(row.rsplit(",", 1)[0] for row in rows)]), encoding="utf-8"
    )
    (home / "shop.csv").write_text("\n".join(["photo,title,colour", *rows]), encoding="utf-8")
    (home / "shards").mkdir()
    for number in range(10):
        (home / "shards" / f"cc-{number:05d}.tar").write_bytes(tar_of(sample(number)))
    shutil.copy(home / "pictures" / "0.jpg", home / "photo.jpg")
    monkeypatch.chdir(home)
    # The same demo, with a handful of scenes.
    monkeypatch.setattr(demo_module, "TRAIN_SCENES", 40)
    monkeypatch.setattr(demo_module, "VAL_SCENES", 10)
    monkeypatch.setattr(demo_module, "TEST_SCENES", 40)
    yield home


def test_the_readme_prints_commands_of_every_kind() -> None:
    kinds = {words(command)[0] for command in commands()}
    assert kinds == {
        "demo",
        "data",
        "train",
        "compare",
        "evaluate",
        "search",
        "classify",
        "zeroshot",
        "blend",
        "bench",
    }


def test_commands_run_in_the_order_printed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in commands():
        code = main([*words(command), *SMALLER.get(words(command)[0], [])])
        said = capsys.readouterr().err
        if any(name in command for name in NEEDS_NETWORK):
            assert code == 2
            assert any(reason in said for reason in OFFLINE), said
        else:
            assert code == 0, (command, said)
    assert (folder / "runs" / "demo" / "report.html").is_file()
    assert (folder / "runs" / "flickr8k" / "metrics.json").is_file()
    assert (folder / "runs" / "flickr8k-blend" / "blend.png").is_file()


def test_the_python_program_runs(
    coco: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAPTUNE_DATA", str(coco))
    program = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert program is not None
    exec(compile(program.group(1), "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert "train_loss" in printed and "tensor([[" in printed


def test_figures_of_the_towers_are_right() -> None:
    """The table's parameter counts, from the architectures."""
    import torch

    from captune.config import Config
    from captune.models import CLIPModel

    class Text:
        name, dimension, fingerprint = "stub", 384, "1"

        def encode(self, texts: list[str]) -> torch.Tensor:
            return torch.ones(len(texts), 384)

    forms = {
        "minilm-lite0": "EfficientNet-Lite0 ({} pixels), {:,} |",
        "minilm-lite1": "EfficientNet-Lite1 ({} pixels), {:,};",
        "minilm-lite2": "-Lite2 ({} pixels), {:,} |",
    }
    for towers, form in forms.items():
        config = Config.from_mapping({"towers": towers})
        tower = config.image_encoder_name
        model = CLIPModel(Text(), image_encoder=tower, hidden_dim=config.hidden_dim)
        count = sum(p.numel() for p in model.parameters())
        assert form.format(config.image_size, count) in README
