"""What the commands print for people: small tables on stdout; ``--json`` prints whole objects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def print_classes(metrics: dict[str, Any]) -> None:
    """Accuracy beside its baselines, then what is confused most."""
    from captune.report.classes import accuracy_lines

    print(
        f"{metrics['data']} {metrics['split']}: {metrics['images']:,} images of "
        f"{metrics['classes']} classes (percent)"
    )
    lines = accuracy_lines(metrics)
    width = max(len(line.name) for line in lines) + 2
    print(f"{'':{width}}{'top-1':>7}{'95 %':>15}{'top-5':>8}")
    for line in lines:
        bounds = line.intervals["top1"] if line.intervals else None
        interval = f"[{bounds[0]:.1f}, {bounds[1]:.1f}]" if bounds else ""
        print(f"{line.name:{width}}{line.top1:7.1f}{interval:>15}{line.top5:8.1f}")
    if "multi_label" in metrics:
        several = metrics["multi_label"]
        print(
            f"all classes of {several['images']:,} images: mAP {several['mAP']:.1f}, "
            f"chance {several['chance']:.1f}"
        )
    before, after = (metrics["calibration"][when] for when in ("before", "after"))
    print(
        f"temperature {before['temperature']:.4f} (calibration error {before['ece']:.1f} points); "
        f"calibrated {after['temperature']:.4f} ({after['ece']:.1f})"
    )
    for row in metrics["worst_confusions"][:3]:
        images = "1 image" if row["images"] == 1 else f"{row['images']:,} images"
        print(f"  {row['class']} called {row['called']}: {images}")


def print_metrics(metrics: dict[str, Any], as_json: bool) -> None:
    """One JSON object, or a small table."""
    if as_json:
        print(json.dumps(metrics, ensure_ascii=False))
        return
    print(
        f"{metrics['data']} {metrics['split']}: {metrics['images']:,} images, "
        f"{metrics['captions']:,} captions (percent)"
    )
    _print_recalls(metrics, ("image_to_text", "text_to_image"))
    low, high = metrics["intervals"]["rsum"]
    print(f"{'':16}[{low:.1f}, {high:.1f}] 95 %, bootstrapped over images")
    if "against" in metrics:
        _print_against(metrics["against"])
    if "hubness_corrected" in metrics:
        _print_hubness(metrics["hubness_corrected"])
    if "plausible" in metrics:
        _print_plausible(metrics["plausible"])


def _print_against(other: dict[str, Any]) -> None:
    """The other model's recalls, and how sure the difference is."""
    print(f"\n{other['model']}, on the same images")
    _print_recalls(other, ("image_to_text", "text_to_image"))
    difference = other["difference"]
    print("\ndifference, 95 % by a paired bootstrap over images")
    rows = [
        (d.replace("_", " ") + " " + k, v)
        for d in ("image_to_text", "text_to_image")
        for k, v in difference[d].items()
    ]
    for name, found in [*rows, ("rsum", difference["rsum"])]:
        sure = "" if found["low"] > 0 or found["high"] < 0 else "  within noise"
        print(f"{name:20}{found['value']:+7.1f}  [{found['low']:+.1f}, {found['high']:+.1f}]{sure}")


def _print_hubness(corrected: dict[str, Any]) -> None:
    """Below an empty line and under a title of its own: never to be taken for the plain figures."""
    print(
        f"\ncorrected for hubs with {corrected['queries']:,} {corrected['querybank']} "
        f"({corrected['method']}, temperature {corrected['temperature']:g})"
    )
    _print_recalls(corrected, corrected["corrected"])
    for direction in corrected["corrected"]:
        before, after = (corrected[f"skewness_{when}"][direction] for when in ("before", "after"))
        print(f"{'skewness':16}{after:7.2f}, {before:.2f} before: 0 where there are no hubs")


def _print_plausible(plausible: dict[str, Any]) -> None:
    """A table for each ground truth, for their figures differ."""
    print(f"\nwith matches that the captions do not list ({plausible['package']}, percent)")
    for key, name in (("cxc", "CxC"), ("eccv", "ECCV Caption"), ("pmrp", "PMRP")):
        if key not in plausible:
            continue
        figures = [figure for figure in plausible[key]["image_to_text"] if figure != "queries"]
        print(f"{name:16}" + "".join(f"{figure:>13}" for figure in [*figures, "queries"]))
        for direction in ("image_to_text", "text_to_image"):
            row = plausible[key][direction]
            values = "".join(f"{row[figure]:13.1f}" for figure in figures)
            print(f"{direction.replace('_', ' '):16}{values}{row['queries']:13,}")


def _print_recalls(metrics: dict[str, Any], directions: Sequence[str]) -> None:
    print(f"{'':16}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'median rank':>13}")
    for direction in directions:
        row = metrics[direction]
        recalls = "".join(f"{row[key]:7.1f}" for key in ("R@1", "R@5", "R@10"))
        print(f"{direction.replace('_', ' '):16}{recalls}{row['median_rank']:13g}")
    print(f"{'rsum':16}{metrics['rsum']:7.1f}")


def print_bench(found: dict[str, Any]) -> None:
    """Where a step's time goes, speeds, and the advice that follows."""
    print(
        f"{found['config']}\n{found['device']} ({found['machine']}, {found['threads']} threads), "
        f"{found['precision']}, batches of {found['batch_size']}, {found['workers']} workers\n"
    )
    parts = dict(found["step"])
    if found["workers"]:
        seconds = parts.pop("decode")
        print(f"{'decode':18}{1e3 * seconds:9.1f} ms   meanwhile, by the workers")
    whole = sum(parts.values())
    for name, seconds in parts.items():
        print(f"{name:18}{1e3 * seconds:9.1f} ms{100 * seconds / whole:7.1f} %")
    print(f"{'a step':18}{1e3 * whole:9.1f} ms\n\nimages a second")
    for name, rate in found["images_per_second"].items():
        print(f"  {name:24}{rate:9.1f}")
    print(f"\nfrom disk at {found['share_of_ceiling']:.2f} of the speed from memory")
    for words in found["advice"]:
        print(f"  {words}")
