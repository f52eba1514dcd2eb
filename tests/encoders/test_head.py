"""Pooling and projection."""

from __future__ import annotations

import pytest
import torch

from captune.encoders.head import AttentionPooling, ProjectionHead


def feature_map() -> torch.Tensor:
    return torch.randn(3, 16, 4, 5, generator=torch.Generator().manual_seed(1))


def test_attention_starts_from_average_pooling() -> None:
    pooled = AttentionPooling(16, heads=4)(feature_map())
    torch.testing.assert_close(pooled, feature_map().mean((2, 3)))


def test_attention_equals_a_slow_loop() -> None:
    pooling = AttentionPooling(16, heads=4)
    torch.nn.init.normal_(pooling.score.weight).requires_grad_(False)
    maps = feature_map()
    found = pooling(maps)
    for n in range(3):
        for head in range(4):
            scores = [
                float((pooling.score.weight[head, :, 0, 0] * maps[n, :, y, x]).sum())
                for y in range(4)
                for x in range(5)
            ]
            weights = torch.softmax(torch.tensor(scores), 0)
            for channel in range(4 * head, 4 * head + 4):
                expected = float((weights * maps[n, channel].flatten()).sum())
                assert float(found[n, channel]) == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(pooling.weights(maps).sum(-1), torch.ones(3, 4))


def test_attention_learns_where_to_look() -> None:
    """Only one position tells; from uniform weights the gradient finds it."""
    torch.manual_seed(0)
    pooling = AttentionPooling(16, heads=4)
    maps = torch.randn(64, 16, 3, 3) * 0.3
    maps[:, 8:, 1, 1] += 2.0  # a mark that says: here
    goal = maps[:, :, 1, 1]
    optimizer = torch.optim.Adam(pooling.parameters(), lr=0.05)
    for _ in range(100):
        loss = (pooling(maps) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(pooling.weights(maps)[:, :, 4].detach().mean()) > 0.9


def test_heads_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="8 heads"):
        AttentionPooling(12, heads=8)


def test_projection_is_linear_gelu_linear() -> None:
    head = ProjectionHead(6, 4, hidden_dim=5)
    x = torch.randn(3, 6)
    hidden = torch.nn.functional.gelu(x @ head.hidden.weight.T + head.hidden.bias)
    torch.testing.assert_close(head(x), hidden @ head.output.weight.T + head.output.bias)
    assert not any(isinstance(m, torch.nn.BatchNorm1d) for m in head.modules())


def test_batch_norm_normalises_the_hidden_layer() -> None:
    head = ProjectionHead(6, 4, hidden_dim=5, use_batch_norm=True).train()
    normed = head.norm(head.hidden(torch.randn(64, 6) * 9 + 3))
    torch.testing.assert_close(normed.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.std(0, unbiased=False), torch.ones(5), atol=1e-3, rtol=0)
