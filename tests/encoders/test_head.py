"""Pooling, projection and the text side's adapter."""

from __future__ import annotations

import pytest
import torch

from captune.encoders.head import (
    AttentionPooling,
    GeneralisedMeanPooling,
    ProjectionHead,
    TextAdapter,
)


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


# -- the head's options -------------------------------------------------------------------------
def test_without_options_the_head_is_the_one_of_before() -> None:
    """Runs from before must open, and a seed must give the same first weights and draws."""
    torch.manual_seed(3)
    hidden, output = torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)
    after = torch.rand(1)
    torch.manual_seed(3)
    head = ProjectionHead(6, 4, hidden_dim=5).train()
    head(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(1), after)
    state = head.state_dict()
    assert list(state) == ["hidden.weight", "hidden.bias", "output.weight", "output.bias"]
    assert torch.equal(state["hidden.weight"], hidden.weight)
    assert torch.equal(state["output.bias"], output.bias)


def test_options_leave_the_first_weights_alone() -> None:
    torch.manual_seed(3)
    plain = ProjectionHead(6, 4, hidden_dim=5)
    torch.manual_seed(3)
    head = ProjectionHead(6, 4, hidden_dim=5, dropout=0.5, standardise=True).eval()
    x = torch.randn(3, 6)
    torch.testing.assert_close(head(x), plain(x))  # mean 0 and std 1 until they are set


def test_dropout_drops_hidden_units_while_training_only() -> None:
    torch.manual_seed(0)
    head = ProjectionHead(6, 4, hidden_dim=2000, dropout=0.25)
    seen: list[torch.Tensor] = []
    head.output.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(2, 6)
    head.train()(x)
    head.eval()(x)
    kept, whole = seen
    assert float((kept == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(kept[kept != 0], whole[kept != 0] / 0.75)  # the mean is kept
    assert not bool((whole == 0).any())
    assert set(head.state_dict()) == set(ProjectionHead(6, 4).state_dict())


def test_standardised_features_have_mean_0_and_std_1() -> None:
    torch.manual_seed(0)
    features = torch.randn(500, 6) * torch.tensor([0.5, 1, 2, 3, 4, 20]) + 7
    head = ProjectionHead(6, 4, hidden_dim=5, standardise=True)
    seen: list[torch.Tensor] = []
    head.hidden.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    head.set_statistics(features.mean(0), features.std(0))
    head(features)
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen[0].std(0), torch.ones(6), atol=1e-4, rtol=0)


def test_statistics_are_saved_and_are_not_trained() -> None:
    head = ProjectionHead(3, 2, hidden_dim=4, standardise=True)
    head.set_statistics(torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 5, 6]))
    again = ProjectionHead(3, 2, hidden_dim=4, standardise=True)
    again.load_state_dict(head.state_dict())
    assert again.feature_mean.tolist() == [1, 2, 3] and again.feature_std.tolist() == [4, 5, 6]
    x = torch.randn(5, 3)
    torch.testing.assert_close(again(x), head(x))
    assert not any("feature" in name for name, _ in head.named_parameters())


def test_a_dead_channel_does_not_explode() -> None:
    head = ProjectionHead(4, 2, standardise=True)
    head.set_statistics(torch.zeros(4), torch.tensor([0.0, 1.0, 1.0, 2.0]))
    assert head.feature_std.tolist() == pytest.approx([0.01, 1, 1, 2])
    head.set_statistics(torch.zeros(4), torch.zeros(4))  # nothing moves at all
    assert head.feature_std.tolist() == [1, 1, 1, 1]


def test_wrong_statistics_are_refused() -> None:
    head = ProjectionHead(3, 2, standardise=True)
    with pytest.raises(ValueError, match=r"\(1,\) and \(3,\) for 3 features"):
        head.set_statistics(torch.zeros(1), torch.ones(3))
    for mean, std in [(float("nan"), 1.0), (0.0, float("inf")), (0.0, -1.0)]:
        with pytest.raises(ValueError, match="finite"):
            head.set_statistics(torch.full((3,), mean), torch.full((3,), std))
    assert head.feature_mean.tolist() == [0, 0, 0] and head.feature_std.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="standardise=False"):
        ProjectionHead(3, 2).set_statistics(torch.zeros(3), torch.ones(3))


# -- generalised mean pooling -------------------------------------------------------------------
def test_generalised_mean_equals_a_slow_loop() -> None:
    maps = feature_map()
    for p in (1.0, 1.7, 3.0, 10.0):
        found = GeneralisedMeanPooling(initial=p)(maps).detach()
        assert found.shape == (3, 16)
        for n in range(3):
            for c in range(16):
                values = [max(float(v), 1e-6) ** p for v in maps[n, c].flatten()]
                expected = (sum(values) / len(values)) ** (1 / p)
                assert float(found[n, c]) == pytest.approx(expected, rel=1e-4)


