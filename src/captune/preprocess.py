"""What a tower expects of its pixels: size and normalisation travel with the tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from captune.errors import CaptuneError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocess:
    """Shorter side resized to ``image_size`` (bicubic, antialiased), centre crop, normalisation.

    ``mean`` and ``std`` apply to RGB in 0..1, per channel. The defaults are CLIP's
    (Radford et al. 2021, section 2.5 and the published preprocessing).
    """

    image_size: int = 224
    mean: RGB = CLIP_MEAN
    std: RGB = CLIP_STD

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        return {"format_version": 1, **asdict(self)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Preprocess:
        """The inverse of :meth:`to_dict`.

        Raises:
            CaptuneError: a key is missing or has the wrong form.
        """
        try:
            mean, std = (tuple(float(x) for x in value[key]) for key in ("mean", "std"))
            if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
                raise ValueError("mean and std need three numbers, std above zero")
            return cls(int(value["image_size"]), mean, std)
        except (KeyError, TypeError, ValueError) as error:
            raise CaptuneError(f"preprocess.json is not as written by captune: {error!r}") from None
