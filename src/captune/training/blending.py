"""The weights on the line between two models: WiSE-FT.

Wortsman et al. 2022, *Robust fine-tuning of zero-shot models*, equation 1: between a model before
fine-tuning and the same model after it often lies one that is better than both, at no cost when it
is used. The two should have a beginning in common, such as a run and its own ``@stage-1``: between
two heads that were drawn at random lies nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from captune.encoders.image import ImageEncoder
from captune.errors import CaptuneError
from captune.models import CLIPModel
from captune.training.run import SELECTED, TRAINED, Run

# What a tower's description says of where it came from; none of it changes what weights mean.
_ORIGIN = frozenset(
    {"name", "revision", "_name_or_path", "transformers_version", "architectures"}
    | {"dtype", "torch_dtype", "id2label", "label2id"}
)


def even_alphas(steps: int) -> list[float]:
    """``steps`` shares of the second model, from 0 to 1.

    Raises:
        CaptuneError: fewer than the two ends.
    """
    if steps < 2:
        raise CaptuneError(f"steps={steps}: at least 2 are needed, the two models themselves")
    return [step / (steps - 1) for step in range(steps)]


def blend_weights(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """``(1 - alpha) * first + alpha * second``, tensor by tensor, computed in double.

    At 0 and 1 it is the very tensors of that side. Between them a count (BatchNorm's of batches)
    is the second's. The temperature's inverse is blended like all else: no ranking depends on it.

    Args:
        first, second: states of one architecture.
        alpha: in 0..1.
    """
    if alpha in (0, 1):
        return dict(second if alpha else first)
    blended: dict[str, Tensor] = {}
    for key, end in second.items():
        if end.is_floating_point():
            blended[key] = ((1 - alpha) * first[key].double() + alpha * end.double()).to(end.dtype)
        else:
            blended[key] = end
    return blended


def refuse_unlike(first: CLIPModel, second: CLIPModel, names: Sequence[str]) -> None:
    """See that the weights of two models mean the same.

    Raises:
        CaptuneError: they are of another architecture, preprocessing or text tower.
    """
    pairs = {
        "the text tower": (first.text_fingerprint, second.text_fingerprint),
        "preprocessing": (first.preprocess, second.preprocess),
        "the image tower": (_described(first), _described(second)),
        "the shapes of weights": (_shapes(first), _shapes(second)),
    }
    differing = [what for what, (one, other) in pairs.items() if one != other]
    if differing:
        raise CaptuneError(
            f"{names[0]} and {names[1]} cannot be blended, they differ in {', '.join(differing)}: "
            "take two runs of the same towers and flags"
        )


def _described(model: CLIPModel) -> str:
    """The image tower's architecture, as two models can be compared by."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items() if k not in _ORIGIN}
        return value

    description = cast(ImageEncoder, model.image_encoder).description()
    return json.dumps(plain(description), sort_keys=True, default=str)


def _shapes(model: CLIPModel) -> dict[str, Any]:
    return {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}


def seen_by_any(runs: Sequence[Run], selected: Sequence[str]) -> tuple[list[str], list[str]]:
    """The file keys of the images that any of ``runs`` trained on; and of those that any of them,
    or whoever chose ``selected``, selected on, the trained ones left out."""
    seen = [run.seen() for run in runs]
    trained = dict.fromkeys(key for roles in seen for key in roles[TRAINED])
    chosen = dict.fromkeys([*(key for roles in seen for key in roles[SELECTED]), *selected])
    return list(trained), [key for key in chosen if key not in trained]
