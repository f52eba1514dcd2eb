"""Contrastive losses: tensors in, tensor out. A loss never sees a model, a loader or a config."""

from captune.losses.contrastive import ContrastiveLoss
from captune.losses.criterion import Criterion, PairedCriterion, PartialCriterion
from captune.losses.image_queue import ImageQueue
from captune.losses.infonce import InfoNCELoss
from captune.losses.siglip import SigLIPLoss

__all__ = [
    "ContrastiveLoss",
    "Criterion",
    "ImageQueue",
    "InfoNCELoss",
    "PairedCriterion",
    "PartialCriterion",
    "SigLIPLoss",
]
