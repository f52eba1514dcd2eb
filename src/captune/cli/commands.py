"""The commands: arguments in, one workflow called, results printed.

Heavy imports happen inside the commands, so that ``captune --help`` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from captune.cli.printing import print_bench, print_classes, print_metrics
from captune.config import Config, parse_value
from captune.console import SPEAKS
from captune.errors import CaptuneError

EXIT_INTERRUPTED = 130


def demo(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from captune.workflow.demo import TRAIN_SCENES, demo

    images = TRAIN_SCENES if arguments.images is None else arguments.images
    return _report_training(
        lambda: demo(arguments.out, images=images, overrides=overrides), arguments
    )


def train(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from captune.data.stream_shards import is_pattern
    from captune.workflow.train import train

    if arguments.val_data or is_pattern(arguments.data):
        return _train_on_shards(arguments, overrides)
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


def _train_on_shards(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from captune.workflow.stream import train_on_shards

    return _report_training(
        lambda: train_on_shards(
            arguments.data,
            val_data=arguments.val_data,
            config=Config.from_mapping(overrides),
            out=arguments.out,
            options=table_options(arguments),
            resume=arguments.resume,
        ),
        arguments,
    )


def _report_training(work: Any, arguments: argparse.Namespace) -> int:
    from captune.training.stop import TrainingStopped

    try:
        outcome = work()
    except TrainingStopped as stopped:
        if SPEAKS:
            print(f"captune: {stopped}", file=sys.stderr)
        return EXIT_INTERRUPTED
    print_metrics(outcome.metrics, arguments.json)
    if not arguments.json:
        print(f"\nrun    {outcome.run.folder}\nreport {outcome.page}")
        for caption, command in outcome.commands:
            print(f"\n{caption}\n  {command}")
    return 0


def compare(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from captune.training.stop import TrainingStopped
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
        **_measured_on(arguments),
        hubness=arguments.hubness,
        protocol=arguments.protocol,
        against=arguments.against,
        truth=GroundTruth.load(arguments.pmrp) if more else None,
    )
    if arguments.format == "text":
        print_metrics(result, arguments.json)
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
        **_measured_on(arguments),
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
        **_measured_on(arguments),
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
        **_measured_on(arguments),
        templates=read_templates(Path(arguments.templates)) if arguments.templates else TEMPLATES,
        names=read_names(Path(arguments.names)) if arguments.names else None,
        probe=not arguments.no_probe,
        out=arguments.out,
    )
    if arguments.json:
        print(json.dumps(outcome.metrics, ensure_ascii=False))
        return 0
    print_classes(outcome.metrics)
    if outcome.page is not None:
        print(f"\npage {outcome.page}")
    return 0


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
    print_bench(found)
    return 0


def table_options(arguments: argparse.Namespace) -> Any:
    from captune.data.tabular import TableOptions

    return TableOptions(
        arguments.image_column,
        tuple(arguments.caption_column),
        arguments.caption,
        arguments.val,
    )


def _measured_on(arguments: argparse.Namespace) -> dict[str, Any]:
    """Split, columns and own towers, which all commands that open a model take."""
    return {
        "split": arguments.split,
        "options": table_options(arguments),
        "own": _own_towers(arguments),
    }


def _own_towers(arguments: argparse.Namespace) -> Any:
    from captune.workflow.opening import OwnTowers

    return OwnTowers(arguments.image_encoder, arguments.text_encoder)
