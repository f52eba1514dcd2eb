"""CLIPModel: what is trained, and what it embeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captune.config import DEFAULT_CONFIG
from captune.encoders.image import TransformersImageEncoder, load_image_encoder
from captune.errors import CaptuneError
from captune.models import CLIPModel
from captune.preprocess import Preprocess
from conftest import write_scene


class StubText:
    """512 dimensions, no weights."""

    name, dimension, fingerprint = "stub", 512, "1"

    def encode(self, texts: list[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.ones(len(texts), 512), dim=-1)


def trainable(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_default_model_has_26_131_008_trainable_parameters() -> None:
    """From configuration alone: ResNet-50 without classifier, head 2048 -> 1024 -> 512."""
    from transformers import ResNetConfig, ResNetModel

    # ResNetConfig's defaults are microsoft/resnet-50's; 64 pixels probe it faster than 224.
    backbone = TransformersImageEncoder(
        ResNetModel(ResNetConfig()), name="microsoft/resnet-50", preprocess=Preprocess(64)
    )
    model = CLIPModel(StubText(), image_encoder=backbone)
    assert backbone.feature_dim == 2048
    assert trainable(model) == 26_131_008
    with_norm = CLIPModel(StubText(), image_encoder=backbone, use_batch_norm=True)
    assert trainable(with_norm) == 26_131_008 + 2 * 1024
    assert DEFAULT_CONFIG.image_encoder_name == "microsoft/resnet-50"
    assert DEFAULT_CONFIG.clip_normalisation


def test_images_embed_alike_from_path_picture_and_tensor(model: CLIPModel, tmp_path: Path) -> None:
    write_scene(tmp_path / "a.png", "red", "blue", size=32)
    image = Image.open(tmp_path / "a.png")
    array = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    embedded = [
        model.encode_image(tmp_path / "a.png"),
        model.encode_image(str(tmp_path / "a.png")),
        model.encode_image(image),
        model.encode_image(array),
        model.encode_image(array[None].float() / 255),
        model.encode_image([image, image])[1:],
    ]
    for other in embedded:
        assert other.shape == (1, 16)
        torch.testing.assert_close(other, embedded[0], atol=2e-2, rtol=0)  # bf16 where native
    torch.testing.assert_close(embedded[0].norm(dim=-1), torch.ones(1), atol=1e-5, rtol=0)


def test_tensors_of_another_size_are_resized(model: CLIPModel) -> None:
    wide = torch.randint(0, 255, (2, 3, 50, 90), dtype=torch.uint8)
    assert model.encode_image(wide).shape == (2, 16)
    with pytest.raises(CaptuneError, match=r"\(N, 3, H, W\)"):
        model.encode_image(torch.zeros(2, 1, 32, 32))
    with pytest.raises(CaptuneError, match="uint8 or float"):
        model.encode_image(torch.zeros(2, 3, 32, 32, dtype=torch.int64))


def test_batches_change_nothing(model: CLIPModel) -> None:
    pixels = torch.randint(0, 255, (7, 3, 32, 32), dtype=torch.uint8)
    whole = model.encode_image(pixels, precision="fp32")
    parts = model.encode_image(pixels, batch_size=3, precision="fp32")
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)


def test_forward_normalises_as_the_tower_says(model: CLIPModel) -> None:
    pixels = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        by_hand = (pixels.float() / 255 - 0.5) / 0.25
        features = model.image_encoder(by_hand)
        expected = torch.nn.functional.normalize(model.head(features.pooled), dim=-1)
        torch.testing.assert_close(model(pixels), expected, atol=1e-5, rtol=1e-5)


def test_encode_text_is_the_frozen_towers(model: CLIPModel) -> None:
    texts = [f"text {i}" for i in range(5)]
    torch.testing.assert_close(
        model.encode_text(texts, batch_size=2), model.text_encoder.encode(texts)
    )
    assert model.encode_text("one").shape == (1, 16)


def test_clips_own_tower_starts_at_zero_shot_clip(tiny_clip: Path, tmp_path: Path) -> None:
    """Epoch 0 of clip-vit-b32 equals CLIP: same similarities, from the same pixels."""
    from transformers import AutoTokenizer
    from transformers import CLIPModel as Reference

    reference = Reference.from_pretrained(tiny_clip).eval()
    config = DEFAULT_CONFIG.replace(
        towers="clip-vit-b32", image_encoder=str(tiny_clip), text_encoder=str(tiny_clip)
    )
    model = CLIPModel.from_config(config).eval()
    pixels = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8)
    texts = ["a cat", "a dog on a beach"]
    normal = (pixels.float() / 255 - model.mean) / model.std
    tokens = AutoTokenizer.from_pretrained(tiny_clip)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = reference(**tokens, pixel_values=normal)
        expected = output.image_embeds @ output.text_embeds.T
        found = model(pixels) @ model.encode_text(texts).T
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)

    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(CLIPModel.from_pretrained(tmp_path)(pixels), model(pixels))


def test_zero_shot_needs_a_clip(tiny_clip: Path, tiny_resnet: Path) -> None:
    assert float(CLIPModel.zero_shot(str(tiny_clip)).logit_scale) == pytest.approx(100)
    with pytest.raises(CaptuneError, match="no CLIP checkpoint"):
        CLIPModel.zero_shot(str(tiny_resnet))


def test_batch_norm_does_not_fit_clips_projection(tiny_clip: Path) -> None:
    with pytest.raises(CaptuneError, match="use_batch_norm belongs to the projection head"):
        CLIPModel(str(tiny_clip), image_encoder=str(tiny_clip), use_batch_norm=True)


def test_towers_of_different_dimension_are_refused(tiny_clip: Path) -> None:
    with pytest.raises(CaptuneError, match="into 16 dimensions, text tower stub into 512"):
        CLIPModel(StubText(), image_encoder=load_image_encoder(str(tiny_clip)))


def test_the_heads_first_weights_follow_the_seed_alone(
    tiny_resnet: Path, tiny_sentence: Path
) -> None:
    config = DEFAULT_CONFIG.replace(image_encoder=str(tiny_resnet), text_encoder=str(tiny_sentence))
    torch.manual_seed(5)
    one = CLIPModel.from_config(config).head.state_dict()["hidden.weight"]
    torch.rand(17)
    before = torch.get_rng_state()
    two = CLIPModel.from_config(config).head.state_dict()["hidden.weight"]
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)  # and the caller's draws are left alone
    other = CLIPModel.from_config(config.replace(seed=1)).head.state_dict()["hidden.weight"]
    assert not torch.equal(one, other)
