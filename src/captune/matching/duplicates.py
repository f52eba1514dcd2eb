"""Near-duplicates: captions that describe an image for which another one was written."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captune.device import has_native_bf16

ROUNDING = 1e-6  # the cosine of two equal rows in fp32 may fall this short of 1
COARSE = 4 / 256  # a cosine of unit rows in bf16 is off by less
WORTH_A_SIEVE = 1 << 18  # cosines


class Likeness(NamedTuple):
    """What near-duplicates are told by: embeddings of captions that were written for images in
    question, ``(W, D)``, and of all candidates, ``(K, D)``."""

    written: Tensor
    candidates: Tensor
    threshold: float
    duplicates: str


def near_duplicates(images: Tensor, writers: Tensor, alike: Likeness) -> Tensor:
    """``(R, K) bool``, for ``images (R,)``; ``writers (W,)`` says for which image each of the W
    captions was written."""
    written, candidates = alike.written.detach().float(), alike.candidates.detach().float()
    with torch.autocast(written.device.type, enabled=False):
        columns = _candidates(written, candidates, alike.threshold)  # (k,), those that can be near
        cosine = written @ candidates[columns].T  # (W, k)
    place, there = _first_place(writers, images)
    near = (cosine >= alike.threshold - ROUNDING) & there[:, None]
    # Votes are added up at the first row of each image: a sum over W rows of k columns costs less
    # than a product with who wrote for whom. Sums of ones are exact in any order.
    votes = near.new_zeros((len(images), near.shape[1]), dtype=torch.float32)
    votes.index_add_(0, place, near.float())
    found = near.new_zeros((len(images), len(candidates)))
    found[:, columns] = votes[_first_place(images, images)[0]] > 0  # an image may stand there twice
    return found


def _candidates(written: Tensor, candidates: Tensor, threshold: float) -> slice | Tensor:
    """The rows of ``candidates (K, D)`` that may be near one of ``written (W, D)``: all but those
    that a product in bf16 rules out, which a CPU made for bf16 does in a third of the time.

    The rounding of two unit vectors and of their product moves a cosine by at most 3/256
    (Cauchy-Schwarz). A GPU is faster than the wait that a selection of rows would need.
    """
    worth = written.device.type == "cpu" and len(written) * len(candidates) >= WORTH_A_SIEVE
    if not (worth and has_native_bf16(written.device)):
        return slice(None)
    nearest = (candidates.bfloat16() @ written.bfloat16().T).amax(1).float()  # (K,)
    return (nearest >= threshold - COARSE).nonzero()[:, 0]


def _first_place(wanted: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """For each of ``wanted`` the first row of ``images`` with that id, and whether there is one."""
    ordered, rows = images.sort(stable=True)
    place = torch.searchsorted(ordered, wanted).clamp(max=len(images) - 1)
    return rows[place], ordered[place] == wanted