def test_generalised_mean_starts_from_the_average() -> None:
    maps = feature_map().relu()
    pooled = GeneralisedMeanPooling()(maps)
    torch.testing.assert_close(pooled, maps.mean((2, 3)), atol=2e-6, rtol=1e-5)
    below = GeneralisedMeanPooling()(torch.full((1, 1, 2, 2), -3.0)).detach()
    assert float(below) == pytest.approx(1e-6)  # negatives are clamped


def test_generalised_mean_nears_the_maximum() -> None:
    maps = feature_map().relu() + 0.1
    high = maps.amax((2, 3))
    pooled = [GeneralisedMeanPooling(initial=p)(maps).detach() for p in (1, 3, 10)]
    gaps = [float((high - values).mean()) for values in pooled]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    peak = torch.zeros(1, 1, 2, 2)
    peak[0, 0, 0, 0] = 5
    assert float(GeneralisedMeanPooling(initial=10)(peak).detach()) == pytest.approx(
        5 * 0.25**0.1, rel=1e-4
    )


@pytest.mark.parametrize("p", [1.0, 10.0])
def test_generalised_mean_has_finite_gradients_on_an_empty_map(p: float) -> None:
    pooling = GeneralisedMeanPooling(initial=p)
    maps = torch.zeros(2, 3, 4, 4, requires_grad=True)
    pooling(maps).sum().backward()
    assert maps.grad is not None and pooling.p.grad is not None
    assert bool(maps.grad.isfinite().all()) and bool(pooling.p.grad.isfinite())


def test_generalised_mean_agrees_with_finite_differences() -> None:
    pooling = GeneralisedMeanPooling(initial=2.5)
    maps = feature_map().abs() + 0.1
    pooling(maps).sum().backward()
    with torch.no_grad():
        above = GeneralisedMeanPooling(initial=2.51)(maps).double().sum()
        below = GeneralisedMeanPooling(initial=2.49)(maps).double().sum()
    assert pooling.p.grad is not None
    assert float(pooling.p.grad) == pytest.approx(float(above - below) / 0.02, rel=1e-2)


@pytest.mark.parametrize(("start", "goal"), [(0.5, 4.0), (12.0, 4.0), (1.0, 4.0)])
def test_p_comes_back_from_beyond_its_bounds(start: float, goal: float) -> None:
    """A plain clamp has no gradient there, and one step too far would be for ever."""
    maps = feature_map().abs() + 0.1
    target = GeneralisedMeanPooling(initial=goal)(maps).detach()
    pooling = GeneralisedMeanPooling()
    pooling.p.data.fill_(start)
    optimizer = torch.optim.Adam(pooling.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        (pooling(maps) - target).square().sum().backward()
        optimizer.step()
    assert float(pooling.p.detach()) == pytest.approx(goal, abs=0.1)


def test_p_stays_near_a_bound_that_it_is_pushed_against() -> None:
    maps = feature_map().abs() + 0.1
    pooling = GeneralisedMeanPooling()
    optimizer = torch.optim.SGD(pooling.parameters(), lr=0.01)
    for _ in range(50):
        optimizer.zero_grad()
        pooling(maps).sum().backward()  # less is better: p would sink below 1 for ever
        optimizer.step()
    once = GeneralisedMeanPooling()
    once(maps).sum().backward()
    assert once.p.grad is not None
    assert float(pooling.p.detach()) == pytest.approx(1 - 0.01 * float(once.p.grad))
    torch.testing.assert_close(pooling(maps), maps.mean((2, 3)), atol=2e-6, rtol=1e-5)


def test_generalised_mean_computes_in_fp32() -> None:
    maps = (feature_map().abs() + 0.1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = GeneralisedMeanPooling(initial=3)(maps)
    expected = GeneralisedMeanPooling(initial=3)(maps.float())
    assert pooled.dtype == torch.bfloat16
    assert torch.equal(pooled, expected.bfloat16())


def test_an_exponent_out_of_bounds_is_refused() -> None:
    for p in (0.5, 11):
        with pytest.raises(ValueError, match=r"not in 1\.\.10"):
            GeneralisedMeanPooling(initial=p)


# -- the text side's adapter ----------------------------------------------------------------------
@pytest.mark.parametrize("autocast", [False, True])
def test_the_adapter_starts_as_the_identity(autocast: bool) -> None:
    text = torch.nn.functional.normalize(torch.randn(7, 16), dim=-1)
    adapter = TextAdapter(16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        adapted = adapter(text)
    assert adapted.dtype == torch.float32
    torch.testing.assert_close(adapted, text, atol=2e-7, rtol=0)


def test_the_adapter_learns_and_keeps_unit_length() -> None:
    torch.manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(64, 4), dim=-1)
    turned = text[:, [1, 0, 3, 2]]
    adapter = TextAdapter(4)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (adapter(text) - turned).square().mean().backward()
        optimizer.step()
    adapted = adapter(text).detach()
    torch.testing.assert_close(adapted, turned, atol=0.05, rtol=0)
    torch.testing.assert_close(adapted.norm(dim=-1), torch.ones(64), atol=1e-5, rtol=0)
