"""What a run keeps of its epochs: history, the best weights, further ones, the soup of the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from captune.console import say
from captune.files import replacing
from captune.losses import Criterion
from captune.models import CLIPModel
from captune.processes import processes
from captune.training.checkpoints import keep_epoch, keep_stage
from captune.training.criteria import remember_temperature
from captune.training.run import Run
from captune.training.sharing import copy_from_main
from captune.training.soup import Soup
from captune.training.stages import WHOLE

History = list[dict[str, Any]]


class Keeper:
    """Writes what a run keeps; of several processes all call it, and the first one alone writes.

    Args:
        run: what it is kept in.
        model: the weights that are validated and saved: the moving average, where there is one.
        criterion: its temperature is saved with them; all that it has learnt comes back with the
            best weights of stage 1, from which stage 2 starts.
        device: that of the training.
    """

    def __init__(
        self, run: Run, model: CLIPModel, criterion: Criterion, device: torch.device
    ) -> None:
        self.here = processes()
        self.run = run
        self.model = model
        self.criterion = criterion
        self.device = device
        self.soup = Soup(run.state_path.parent, size=run.config.soup)
        self.learnt_path = run.state_path.parent / "criterion.safetensors"

    def save(self) -> None:
        """Write the weights as the run's best, with the temperature that belongs to them."""
        remember_temperature(self.model, self.criterion)
        self._write()

    def _write(self) -> None:
        if self.here.main:
            self.model.save_pretrained(self.run.folder)

    def keep(self, history: History) -> bool:
        """Write the history, and the weights where its last epoch is the best so far.

        Returns:
            Whether it is, by rsum.
        """
        row = history[-1]
        remember_temperature(self.model, self.criterion)  # whatever of it is kept, and how
        best = max(history, key=lambda r: float(r["rsum"])) is row
        if best:
            self._write()
            if row["stage"] != WHOLE and self.here.main:
                self._write_learnt()
        if self.run.config.keep_epochs and row["stage"] == WHOLE and self.here.main:
            keep_epoch(self.run, row["epoch"], self.model)
        if self.here.main:
            self.run.write_history(history)
        if self.run.config.soup and self.here.main:
            self.soup.add(self.model, history)
        return best

    def _learnt(self) -> dict[str, nn.Parameter]:
        """What a loss trains: a temperature, a bias, what one of the user's own has."""
        loss = self.criterion
        return dict(loss.named_parameters()) if isinstance(loss, nn.Module) else {}

    def _write_learnt(self) -> None:
        learnt = {name: p.detach().cpu().contiguous() for name, p in self._learnt().items()}
        with replacing(self.learnt_path) as temporary:
            save_file(learnt, temporary)

    @torch.no_grad()
    def end_stage(self, number: int, models: Sequence[CLIPModel]) -> None:
        """Keep the best weights so far as the stage's end, and bring ``models``, and what the loss
        has learnt, back to them."""
        if self.here.main:  # the others might still see an older file
            keep_stage(self.run, number)
            for model in models:
                model.load_weights(self.run.weights_path)
            best = load_file(self.learnt_path) if self.learnt_path.is_file() else {}
            for name, parameter in self._learnt().items():
                if name in best:
                    parameter.copy_(best[name])
        loss = [self.criterion] if isinstance(self.criterion, nn.Module) else []
        copy_from_main([*models, *loss], self.device)

    def clear(self) -> None:
        """Remove what only the next stage, or the end, would have needed."""
        if self.here.main:
            self.soup.clear()
            self.learnt_path.unlink(missing_ok=True)

    def taste_soup(self, history: History, validate: Callable[[], dict[str, Any]]) -> None:
        """Keep the mean of the best epochs where ``validate`` finds it better than the best one."""
        epochs = self.here.from_main(lambda: self.soup.pour(self.model))
        copy_from_main([self.model], self.device)
        if epochs:
            best = max(float(row["rsum"]) for row in history)
            found = validate()
            rsum = float(found["rsum"])
            better = rsum > best
            found["val_loss"] = found.pop("loss")  # as an epoch's row calls it
            history[-1]["soup"] = {"epochs": epochs, "kept": better, **found}
            say(
                f"soup of epochs {', '.join(map(str, epochs))}: rsum {rsum:.1f}, the best "
                f"epoch {best:.1f}: {'the soup' if better else 'the epoch'} is kept"
            )
            if better:
                self._write()  # its temperature is the mean of theirs
            if self.here.main:
                self.run.write_history(history)
