"""What each part of the recipes is worth: benchmarks/quality.py DATA [--part head|whole|demo|full].

Each part is added to or taken from `best` or `best-adapter`, alone, and trained with the same
seeds; figures are rsum on the validation split (on which each run also chose its best epoch, alike
for all). Differences are paired by seed, their 95 % intervals are Student's t over seeds.

Of `whole`, parts that change stage 2 alone go on from one stage 1 for each seed, that of
"stage 1 only", and their time is that of stage 2. Time is the processor's, workers included, for
other work on the machine moves it less. `full` is whole trainings at full size, some of them on
larger towers: an hour and more each on a CPU.

Results lie in benchmarks/results/quality-PART.json, which is brought up to date after each run:
stopped, the same command goes on; --again measures anew what it names. Each machine has rows of its
own, for its arithmetic moves the figures, and a row of another config is measured anew. Prints the
tables of docs/recipe.md, one for each machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock
from record import device_name, processor_seconds

from captune import Config, fit, open_source
from captune.data.table import CaptionTable
from captune.device import best_device, choose_precision
from captune.evaluation.intervals import mean_over_seeds
from captune.files import read_versioned, write_json
from captune.models import CLIPModel
from captune.training.run import Run
from captune.workflow.demo import DEMO_CONFIG, demo_config

VERSION = 1
RESULTS = Path(__file__).parent / "results"

# Trained on captions of other images: what comes out is what chance, and choosing an epoch, give.
CONTROL = "captions of other images"
# Stage 1 takes a minute or two, so its parts are measured at full size.
HEAD = {"recipe": "best-adapter", "freeze_backbone": True}
HEAD_PARTS: dict[str, Mapping[str, Any]] = {
    "best-adapter, stage 1": {},
    "without the text adapter (best)": {"text_adapter": False},
    "hidden layer of 1024": {"hidden_dim": 1024},
    "no mixup": {"head_mixup": 0.0},
    "no dropout of hidden units": {"dropout": 0.0},
    "no dropout of features": {"feature_dropout": 0.0},
    "no mirrored photos": {"augment": False},  # which varies nothing else in stage 1
    "one caption an image": {"captions_per_image": 1},
    "no bank negatives": {"bank_negatives": 0},
    "8192 bank negatives": {"bank_negatives": 8192},
    "near-duplicates are negatives": {"duplicate_threshold": 0.0},
    "near-duplicates are positives": {"duplicates": "positive"},
    "near-duplicates from a cosine of 0.8": {"duplicate_threshold": 0.8},
    "fixed temperature 0.07": {"learn_temperature": False},
    "no moving average": {"ema_decay": 0.0},
    "standardised features": {"standardise_features": True},
    "BatchNorm in the head": {"use_batch_norm": True},
    "queue of 1024 images, no mixup": {
        "image_queue": 1024,
        "head_mixup": 0.0,
        "mixup": 0.0,
    },
    "soft targets 0.2": {"soft_targets": 0.2},
    "hard negatives, exponent 5": {"hard_negatives": 5.0},
    "SigLIP": {"loss": "siglip", "temperature": 0.1},
    "none of it (plain, 10 epochs of stage 1)": {"recipe": "plain", "head_epochs": 10},
    CONTROL: {},
}
# Stage 2 takes an hour at full size: its parts are measured on smaller photos for fewer epochs.
WHOLE = {"recipe": "best-adapter", "image_size": 128, "head_epochs": 10, "num_epochs": 3}
STAGE_1 = "stage 1 only"
WHOLE_PARTS: dict[str, Mapping[str, Any]] = {
    "best-adapter, 128 pixels, 3 epochs": {},
    STAGE_1: {"freeze_backbone": True},
    "no stage 1": {"head_epochs": 0},
    "one rate for all layers": {"layer_decay": 1.0, "head_rate_factor": 1.0},
    "lower half of the layers frozen": {"frozen_layers": 0.5},
    "learning rate 1e-4, the head's 3e-4": {"learning_rate": 1e-4, "head_rate_factor": 3.0},
    "unfrozen over 3 epochs": {"unfreeze_epochs": 3},
    "BatchNorm statistics move": {"freeze_batch_norm": False},
    "no augmentation": {"augment": False},
    "no mirrored photos": {"flip": False},
    "crops of 20 % and more": {"crop_scale": 0.2},
    "colour jitter 0.3": {"colour_jitter": 0.3},
    "RandAugment 5": {"rand_augment": 5},
    "trained on the full side": {"train_size_share": 1.0},
    "all layers train": {"frozen_layers": 0.0},
    "no mixup in stage 2": {"mixup": 0.0},
    "mixup of photos, not features": {"mix_photos": True},
    "progressive resizing": {"progressive_resizing": True},
    "generalised-mean pooling": {"generalised_pooling": True},
    "attention pooling": {"use_attention_pooling": True},
    "no moving average": {"ema_decay": 0.0},
    "soup of 3 epochs": {"soup": 3},
    "plain": {"recipe": "plain", "head_epochs": 0},
}
# What stage 1 does not read: parts of these keys alone may share one.
STAGE_2_KEYS = {
    *("layer_decay", "head_rate_factor", "frozen_layers", "learning_rate", "unfreeze_epochs"),
    *("freeze_batch_norm", "crop_scale", "colour_jitter", "rand_augment", "train_size_share"),
    *("mixup", "mix_photos", "progressive_resizing", "soup"),
}
# Full size; `best-adapter` unless said otherwise.
FULL_PARTS: dict[str, Mapping[str, Any]] = {
    "Lite0, best-adapter": {},
    "Lite0, best": {"recipe": "best"},
    "Lite0, plain": {"recipe": "plain"},
    "Lite1, best-adapter": {"towers": "minilm-lite1"},
    "Lite2, best-adapter": {"towers": "minilm-lite2"},
    "Lite2, hard negatives": {"towers": "minilm-lite2", "hard_negatives": 5.0},
    "Lite2, 16 epochs, hard negatives, 8192 bank negatives": {
        "towers": "minilm-lite2",
        "num_epochs": 16,
        "hard_negatives": 5.0,
        "bank_negatives": 8192,
    },
    "Lite2, 20 epochs": {"towers": "minilm-lite2", "num_epochs": 20},
    "Lite2, 20 epochs, 288 pixels": {
        "towers": "minilm-lite2",
        "num_epochs": 20,
        "image_size": 288,
    },
    "Lite2, 20 epochs, hard negatives, 288 pixels": {
        "towers": "minilm-lite2",
        "num_epochs": 20,
        "image_size": 288,
        "hard_negatives": 5.0,
        "bank_negatives": 8192,
    },
}
# Keys that are younger than the first rows, with what had gone for each until then.
BEFORE = {"flip": True}
# The demo's scenes (captune data demo scenes), at equal time: plain takes as many passes as fit.
PLAIN = {"recipe": "plain", **demo_config(recipe="plain").differences()}
DEMO_PARTS: dict[str, Mapping[str, Any]] = {
    "best, as in the demo": {"recipe": DEMO_CONFIG.recipe, **DEMO_CONFIG.differences()},
    **{f"plain, {n} epochs": {**PLAIN, "num_epochs": n} for n in (3, 4, 5)},
}
SHARED = {"towers": "minilm-lite0", "log_with": "none"}
PARTS: dict[str, tuple[Mapping[str, Any], Mapping[str, Mapping[str, Any]]]] = {
    "head": (HEAD, HEAD_PARTS),
    "whole": (WHOLE, WHOLE_PARTS),
    "demo": ({}, DEMO_PARTS),
    "full": ({"recipe": "best-adapter"}, FULL_PARTS),
}


def measure(
    name: str,
    config: Config,
    folder: Path,
    tables: Sequence[CaptionTable],
    model: CLIPModel | None = None,
) -> dict[str, Any]:
    """Train one run; its best epoch's figures and what it took."""
    began, used = time.perf_counter(), processor_seconds()
    run: Run = fit(*tables, out=folder, config=config, model=model)
    history = run.history()
    best = max(history, key=lambda row: float(row["rsum"]))
    soup = history[-1].get("soup", {"kept": False})
    if soup["kept"]:
        best = {**best, **soup}
    return {
        "part": name,
        "seed": config.seed,
        "rsum": best["rsum"],
        "image_to_text": best["image_to_text"]["R@1"],
        "text_to_image": best["text_to_image"]["R@1"],
        "temperature": best["temperature"],
        "best_epoch": best["epoch"],
        "training_seconds": sum(row["seconds"] for row in history),
        "seconds": time.perf_counter() - began,
        "processor_seconds": processor_seconds() - used,
        "config": config.differences(),
        "machine": _machine(config),
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "split": tables[1].describe(),
    }


