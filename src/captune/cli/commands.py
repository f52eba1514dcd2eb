"""The commands: arguments in, one workflow called, results printed.

Heavy imports happen inside the commands, so that ``captune --help`` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captune.config import Config, parse_value
from captune.errors import CaptuneError

EXIT_INTERRUPTED = 130


def demo(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from captune.workflow.demo import TRAIN_SCENES, demo

    images = TRAIN_SCENES if arguments.images is None else arguments.images
    return _report_training(
        lambda: demo(arguments.out, images=images, overrides=overrides), arguments
    )


def train(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from captune.workflow.train import train

    config = Config.from_mapping(overrides)
    options = table_options(arguments)
    return _report_training(
        lambda: train(
            arguments.data,
            config=config,
            out=arguments.out,
            options=options,
            resume=arguments.resume,
        ),
        arguments,
    )


def _report_training(work: Any, arguments: argparse.Namespace) -> int:
    from captune.training.fit import TrainingStopped

    try:
        outcome = work()
    except TrainingStopped as stopped:
        print(f"captune: {stopped}", file=sys.stderr)
        return EXIT_INTERRUPTED
    _print_metrics(outcome.metrics, arguments.json)
    if not arguments.json:
        print(f"\nrun    {outcome.run.folder}\nreport {outcome.page}")
        for caption, command in outcome.commands:
            print(f"\n{caption}\n  {command}")
    return 0


def compare(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from captune.training.fit import TrainingStopped
    from captune.workflow.compare import compare

    flags = [word for word in arguments.flags if "=" not in word or "," in word]
    rest = [word for word in arguments.flags if word not in flags]
    values = dict(word.split("=", 1) for word in rest)
    config = {**overrides, **{key: parse_value(key, value) for key, value in values.items()}}
    twice = {word.partition("=")[0].replace("-", "_") for word in flags} & set(config)
    if twice:
        raise CaptuneError(f"{min(twice)} is to be compared, so it cannot be set as well")
    try:
        comparison = compare(
            arguments.data,
            flags=flags,
            seeds=arguments.seeds,
            config=config,
            out=arguments.out,
            options=table_options(arguments),
            split=arguments.split,
        )
    except TrainingStopped as stopped:
        print(
            f"captune: stopped in {stopped.run.folder}: the same command goes on", file=sys.stderr
        )
        return EXIT_INTERRUPTED
    if arguments.json:
        print(json.dumps(comparison.to_dict(), ensure_ascii=False))
    else:
        print(comparison.to_text())
        print(f"\npicture {comparison.picture}\npage    {comparison.page}")
    return 0


def evaluate(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from captune.evaluation.plausible import GroundTruth
    from captune.workflow.evaluate import evaluate

    more = arguments.eccv or arguments.pmrp is not None
    result = evaluate(
        arguments.model,
        data=arguments.data,
        split=arguments.split,
        options=table_options(arguments),
        own=_own_towers(arguments),
        hubness=arguments.hubness,
        protocol=arguments.protocol,
        against=arguments.against,
        truth=GroundTruth.load(arguments.pmrp) if more else None,
    )
    if arguments.format == "text":
        _print_metrics(result, arguments.json)
    else:
        from captune.report.tables import as_latex, as_markdown

        print({"markdown": as_markdown, "latex": as_latex}[arguments.format](result))
    return 0


def blend(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from captune.workflow.blend import blend

    found = blend(
        arguments.first,
        arguments.second,
        data=arguments.data,
        split=arguments.split,
        options=table_options(arguments),
        own=_own_towers(arguments),
        steps=arguments.steps,
        out=arguments.out,
    )
    if arguments.json:
        print(json.dumps(found.told, ensure_ascii=False))
    else:
        print(found.to_text())
        print(f"\nrun     {found.folder}\npicture {found.picture}")
    return 0


def search(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from captune.workflow.evaluate import search

    hits = search(
        arguments.model,
        arguments.query,
        k=arguments.k,
        data=arguments.data,
        split=arguments.split,
        options=table_options(arguments),
        own=_own_towers(arguments),
    )
    if arguments.json:
        print(json.dumps([hit.to_dict() for hit in hits], ensure_ascii=False))
    else:
        for hit in hits:
            print(f"{hit.score:6.3f}  {hit.image}\n        {hit.caption}")
    return 0


def classify(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from captune.evaluation.zeroshot import TEMPLATES
    from captune.workflow.evaluate import classify_files

    predictions = classify_files(
        arguments.model,
        arguments.images,
        arguments.labels,
        templates=arguments.template or TEMPLATES,
        own=_own_towers(arguments),
    )
    if arguments.json:
        print(json.dumps([p.to_dict() for p in predictions], ensure_ascii=False))
    else:
        for prediction in predictions:
            print(prediction.image)
            for label, value in sorted(prediction.probabilities.items(), key=lambda p: -p[1]):
                print(f"  {100 * value:5.1f} %  {label}")
    return 0


def zeroshot(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from captune.data.labelled import read_names
    from captune.evaluation.zeroshot import TEMPLATES, read_templates
    from captune.workflow.zeroshot import zero_shot

    outcome = zero_shot(
        arguments.model,
        arguments.data,
        split=arguments.split,
        options=table_options(arguments),
        own=_own_towers(arguments),
        templates=read_templates(Path(arguments.templates)) if arguments.templates else TEMPLATES,
        names=read_names(Path(arguments.names)) if arguments.names else None,
        probe=not arguments.no_probe,
        out=arguments.out,
    )
    if arguments.json:
        print(json.dumps(outcome.metrics, ensure_ascii=False))
        return 0
    _print_classes(outcome.metrics)
    if outcome.page is not None:
        print(f"\npage {outcome.page}")
    return 0


def _print_classes(metrics: dict[str, Any]) -> None:
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


def bench(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from captune.workflow.bench import bench

    found = bench(
        arguments.data,
        config=Config.from_mapping(overrides),
        options=table_options(arguments),
        steps=arguments.steps,
    )
    if arguments.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    print(
        f"{found['config']}\n{found['device']} ({found['machine']}, {found['threads']} threads), "
        f"{found['precision']}, batches of {found['batch_size']}, {found['workers']} workers\n"
    )
    whole = sum(found["step"].values())
    for name, seconds in found["step"].items():
        print(f"{name:18}{1e3 * seconds:9.1f} ms{100 * seconds / whole:7.1f} %")
    print(f"{'a step':18}{1e3 * whole:9.1f} ms\n\nimages a second")
    for name, rate in found["images_per_second"].items():
        print(f"  {name:24}{rate:9.1f}")
    print(f"\nfrom disk at {found['share_of_ceiling']:.2f} of the speed from memory")
    for words in found["advice"]:
        print(f"  {words}")
    return 0


def table_options(arguments: argparse.Namespace) -> Any:
    from captune.data.tabular import TableOptions

    return TableOptions(
        arguments.image_column,
        tuple(arguments.caption_column),
        arguments.caption,
        arguments.val,
    )


def _own_towers(arguments: argparse.Namespace) -> Any:
    from captune.workflow.opening import OwnTowers

    return OwnTowers(arguments.image_encoder, arguments.text_encoder)


def _print_metrics(metrics: dict[str, Any], as_json: bool) -> None:
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
