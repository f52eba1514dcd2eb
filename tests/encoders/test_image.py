"""Image towers, run through real checkpoint folders made on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from captune.encoders.image import (
    ClipImageEncoder,
    TransformersImageEncoder,
    image_encoder_from_description,
    load_image_encoder,
)
from captune.errors import CaptuneError
from captune.preprocess import Preprocess


def pixels(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_resnet_folder_gives_what_transformers_gives(tiny_resnet: Path) -> None:
    from transformers import ResNetModel

    reference = ResNetModel.from_pretrained(tiny_resnet).eval()
    encoder = load_image_encoder(str(tiny_resnet)).eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        expected, found = reference(pixels()), encoder(pixels())
    assert encoder.feature_dim == 32 and found.map.dim() == 4
    torch.testing.assert_close(found.map, expected.last_hidden_state)
    torch.testing.assert_close(found.pooled, expected.pooler_output.flatten(1))


def test_preprocessing_is_the_checkpoints_own(tiny_resnet: Path) -> None:
    stated = load_image_encoder(str(tiny_resnet)).preprocess
    assert stated == Preprocess(32, (0.5,) * 3, (0.25,) * 3)
    assert load_image_encoder(str(tiny_resnet), image_size=48).preprocess.image_size == 48
    ours = load_image_encoder(str(tiny_resnet), preprocess=Preprocess(32)).preprocess
    assert ours.mean == Preprocess().mean


def test_clip_tower_with_its_projection_is_clip(tiny_clip: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    reference = CLIPVisionModelWithProjection.from_pretrained(tiny_clip).eval()
    encoder = load_image_encoder(str(tiny_clip))
    assert isinstance(encoder, ClipImageEncoder)
    with torch.no_grad():
        features = encoder.eval()(pixels())
        projected = encoder.projection[0](features.pooled)
        expected = reference(pixel_values=pixels()).image_embeds
    torch.testing.assert_close(projected, expected, atol=1e-5, rtol=1e-5)
    assert features.map.shape == (2, 32, 4, 4)


def test_a_vits_tokens_become_a_map(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
    )
    ViTModel(config).save_pretrained(tmp_path / "vit")
    encoder = load_image_encoder(str(tmp_path / "vit"))
    assert isinstance(encoder, TransformersImageEncoder)
    with torch.no_grad():
        encoder.eval()
        features = encoder(pixels())
        hidden = encoder.model(pixel_values=pixels()).last_hidden_state
    assert features.map.shape == (2, 16, 4, 4)
    torch.testing.assert_close(features.pooled, hidden[:, 0])
    torch.testing.assert_close(features.map[:, :, 2, 3], hidden[:, 1 + 4 * 2 + 3])
    # Its pooling layer takes part in nothing, so it must not be trained or saved.
    assert not any("pooler" in name for name, _ in encoder.named_parameters())


@pytest.mark.parametrize("tower", ["tiny_resnet", "tiny_clip"])
def test_architecture_is_rebuilt_from_its_description(
    tower: str, request: pytest.FixtureRequest
) -> None:
    import json

    encoder = load_image_encoder(str(request.getfixturevalue(tower)))
    stated = json.loads(json.dumps(encoder.description()))  # as it stands in a run
    rebuilt = image_encoder_from_description(stated, encoder.preprocess)
    rebuilt.load_state_dict(encoder.state_dict())  # type: ignore[attr-defined]
    with torch.no_grad():
        encoder.eval(), rebuilt.eval()  # type: ignore[attr-defined]
        torch.testing.assert_close(encoder(pixels()).pooled, rebuilt(pixels()).pooled)


def test_own_code_named_in_a_run_is_not_run() -> None:
    stated = {"kind": "captune_evil:make", "name": "their tower"}
    with pytest.raises(CaptuneError, match=r"--image-encoder package\.module:factory"):
        image_encoder_from_description(stated, Preprocess())


def test_a_repositorys_code_is_not_loaded(tiny_resnet: Path) -> None:
    stated = load_image_encoder(str(tiny_resnet)).description()
    stated["config"]["auto_map"] = {"AutoModel": "evil.py--evil.Model"}
    rebuilt = image_encoder_from_description(stated, Preprocess(32))
    assert type(rebuilt.model).__name__ == "ResNetModel"  # type: ignore[attr-defined]


def test_an_input_size_that_the_tower_refuses_is_a_clear_error(tiny_clip: Path) -> None:
    """CLIP's position embeddings fit one size."""
    with pytest.raises(CaptuneError, match="does not take 64x64 images"):
        load_image_encoder(str(tiny_clip), image_size=64)
