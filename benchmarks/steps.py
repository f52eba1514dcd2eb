"""ResNet-50 steps against a plain loop: python benchmarks/steps.py DATA [--steps N].

The plain loop: fp32, NCHW, photos decoded whole and resized by Pillow, one caption for each, AdamW
as it comes, the loss read at every step. captune's: `train_epoch` with the recipe `plain`, which
trains the same thing (the same photos, captions, order, crops and rate) in the machine's precision.
Both start from the same random weights and decode in the process itself, so that the processor's
time is all of it. Captions come from a bank in either, of random vectors. Ways take turns; a ratio
is of two turns of one repeat; each turn goes on from the weights of the one before.

Writes benchmarks/results/steps.json and prints it.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import heading, in_turns, keep, summary
from standins import RandomText
from torch import Tensor
from transformers import ResNetConfig, ResNetModel

from captune import CLIPModel, InfoNCELoss, open_source
from captune.bank import CaptionBank
from captune.config import Config
from captune.data.dataset import COCOClipDataset, draw_caption, draw_generator
from captune.data.pixels import load_image, resize_and_crop
from captune.data.table import CaptionTable
from captune.encoders.image import TransformersImageEncoder
from captune.preprocess import Preprocess
from captune.training.loader import make_loader
from captune.training.steps import make_accelerator, train_epoch


class Plain:
    """The loop that one writes first."""

    def __init__(self, model: CLIPModel, table: CaptionTable, bank: CaptionBank, config: Config):
        self.model = model.to(memory_format=torch.contiguous_format).train()
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.keys = COCOClipDataset(table=table, image_size=model.preprocess.image_size)
        self.order = make_loader(self.keys, bank, config)._keys
        self.table, self.bank = table, bank
        self.losses: list[float] = []

    def epoch(self, number: int) -> None:
        """The batches that captune draws, too."""
        size = self.model.preprocess.image_size
        self.order.begin(number)
        for keys in self.order:
            photos, rows = [], []
            for key in keys:
                image = load_image(self.table.path(key.image))
                photos.append(torch.from_numpy(resize_and_crop(image, size)))
                rows.append(draw_caption(self.table, key.image, draw_generator(self.table, key)))
            self.losses.append(self.step(torch.stack(photos), self.bank.lookup(rows)))

    def step(self, pixels: Tensor, text: Tensor) -> float:
        """One step; its loss."""
        model = self.model
        inputs = (pixels.float() / 255 - model.mean) / model.std
        image = model.project_image(model.image_encoder(inputs).pooled)
        loss = InfoNCELoss()(image, text)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


class Captune:
    """`train_epoch`, as training calls it."""

    def __init__(self, model: CLIPModel, table: CaptionTable, bank: CaptionBank, config: Config):
        self.model, self.config = model, config
        dataset = COCOClipDataset(table=table, image_size=model.preprocess.image_size)
        self.loader = make_loader(dataset, bank, config)
        self.accelerator = make_accelerator(config)
        self.optimizer = self.accelerator.prepare_optimizer(
            torch.optim.AdamW(
                model.parameters(),
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                fused=True,
            ),
            device_placement=False,
        )
        self.losses: list[float] = []

    def epoch(self, number: int) -> None:
        """All its steps; the losses are kept one by one."""
        real = InfoNCELoss()

        def criterion(image: Tensor, text: Tensor) -> Tensor:
            loss = real(image, text)
            self.losses.append(loss.detach())  # type: ignore[arg-type]
            return loss

        train_epoch(
            self.model,
            self.loader,
            criterion,
            self.optimizer,
            None,
            number,
            self.config,
            accelerator=self.accelerator,
        )


def resnet50(layers: tuple[int, ...], image_size: int) -> CLIPModel:
    """Random weights; CLIP's 512 dimensions."""
    torch.manual_seed(0)
    tower = TransformersImageEncoder(
        ResNetModel(ResNetConfig(depths=list(layers))),
        name="resnet-50",
        preprocess=Preprocess(image_size=image_size),
    )
    return CLIPModel(RandomText(), image_encoder=tower)


def measure(
    data: Path, batch_size: int, steps: int, repeats: int, *, precision: str = "auto", **model: Any
) -> dict[str, Any]:
    """Epochs of ``steps`` steps in turns, after one of each that is not counted."""
    config = Config.from_mapping(
        {
            "recipe": "plain",
            "batch_size": batch_size,
            "num_workers": 0,
            "precision": precision,
            "log_with": "none",
            "device": "cpu",
        }
    )
    table = open_source(data).table("train")
    table = table.take_images(range(min(len(table), batch_size * steps)))
    ours = resnet50(**model)
    other = copy.deepcopy(ours)
    with tempfile.TemporaryDirectory() as cache:
        bank = CaptionBank.build(
            table.texts(), ours.text_encoder, cache=Path(cache), progress=False
        )
        plain, captune = (
            Plain(other, table, bank, config),
            Captune(ours, table, bank, config),
        )
        numbers = {id(way): iter(range(repeats + 1)) for way in (plain, captune)}
        ways = {
            name: lambda way=way: way.epoch(next(numbers[id(way)]))
            for name, way in (("plain loop", plain), ("captune", captune))
        }
        in_turns(ways, 1)
        taken = in_turns(ways, repeats)
    curves = {"plain loop": plain.losses, "captune": [float(loss) for loss in captune.losses]}
    pairs = zip(*curves.values(), strict=True)
    return {
        "images": len(table),
        "batch_size": batch_size,
        "steps of a turn": captune.loader.steps,
        "precision": captune.accelerator.mixed_precision,
        "ways": summary(taken),
        "losses": {name: [round(loss, 4) for loss in curve] for name, curve in curves.items()},
        "mean difference of two losses": round(
            float(torch.tensor([abs(a - b) for a, b in pairs]).mean()), 4
        ),
    }


def main() -> None:
    """Measure, keep and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--layers", type=int, nargs=4, default=(3, 4, 6, 3))
    parser.add_argument("--out", type=Path, default=None, help="folder of the result")
    arguments = parser.parse_args()
    result = heading("transformers", "accelerate")
    result |= measure(
        arguments.data,
        arguments.batch_size,
        arguments.steps,
        arguments.repeats,
        layers=tuple(arguments.layers),
        image_size=arguments.image_size,
    )
    keep("steps", result, arguments.out)


if __name__ == "__main__":
    main()
