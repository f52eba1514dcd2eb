"""Layers for layer-wise learning rates: every kind of tower, in the order of its forward pass."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captune.encoders.image import load_image_encoder
from captune.encoders.layers import encoder_layers, freeze_batch_norm

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_image_encoder.py"
Make = Callable[[pytest.FixtureRequest], nn.Module]


def of_transformers(kind: str, **config: Any) -> Make:
    def make(_: pytest.FixtureRequest) -> nn.Module:
        import transformers

        settings = getattr(transformers, f"{kind}Config")(**config)
        options = {"add_pooling_layer": False} if kind in ("ViT", "Swin") else {}
        return getattr(transformers, f"{kind}Model")(settings, **options)  # type: ignore[no-any-return]

    return make


def named(name: str) -> Make:
    def make(request: pytest.FixtureRequest) -> nn.Module:
        tower = request.getfixturevalue(name) if name.startswith("tiny") else name
        encoder = load_image_encoder(str(tower))
        assert isinstance(encoder, nn.Module)
        return encoder

    return make


def example(_: pytest.FixtureRequest) -> nn.Module:
    spec = importlib.util.spec_from_file_location("own_image_encoder", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make()  # type: ignore[no-any-return]


VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 32,
    "patch_size": 8,
}
# Each kind, and the names of its layers.
TOWERS: dict[str, tuple[Make, list[str]]] = {
    "lite0": (
        named("efficientnet-lite0"),
        ["model._conv_stem", *(f"model._blocks.{i}" for i in range(16)), "model._conv_head"],
    ),
    "lite2": (
        named("efficientnet-lite2"),
        ["model._conv_stem", *(f"model._blocks.{i}" for i in range(21)), "model._conv_head"],
    ),
    "clip": (
        named("tiny_clip"),
        [
            "model.vision_model.embeddings",
            "model.vision_model.encoder.layers.0",
            "model.vision_model.encoder.layers.1",
            "model.vision_model.post_layernorm",
        ],
    ),
    "resnet": (
        named("tiny_resnet"),
        ["model.embedder", *(f"model.encoder.stages.{i}.layers.0" for i in range(3))],
    ),
    "bottlenecks": (
        of_transformers(
            "ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[2, 3], layer_type="bottleneck"
        ),
        [
            "embedder",
            *(f"encoder.stages.0.layers.{i}" for i in range(2)),
            *(f"encoder.stages.1.layers.{i}" for i in range(3)),
        ],
    ),
    "vit": (
        of_transformers("ViT", **VIT),
        ["embeddings", "layers.0", "layers.1", "layers.2", "layernorm"],
    ),
    "convnext": (
        of_transformers("ConvNext", hidden_sizes=[8, 8, 16, 16], depths=[1, 2, 1, 1]),
        [
            "embeddings",
            "encoder.stages.0.layers.0",
            "encoder.stages.1.downsampling_layer",
            "encoder.stages.1.layers.0",
            "encoder.stages.1.layers.1",
            "encoder.stages.2.downsampling_layer",
            "encoder.stages.2.layers.0",
            "encoder.stages.3.downsampling_layer",
            "encoder.stages.3.layers.0",
            "layernorm",
        ],
    ),
    "swin": (
        of_transformers("Swin", embed_dim=8, depths=[1, 2], num_heads=[2, 2], window_size=2),
        [
            "embeddings",
            "encoder.layers.0.blocks.0",
            "encoder.layers.0.downsample",
            "encoder.layers.1.blocks.0",
            "encoder.layers.1.blocks.1",
            "layernorm",
        ],
    ),
    "example": (example, ["stem", "body"]),
}


def forward_order(encoder: nn.Module, side: int) -> list[nn.Parameter]:
    """Parameters in the order in which the modules that own them are first called."""
    order: dict[int, nn.Parameter] = {}

    def note(module: nn.Module, *_: Any) -> None:
        order.update({id(p): p for p in module.parameters(recurse=False) if id(p) not in order})

    handles = [module.register_forward_pre_hook(note) for module in encoder.modules()]
    with torch.no_grad():
        encoder.eval()(torch.zeros(1, 3, side, side))
    for handle in handles:
        handle.remove()
    return list(order.values())


@pytest.mark.parametrize("kind", TOWERS)
def test_layers_run_from_input_to_output(kind: str, request: pytest.FixtureRequest) -> None:
    make, names = TOWERS[kind]
    encoder = make(request)
    layers = encoder_layers(encoder)
    assert [name for name, _ in layers] == names
    found = [id(p) for _, parameters in layers for p in parameters]
    wanted = {id(p) for p in encoder.parameters() if p.requires_grad}
    assert len(found) == len(set(found)) and set(found) == wanted
    number = {id(p): i for i, (_, parameters) in enumerate(layers) for p in parameters}
    side = 64 if kind in ("example", "lite0", "lite2", "convnext", "swin") else 32
    passed = [number[id(p)] for p in forward_order(encoder, side)]
    assert passed == sorted(passed) and set(passed) == set(range(len(layers)))


def test_frozen_parameters_stand_in_no_layer(request: pytest.FixtureRequest) -> None:
    encoder = example(request)
    encoder.stem[0].requires_grad_(False)  # type: ignore[union-attr,index,operator]
    assert [(name, len(p)) for name, p in encoder_layers(encoder)] == [("stem", 2), ("body", 4)]
    assert encoder_layers(encoder.requires_grad_(False)) == []


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        # Chains inside a block are its own affair.
        self.branch = nn.Sequential(nn.Sequential(nn.Linear(width, width), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self.linear(x))  # type: ignore[no-any-return]


def test_shared_parameters_stand_in_the_first_layer_only() -> None:
    shared = Block()
    tower = nn.Sequential(Block(), shared, Block(), shared)
    tower[2].linear.weight = tower[0].linear.weight
    layers = encoder_layers(tower)
    assert [(name, len(p)) for name, p in layers] == [("0", 4), ("1", 4), ("2", 3)]


def test_a_towers_own_parameters_belong_to_its_stem() -> None:
    class OwnViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 4, 8)
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.norm = nn.LayerNorm(4)
            self.class_token = nn.Parameter(torch.zeros(4))

    layers = encoder_layers(OwnViT())
    assert [len(parameters) for _, parameters in layers] == [3, 4, 4, 2]


def test_one_sequential_of_everything_is_taken_apart() -> None:
    stage = nn.Sequential(Block(), Block())
    tower = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), stage, nn.Linear(4, 4))
    assert [(n, len(p)) for n, p in encoder_layers(nn.ModuleDict({"net": tower}))] == [
        ("net.0", 4),
        ("net.3.0", 4),
        ("net.3.1", 4),
        ("net.4", 2),
    ]


def test_without_blocks_every_child_is_a_layer() -> None:
    wrapped = nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))})
    assert [name for name, _ in encoder_layers(wrapped)] == ["net.0", "net.2"]
    assert [(name, len(p)) for name, p in encoder_layers(nn.Linear(2, 2))] == [("", 2)]


def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_weights(tiny_resnet: Path) -> None:
    encoder: Any = load_image_encoder(str(tiny_resnet))
    statistics = {k: v.clone() for k, v in encoder.state_dict().items() if "running" in k}
    counts = {k: v.clone() for k, v in encoder.state_dict().items() if "num_batches" in k}
    assert statistics and counts
    encoder.train()
    freeze_batch_norm(encoder)
    assert encoder.training
    encoder(torch.randn(4, 3, 32, 32)).pooled.square().sum().backward()
    state = encoder.state_dict()
    assert all(torch.equal(state[key], value) for key, value in (statistics | counts).items())
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(float(m.weight.grad.abs().sum()) > 0 for m in norms)
    encoder.train()  # undoes it
    encoder(torch.randn(4, 3, 32, 32))
    assert not any(torch.equal(encoder.state_dict()[k], v) for k, v in statistics.items())


def test_a_batch_norm_itself_is_frozen_and_others_are_not() -> None:
    norm = nn.BatchNorm1d(3).train()
    freeze_batch_norm(norm)
    assert not norm.training
    mixed = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.LayerNorm(3)).train()
    freeze_batch_norm(mixed)
    assert [part.training for part in mixed] == [False, True, True]
