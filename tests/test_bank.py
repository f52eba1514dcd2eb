"""The caption bank: each distinct caption once, resumable, never half, never of something else."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from captune import bank as bank_module
from captune import rowfile
from captune.bank import CaptionBank
from captune.encoders.text import ClipTextEncoder, SentenceEncoder
from captune.errors import CaptuneError

CAPTIONS = [f"caption number {i % 700} " + "long " * (i % 13) for i in range(1000)]


class CountingEncoder:
    """Deterministic vectors from the letters; counts calls, and can be told to fail."""

    name = "counting"
    dimension = 8
    fingerprint = "v1"

    def __init__(self, fail_after: int | None = None) -> None:
        self.texts: list[str] = []
        self.fail_after = fail_after

    def encode(self, texts: Sequence[str]) -> Tensor:
        if self.fail_after is not None and len(self.texts) + len(texts) > self.fail_after:
            raise KeyboardInterrupt
        self.texts += texts
        return vectors(texts)


def vectors(texts: Sequence[str]) -> Tensor:
    rows = []
    for text in texts:
        seed = int.from_bytes(text.encode()[-12:], "little") % 2**31 + len(text)
        rows.append(torch.randn(8, generator=torch.Generator().manual_seed(seed)))
    return F.normalize(torch.stack(rows), dim=-1)


def slow_distinct(captions: Sequence[str]) -> tuple[list[str], list[int]]:
    """Distinct captions in order of first appearance, and each one's row, by a loop."""
    distinct: list[str] = []
    for caption in captions:
        if caption not in distinct:
            distinct.append(caption)
    return distinct, [distinct.index(caption) for caption in captions]


def folder_of(cache: Path) -> Path:
    return next(path for path in cache.iterdir() if path.is_dir())


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1), st.integers(0, 9))
def test_distinct_captions_stand_in_order_of_appearance(captions: list[str], at: int) -> None:
    expected, rows = slow_distinct(captions)
    chunks = [pa.array(part, pa.string()) for part in (captions[:at], captions[at:])]
    for given_as in (captions, pa.chunked_array(chunks)):
        distinct, found = bank_module._distinct(given_as)
        assert (distinct.to_pylist(), found.tolist()) == (expected, rows)


def test_the_fingerprint_is_of_each_distinct_caption_and_all_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bank_module, "HASHED_AT_ONCE", 7)
    encoder, captions = CountingEncoder(), ["é", "", "\0", "a b", "é", *map(str, range(20)), ""]
    expected, rows = slow_distinct(captions)
    made_by = [bank_module.VERSION, "counting", "", "v1", 8, "fp32", "float16"]
    state = hashlib.blake2b(json.dumps(made_by).encode(), digest_size=16)
    for text in expected:
        state.update(text.encode("utf-8") + b"\0")
    state.update(np.array(rows, dtype="<i8").tobytes())
    found = bank_module._fingerprint(encoder, "fp32", *bank_module._distinct(captions))
    assert found == state.hexdigest()


def test_a_column_and_a_list_have_the_same_bank(tmp_path: Path) -> None:
    encoder = CountingEncoder()
    of_list = CaptionBank.build(CAPTIONS, encoder, cache=tmp_path)
    embedded = len(encoder.texts)
    of_column = CaptionBank.build(pa.chunked_array([CAPTIONS]), encoder, cache=tmp_path)
    assert len(encoder.texts) == embedded  # from disk
    assert torch.equal(of_list.all(), of_column.all())


def test_lookup_equals_embedding_each_caption_alone(tmp_path: Path) -> None:
    bank = CaptionBank.build(CAPTIONS, CountingEncoder(), cache=tmp_path)
    expected = torch.cat([vectors([caption]) for caption in CAPTIONS])
    torch.testing.assert_close(bank.all(), expected, atol=1e-3, rtol=0)  # float16 on disk
    torch.testing.assert_close(bank.lookup([5, 5, 999]), expected[[5, 5, 999]], atol=1e-3, rtol=0)
    torch.testing.assert_close(bank.all().norm(dim=-1), torch.ones(1000), atol=1e-6, rtol=0)


