"""The weights between two models: exact at the ends, a slow loop's in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from captune.config import Config
from captune.errors import CaptuneError
from captune.models import CLIPModel
from captune.training.blending import blend_weights, even_alphas, refuse_unlike, seen_by_any
from captune.training.run import Provenance, Run

State = dict[str, torch.Tensor]


def state(seed: int) -> State:
    """Odd values and a count; a negative zero and an infinity, which 0 * x would not keep."""
    torch.manual_seed(seed)
    weight = torch.randn(5, 7) * 10.0 ** torch.randint(-6, 6, (5, 7))
    weight[0, :2] = torch.tensor([-0.0, float("inf")])
    return {
        "weight": weight,
        "half": torch.randn(4).bfloat16(),
        "logit_scale": torch.tensor(10.0 + seed),
        "num_batches_tracked": torch.tensor(100 + seed),
    }


def bits(tensors: State) -> dict[str, bytes]:
    return {k: v.reshape(-1).view(torch.uint8).numpy().tobytes() for k, v in tensors.items()}


def test_the_ends_are_the_two_models_bit_for_bit() -> None:
    first, second = state(1), state(2)
    assert bits(blend_weights(first, second, 0.0)) == bits(first)
    assert bits(blend_weights(first, second, 1.0)) == bits(second)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_the_middle_is_what_a_slow_loop_makes(alpha: float) -> None:
    first, second = state(1), state(2)
    blended = blend_weights(first, second, alpha)
    assert blended.keys() == first.keys()
    for key in ("weight", "half", "logit_scale"):
        pairs = zip(first[key].flatten().tolist(), second[key].flatten().tolist(), strict=True)
        slow = [(1 - alpha) * one + alpha * other for one, other in pairs]
        expected = torch.tensor(slow, dtype=torch.float64).to(first[key].dtype)
        assert torch.equal(blended[key].flatten(), expected), key
        assert blended[key].dtype == first[key].dtype
    assert int(blended["num_batches_tracked"]) == 102


def test_alphas_are_even_and_hold_both_ends() -> None:
    assert even_alphas(11) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert even_alphas(2) == [0.0, 1.0]
    with pytest.raises(CaptuneError, match=r"steps=1: at least 2"):
        even_alphas(1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_batch_norm": True}, "the shapes of weights"),
        ({"hidden_dim": 64}, "the shapes of weights"),
        ({"text_adapter": True}, "the shapes of weights"),
        ({"image_size": 64}, "preprocessing"),
    ],
)
def test_models_whose_weights_mean_other_things_are_refused(
    config: Config, changes: dict[str, Any], words: str
) -> None:
    one = CLIPModel.from_config(config)
    other = CLIPModel.from_config(config.replace(**changes))
    with pytest.raises(CaptuneError, match=f"runs/a and runs/b cannot be blended.*{words}"):
        refuse_unlike(one, other, ["runs/a", "runs/b"])


def test_other_towers_are_refused(config: Config, tiny_clip: Path) -> None:
    one = CLIPModel.from_config(config)
    both = CLIPModel.from_config(
        config.replace(image_encoder=str(tiny_clip), text_encoder=str(tiny_clip))
    )
    with pytest.raises(CaptuneError, match=r"the text tower.*the image tower"):
        refuse_unlike(one, both, ["a", "b"])


def test_what_only_training_needs_may_differ(config: Config) -> None:
    one = CLIPModel.from_config(config)
    other = CLIPModel.from_config(config.replace(dropout=0.5, feature_dropout=0.1, seed=7))
    refuse_unlike(one, other, ["a", "b"])
    expect_a_blend(one, other)


def expect_a_blend(one: CLIPModel, other: CLIPModel) -> None:
    """The weights between the two fit, and are a model."""
    key = next(name for name, _ in other.named_parameters())
    middle = (one.state_dict()[key] + other.state_dict()[key]) / 2
    other.load_state_dict(blend_weights(one.state_dict(), other.state_dict(), 0.5))
    torch.testing.assert_close(other.state_dict()[key], middle)
    assert float(other.encode_image(torch.zeros(1, 3, 32, 32)).norm()) == pytest.approx(1)


def test_a_clip_and_what_became_of_it_may_be_blended(tiny_clip: Path, tmp_path: Path) -> None:
    zero_shot = CLIPModel.zero_shot(str(tiny_clip))
    tuned = CLIPModel(str(tiny_clip), image_encoder=str(tiny_clip))
    with torch.no_grad():
        next(tuned.parameters()).add_(1)  # as if trained
    tuned.save_pretrained(tmp_path)
    reopened = CLIPModel.from_pretrained(tmp_path)
    refuse_unlike(zero_shot, reopened, ["a", "b"])
    expect_a_blend(zero_shot, reopened)


def test_images_that_either_run_trained_on_are_trained_ones(config: Config, tmp_path: Path) -> None:
    one, other = (Run(tmp_path / name, config, Provenance()) for name in "ab")
    one.write_seen(["1", "2"], ["3", "4"])
    other.write_seen(["3", "5"], ["6"])
    trained, selected = seen_by_any([one, other], ["2", "6", "7"])
    assert (trained, selected) == (["1", "2", "3", "5"], ["4", "6", "7"])
    one.write_seen(trained, selected)
    assert one.seen() == {"trained": trained, "selected": selected}


def test_a_blend_is_not_trained(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Run(folder, config, Provenance()).write_identity()
    (folder / "blend.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CaptuneError, match=r"holds a blend.*--out .*run-2"):
        Run.claim(folder, config, Provenance())
