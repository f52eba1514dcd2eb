"""The images and captions of a table, embedded by the model that a command has opened."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from captune.bank import CaptionBank
from captune.config import DEFAULT_CONFIG
from captune.data.table import CaptionTable
from captune.evaluation.embeddings import ImageEmbeddings, embed_images
from captune.evaluation.retrieval import caption_embeddings
from captune.workflow.opening import Opened


def embed(opened: Opened, table: CaptionTable) -> ImageEmbeddings:
    """The table's images, embedded in the precision that the run was validated in."""
    config = opened.run.config if opened.run else DEFAULT_CONFIG
    return embed_images(
        opened.model,
        table,
        cache=opened.cache,
        precision=config.precision,
        num_workers=config.num_workers,
    )


def embed_captions(opened: Opened, table: CaptionTable, captions: npt.NDArray[np.int64]) -> Tensor:
    """``(m, D)`` of some caption rows; the bank of all is on disk from training and measuring."""
    config = opened.run.config if opened.run else DEFAULT_CONFIG
    bank = CaptionBank.build(table.texts(), opened.model.text_encoder, precision=config.precision)
    return caption_embeddings(opened.model, bank, captions)
