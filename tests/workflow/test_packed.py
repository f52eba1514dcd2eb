"""From a pack, every command does what it does from the photos themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from captune.cli.main import main
from captune.config import Config
from captune.download.pack import pack
from captune.training.run import Run
from captune.workflow.evaluate import classify_files, evaluate, search
from captune.workflow.train import train


@pytest.fixture
def packed(data: str, tmp_path: Path) -> str:
    """The data of ``run`` as a pack, the split that the run never saw included."""
    pack(data, tmp_path / "pack", splits=["train", "val", "fresh"])
    return str(tmp_path / "pack")


def test_a_run_is_measured_on_a_pack_as_on_its_own_data(run: Path, data: str, packed: str) -> None:
    for split in ("train", "val", "fresh"):
        own, mine = (evaluate(str(run), data=place, split=split) for place in (data, packed))
        assert mine == own  # digest of the split, images seen and notes among it
    assert mine["images_seen_in_training"] == 0
    seen = evaluate(str(run), data=packed, split="train")
    assert seen["images_seen_in_training"] == 24 and "were trained on" in seen["notes"][0]


def test_training_from_a_pack_is_training(
    data: str, packed: str, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same draws and the same pixels give the same run; its answers can be opened again."""
    config = tiny_config.replace(precision="fp32")
    one, other = (
        train(place, config=config, out=tmp_path / name)
        for place, name in ((data, "plainly"), (packed, "packed"))
    )
    assert other.metrics["rsum"] == one.metrics["rsum"]
    assert other.metrics["split_digest"] == one.metrics["split_digest"]
    run = Run.open(tmp_path / "packed")
    assert run.source().splits == ["train", "val", "fresh"]
    assert run.seen() == one.run.seen()
    hits = search(str(run.folder), "a red square", k=2)
    assert hits[0].image.startswith(f"{packed}/val-00000.arrow::")
    predictions = classify_files(str(run.folder), [hit.image for hit in hits], ["red", "blue"])
    assert [prediction.image for prediction in predictions] == [hit.image for hit in hits]
    capsys.readouterr()
    words = ["classify", str(run.folder), hits[0].image, "--labels", "red", "blue"]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith(hits[0].image)
    pages = [outcome.page.read_text(encoding="utf-8") for outcome in (one, other)]
    shown = [page.count("data:image/jpeg;base64,") for page in pages]
    assert shown[1] == shown[0] > 0


def test_workers_train_from_a_pack(packed: str, tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config.replace(num_workers=2, recipe="plain")
    outcome = train(packed, config=config, out=tmp_path / "run")
    assert outcome.run.is_complete and outcome.metrics["images"] == 8
