"""A run on disk: one directory that stands alone, one variant in each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from captune.config import Config
from captune.data.sources import Source, open_source
from captune.data.table import CaptionTable
from captune.data.tabular import TableOptions
from captune.encoders.image import ImageEncoder
from captune.encoders.text import TextEncoder
from captune.errors import CaptuneError
from captune.files import read_versioned, replacing, write_json, write_text
from captune.models import CLIPModel
from captune.training.schedule import finished

VERSION = 1

# How a run is computed and what is kept of it, not what: these may change when it is resumed.
MACHINE_KEYS = frozenset(
    {
        "device",
        "precision",
        "chunk_size",
        "compile_backbone",
        "num_workers",
        "save_steps",
        "log_with",
        "keep_epochs",
    }
)

# What says which run a folder holds; one without the other is the scrap of a start cut short.
IDENTITY = ("config.json", "data.json")

BLEND = "blend.json"  # in a run that no training made, but `captune blend`

TRAINED, SELECTED = "trained", "selected"


@dataclass(frozen=True)
class Provenance:
    """Where a run's data came from, so that ``search`` and ``evaluate`` find it again.

    ``stream``: what it was trained on in place of ``data``'s training split, as
    :meth:`captune.data.stream_table.StreamTable.record` says; ``data`` is then what it was
    validated on.
    """

    data: str = ""
    options: TableOptions = field(default_factory=TableOptions)
    train_split: str = "train"
    val_split: str = "val"
    stream: Mapping[str, Any] | None = None


class Run:
    """A run directory; every output carries the flags' suffix."""

    def __init__(self, folder: Path, config: Config, provenance: Provenance) -> None:
        self.folder = folder
        self.config = config
        self.provenance = provenance

    # -- where things are -------------------------------------------------------------------
    @property
    def state_path(self) -> Path:
        """The resume state; gone once the run is complete."""
        return self.folder / "last" / "state.safetensors"

    @property
    def weights_path(self) -> Path:
        """The best model so far."""
        return self.folder / f"best_model{self.config.suffix}.safetensors"

    def output(self, stem: str, ending: str) -> Path:
        """``metrics_bn.json`` for ``output("metrics", ".json")`` of a run with BatchNorm."""
        return self.folder / f"{stem}{self.config.suffix}{ending}"

    # -- its life ---------------------------------------------------------------------------
    @classmethod
    def claim(cls, folder: str | Path, config: Config, provenance: Provenance) -> Run:
        """A new run in ``folder``, or the one of the same configuration that is there.

        Nothing is written yet: a run that cannot start leaves its folder free.

        Raises:
            CaptuneError: the folder holds another configuration, other data or other files; a
                free name is suggested.
        """
        path = Path(folder)
        run = cls(path, config, provenance)
        if run.is_blend:
            raise CaptuneError(
                f"{path} holds a blend, which is not trained: take --out {free_name(path)}"
            )
        if cls.is_begun(path):
            existing = cls.open(path)
            differing = existing.differences(run)
            if differing:
                raise CaptuneError(
                    f"{path} holds a run with another configuration ({', '.join(differing)}): "
                    f"take --out {free_name(path)}"
                )
        elif path.exists() and (not path.is_dir() or not all(map(_is_scrap, path.iterdir()))):
            raise CaptuneError(
                f"{path} is not empty and holds no run: take --out {free_name(path)}"
            )
        return run

    @staticmethod
    def is_begun(folder: Path) -> bool:
        """Whether a run is in ``folder``, complete or not."""
        return all((folder / name).is_file() for name in IDENTITY)

    def write_identity(self) -> None:
        """Write what the run is: its configuration, and where its data lies."""
        stated = {"format_version": VERSION, "config": dict(self.config)}
        write_json(self.folder / "config.json", stated)
        source = self.provenance
        data = {
            "format_version": VERSION,
            "data": source.data,
            "options": source.options.to_dict(),
            "train_split": source.train_split,
            "val_split": source.val_split,
            **({"stream": dict(source.stream)} if source.stream else {}),
        }
        write_json(self.folder / "data.json", data)

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """The run in ``folder``.

        Raises:
            CaptuneError: no run there, or one of another version.
        """
        path = Path(folder)
        if not path.is_dir():
            raise CaptuneError(f"no run at {path}: give a folder that `captune train` made")
        stated = read_versioned(path / "config.json", what="run", version=VERSION)
        data = read_versioned(path / "data.json", what="run", version=VERSION)
        try:
            provenance = Provenance(
                data["data"],
                TableOptions.from_dict(data["options"]),
                data["train_split"],
                data["val_split"],
                data.get("stream"),
            )
            config = Config.from_mapping(stated["config"])
        except (KeyError, TypeError) as error:
            raise CaptuneError(
                f"run {path} is damaged: config.json or data.json lacks {error}"
            ) from None
        return cls(path, config, provenance)

    @property
    def is_blend(self) -> bool:
        """Whether its weights lie between those of two others."""
        return (self.folder / BLEND).is_file()

    def differences(self, other: Run) -> list[str]:
        """What differs from ``other``: ``batch_size 128 -> 64``, machine matters left out."""
        rows = [
            (key, self.config[key], other.config[key])
            for key in self.config
            if not self._is_machine_matter(key)
        ]
        rows.append(("data", self.provenance.data, other.provenance.data))
        mine, others = (run.provenance.stream or {} for run in (self, other))
        rows.append(("shards", mine.get("fingerprint"), others.get("fingerprint")))
        rows.append(("columns", self.provenance.options, other.provenance.options))
        return [f"{key} {old} -> {new}" for key, old, new in rows if old != new]

    def _is_machine_matter(self, key: str) -> bool:
        # Chunks give the gradients of the whole batch, so a run may go on where memory is less; but
        # a BatchNorm whose statistics move takes those of a chunk: another training.
        if key == "chunk_size" and not self.config.freeze_batch_norm:
            return False
        return key in MACHINE_KEYS

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to train, a soup neither, and the best model is there."""
        history = self.history()
        done = finished(self.config, history) and self.weights_path.is_file()
        return done and not (self.config.soup and self.state_path.is_file())

    # -- what it holds ----------------------------------------------------------------------
    def history(self) -> list[dict[str, Any]]:
        """One object an epoch, in order; empty before the first is done."""
        path = self.folder / "history.jsonl"
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        try:
            return [json.loads(line) for line in lines if line]
        except json.JSONDecodeError as error:
            raise CaptuneError(f"{path} is damaged: {error}") from None

    def write_history(self, rows: Sequence[dict[str, Any]]) -> None:
        """Replace the history; written whole, so that a resumed epoch stands in it once."""
        write_text(self.folder / "history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def write_seen(self, trained: Sequence[str], selected: Sequence[str]) -> None:
        """Keep which images (their file keys) the run trained on and which it selected on."""
        keys = [*trained, *selected]
        roles = [TRAINED] * len(trained) + [SELECTED] * len(selected)
        with replacing(self.folder / "seen_images.parquet") as temporary:
            pq.write_table(pa.table({"image": keys, "role": roles}), temporary)

    def seen(self) -> dict[str, list[str]]:
        """The file keys of the images that it trained on, and of those that it selected on."""
        path = self.folder / "seen_images.parquet"
        keys: dict[str, list[str]] = {TRAINED: [], SELECTED: []}
        if not path.is_file():
            return keys
        try:
            seen = pq.read_table(path, columns=["image", "role"])
        except (pa.ArrowException, OSError) as error:
            raise CaptuneError(
                f"{path} is damaged, so it cannot be told which images the run has seen: {error}"
            ) from None
        for image, role in zip(seen["image"].to_pylist(), seen["role"].to_pylist(), strict=True):
            keys[role].append(image)
        return keys

    def overlap(self, table: CaptionTable) -> dict[str, int]:
        """How many of ``table``'s images the run trained on, and how many it selected on."""
        mine = set(table.file_keys())
        return {role: sum(key in mine for key in keys) for role, keys in self.seen().items()}

    def load_model(
        self,
        *,
        image_encoder: ImageEncoder | None = None,
        text_encoder: TextEncoder | None = None,
        weights: Path | None = None,
    ) -> CLIPModel:
        """The best model, in eval mode, or that of other ``weights``; own towers must be handed
        in."""
        return CLIPModel.from_pretrained(
            self.folder, image_encoder=image_encoder, text_encoder=text_encoder, weights=weights
        )

    def source(self) -> Source:
        """The data that the run was trained on.

        Raises:
            CaptuneError: it was not named, or is no longer there.
        """
        if not self.provenance.data:
            raise CaptuneError(f"{self.folder} does not say where its data lies: name the data")
        return open_source(self.provenance.data, self.provenance.options)


def _is_scrap(path: Path) -> bool:
    """What a process killed in its first moment leaves."""
    return path.name in IDENTITY or (path.name.startswith(".") and path.suffix == ".tmp")


def free_name(folder: Path) -> Path:
    """The first of ``folder-2``, ``folder-3``, … that is free."""
    number = 2
    while folder.with_name(f"{folder.name}-{number}").exists():
        number += 1
    return folder.with_name(f"{folder.name}-{number}")
