"""What a run keeps: the loss's own weights go back with the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from captune.config import Config
from captune.data.table import CaptionTable
from captune.losses import SigLIPLoss
from captune.training.fit import fit
from captune.training.keeping import Keeper
from captune.training.run import Run

Tables = tuple[CaptionTable, CaptionTable]
RSUMS = [200.0, 300.0, 250.0, 100.0, 400.0]  # of the epochs: stage 1's best is the second of three


class Stop(Exception):
    pass


def learnt(keeper: Keeper) -> list[float]:
    assert isinstance(keeper.criterion, SigLIPLoss)
    return [float(keeper.criterion.bias.detach()), keeper.criterion.temperature]


@pytest.mark.parametrize("stopped_after", [None, 2, 3])
def test_stage_2_starts_with_the_loss_of_the_best_epoch(
    tables: Tables,
    best: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped_after: int | None,
) -> None:
    """Its bias and temperature belong to the weights that they were learnt with."""
    by_epoch: dict[int, list[float]] = {}
    at_start: list[list[float]] = []
    real_keep, real_end = Keeper.keep, Keeper.end_stage

    def keep(self: Keeper, history: list[dict[str, Any]]) -> bool:
        history[-1]["rsum"] = RSUMS[len(history) - 1]
        by_epoch[len(history)] = learnt(self)
        return real_keep(self, history)

    def end_stage(self: Keeper, number: int, models: Any) -> None:
        assert learnt(self) == by_epoch[3]
        real_end(self, number, models)
        at_start.append(learnt(self))

    monkeypatch.setattr(Keeper, "keep", keep)
    monkeypatch.setattr(Keeper, "end_stage", end_stage)
    config = best.replace(
        loss="siglip", temperature=0.1, head_epochs=3, num_epochs=2, head_learning_rate=0.05
    )

    def stop(run: Run) -> None:
        if len(run.history()) == stopped_after:
            raise Stop

    out = tmp_path / "run"
    if stopped_after:
        with pytest.raises(Stop):
            fit(*tables, out=out, config=config, on_epoch=stop)
    run = fit(*tables, out=out, config=config, resume=True)
    assert at_start == [by_epoch[2]] and by_epoch[2] != by_epoch[3]
    assert by_epoch[4] != by_epoch[2]  # and learns on
    assert [path.name for path in run.state_path.parent.iterdir()] == []
