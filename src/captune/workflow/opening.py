"""From what a command is given to a model and a table: runs, checkpoints, CLIPs, splits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from captune.config import Config
from captune.data.sources import Source, open_source
from captune.data.table import CaptionTable
from captune.data.tabular import TableOptions
from captune.device import best_device
from captune.encoders.hub import is_factory, read_checkpoint_config
from captune.encoders.image import load_image_encoder
from captune.encoders.text import load_text_encoder
from captune.errors import CaptuneError, nearest
from captune.models import CLIPModel
from captune.training.checkpoints import BEST, checkpoint_weights, split_name
from captune.training.run import Run


@dataclass(frozen=True)
class OwnTowers:
    """Factories, named by the user, of the towers that a run's files cannot rebuild."""

    image_encoder: str = ""
    text_encoder: str = ""

    @classmethod
    def of(cls, config: Config) -> OwnTowers:
        """The factories in a config that the user has just given (never one read from a run)."""
        named = (config.image_encoder, config.text_encoder)
        return cls(*(name if is_factory(name) else "" for name in named))


@dataclass(frozen=True)
class Opened:
    """A model ready to use, and the run it is from (none for zero-shot CLIP).

    ``cache``: where its image embeddings are kept; None keeps none.
    """

    model: CLIPModel
    run: Run | None
    name: str
    checkpoint: str = BEST
    cache: Path | None = None


def open_model(name: str, own: OwnTowers | None = None) -> Opened:
    """A run folder, a checkpoint of it (``RUN@stage-1``), or a CLIP (folder or hub name) as it is.

    Raises:
        CaptuneError: it is none of them, or cannot be loaded.
    """
    own = own or OwnTowers()
    place, checkpoint = split_name(name)
    folder = Path(place).expanduser()
    device = best_device()
    if (folder / "data.json").is_file():
        run = Run.open(folder)
        weights = checkpoint_weights(run, checkpoint)
        image = load_image_encoder(own.image_encoder) if own.image_encoder else None
        text = load_text_encoder(own.text_encoder) if own.text_encoder else None
        model = run.load_model(image_encoder=image, text_encoder=text, weights=weights)
        said = str(folder) if checkpoint == BEST else f"{folder}@{checkpoint}"
        return Opened(model.to(device), run, said, checkpoint, folder / "embeddings")
    if folder.is_dir() and "model_type" not in read_checkpoint_config(folder):
        raise CaptuneError(f"{folder} is neither a run of `captune train` nor a CLIP checkpoint")
    if not folder.is_dir() and not _may_be_hub_name(place):
        raise _no_run_at(place)
    if checkpoint != BEST:
        raise CaptuneError(f"{place} is no run here, so it holds no checkpoint {checkpoint!r}")
    return Opened(CLIPModel.zero_shot(place).to(device), None, place)


def _may_be_hub_name(name: str) -> bool:
    """``owner/model``; not where ``owner`` is a folder of runs, which makes it a misspelt one."""
    return name.count("/") == 1 and name[0] not in "./~" and not _runs_in(Path(name).parent)


def _runs_in(folder: Path) -> list[str]:
    """The names of the runs in a folder, none where there is no folder."""
    inside = folder.iterdir() if folder.is_dir() else ()
    return [path.name for path in inside if (path / "data.json").is_file()]


def _no_run_at(place: str) -> CaptuneError:
    """What to say of a run that is not there, with the nearest name of those beside it."""
    folder = Path(place).expanduser()
    runs = _runs_in(folder.parent)
    hint = nearest(folder.name, runs) if runs else ""
    return CaptuneError(f"no run at {place}: give a folder that `captune train` made{hint}")


def open_table(
    opened: Opened, data: str | None, split: str | None, options: TableOptions
) -> CaptionTable:
    """The table that a command works on: named, or the run's validation split.

    Raises:
        CaptuneError: nothing is named and no run says where its data lies.
    """
    if data is not None:
        source: Source = open_source(data, options)
        return source.table(split or source.evaluation_split)
    if opened.run is None:
        raise CaptuneError(f"{opened.name} is no run: name the data to evaluate on")
    return opened.run.source().table(split or opened.run.provenance.val_split)