def _machine(config: Config) -> str:
    """What computed, and in which arithmetic."""
    device = best_device(config.device)
    what = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device.type != "cpu":
        what = device_name(device)
    return f"{what}, {choose_precision(config.precision, device)}"


def after_stage_1(config: Config, out: Path, tables: Sequence[CaptionTable]) -> tuple[Config, Any]:
    """The config of a part's stage 2, and the model that its seed's stage 1 ends with (trained here
    where it is not there yet)."""
    first = Config.from_mapping({**WHOLE, **WHOLE_PARTS[STAGE_1], **SHARED, "seed": config.seed})
    folder = out / f"stage-1-seed-{config.seed}"
    fit(*tables, out=folder, config=first, resume=True)
    model = CLIPModel.from_pretrained(folder)
    return config.replace(head_epochs=0, temperature=1 / float(model.logit_scale)), model


def shuffled(table: CaptionTable, seed: int) -> CaptionTable:
    """Each image with all captions of one other image."""
    images = np.random.default_rng(seed).permutation(len(table))
    other = np.empty_like(images)
    other[images] = np.roll(images, 1)
    place = table.captions.schema.get_field_index("image")
    owners = pa.array(other[table.image_of_caption])
    captions = table.captions.set_column(place, "image", owners)
    return CaptionTable.from_columns(table.images, captions, table.name, table.split)


