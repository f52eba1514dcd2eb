"""One flat, frozen, typed object that reads like a mapping and refuses what it does not know."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captune.config import DEFAULT_CONFIG, FIELDS, Config, parse_value
from captune.errors import CaptuneError
from captune.recipes import RECIPES, TOWERS


def test_defaults_are_those_of_the_mission() -> None:
    expected = {
        "batch_size": 128,
        "num_epochs": 10,
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "temperature": 0.07,
        "warmup_steps": 500,
        "max_grad_norm": 1.0,
        "use_batch_norm": False,
        "use_attention_pooling": False,
        "towers": "clip-resnet50",
    }
    assert {key: DEFAULT_CONFIG[key] for key in expected} == expected


def test_plain_recipe_changes_nothing() -> None:
    assert RECIPES["plain"].values == {}
    assert Config.from_mapping({"recipe": "plain"}) == DEFAULT_CONFIG


def test_dict_with_changes_is_accepted() -> None:
    values = dict(DEFAULT_CONFIG)
    values["use_batch_norm"] = True
    assert Config.from_mapping(values) == DEFAULT_CONFIG.replace(use_batch_norm=True)


def test_reads_like_a_mapping() -> None:
    assert list(DEFAULT_CONFIG) == list(FIELDS)
    assert len(DEFAULT_CONFIG) == len(FIELDS)
    assert {**DEFAULT_CONFIG}["seed"] == 0
    with pytest.raises(KeyError, match="batch_size"):
        DEFAULT_CONFIG["bach_size"]


def test_assignment_names_the_replace_line() -> None:
    with pytest.raises(CaptuneError, match=r"config = config\.replace\(use_batch_norm=True\)"):
        DEFAULT_CONFIG["use_batch_norm"] = True
    with pytest.raises(CaptuneError, match=r"config = config\.replace\(batch_size=64\)"):
        DEFAULT_CONFIG.batch_size = 64  # type: ignore[misc]
    assert DEFAULT_CONFIG.batch_size == 128


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bach_size": 3}, "did you mean 'batch_size'"),
        ({"batch_size": 1}, "at least 2"),
        ({"batch_size": "64"}, "wants int, found str"),
        ({"batch_size": True}, "wants int, found bool"),
        ({"use_batch_norm": 1}, "wants bool, found int"),
        ({"temperature": 0.0}, "above 0"),
        ({"learning_rate": float("nan")}, "finite"),
        ({"learning_rate": float("inf")}, "finite"),
        ({"recipe": "plane"}, "did you mean 'plain'"),
        ({"towers": "clip-resnet5"}, "did you mean 'clip-resnet50'"),
        ({"seed": -1}, "at least 0"),
        ({"num_epochs": None}, "wants int, found NoneType"),
    ],
)
def test_wrong_values_are_refused_with_the_way_out(changes: dict[str, object], words: str) -> None:
    with pytest.raises(CaptuneError, match=words):
        DEFAULT_CONFIG.replace(**changes)


def test_an_int_stands_for_a_float() -> None:
    config = DEFAULT_CONFIG.replace(learning_rate=1)
    assert config.learning_rate == 1.0 and type(config.learning_rate) is float


@given(
    batch=st.integers(2, 10**6),
    rate=st.floats(1e-12, 10, allow_nan=False),
    norm=st.booleans(),
    towers=st.sampled_from(sorted(TOWERS)),
    image=st.text(),
)
def test_json_round_trip(batch: int, rate: float, norm: bool, towers: str, image: str) -> None:
    config = DEFAULT_CONFIG.replace(
        batch_size=batch,
        learning_rate=rate,
        use_batch_norm=norm,
        towers=towers,
        image_encoder=image,
    )
    assert Config.from_json(config.to_json()) == config


def test_suffixes_of_the_flags() -> None:
    suffixes = [
        DEFAULT_CONFIG.replace(use_batch_norm=norm, use_attention_pooling=attention).suffix
        for norm in (False, True)
        for attention in (False, True)
    ]
    assert suffixes == ["", "_attn", "_bn", "_bn_attn"]


def test_first_line_names_recipe_towers_and_what_differs() -> None:
    line = DEFAULT_CONFIG.replace(towers="minilm-lite0", num_epochs=2).describe()
    assert line == "recipe plain · towers minilm-lite0 · num_epochs=2"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("batch_size", "64", 64),
        ("learning_rate", "3e-4", 3e-4),
        ("use_batch_norm", "true", True),
        ("use_batch_norm", "0", False),
        ("towers", "minilm-lite0", "minilm-lite0"),
    ],
)
def test_words_become_values(key: str, text: str, value: object) -> None:
    assert parse_value(key, text) == value


@pytest.mark.parametrize(("key", "text"), [("batch_size", "6.5"), ("use_batch_norm", "maybe")])
def test_words_of_the_wrong_type_are_refused(key: str, text: str) -> None:
    with pytest.raises(CaptuneError, match=f"config {key} wants"):
        parse_value(key, text)
