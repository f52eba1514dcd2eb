"""Does a model look at what is asked for? python benchmarks/pointing.py DEMO_DATA RUN [RUN …]

The pointing game (Zhang et al. 2016) on the demo's test scenes, whose boxes are known: for a thing
of the scene, asked for by name, does the hottest place of the heat map lie in one of its boxes?
Chance is the share of the picture that those boxes cover. For runs with attention pooling, also
how much of the attention lies on things at all, against the share of the picture that they cover.
Prints one JSON object a run; 95 % intervals are bootstrapped over scenes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from captune import CaptionTable, CLIPModel, Run, open_source
from captune.data.pixels import image_batches
from captune.evaluation.explain import explain_image
from captune.files import read_json

SCENES = 200
RESAMPLES = 2000

Mask = npt.NDArray[np.bool_]


def load_boxes(data: Path, table: CaptionTable) -> list[dict[str, Mask]]:
    """For each scene, a mask ``(H, W)`` of the boxes of each named thing."""
    content = read_json(data / "annotations" / "instances_test2014.json", what="instances file")
    names = {category["id"]: str(category["name"]) for category in content["categories"]}
    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in content["images"]}
    by_image: dict[int, dict[str, Mask]] = {int(image): {} for image in table.image_ids}
    for instance in content["annotations"]:
        masks = by_image[instance["image_id"]]
        name = names[instance["category_id"]]
        mask = masks.setdefault(name, np.zeros(sizes[instance["image_id"]], dtype=bool))
        x, y, width, height = instance["bbox"]
        mask[y : y + height, x : x + width] = True
    return [by_image[int(image)] for image in table.image_ids]


def interval(values: list[float]) -> dict[str, float]:
    """The mean in percent, with its bootstrap interval."""
    found = 100 * np.asarray(values)
    drawn = np.random.default_rng(0).choice(found, (RESAMPLES, len(found))).mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": float(found.mean()), "low": float(low), "high": float(high)}


@torch.no_grad()
def attention_on(model: CLIPModel, path: Path, mask: Mask) -> float:
    """The share of the attention, mean over heads, that lies in ``mask``."""
    assert model.pooling is not None
    pixels = next(image_batches(path, model.preprocess.image_size, 1)).float() / 255
    feature_map = model.image_encoder((pixels - model.mean) / model.std).map
    weights = model.pooling.weights(feature_map).mean(1).view(1, 1, *feature_map.shape[2:])
    wide = torch.nn.functional.interpolate(weights, size=mask.shape, mode="nearest")[0, 0]
    return float((wide * torch.from_numpy(mask)).sum() / wide.sum())


def point(data: Path, folder: Path) -> dict[str, Any]:
    """The pointing game of one run, over scenes with two or more kinds of things."""
    model = Run.open(folder).load_model()
    table = open_source(data).table("test")
    boxes = load_boxes(data, table)
    rows = [row for row, masks in enumerate(boxes) if len(masks) > 1][:SCENES]
    methods = ["gradient", "occlusion", *(["attention"] if model.pooling else [])]
    hits: dict[str, list[float]] = {method: [] for method in methods}
    chance: list[float] = []
    looked: list[float] = []
    covered: list[float] = []
    for number, row in enumerate(tqdm(rows, desc=folder.name, unit="scene")):
        name = sorted(boxes[row])[number % len(boxes[row])]
        mask = boxes[row][name]
        chance.append(float(mask.mean()))
        for method in methods:
            heat = explain_image(model, table.path(row), name, method=method).values
            place = np.unravel_index(heat.argmax(), heat.shape)
            scale = mask.shape[0] / heat.shape[0]
            hits[method].append(float(mask[int(place[0] * scale), int(place[1] * scale)]))
        if model.pooling is not None:
            things = np.logical_or.reduce(list(boxes[row].values()))
            looked.append(attention_on(model, table.path(row), things))
            covered.append(float(things.mean()))
    found: dict[str, Any] = {
        "run": folder.name,
        "scenes": len(rows),
        "chance": interval(chance),
        "pointing": {method: interval(values) for method, values in hits.items()},
    }
    if looked:
        found["attention_on_things"] = interval(looked)
        found["things_cover"] = interval(covered)
    return found


if __name__ == "__main__":
    for name in sys.argv[2:]:
        print(json.dumps(point(Path(sys.argv[1]), Path(name))))
