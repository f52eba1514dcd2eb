"""From a config to a loss, and from a loss back to the model's temperature."""

from __future__ import annotations

from captune.config import Config
from captune.encoders.hub import call_factory
from captune.losses import ContrastiveLoss, Criterion, SigLIPLoss
from captune.models import CLIPModel


def make_criterion(config: Config, dimension: int = 0) -> Criterion:
    """The loss that ``config`` names: a factory's, or one of captune's.

    Args:
        config: ``criterion``, else ``loss`` with its values.
        dimension: D, needed for a queue of images.
    """
    if config.criterion:
        criterion: Criterion = call_factory(config.criterion)
        return criterion
    if config.loss == "siglip":
        return SigLIPLoss(
            temperature=config.temperature, learn_temperature=config.learn_temperature
        )
    return ContrastiveLoss(
        temperature=config.temperature,
        learn_temperature=config.learn_temperature,
        hard_negatives=config.hard_negatives,
        soft_targets=config.soft_targets,
        queue=config.image_queue,
        dimension=dimension,
    )


def remember_temperature(model: CLIPModel, criterion: Criterion) -> None:
    """Save a learnt temperature with the model: zero-shot logits are scaled by it."""
    model.logit_scale.fill_(1 / temperature_of(model, criterion))


def temperature_of(model: CLIPModel, criterion: Criterion) -> float:
    """The loss's temperature as it stands; a user's own loss leaves the model's as it is."""
    if isinstance(criterion, ContrastiveLoss | SigLIPLoss):
        return criterion.temperature
    return 1 / float(model.logit_scale)
