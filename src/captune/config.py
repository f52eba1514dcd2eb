"""The configuration of a run: one flat, frozen, typed object that reads like a mapping."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from captune.errors import CaptuneError, nearest
from captune.recipes import DEFAULT_RECIPE, RECIPES, TOWERS

LEARNT_TEMPERATURES = (0.01, 0.5)  # what a loss keeps a learnt temperature between
SOFTMAX_ONLY = ("hard_negatives", "soft_targets", "image_queue")


def _key(default: Any, help: str, **limits: Any) -> Any:
    """A field with its help and limits: ``low``, ``high``, ``above``, ``below``, ``choices``."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Config(Mapping[str, Any]):
    """Everything that decides a run. See :data:`DEFAULT_CONFIG`.

    Frozen: ``config.replace(use_batch_norm=True)`` gives a changed copy. ``dict(config)`` with
    changes is accepted (and validated) wherever a config is.

    Raises:
        CaptuneError: a value of the wrong type or out of range.
    """

    recipe: str = _key(DEFAULT_RECIPE, "how it is trained", choices=tuple(RECIPES))
    towers: str = _key("clip-resnet50", "which towers are aligned", choices=tuple(TOWERS))
    image_encoder: str = _key("", "hub id, folder or package.module:factory; '' = the towers' own")
    text_encoder: str = _key("", "hub id, folder or package.module:factory; '' = the towers' own")

    # The model.
    use_batch_norm: bool = _key(False, "experimental: BatchNorm in the projection head (_bn)")
    use_attention_pooling: bool = _key(False, "experimental: attention pooling (_attn)")
    generalised_pooling: bool = _key(False, "generalised-mean pooling with a learnt exponent")
    hidden_dim: int = _key(1024, "width of the projection head's hidden layer", low=1)
    dropout: float = _key(0.7, "share of the head's hidden units left out", low=0.0, below=1.0)
    feature_dropout: float = _key(0.3, "share of the features left out", low=0.0, below=1.0)
    standardise_features: bool = _key(False, "pooled features to mean 0 and deviation 1")
    text_adapter: bool = _key(False, "a linear layer after the text tower, first the identity")
    image_size: int = _key(0, "side of the input in pixels; 0 = the image tower's own", low=0)

    # The loss.
    criterion: str = _key("", "package.module:factory of a loss; '' = the one of `loss`")
    loss: str = _key("infonce", "softmax or sigmoid over pairs", choices=("infonce", "siglip"))
    temperature: float = _key(0.07, "the loss's temperature, or its first value", above=0.0)
    learn_temperature: bool = _key(
        True, "train the temperature too, kept between {} and {}".format(*LEARNT_TEMPERATURES)
    )
    captions_per_image: int = _key(0, "captions of an image in a step; 0 = all", low=0)
    bank_negatives: int = _key(2048, "random captions of all as further negatives a step", low=0)
    image_queue: int = _key(0, "embeddings of recent images as further negatives", low=0)
    duplicate_threshold: float = _key(
        0.9, "captions as alike as this (cosine) are no negatives; 0 = all are", low=0.0, high=1.0
    )
    duplicates: str = _key(
        "ignore", "what such captions are instead", choices=("ignore", "positive")
    )
    soft_targets: float = _key(
        0.0, "share of the target spread over captions by their likeness", low=0.0, below=1.0
    )
    hard_negatives: float = _key(
        0.0, "weight of hard negatives after the warm-up (exponent); 0 = alike", low=0.0
    )

    # Stage 1: the head alone, on kept features.
    head_epochs: int = _key(30, "passes of stage 1; 0 = no stage 1", low=0)
    head_batch_size: int = _key(128, "images a step of stage 1", low=2)
    head_learning_rate: float = _key(1e-3, "AdamW's peak rate in stage 1", above=0.0)
    head_mixup: float = _key(
        1.0, "mixup of features in stage 1: alpha of its Beta distribution; 0 = none", low=0.0
    )
    freeze_backbone: bool = _key(False, "stop after stage 1")

    # Stage 2: the whole image tower.
    batch_size: int = _key(128, "images a step", low=2)
    num_epochs: int = _key(10, "passes over the training images", low=1)
    learning_rate: float = _key(1e-4, "AdamW's peak rate", above=0.0)
    head_rate_factor: float = _key(3.0, "the head's rate, in learning rates", above=0.0)
    layer_decay: float = _key(
        0.9, "rate of each layer of the backbone, in that of the next", above=0.0, high=1.0
    )
    frozen_layers: float = _key(
        0.0, "share of the backbone's layers, from the input, that stay", low=0.0, below=1.0
    )
    mixup: float = _key(
        1.0, "mixup of features in stage 2: alpha of its Beta distribution; 0 = none", low=0.0
    )
    mix_photos: bool = _key(False, "stage 2 mixes photos in place of their features")
    unfreeze_epochs: int = _key(
        0, "epochs in which the backbone comes in from the top; 0 = at once", low=0
    )
    freeze_batch_norm: bool = _key(True, "the backbone's BatchNorm keeps its statistics")
    weight_decay: float = _key(0.01, "AdamW's decoupled weight decay", low=0.0)
    warmup_steps: int = _key(500, "linear warm-up; never more than a tenth of all steps", low=0)
    max_grad_norm: float = _key(1.0, "gradients are clipped to this norm", above=0.0)
    ema_decay: float = _key(
        0.999,
        "moving average of the weights that is validated and kept; 0 = none",
        low=0.0,
        below=1.0,
    )
    soup: int = _key(0, "average the weights of this many best epochs at the end", low=0)
    keep_epochs: bool = _key(
        False, "keep the weights of every epoch of stage 2, to compare or blend"
    )
    patience: int = _key(3, "stop after this many epochs without a better rsum; 0 = never", low=0)

    # The photos.
    augment: bool = _key(True, "crops, flips and what else varies training photos; false = none")
    flip: bool = _key(
        True, "mirror training photos half of the time, unless a caption says left or right"
    )
    crop_scale: float = _key(0.5, "least share of the picture in a crop", above=0.0, high=1.0)
    colour_jitter: float = _key(0.0, "brightness, contrast, saturation vary by this", low=0.0)
    rand_augment: int = _key(0, "RandAugment's magnitude, two operations; 0 = none", low=0, high=10)
    train_size_share: float = _key(
        1.0, "side of the training crops, in that of image_size", above=0.0, high=2.0
    )
    progressive_resizing: bool = _key(False, "training crops grow from half to full size")
    shuffle_buffer: int = _key(
        1000, "samples of a stream that each loader worker shuffles among each other", low=1
    )
    train_split: str = _key("train", "split to train on")
    val_split: str = _key("", "split to validate and select on; '' = karpathy-val or val")

    # The machine.
    precision: str = _key("auto", "arithmetic", choices=("auto", "fp32", "bf16", "fp16"))
    device: str = _key("auto", "where to compute", choices=("auto", "cpu"))
    chunk_size: int = _key(
        0, "images that go through the backbone at once in stage 2; 0 = the whole batch", low=0
    )
    compile_backbone: str = _key(
        "auto",
        "torch.compile in stage 2; auto = on CUDA, where steps timed with it are faster",
        choices=("auto", "on", "off"),
    )
    num_workers: int = _key(
        -1, "processes that decode images; 0: this one; -1 = by the machine", low=-1
    )
    save_steps: int = _key(
        200, "steps between resume states inside an epoch; more where saving is slow", low=1
    )
    log_with: str = _key("tensorboard", "logger", choices=("tensorboard", "wandb", "none"))
    seed: int = _key(0, "seed of every draw", low=0, high=2**31 - 1)

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = _checked(spec, getattr(self, spec.name))
            object.__setattr__(self, spec.name, value)
        if self.freeze_backbone and self.head_epochs == 0:
            raise CaptuneError(
                "freeze_backbone stops after stage 1, and head_epochs=0 leaves it out"
            )
        low, high = LEARNT_TEMPERATURES
        own_loss = bool(self.criterion)
        if self.learn_temperature and not own_loss and not low <= self.temperature <= high:
            raise CaptuneError(
                f"config temperature must be between {low} and {high} where it is learnt, found "
                f"{self.temperature}: or take learn_temperature=false"
            )
        if self.image_queue and (self.mixup or self.head_mixup):
            raise CaptuneError(
                "image_queue keeps embeddings of whole images, not of mixed ones: take "
                "mixup=0 head_mixup=0 with it"
            )
        if self.mix_photos and not self.mixup:
            raise CaptuneError("mix_photos says what mixup mixes, and mixup=0 mixes nothing")
        if self.soup == 1:
            raise CaptuneError("soup=1 is the best epoch itself: take 2 or more, or 0")
        if self.soup and self.freeze_backbone:
            raise CaptuneError("a soup is of epochs of stage 2, and freeze_backbone leaves it out")
        idle = [key for key in SOFTMAX_ONLY if getattr(self, key)]
        if self.loss == "siglip" and idle and not own_loss:
            raise CaptuneError(f"loss=siglip has no {', '.join(idle)}: take 0, or loss=infonce")
        if self.use_attention_pooling and self.generalised_pooling:
            raise CaptuneError(
                "use_attention_pooling and generalised_pooling are two ways to pool: choose one"
            )

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
        """A copy with ``changes``, validated.

        A change of recipe brings the new recipe's values with it; what differed from the old
        recipe's stays.
        """
        own = {**self.differences(), "recipe": self.recipe, "towers": self.towers}
        return Config.from_mapping({**own, **changes})

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Config:
        """A config from any mapping; keys left out have the recipe's value, else the towers',
        else the default.

        Raises:
            CaptuneError: an unknown key (the nearest right name is given) or a bad value.
        """
        if isinstance(values, Config):
            return values
        for key in values:
            if key not in FIELDS:
                raise CaptuneError(f"unknown config key {key!r}{nearest(str(key), FIELDS)}")
        recipe = RECIPES.get(values.get("recipe", DEFAULT_RECIPE))
        towers = TOWERS.get(values.get("towers", FIELDS["towers"].default))
        named = [choice.values for choice in (towers, recipe) if choice]
        return cls(**{key: value for part in (*named, values) for key, value in part.items()})

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
    def flips(self) -> bool:
        """Whether training photos are mirrored: ``augment=false`` switches that off, too."""
        return self.augment and self.flip

    @property
    def clip_normalisation(self) -> bool:
        """Whether CLIP's normalisation replaces the backbone's own."""
        return TOWERS[self.towers].clip_normalisation and not self.image_encoder

    def differences(self) -> dict[str, Any]:
        """The values that differ from the recipe's (recipe and towers themselves left out)."""
        base = Config.from_mapping({"recipe": self.recipe, "towers": self.towers})
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
        ("below", operator.ge, "below"),
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

FIELDS: dict[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(Config)}
DEFAULT_CONFIG = Config()
