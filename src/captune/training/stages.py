"""The two stages of a training: the head on kept features, then the whole image tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from captune.bank import CaptionBank
from captune.config import Config
from captune.data.dataset import COCOClipDataset
from captune.data.stream_table import StreamTable
from captune.data.table import CaptionTable
from captune.encoders.layers import split_layers
from captune.errors import CaptuneError
from captune.features import FeatureStore
from captune.losses import ContrastiveLoss, Criterion
from captune.models import CLIPModel
from captune.processes import processes
from captune.training.chance import chance_loss
from captune.training.feature_batches import FeatureBatches
from captune.training.loader import Batches, augmentation, crop_side, make_loader
from captune.training.schedule import planned_epochs, rate_factor, warmup_within
from captune.training.stream_bank import StreamBank
from captune.training.stream_loader import StreamLoader

HEAD, WHOLE = 1, 2


@dataclass(frozen=True)
class Stage:
    """Epochs ``[first, last)`` of the run, on batches of one kind.

    ``layers``: the backbone's parameters that may train, from input to output.
    """

    number: int
    first: int
    last: int
    train_loader: Any
    val_loader: Batches
    layers: list[list[nn.Parameter]]
    config: Config

    @property
    def what(self) -> str:
        """In words."""
        if self.number == HEAD:
            return "the head, on features kept from the frozen backbone"
        if self.config.frozen_layers:
            return f"the image tower but for its first layers ({self.config.frozen_layers:.0%})"
        return "the whole image tower"

    @property
    def steps(self) -> int:
        """Of all its epochs."""
        return int(self.train_loader.steps) * (self.last - self.first)

    def is_told(self, epoch: int) -> bool:
        """Whether ``epoch`` (from 1) gets a line: those of stage 1 pass in seconds."""
        return self.number == WHOLE or epoch % 5 == 0 or epoch == self.last

    @property
    def learning_rate(self) -> float:
        """The peak rate; of the backbone's last layer in stage 2."""
        config = self.config
        return config.head_learning_rate if self.number == HEAD else config.learning_rate

    def rate_at_start(self, epoch: int) -> float:
        """The rate of the first step of ``epoch`` (from 0); a resumed epoch has the same."""
        warmup = warmup_within(self.config.warmup_steps, self.steps)
        step = (epoch - self.first) * self.train_loader.steps
        return self.learning_rate * rate_factor(step, warmup, self.steps)

    @property
    def chance_loss(self) -> float:
        """The loss of embeddings that carry no information; infinite where that is not known."""
        config = self.config
        images = config.head_batch_size if self.number == HEAD else config.batch_size
        return chance_loss(config, self.train_loader.table, images)

    def groups(self, model: CLIPModel, criterion: Criterion) -> list[dict[str, Any]]:
        """AdamW's parameter groups, from the input to the output, the loss's own last.

        Layer-wise rates as in Clark et al. 2020 (ELECTRA) and Bao et al. 2022 (BEiT): layer ``l``
        of ``L`` learns at ``learning_rate * layer_decay ** (L - 1 - l)``.
        """
        config = self.config
        head = [*_parameters(model.head), *_parameters(model.text_adapter)]
        own = list(criterion.parameters()) if isinstance(criterion, nn.Module) else []
        if self.number == HEAD:  # what pools comes before the features that are kept
            return [{"params": head}, {"params": own, "weight_decay": 0.0}]
        groups: list[dict[str, Any]] = [
            {"params": layer, "lr": config.learning_rate * config.layer_decay**above}
            for above, layer in enumerate(reversed(self.layers))
        ][::-1]
        rate = config.learning_rate * config.head_rate_factor
        # A temperature, a bias, an exponent: decay would draw them to where they mean nothing.
        scalars = [p for p in _parameters(model.pooling) if p.dim() == 0] + own
        head += [p for p in _parameters(model.pooling) if p.dim() > 0]
        groups.append({"params": head, "lr": rate})
        return [*groups, {"params": scalars, "lr": rate, "weight_decay": 0.0}]

    def prepare(self, criterion: Criterion | None, epoch: int) -> None:
        """What changes with the epoch: which layers train (gradual unfreezing, Howard and Ruder
        2018), and hard negatives and the queue, which come in after a stage's first epoch: until
        then what is hard is chance, and embeddings age within a few steps.

        ``criterion``: None leaves a loss of the user's own as it was handed in.
        """
        if isinstance(criterion, ContrastiveLoss):
            criterion.hard_negatives = self.config.hard_negatives if epoch > self.first else 0.0
            criterion.queue_rests = epoch == self.first
        if self.number == HEAD:
            return
        first_open = self._first_open(epoch)
        for place, layer in enumerate(self.layers):
            for parameter in layer:
                parameter.requires_grad_(place >= first_open)

    def _first_open(self, epoch: int) -> int:
        """The place of the first layer that trains in ``epoch`` of stage 2."""
        wanted = self.config.unfreeze_epochs
        share = min(1.0, (epoch - self.first + 1) / wanted) if wanted else 1.0
        return round(len(self.layers) * (1 - share))

    def steps_alike(self, epoch: int) -> int:
        """Steps of stage 2 from the start of ``epoch`` on that train the same layers on crops of
        the same side; an early stop may make them fewer."""
        side = self.train_loader.side
        forms = [(side(e), self._first_open(e)) for e in range(epoch, self.last)]
        alike = sum(1 for _ in takewhile(lambda form: form == forms[0], forms))
        return alike * int(self.train_loader.steps)


