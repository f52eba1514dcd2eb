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


@pytest.mark.parametrize("towers", sorted(TOWERS))
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_values_of_every_recipe_and_towers_are_valid_and_not_the_defaults_again(
    recipe: str, towers: str
) -> None:
    config = Config.from_mapping({"recipe": recipe, "towers": towers})
    assert config.differences() == {}
    stated = [RECIPES[recipe].values, TOWERS[towers].values]
    assert set().union(*stated) <= set(FIELDS)
    for key, value in RECIPES[recipe].values.items():
        without = {
            FIELDS[key].default,
            *(t.values[key] for t in TOWERS.values() if key in t.values),
        }
        assert config[key] == value and without != {value}, key
    for key, value in TOWERS[towers].values.items():
        assert config[key] == RECIPES[recipe].values.get(key, value)
        assert FIELDS[key].default != value, key


def test_the_best_recipe_is_the_defaults() -> None:
    assert DEFAULT_CONFIG.recipe == "best" and RECIPES["best"].values == {}
    assert Config.from_mapping({}) == Config.from_mapping({"recipe": "best"}) == DEFAULT_CONFIG
    assert DEFAULT_CONFIG.learn_temperature and DEFAULT_CONFIG.head_epochs > 0


def test_best_adapter_differs_from_best_by_the_adapter_alone() -> None:
    adapter = Config.from_mapping({"recipe": "best-adapter"})
    differing = {key for key in FIELDS if adapter[key] != DEFAULT_CONFIG[key]}
    assert differing == {"recipe", "text_adapter"} and adapter.text_adapter


def test_the_plain_recipe_switches_everything_off() -> None:
    """In-batch InfoNCE over one caption an image, the whole tower at one rate, last weights."""
    expected = {
        "use_batch_norm": False,
        "use_attention_pooling": False,
        "generalised_pooling": False,
        "image_size": 0,
        "hidden_dim": 1024,
        "dropout": 0.0,
        "standardise_features": False,
        "text_adapter": False,
        "criterion": "",
        "loss": "infonce",
        "learn_temperature": False,
        "captions_per_image": 1,
        "bank_negatives": 0,
        "image_queue": 0,
        "duplicate_threshold": 0.0,
        "soft_targets": 0.0,
        "hard_negatives": 0.0,
        "head_epochs": 0,
        "head_mixup": 0.0,
        "mixup": 0.0,
        "freeze_backbone": False,
        "learning_rate": 1e-4,
        "head_rate_factor": 1.0,
        "layer_decay": 1.0,
        "frozen_layers": 0.0,
        "train_size_share": 1.0,
        "unfreeze_epochs": 0,
        "freeze_batch_norm": False,
        "ema_decay": 0.0,
        "soup": 0,
        "patience": 0,
        "augment": False,
        "progressive_resizing": False,
    }
    for towers in ("clip-resnet50", "minilm-lite0"):
        plain = Config.from_mapping({"recipe": "plain", "towers": towers})
        assert {key: plain[key] for key in expected} == expected


def test_a_change_of_recipe_brings_its_values_and_keeps_ones_own() -> None:
    plain = Config.from_mapping({"recipe": "plain"})
    assert DEFAULT_CONFIG.replace(recipe="plain") == plain
    assert plain.replace(recipe="best") == DEFAULT_CONFIG
    own = DEFAULT_CONFIG.replace(batch_size=64, dropout=0.25)
    assert own.replace(recipe="plain") == plain.replace(batch_size=64, dropout=0.25)
    assert own.replace(recipe="plain").replace(recipe="best") == own
    assert DEFAULT_CONFIG.replace(recipe="plain", head_epochs=3).head_epochs == 3


