"""ResNet-50 steps against a plain loop: python benchmarks/steps.py DATA [--steps N].

The plain loop: fp32, NCHW, photos decoded whole and resized by Pillow, one caption for each, AdamW
as it comes, the loss read at every step. captune's: `train_epoch` with the recipe `plain`, which
trains the same thing (the same photos, captions, order, crops and rate) in the machine's precision.
Both start from the same random weights; captions come from a bank in either, of random vectors.
How far their losses lie apart is told beside what another seed of the plain loop (order, crops and
captions drawn otherwise, the same weights) makes of them: that is the noise.
Ways take turns; a ratio is of two turns of one repeat; each turn goes on from the weights of the
one before.

On a CPU both decode in the process itself, so that the processor's time is all of it. With
`--workers N` both have N processes that decode, and with `--from-memory` batches that were decoded
before; on a GPU one of these, or decoding is all that is measured. Photos are taken again from the
first on where DATA has too few.

Writes benchmarks/results/steps.json (steps-gpu.json on a card) and prints it.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from record import device_name, heading, in_turns, keep, summary
from standins import RandomText, copies
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import ResNetConfig, ResNetModel

from captune import CLIPModel, InfoNCELoss, open_source
from captune.bank import CaptionBank
from captune.config import Config
from captune.data.dataset import COCOClipDataset, DrawKey, draw_caption, draw_generator
from captune.data.pixels import load_image, resize_and_crop
from captune.data.table import CaptionTable
from captune.device import best_device
from captune.encoders.image import TransformersImageEncoder
from captune.preprocess import Preprocess
from captune.training.loader import Batch, BatchLoader, make_loader
from captune.training.steps import make_accelerator, train_epoch


class PlainPhotos(Dataset[tuple[Tensor, int]]):
    """Photos decoded whole and resized, and the row of a caption."""

    def __init__(self, table: CaptionTable, size: int) -> None:
        self.table, self.size = table, size

    def __getitem__(self, key: DrawKey) -> tuple[Tensor, int]:
        image = load_image(self.table.path(key.image))
        row = draw_caption(self.table, key.image, draw_generator(self.table, key))
        return torch.from_numpy(resize_and_crop(image, self.size)), row


class Plain:
    """The loop that one writes first, over the batches that captune draws, too."""

    def __init__(
        self, model: CLIPModel, table: CaptionTable, bank: CaptionBank, config: Config, held: bool
    ):
        device = best_device(config.device)
        self.model = model.to(device, memory_format=torch.contiguous_format).train()
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        size = model.preprocess.image_size
        loader = make_loader(COCOClipDataset(table=table, image_size=size), bank, config)
        self.order, self.bank = loader._keys, bank
        self.photos: Any = DataLoader(
            PlainPhotos(table, size),
            batch_sampler=self.order,
            num_workers=config.num_workers,
            persistent_workers=config.num_workers > 0,
        )
        if held:
            self.order.begin(0)
            self.photos = list(self.photos)
        self.losses: list[float] = []

    def epoch(self, number: int) -> None:
        """All its steps; the losses are kept one by one."""
        self.order.begin(number)
        for pixels, rows in self.photos:
            self.losses.append(self.step(pixels, self.bank.lookup(rows)))

    def step(self, pixels: Tensor, text: Tensor) -> float:
        """One step; its loss."""
        model = self.model
        pixels, text = pixels.to(model.device), text.to(model.device)
        inputs = (pixels.float() / 255 - model.mean) / model.std
        image = model.project_image(model.image_encoder(inputs).pooled)
        loss = InfoNCELoss()(image, text)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


class Held:
    """A loader's first epoch, kept in memory and given again for each other one."""

    def __init__(self, loader: BatchLoader) -> None:
        self.table, self.bank, self.steps = loader.table, loader.bank, loader.steps
        self.kept = list(loader.batches(0))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return iter(self.kept[start:])


class Captune:
    """`train_epoch`, as training calls it."""

    def __init__(
        self, model: CLIPModel, table: CaptionTable, bank: CaptionBank, config: Config, held: bool
    ):
        self.config, self.bank = config, bank
        self.accelerator = make_accelerator(config)
        self.model = model.to(self.accelerator.device)
        dataset = COCOClipDataset(table=table, image_size=model.preprocess.image_size)
        loader = make_loader(dataset, bank, config)
        self.loader: Any = Held(loader) if held else loader
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
    data: Path, steps: int, repeats: int, *, held: bool, values: dict[str, Any], **model: Any
) -> dict[str, Any]:
    """Epochs of ``steps`` steps in turns, after one of each that is not counted.

    ``held``: batches lie in memory; ``values`` of the config; ``model``: see :func:`resnet50`.
    """
    config = Config.from_mapping({"recipe": "plain", "log_with": "none", **values})
    ours = resnet50(**model)
    other, third = copy.deepcopy(ours), copy.deepcopy(ours)
    with tempfile.TemporaryDirectory() as scratch:
        folder = copies(data, Path(scratch) / "photos", config.batch_size * steps)
        table = open_source(folder).table("train")
        bank = CaptionBank.build(
            table.texts(), ours.text_encoder, cache=Path(scratch), progress=False
        )
        captune = Captune(ours, table, bank, config, held)
        plain = Plain(other, table, bank, config, held)
        numbers = {id(way): iter(range(repeats + 1)) for way in (plain, captune)}
        ways = {
            name: lambda way=way: way.epoch(next(numbers[id(way)]))
            for name, way in (("plain loop", plain), ("captune", captune))
        }
        in_turns(ways, 1)
        taken = in_turns(ways, repeats)
        seeds = Plain(third, table, bank, config.replace(seed=config.seed + 1), held)
        for number in range(repeats + 1):
            seeds.epoch(number)
    curves = {
        "plain loop": plain.losses,
        "captune": [float(loss) for loss in captune.losses],
        "plain loop, another seed": seeds.losses,
    }
    return {
        "images": len(table),
        "batch_size": config.batch_size,
        "image_size": captune.model.preprocess.image_size,
        "photos": "in memory" if held else f"decoded by {config.num_workers} processes, 0: here",
        "device": device_name(captune.model.device),
        "steps of a turn": captune.loader.steps,
        "precision": captune.accelerator.mixed_precision,
        "ways": summary(taken),
        "losses": {name: [round(loss, 4) for loss in curve] for name, curve in curves.items()},
        "mean difference from the plain loop's losses": {
            name: _apart(plain.losses, curve) for name, curve in list(curves.items())[1:]
        },
    }


def _apart(one: list[float], other: list[float]) -> float:
    return round(
        float(torch.tensor([abs(a - b) for a, b in zip(one, other, strict=True)]).mean()), 4
    )


def main() -> None:
    """Measure, keep and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"))
    parser.add_argument("--workers", type=int, default=0, help="processes that decode photos")
    parser.add_argument("--from-memory", action="store_true", help="decode before measuring")
    parser.add_argument("--layers", type=int, nargs=4, default=(3, 4, 6, 3))
    parser.add_argument("--out", type=Path, default=None, help="folder of the result")
    arguments = parser.parse_args()
    result = heading("transformers", "accelerate")
    result |= measure(
        arguments.data,
        arguments.steps,
        arguments.repeats,
        held=arguments.from_memory,
        values={
            "batch_size": arguments.batch_size,
            "num_workers": arguments.workers,
            "device": arguments.device,
        },
        layers=tuple(arguments.layers),
        image_size=arguments.image_size,
    )
    keep("steps", result, arguments.out)


if __name__ == "__main__":
    main()
