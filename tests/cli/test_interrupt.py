"""Ctrl-C in a terminal, and the end of a batch job: every process of the group gets the signal, and
the run stays usable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from captune.training.run import Run


@pytest.mark.skipif(os.name == "nt", reason="process groups get signals in another way there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_and_resume_finishes(
    coco: Path, tmp_path: Path, tiny_resnet: Path, tiny_sentence: Path, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "captune", "train", str(coco), "--out", str(out)),
        *(f"image_encoder={tiny_resnet}", f"text_encoder={tiny_sentence}"),
        *(
            "recipe=plain",
            "batch_size=8",
            "num_epochs=60",
            "num_workers=2",
            "log_with=none",
            "precision=fp32",
        ),
    ]
    with open(tmp_path / "log", "wb") as log:
        training = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + 120
        history = out / "history.jsonl"
        while not (history.is_file() and history.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(training.pid, number)
        assert training.wait(timeout=60) == 130
    said = (tmp_path / "log").read_text(encoding="utf-8")
    assert "--resume" in said and "Traceback" not in said
    run = Run.open(out)
    assert 0 < len(run.history()) < 60 and run.load_model()
    finished = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert "resuming in epoch" in finished.stderr
    assert [row["epoch"] for row in run.history()] == list(range(1, 61))
