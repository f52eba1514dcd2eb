"""fit: from tables and a config to a trained run, resumable from the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from captune.config import DEFAULT_CONFIG, Config
from captune.console import say
from captune.data.stream_table import StreamTable
from captune.data.table import CaptionTable
from captune.device import best_device, training_precision
from captune.errors import CaptuneError
from captune.losses import Criterion
from captune.models import CLIPModel
from captune.processes import processes
from captune.training.loop import TrainingLoop
from captune.training.run import Provenance, Run, free_name
from captune.training.stream_loader import equal_share


def fit(
    train: CaptionTable | StreamTable,
    val: CaptionTable,
    *,
    out: str | Path,
    config: Config | Mapping[str, Any] = DEFAULT_CONFIG,
    model: CLIPModel | None = None,
    criterion: Criterion | None = None,
    resume: bool = False,
    provenance: Provenance | None = None,
    on_epoch: Callable[[Run], None] | None = None,
    announce: bool = True,
) -> Run:
    """Train an image tower on ``train``, keep the model that is best on ``val``.

    Args:
        train: images with captions, or a stream of them, for stage 2 alone.
        val: images with captions.
        out: the run's directory.
        config: or any mapping with its keys.
        model: towers of one's own; default: the ones that ``config`` names.
        criterion: a loss of one's own; default: what ``config`` names.
        resume: go on where the run in ``out`` stopped.
        provenance: where the tables came from, so that later commands find the data.
        on_epoch: called with the run after each epoch, when all of it is saved; what it raises
            ends the training, which can be resumed. Of several processes, each calls it.
        announce: say recipe, towers and changes in the first line; False for who has said them
            already, before opening tables that may have something to say themselves.

    Started by ``torchrun`` or ``accelerate launch``, several processes share each batch
    (:mod:`captune.training.sharing`): all must call ``fit`` with the same arguments, and see the
    same folder ``out``. The first one alone writes.

    Returns:
        The run, complete: best weights (by rsum on ``val``), history, seen images.

    Raises:
        CaptuneError: ``out`` is occupied, a tower cannot be loaded, the loss is not finite.
        TrainingStopped: Ctrl-C; everything is saved.
    """
    config = Config.from_mapping(config)
    here = processes()
    smallest = min(config.batch_size, config.head_batch_size)
    if smallest < here.count:
        raise CaptuneError(
            f"batches of {smallest} images cannot be shared by {here.count} processes: take "
            "batch_size and head_batch_size at least as large, or fewer processes"
        )
    if isinstance(train, StreamTable):
        equal_share(config.batch_size, here.count)
    if announce:
        say(config.describe())
    run = Run(Path(out), config, provenance or Provenance())
    here.check_same("\0".join([config.to_json(), train.digest, val.digest]), "data or config")
    if here.from_main(lambda: _claim(run, resume)):
        say(f"{run.folder} is complete already: nothing to train")
        return run
    torch.manual_seed(config.seed)
    device = best_device(config.device)
    training_precision(config.precision, device)  # before anything is written
    model = model or here.main_first(lambda: CLIPModel.from_config(config, device=device))
    if here.main:
        run.write_identity()
        run.write_seen(train.file_keys(), val.file_keys())
    loop = TrainingLoop(run, model, criterion, train, val)
    return loop.run_all(resume=resume, on_epoch=on_epoch)


def _claim(run: Run, resume: bool) -> bool:
    """Whether the run is complete already.

    Raises:
        CaptuneError: its folder is occupied, or holds an unfinished run that is not to be resumed.
    """
    Run.claim(run.folder, run.config, run.provenance)
    if run.is_complete:
        return True
    if run.state_path.is_file() and not resume:
        raise CaptuneError(
            f"{run.folder} holds an unfinished run: go on with --resume, or take "
            f"--out {free_name(run.folder)}"
        )
    return False
