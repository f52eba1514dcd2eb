"""The mean of the best epochs: what is in it, and that it is kept only where it is better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from captune.config import Config
from captune.data.table import CaptionTable
from captune.models import CLIPModel
from captune.training import keeping
from captune.training.fit import fit
from captune.training.keeping import Keeper
from captune.training.run import Run

Tables = tuple[CaptionTable, CaptionTable]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(CLIPModel.from_pretrained(folder).state_dict())


@pytest.mark.parametrize("rsum", [1000.0, -1.0])
def test_the_mean_of_the_best_epochs_is_kept_where_it_is_better(
    tables: Tables,
    best: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rsum: float,
) -> None:
    """Whatever it is worth: its recalls are told."""
    epochs: dict[int, dict[str, torch.Tensor]] = {}
    real_save, real_taste = keeping.keep_epoch, Keeper.taste_soup

    def keep_epoch(run: Run, epoch: int, model: CLIPModel) -> None:
        epochs[epoch] = {k: v.detach().clone() for k, v in model.state_dict().items()}
        real_save(run, epoch, model)

    def taste(self: Keeper, history: Any, validate: Any) -> None:
        real_taste(self, history, lambda: {**validate(), "rsum": rsum})

    monkeypatch.setattr(keeping, "keep_epoch", keep_epoch)
    monkeypatch.setattr(Keeper, "taste_soup", taste)
    config = best.replace(head_epochs=0, num_epochs=4, soup=2, keep_epochs=True)
    run = fit(*tables, out=tmp_path / "run", config=config)
    history = run.history()
    by_rsum = sorted(history, key=lambda row: -float(row["rsum"]))
    chosen = sorted(row["epoch"] for row in by_rsum[:2])
    soup = history[-1]["soup"]
    assert soup["epochs"] == chosen and soup["kept"] is (rsum > 0) and soup["rsum"] == rsum
    assert {"image_to_text", "text_to_image", "val_loss"} <= set(soup)
    kept = load_file(run.weights_path)
    inside = chosen if rsum > 0 else [by_rsum[0]["epoch"]]
    for key, found in kept.items():
        expected = torch.stack([epochs[epoch][key].double() for epoch in inside]).mean(0)
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-7), key
    said = "the soup is kept" if rsum > 0 else "the epoch is kept"
    assert said in capsys.readouterr().err
    assert not list(run.state_path.parent.glob("epoch-*.safetensors"))  # three times the weights


def test_a_run_killed_before_the_soup_was_tasted_tastes_it_when_resumed(
    tables: Tables, best: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = best.replace(head_epochs=0, num_epochs=2, soup=2)
    whole = fit(*tables, out=tmp_path / "whole", config=config)

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Keeper, "taste_soup", killed)
        with pytest.raises(Killed):
            fit(*tables, out=tmp_path / "run", config=config)
    assert not Run.open(tmp_path / "run").is_complete
    run = fit(*tables, out=tmp_path / "run", config=config, resume=True)
    assert run.is_complete and run.history()[-1]["soup"] == whole.history()[-1]["soup"]
    kept, expected = load_file(run.weights_path), load_file(whole.weights_path)
    assert all(torch.equal(kept[key], expected[key]) for key in expected)