def test_each_distinct_caption_is_embedded_once_longest_first(tmp_path: Path) -> None:
    encoder = CountingEncoder()
    bank = CaptionBank.build(CAPTIONS, encoder, cache=tmp_path)
    assert sorted(encoder.texts) == sorted(set(CAPTIONS))
    lengths = [len(text) for text in encoder.texts]
    assert lengths == sorted(lengths, reverse=True)
    assert bank.embeddings.shape == (len(set(CAPTIONS)), 8)
    assert bank.embeddings.dtype == np.float16 and isinstance(bank.embeddings, np.memmap)


class TokenCountingEncoder(CountingEncoder):
    """Its tokens are words, so that its order is another than that of the letters."""

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]


def test_captions_of_as_many_tokens_are_embedded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank_module, "COUNTED_AT_ONCE", 300)
    captions = [caption + "x" * (number % 50) for number, caption in enumerate(CAPTIONS)]
    encoder = TokenCountingEncoder()
    bank = CaptionBank.build(captions, encoder, cache=tmp_path)
    counts = encoder.token_counts(encoder.texts)
    assert counts == sorted(counts, reverse=True) and len(counts) == len(set(captions))
    expected = torch.cat([vectors([caption]) for caption in captions])
    torch.testing.assert_close(bank.all(), expected, atol=1e-3, rtol=0)


def test_what_was_begun_in_another_order_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank_module, "BATCH", 16)
    monkeypatch.setattr(rowfile, "SECONDS_BETWEEN_MARKS", 0.0)
    captions = [caption + "x" * (number % 50) for number, caption in enumerate(CAPTIONS)]
    with pytest.raises(KeyboardInterrupt):
        CaptionBank.build(captions, CountingEncoder(fail_after=300), cache=tmp_path)
    encoder = TokenCountingEncoder()
    bank = CaptionBank.build(captions, encoder, cache=tmp_path)
    assert len(encoder.texts) == len(set(captions))
    expected = torch.cat([vectors([caption]) for caption in captions])
    torch.testing.assert_close(bank.all(), expected, atol=1e-3, rtol=0)


def test_own_towers_count_the_tokens_they_pad_to(tiny_sentence: Path, tiny_clip: Path) -> None:
    texts = ["a dog", "a " + "very " * 60 + "old dog", "cats"]
    sentence = SentenceEncoder(str(tiny_sentence))
    padded = sentence.model.tokenize(texts)["attention_mask"].sum(1).tolist()
    assert sentence.token_counts(texts) == padded and max(padded) == 32
    clip = ClipTextEncoder(str(tiny_clip))
    assert clip.token_counts(texts)[1] == clip.max_tokens
    assert clip.token_counts(texts)[0] == len(clip.tokenizer("a dog")["input_ids"])


def test_the_second_build_embeds_nothing(tmp_path: Path) -> None:
    first = CaptionBank.build(CAPTIONS, CountingEncoder(), cache=tmp_path)
    encoder = CountingEncoder()
    again = CaptionBank.build(CAPTIONS, encoder, cache=tmp_path)
    assert encoder.texts == []
    assert torch.equal(first.all(), again.all())


def changed(**attributes: object) -> CountingEncoder:
    encoder = CountingEncoder()
    for name, value in attributes.items():
        setattr(encoder, name, value)
    return encoder


@pytest.mark.parametrize(
    ("captions", "encoder", "precision"),
    [
        (CAPTIONS[::-1], changed(), "fp32"),
        (CAPTIONS[:-1], changed(), "fp32"),
        (CAPTIONS, changed(name="other"), "fp32"),
        (CAPTIONS, changed(fingerprint="v2"), "fp32"),
        (CAPTIONS, changed(revision="abc"), "fp32"),
        (CAPTIONS, changed(), "bf16"),
    ],
)
def test_any_change_builds_another_bank(
    tmp_path: Path, captions: list[str], encoder: CountingEncoder, precision: str
) -> None:
    CaptionBank.build(CAPTIONS, CountingEncoder(), cache=tmp_path, precision="fp32")
    CaptionBank.build(captions, encoder, cache=tmp_path, precision=precision)
    assert len(encoder.texts) == len(set(captions))


