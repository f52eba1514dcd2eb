"""A model on disk: saved and reopened; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from captune.errors import CaptuneError
from captune.models import CLIPModel

FLAGS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("norm", "attention"), FLAGS)
def test_save_and_reopen(
    tiny_resnet: Path, tiny_sentence: Path, tmp_path: Path, norm: bool, attention: bool
) -> None:
    model = CLIPModel(
        str(tiny_sentence),
        image_encoder=str(tiny_resnet),
        use_batch_norm=norm,
        use_attention_pooling=attention,
        hidden_dim=24,
        temperature=0.05,
    ).eval()
    model.save_pretrained(tmp_path)
    suffix = ("_bn" if norm else "") + ("_attn" if attention else "")
    assert (tmp_path / f"best_model{suffix}.safetensors").is_file()
    reopened = CLIPModel.from_pretrained(tmp_path)
    pixels = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(reopened.encode_image(pixels), model.encode_image(pixels))
    torch.testing.assert_close(reopened.encode_text(["a"]), model.encode_text(["a"]))
    assert float(reopened.logit_scale) == pytest.approx(20.0)
    assert not reopened.training


def test_a_checkpoint_holds_tower_head_and_temperature_only(
    model: CLIPModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "best_model.safetensors", framework="pt") as file:
        rooms = {key.split(".")[0] for key in file.keys()}  # noqa: SIM118
    assert rooms == {"image_encoder", "head", "logit_scale"}
    named = json.loads((tmp_path / "text_encoder.json").read_text(encoding="utf-8"))
    assert named["fingerprint"] == model.text_encoder.fingerprint and named["dimension"] == 16


def test_leftover_and_missing_weights_are_refused(model: CLIPModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model.save_pretrained(tmp_path)
    path = tmp_path / "best_model.safetensors"
    state = load_file(path)
    save_file({**state, "surplus.weight": torch.zeros(1)}, path)
    with pytest.raises(CaptuneError, match=r"surplus\.weight"):
        CLIPModel.from_pretrained(tmp_path)
    del state["head.output.bias"]
    save_file(state, path)
    with pytest.raises(CaptuneError, match=r"head\.output\.bias"):
        CLIPModel.from_pretrained(tmp_path)
    path.write_bytes(b"broken")
    with pytest.raises(CaptuneError, match=r"best_model\.safetensors"):
        CLIPModel.from_pretrained(tmp_path)
