"""Near-duplicates that a bf16 product has sieved against all of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from captune.matching import duplicates, match_pairs


@pytest.fixture
def sieving(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with bf16, however small the batch; others round the same way, slowly."""
    monkeypatch.setattr(duplicates, "WORTH_A_SIEVE", 0)
    monkeypatch.setattr(duplicates, "has_native_bf16", lambda device: True)


@pytest.mark.parametrize("threshold", [0.3, 0.9, 0.99])
def test_the_sieve_loses_no_near_duplicate(sieving: None, threshold: float) -> None:
    """Cosines crowd around the threshold, where bf16 alone would decide wrongly."""
    generator = torch.Generator().manual_seed(0)
    own = F.normalize(torch.randn(40, 96, generator=generator), dim=-1)
    aside = torch.randn(4000, 96, generator=generator)
    near = own.repeat(100, 1)
    aside = F.normalize(aside - (aside * near).sum(1, keepdim=True) * near, dim=-1)
    cosine = (threshold + 0.005 * torch.randn(4000, 1, generator=generator)).clamp(max=1)
    text = torch.cat((own, cosine * near + (1 - cosine**2).sqrt() * aside))
    want = own @ text.T >= threshold - 1e-6
    by_bf16 = (own.bfloat16() @ text.bfloat16().T).float() >= threshold
    assert not torch.equal(want, by_bf16)
    found = match_pairs(
        torch.arange(40), torch.arange(4040), text, own=40, duplicate_threshold=threshold
    )
    assert torch.equal(found.ignored, want & ~found.positive)


def test_the_sieve_bears_the_largest_rounding(sieving: None) -> None:
    """All entries of a row round by the same share, up to 2**-8: nothing cancels."""
    for dimension in range(2, 400):
        row = torch.full((2, dimension), dimension**-0.5)
        found = match_pairs(
            torch.tensor([0]), torch.arange(2), row, own=1, duplicate_threshold=0.9999
        )
        assert found.ignored.tolist() == [[False, True]], dimension


def test_the_sieve_rules_most_captions_out(sieving: None) -> None:
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(2000, 96, generator=generator), dim=-1)
    assert torch.equal(duplicates._candidates(text[:50], text, 0.9), torch.arange(50))