class Plan:
    """The stages of a run, each made when it is entered.

    Args:
        model: on its device, as it starts.
        train: images with captions, or a stream of them, which has no stage 1.
        val: images with captions.
        config: both stages' values.
    """

    def __init__(
        self, model: CLIPModel, train: CaptionTable | StreamTable, val: CaptionTable, config: Config
    ) -> None:
        self.model = model
        self.train = train
        self.val = val
        self.config = config
        self.banks = [self._bank(table) for table in (train, val)]
        self._stages: dict[int, Stage] = {}
        frozen, self.layers = split_layers(model.image_encoder, config.frozen_layers)
        for parameter in (p for layer in frozen for p in layer):
            parameter.requires_grad_(False)  # no gradient need reach them

    def _bank(self, table: CaptionTable | StreamTable) -> CaptionBank | StreamBank:
        encoder, precision = self.model.text_encoder, self.config.precision
        if isinstance(table, StreamTable):
            return StreamBank.build(table, encoder, precision=precision)
        return CaptionBank.build(table.captions["caption"], encoder, precision=precision)

    def __len__(self) -> int:
        return len(self._numbers())

    def _numbers(self) -> list[int]:
        config = self.config
        return [HEAD] * bool(config.head_epochs) + [WHOLE] * (not config.freeze_backbone)

    def stage_of(self, epoch: int) -> Stage:
        """The stage in which ``epoch`` (from 0) lies."""
        config = self.config
        number = HEAD if epoch < config.head_epochs else WHOLE
        if config.freeze_backbone:
            number = HEAD
        if number not in self._stages:
            self._stages[number] = self._make(number)
        return self._stages[number]

    def _make(self, number: int) -> Stage:
        config = self.config
        make: Callable[[int], Any] = self._features if number == HEAD else self._photos
        return Stage(
            number,
            first=0 if number == HEAD else config.head_epochs,
            last=config.head_epochs if number == HEAD else planned_epochs(config),
            train_loader=make(0),
            val_loader=make(1),
            layers=self.layers,
            config=config,
        )

    def _features(self, place: int) -> FeatureBatches:
        """Batches of the training (0) or validation (1) split from kept features."""
        (table, bank), training = self._listed(place), place == 0
        store = self._store(table, mirrored=training and self.config.flips)
        return FeatureBatches(store, table, bank, self.config, shuffle=training)

    def _listed(self, place: int) -> tuple[CaptionTable, CaptionBank]:
        """The training (0) or validation (1) split, where it is no stream, and its bank."""
        table, bank = (self.train, self.val)[place], self.banks[place]
        assert isinstance(table, CaptionTable) and isinstance(bank, CaptionBank)
        return table, bank

    def _photos(self, place: int) -> Batches | StreamLoader:
        """Batches of the training (0) or validation (1) split from the photos."""
        config, training = self.config, place == 0
        if training:
            self._check_sides()
        if training and isinstance(self.train, StreamTable):
            return self._streamed(self.train)
        table, bank = self._listed(place)
        drawn = augmentation(config) if training else None
        dataset = COCOClipDataset(
            table=table,
            image_size=self.model.preprocess.image_size,
            augment=drawn or False,
            seed=config.seed,
        )
        return make_loader(dataset, bank, config, shuffle=training)

    def _streamed(self, table: StreamTable) -> StreamLoader:
        bank = self.banks[0]
        assert isinstance(bank, StreamBank)
        size = self.model.preprocess.image_size
        return StreamLoader(table, bank, self.config, image_size=size, here=processes())

    @torch.no_grad()
    def _check_sides(self) -> None:
        """Try every crop side at once: a ViT with fixed positions takes one side only.

        Raises:
            CaptuneError: the image tower refuses a side that the config asks for.
        """
        config, model = self.config, self.model
        own = model.preprocess.image_size
        epochs = range(config.head_epochs, planned_epochs(config))
        for side in sorted({crop_side(epoch, config, own) for epoch in epochs} - {own}):
            was_training = model.training
            try:
                model.eval().pooled_features(torch.zeros(1, 3, side, side, device=model.device))
            except (ValueError, RuntimeError) as error:
                raise CaptuneError(
                    f"the image tower takes {own}-pixel photos only, not {side}: leave out "
                    f"train_size_share and progressive_resizing ({str(error).splitlines()[0]})"
                ) from None
            finally:
                model.train(was_training)

    def _store(self, table: CaptionTable, *, mirrored: bool) -> FeatureStore:
        return FeatureStore.build(
            table,
            self.model,
            mirrored=mirrored,
            precision=self.config.precision,
            num_workers=self.config.num_workers,
        )

    def feature_statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation ``(C,)`` of the untrained backbone's features of the training images;
        None where the model does not standardise."""
        if not self.model.architecture.standardise_features:
            return None
        return self._store(self._listed(0)[0], mirrored=False).mean_and_deviation()

    def steps_before(self, epoch: int) -> int:
        """Steps of all epochs before ``epoch`` (from 0), for the logger's axis."""
        config = self.config
        head = min(epoch, config.head_epochs) * max(1, len(self.train) // config.head_batch_size)
        return head + max(0, epoch - config.head_epochs) * max(
            1, len(self.train) // config.batch_size
        )


def _parameters(part: nn.Module | None) -> list[nn.Parameter]:
    return list(part.parameters()) if part is not None else []
