"""The weights that a run keeps beside its best: the end of stage 1, and epochs of stage 2.

``RUN@stage-1`` and ``RUN@epoch-7`` name them wherever a command takes a run. Not to be taken for
the resume state (:mod:`captune.training.checkpoint`), which holds the optimiser too.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from captune.errors import CaptuneError
from captune.files import replacing
from captune.models import CLIPModel
from captune.training.run import Run

BEST, STAGE_ONE = "best", "stage-1"
_NAME = re.compile(r"(stage|epoch)-(\d+)")


def keep_stage(run: Run, number: int) -> None:
    """Keep the best weights so far, from which the next stage starts, as ``stage-{number}``."""
    with replacing(_path(run, f"stage-{number}")) as temporary:
        shutil.copyfile(run.weights_path, temporary)


def keep_epoch(run: Run, epoch: int, model: CLIPModel) -> None:
    """Keep ``model``, as it was validated in ``epoch`` (from 1), as ``epoch-{epoch}``."""
    model.save_weights(_path(run, f"epoch-{epoch}"))


def checkpoints(run: Run) -> list[str]:
    """The names of those that are there, in the order of training, ``best`` last."""
    stems = [path.stem for path in (run.folder / "checkpoints").glob("*.safetensors")]
    found = [match for stem in stems if (match := _NAME.fullmatch(stem))]
    found.sort(key=lambda match: (match[1] == "epoch", int(match[2])))
    return [*(match[0] for match in found), BEST]


def split_name(name: str) -> tuple[str, str]:
    """``("runs/x", "stage-1")`` of ``runs/x@stage-1``; ``("runs/x", "best")`` of ``runs/x``.

    A file or folder whose own name holds an ``@`` is itself.
    """
    folder, mark, checkpoint = name.rpartition("@")
    whole = not mark or "/" in checkpoint or not Path(folder).name
    if whole or Path(name).expanduser().exists():
        return name, BEST
    return folder, checkpoint


def checkpoint_weights(run: Run, name: str) -> Path:
    """The file of the weights called ``name``.

    Raises:
        CaptuneError: there are none of that name; those that there are, are listed.
    """
    known = checkpoints(run)
    if name not in known:
        raise CaptuneError(
            f"{run.folder} holds no checkpoint {name!r}: there are {', '.join(known)} "
            "(keep_epochs=true keeps each epoch of stage 2 when a run is trained)"
        )
    return run.weights_path if name == BEST else _path(run, name)


def _path(run: Run, name: str) -> Path:
    return run.folder / "checkpoints" / f"{name}.safetensors"
