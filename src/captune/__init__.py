"""captune: teach an image encoder to speak the language of a frozen text encoder."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from captune.bank import CaptionBank as CaptionBank
    from captune.config import DEFAULT_CONFIG as DEFAULT_CONFIG
    from captune.config import Config as Config
    from captune.data.dataset import COCOClipDataset as COCOClipDataset
    from captune.data.sources import open_source as open_source
    from captune.data.table import CaptionTable as CaptionTable
    from captune.encoders.text import load_text_encoder as load_text_encoder
    from captune.errors import CaptuneError as CaptuneError
    from captune.losses import InfoNCELoss as InfoNCELoss
    from captune.models import CLIPModel as CLIPModel
    from captune.training.fit import fit as fit
    from captune.training.loader import make_loader as make_loader
    from captune.training.run import Run as Run
    from captune.training.steps import train_epoch as train_epoch
    from captune.training.validation import validate as validate

# Names are handed on when first asked for: `captune --help` must not wait for torch.
_HOMES = {
    "CaptionBank": "captune.bank",
    "DEFAULT_CONFIG": "captune.config",
    "Config": "captune.config",
    "COCOClipDataset": "captune.data.dataset",
    "open_source": "captune.data.sources",
    "CaptionTable": "captune.data.table",
    "load_text_encoder": "captune.encoders.text",
    "CaptuneError": "captune.errors",
    "InfoNCELoss": "captune.losses",
    "CLIPModel": "captune.models",
    "fit": "captune.training.fit",
    "make_loader": "captune.training.loader",
    "Run": "captune.training.run",
    "train_epoch": "captune.training.steps",
    "validate": "captune.training.validation",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'captune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
