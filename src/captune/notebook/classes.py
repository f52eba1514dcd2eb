"""How often zero-shot labels are right, shown: accuracy beside baselines, and the confusions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from captune.console import say
from captune.data.objects import instance_files
from captune.notebook.display import plainly, show_figure, show_table
from captune.notebook.show import run_folder
from captune.notebook.steps import held_out
from captune.report.classes import accuracy_lines, confusion_figure
from captune.training.run import Run
from captune.workflow.opening import OwnTowers
from captune.workflow.zeroshot import zero_shot


@plainly
def zero_shot_accuracy(
    run: Run | str,
    data: str | Path = "",
    *,
    split: str = "",
    probe: bool = True,
    own: OwnTowers | None = None,
) -> dict[str, Any]:
    """How often the nearest label is the right one, beside chance, majority and a linear probe.

    Args:
        run: a run or its folder.
        data: a folder for each class, or COCO with its objects; default: the run's own data, of
            which nothing is shown where it says no objects.
        split: as for :func:`captune.notebook.show_recall`; of a folder for each class ``test``.
        probe: train the linear probe too.
        own: factories of own towers.

    Returns:
        The metrics object, also written to the run's ``classification{suffix}.json``; empty where
        nothing is labelled.
    """
    folder = run_folder(run)
    if not data:
        opened = Run.open(folder)
        split = split or held_out(opened)
        if not instance_files(opened.source().table(split)):
            say("no labels beside these pictures: name a folder with a folder for each class")
            return {}
        data = opened.provenance.data
    metrics = zero_shot(str(folder), str(data), split=split or None, probe=probe, own=own).metrics
    rows = [
        [line.name, f"{line.top1:.1f}", f"{line.top5:.1f}", line.note]
        for line in accuracy_lines(metrics)
    ]
    subject = f"{metrics['data']} {metrics['split']}: {metrics['images']:,} images"
    note = f"percent; the class of an image is {metrics['class_rule']}"
    if "multi_label" in metrics:
        several = metrics["multi_label"]
        note += f"; all classes of all images: mAP {several['mAP']:.1f}"
    title = f"{subject} of {metrics['classes']} classes"
    show_table(title, ("", "top-1", "top-5", ""), rows, note)
    show_figure(confusion_figure(metrics))
    return metrics