def test_a_bank_of_something_else_is_never_opened(tmp_path: Path) -> None:
    bank = CaptionBank.build(CAPTIONS, CountingEncoder(), cache=tmp_path)
    with pytest.raises(CaptuneError, match="other captions or another text encoder"):
        CaptionBank.open(folder_of(tmp_path), "0" * 32)
    assert CaptionBank.open(folder_of(tmp_path), bank.fingerprint).fingerprint == bank.fingerprint


@pytest.mark.parametrize("texts_before", [0, 200, 400, 699])
def test_an_interrupted_build_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts_before: int
) -> None:
    monkeypatch.setattr(bank_module, "BATCH", 16)
    monkeypatch.setattr(rowfile, "SECONDS_BETWEEN_MARKS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        CaptionBank.build(CAPTIONS, CountingEncoder(fail_after=texts_before), cache=tmp_path)
    with pytest.raises(CaptuneError):
        CaptionBank.open(folder_of(tmp_path), folder_of(tmp_path).name)
    encoder = CountingEncoder()
    resumed = CaptionBank.build(CAPTIONS, encoder, cache=tmp_path)
    kept = texts_before // 16 * 16
    assert len(encoder.texts) == len(set(CAPTIONS)) - kept
    whole = CaptionBank.build(CAPTIONS, CountingEncoder(), cache=tmp_path / "whole")
    assert np.array_equal(resumed.embeddings, whole.embeddings)


def test_a_mark_without_its_array_starts_over(tmp_path: Path) -> None:
    bank = CaptionBank.build(CAPTIONS, CountingEncoder(), cache=tmp_path)
    folder = folder_of(tmp_path)
    shutil.rmtree(folder)
    folder.mkdir()
    mark = {"fingerprint": bank.fingerprint, "done": 300}
    (folder / "partial.json").write_text(json.dumps(mark), encoding="utf-8")
    encoder = CountingEncoder()
    CaptionBank.build(CAPTIONS, encoder, cache=tmp_path)
    assert len(encoder.texts) == len(set(CAPTIONS))


@pytest.mark.parametrize("damage", ["cut", "shape", "version"])
def test_a_damaged_bank_is_refused_then_built_anew(tmp_path: Path, damage: str) -> None:
    bank = CaptionBank.build(CAPTIONS, CountingEncoder(), cache=tmp_path)
    del bank
    folder = folder_of(tmp_path)
    if damage == "cut":
        data = (folder / "embeddings.npy").read_bytes()
        (folder / "embeddings.npy").write_bytes(data[:-100])
    elif damage == "shape":
        np.save(folder / "embeddings.npy", np.zeros((3, 8), dtype=np.float16))
    else:
        (folder / "bank.json").write_text('{"format_version": 99}', encoding="utf-8")
    with pytest.raises(CaptuneError):
        CaptionBank.build(CAPTIONS, CountingEncoder(), cache=tmp_path)
    encoder = CountingEncoder()
    CaptionBank.build(CAPTIONS, encoder, cache=tmp_path)
    assert len(encoder.texts) == len(set(CAPTIONS))


def test_wrong_shapes_and_nan_are_refused(tmp_path: Path) -> None:
    wide = changed(dimension=9)
    with pytest.raises(CaptuneError, match=r"gave \(128, 8\)"):
        CaptionBank.build(CAPTIONS, wide, cache=tmp_path)
    broken = changed(encode=lambda texts: torch.full((len(texts), 8), float("nan")), name="nan")
    with pytest.raises(CaptuneError, match="NaN"):
        CaptionBank.build(CAPTIONS, broken, cache=tmp_path)
    with pytest.raises(CaptuneError, match="at least one caption"):
        CaptionBank.build([], CountingEncoder(), cache=tmp_path)


def test_bf16_changes_little(tiny_sentence: Path, tmp_path: Path) -> None:
    from captune.encoders.text import load_text_encoder

    encoder = load_text_encoder(str(tiny_sentence))
    exact = CaptionBank.build(CAPTIONS[:50], encoder, cache=tmp_path, precision="fp32").all()
    fast = CaptionBank.build(CAPTIONS[:50], encoder, cache=tmp_path, precision="bf16").all()
    assert float((exact * fast).sum(-1).min()) > 0.999