def digest_of(config: Config) -> str:
    """Of every value, the defaults of today among them: another config's figure is another one.

    A key that came later counts from where it says something new: what was measured without it is
    what would be measured now.
    """
    values = {key: value for key, value in config.items() if BEFORE.get(key) != value}
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def key_of(row: Mapping[str, Any]) -> tuple[str, int, str]:
    """What there is one row of."""
    return row["part"], row["seed"], row["machine"]


def forget(path: Path, configs: Mapping[tuple[str, int], Config], out: Path) -> None:
    """Drop the rows of these parts and seeds, and the stages 1 that they shared."""
    for _, seed in configs:
        shutil.rmtree(out / f"stage-1-seed-{seed}", ignore_errors=True)
    gone = {(*key, _machine(config)) for key, config in configs.items()}
    if path.is_file():
        kept = [row for row in rows_in(path) if key_of(row) not in gone]
        write_json(path, {"format_version": VERSION, "rows": kept})


def rows_in(path: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    if not path.is_file():
        return []
    return list(read_versioned(path, what="results", version=VERSION)["rows"])


def table_of(
    rows: Sequence[Mapping[str, Any]], parts: Sequence[str], time_key: str = "processor_seconds"
) -> str:
    """The results as Markdown: means over seeds, intervals, and differences to the first part.

    ``rows`` are of one machine.
    """
    lines = [
        "| part | I→T R@1 | T→I R@1 | rsum ± 95 % | less the first | seconds |",
        "|---|---|---|---|---|---|",
    ]
    by_part = {part: {r["seed"]: r for r in rows if r["part"] == part} for part in parts}
    base = by_part[parts[0]]
    for part, found in by_part.items():
        if not found:
            continue
        columns = list(found.values())
        means = [mean_of(columns, key) for key in ("image_to_text", "text_to_image")]
        took = mean_of(columns, time_key, ".0f")
        shared = [s for s in found if s in base]
        difference = ""
        if part != parts[0] and shared:
            difference = _interval([found[s]["rsum"] - base[s]["rsum"] for s in shared], "+.1f")
        rsum = _interval([row["rsum"] for row in columns], ".1f")
        lines.append(f"| {part} | {means[0]} | {means[1]} | {rsum} | {difference} | {took} |")
    return "\n".join(lines)


def mean_of(rows: Sequence[Mapping[str, Any]], key: str, form: str = ".1f") -> str:
    """Over the rows that have the key; those of before had fewer."""
    found = [float(row[key]) for row in rows if key in row]
    return f"{sum(found) / len(found):{form}}" if found else ""


def _interval(values: Sequence[float], form: str) -> str:
    if len(values) < 2:
        return f"{values[0]:{form}} (one seed)"
    found = mean_over_seeds(values)
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"


def main() -> None:
    """Measure all parts that are not measured yet, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--part", choices=tuple(PARTS), default="head")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], help="parts whose names hold these words")
    parser.add_argument("--again", action="store_true", help="forget what was measured here before")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where runs lie meanwhile")
    arguments = parser.parse_args()
    base, parts = PARTS[arguments.part]
    source = open_source(arguments.data)
    tables = [source.table("train"), source.table(source.val_split)]
    path = RESULTS / f"quality-{arguments.part}.json"
    wanted = [n for n in parts if not arguments.only or any(w in n for w in arguments.only)]
    configs = {
        (name, seed): Config.from_mapping({**base, **SHARED, "seed": seed, **parts[name]})
        for seed in arguments.seeds
        for name in wanted
    }
    if arguments.again:
        forget(path, configs, arguments.out)
    for folder in (arguments.out, RESULTS):
        folder.mkdir(parents=True, exist_ok=True)
    for (name, seed), config in configs.items():
        asked = digest_of(config)
        known = (name, seed, _machine(config), asked)
        if any(known == (*key_of(r), r.get("asked", asked)) for r in rows_in(path)):
            continue
        model = None
        if arguments.part == "whole" and STAGE_2_KEYS.issuperset(parts[name]):
            config, model = after_stage_1(config, arguments.out, tables)
        used = [shuffled(tables[0], seed), tables[1]] if name == CONTROL else tables
        with TemporaryDirectory(dir=arguments.out) as scratch:
            if arguments.part == "demo":  # features are a part of what best costs
                os.environ["CAPTUNE_CACHE"] = str(Path(scratch) / "cache")
            row = measure(name, config, Path(scratch) / "run", used, model)
        row["asked"] = asked
        with FileLock(f"{path}.lock"):  # one call may measure one seed, a second call another
            rest = [r for r in rows_in(path) if key_of(r) != key_of(row)]
            write_json(path, {"format_version": VERSION, "rows": [*rest, row]})
        print(f"{name}, seed {seed}: rsum {row['rsum']:.1f}", flush=True)
    time_key = "seconds" if arguments.part == "demo" else "processor_seconds"
    rows = rows_in(path)
    for machine in sorted({row["machine"] for row in rows}):
        own = [row for row in rows if row["machine"] == machine]
        print(f"{machine}:\n{table_of(own, list(parts), time_key)}")


if __name__ == "__main__":
    main()