def test_towers_bring_values_of_their_own_above_the_recipes() -> None:
    own = DEFAULT_CONFIG.replace(towers="clip-vit-b32")
    assert (own.head_epochs, own.standardise_features, own.dropout) == (0, False, 0.0)
    assert own.replace(towers="clip-resnet50") == DEFAULT_CONFIG
    assert own.replace(head_epochs=2).head_epochs == 2  # what the user says is above both
    assert own.replace(recipe="plain").head_epochs == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"freeze_backbone": True, "head_epochs": 0}, "head_epochs=0 leaves it out"),
        ({"freeze_backbone": True, "towers": "clip-vit-b32"}, "head_epochs=0 leaves it out"),
        ({"freeze_backbone": True, "recipe": "plain"}, "head_epochs=0 leaves it out"),
        ({"use_attention_pooling": True, "generalised_pooling": True}, "choose one"),
        ({"mix_photos": True, "mixup": 0.0}, "mixup=0 mixes nothing"),
        ({"soup": 1}, "soup=1 is the best epoch itself"),
        ({"soup": 3, "freeze_backbone": True}, "freeze_backbone leaves it out"),
        ({"loss": "siglip", "temperature": 0.1, "soft_targets": 0.2}, "siglip has no soft_targets"),
        ({"loss": "siglip", "temperature": 0.1, "hard_negatives": 5.0}, "no hard_negatives"),
        ({"temperature": 0.005}, "between 0.01 and 0.5"),
        ({"temperature": 0.6}, "between 0.01 and 0.5"),
    ],
)
def test_values_that_exclude_one_another_are_refused(
    changes: dict[str, object], words: str
) -> None:
    with pytest.raises(CaptuneError, match=words):
        DEFAULT_CONFIG.replace(**changes)


@pytest.mark.parametrize("temperature", [0.005, 0.01, 0.5, 5.0])
def test_any_temperature_that_is_not_learnt_or_is_a_losses_own(temperature: float) -> None:
    plain = Config.from_mapping({"recipe": "plain", "temperature": temperature})
    own = DEFAULT_CONFIG.replace(temperature=temperature, criterion="losses:make")
    assert plain.temperature == own.temperature == temperature
    if 0.01 <= temperature <= 0.5:
        assert DEFAULT_CONFIG.replace(temperature=temperature).temperature == temperature


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


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("augment", [True, False])
def test_photos_are_mirrored_where_neither_switch_is_off(augment: bool, flip: bool) -> None:
    config = DEFAULT_CONFIG.replace(augment=augment, flip=flip)
    assert config.flips == (augment and flip)
    assert DEFAULT_CONFIG.flips and not DEFAULT_CONFIG.replace(recipe="plain").flips


def test_suffixes_of_the_flags() -> None:
    suffixes = [
        DEFAULT_CONFIG.replace(use_batch_norm=norm, use_attention_pooling=attention).suffix
        for norm in (False, True)
        for attention in (False, True)
    ]
    assert suffixes == ["", "_attn", "_bn", "_bn_attn"]


def test_first_line_names_recipe_towers_and_what_differs() -> None:
    line = DEFAULT_CONFIG.replace(towers="minilm-lite0", num_epochs=2).describe()
    assert line == "recipe best · towers minilm-lite0 · num_epochs=2"


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


@pytest.mark.parametrize("key", ["mixup", "head_mixup"])
def test_a_queue_of_images_refuses_mixed_ones(key: str) -> None:
    values = {"recipe": "plain", "image_queue": 64}
    assert Config.from_mapping(values).image_queue == 64
    with pytest.raises(CaptuneError, match="image_queue keeps embeddings of whole images"):
        Config.from_mapping({**values, key: 0.5})


def test_a_recipe_wins_over_what_suits_the_towers_and_the_user_over_both() -> None:
    lite = {"towers": "minilm-lite0"}
    assert Config.from_mapping(lite).learning_rate == 5e-4
    assert Config.from_mapping({**lite, "recipe": "plain"}).learning_rate == 1e-4
    assert Config.from_mapping({**lite, "learning_rate": 2e-4}).learning_rate == 2e-4
    assert Config.from_mapping(lite).replace(towers="clip-resnet50").learning_rate == 1e-4
