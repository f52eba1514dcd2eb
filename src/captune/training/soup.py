"""A soup: the mean of the weights of a run's best epochs, kept where it is better than each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from captune.files import replacing
from captune.models import CLIPModel


class Soup:
    """The weights of the ``size`` best epochs of stage 2 (Wortsman et al. 2022, uniform soup).

    Args:
        folder: where they wait for the end of the run.
        size: of how many epochs; 0 keeps none.
    """

    def __init__(self, folder: Path, *, size: int) -> None:
        self.folder = folder
        self.size = size

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch}.safetensors"

    def add(self, model: CLIPModel, history: Sequence[Mapping[str, Any]]) -> None:
        """Keep the last epoch's weights if it is among the best of ``history``; drop others."""
        best = self._best(history)
        newest = int(history[-1]["epoch"])
        if newest in best:
            state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
            with replacing(self._path(newest)) as temporary:
                save_file(state, temporary)
        for path in self.folder.glob("epoch-*.safetensors"):
            if path not in map(self._path, best):
                path.unlink()

    def _best(self, history: Sequence[Mapping[str, Any]]) -> list[int]:
        rows = [row for row in history if row["stage"] == 2]
        rows.sort(key=lambda row: -float(row["rsum"]))
        return sorted(int(row["epoch"]) for row in rows[: self.size])

    def epochs(self) -> list[int]:
        """Those whose weights are there."""
        found = self.folder.glob("epoch-*.safetensors")
        return sorted(int(path.stem.removeprefix("epoch-")) for path in found)

    @torch.no_grad()
    def pour(self, model: CLIPModel) -> list[int]:
        """Give ``model`` the mean of the weights that are there.

        Returns:
            The epochs that are in it; fewer than two are no soup, and nothing happens.
        """
        epochs = self.epochs()
        if len(epochs) < 2:
            return []
        states = [load_file(self._path(epoch)) for epoch in epochs]
        mean: dict[str, Tensor] = {}
        for key, first in states[0].items():
            total = sum((state[key].double() for state in states), torch.zeros_like(first).double())
            mean[key] = (total / len(states)).to(first.dtype)
        model.load_state_dict(mean)
        return epochs

    def clear(self) -> None:
        """Remove the weights of all epochs."""
        for path in self.folder.glob("epoch-*.safetensors"):
            path.unlink()
