"""Hubness corrected with the captions that a run was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from captune.console import say
from captune.data.table import CaptionTable
from captune.errors import CaptuneError
from captune.evaluation.embeddings import ImageEmbeddings
from captune.evaluation.hubness import hubness_corrected
from captune.workflow.embed import embed_captions
from captune.workflow.opening import Opened

# Of more training captions than this, as many at even distances: hubs show in far fewer, and the
# querybank of all of COCO would not fit small machines.
MAX_QUERIES = 50_000


@dataclass(frozen=True)
class Querybank:
    """Training captions to find hubs with: ``rows`` of ``table``; ``left_out`` were evaluated."""

    table: CaptionTable
    rows: npt.NDArray[np.int64]
    left_out: int

    @classmethod
    def of(cls, opened: Opened, evaluated: CaptionTable) -> Querybank:
        """The captions that a run was trained on, but for those of images in ``evaluated``.

        Raises:
            CaptuneError: no run, or no caption remains.
        """
        if opened.run is None:
            raise CaptuneError(
                f"--hubness corrects with the captions that a run was trained on, and "
                f"{opened.name} is no run"
            )
        if not opened.run.provenance.data:
            raise CaptuneError(
                f"--hubness needs the training captions, and {opened.name} does not say where its "
                "data lies"
            )
        if opened.run.provenance.stream:
            raise CaptuneError(
                f"--hubness takes its captions from a table, and {opened.name} was trained on a "
                "stream"
            )
        train = opened.run.source().table(opened.run.provenance.train_split)
        taken = set(evaluated.file_keys())
        apart = [row for row, key in enumerate(train.file_keys()) if key not in taken]
        rows, _ = train.captions_among(apart)
        left_out = train.captions.num_rows - len(rows)
        if not len(rows):
            raise CaptuneError(
                f"--hubness needs training captions of other images than the evaluated ones, and "
                f"all images of {train.describe()} are evaluated: name another split"
            )
        if left_out:
            say(f"hubness: {left_out:,} training captions left out, their images are evaluated")
        if len(rows) > MAX_QUERIES:
            rows = rows[np.linspace(0, len(rows) - 1, MAX_QUERIES).astype(np.int64)]
        return cls(train, rows, left_out)


def correct_hubness(
    opened: Opened, table: CaptionTable, embeddings: ImageEmbeddings, queries: Querybank
) -> dict[str, Any]:
    """What :func:`captune.evaluation.hubness.hubness_corrected` says, and ``queries_left_out``."""
    captions, owner = table.captions_among(embeddings.rows)
    corrected = hubness_corrected(
        embeddings.vectors,
        embed_captions(opened, table, captions),
        torch.from_numpy(owner),
        embed_captions(opened, queries.table, queries.rows),
        device=opened.model.device,
    )
    return {**corrected, "queries_left_out": queries.left_out}
