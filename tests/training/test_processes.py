"""Several processes against one: gradients, whole runs, what stops them, and where they go on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import COLOURS, write_scene

JOB = Path(__file__).with_name("shared_job.py")


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_resnet: Path, tiny_sentence: Path
) -> Path:
    """Scenes and towers for :mod:`shared_job`."""
    found = tmp_path_factory.mktemp("processes")
    (found / "tiny-resnet").symlink_to(tiny_resnet)
    (found / "tiny-sentence").symlink_to(tiny_sentence.parent)
    pairs = [(ground, square) for ground in COLOURS for square in COLOURS if ground != square]
    for split, some in (("train", pairs[:20]), ("val", pairs[20:]), ("broken", pairs[:14])):
        for ground, square in some:
            write_scene(found / split / f"{square}_on_{ground}.jpg", ground, square)
    # All that the first of several processes holds of a batch, and one of a later one's.
    for path in sorted((found / "broken").glob("*.jpg"))[:9]:
        path.write_bytes(b"no picture")
    return found


class Begun(NamedTuple):
    """A process, and the file that it writes into: a pipe that nobody reads would stop it."""

    process: subprocess.Popen[bytes]
    log: Path


def start(
    world: int, folder: Path, *jobs: str, within: Sequence[Sequence[str]] = (), address: str = ""
) -> list[Begun]:
    """The processes of a job, as a launcher starts them; ``within``: words before each command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    source = str(Path(__file__).parents[2] / "src")
    begun = []
    for rank in range(world):
        own = {
            "RANK": rank,
            "LOCAL_RANK": 0 if within else rank,
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": 1 if within else world,
            "MASTER_ADDR": address or "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": 1,
            "TQDM_DISABLE": 1,
            "PYTHONPATH": source,
        }
        log = folder / f"{port}-{rank}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*(within[rank] if within else ()), sys.executable, str(JOB), str(folder), *jobs],
                env={**os.environ, **{key: str(value) for key, value in own.items()}},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        begun.append(Begun(process, log))
    return begun


def finish(begun: list[Begun], codes: Sequence[int] = ()) -> list[str]:
    """What each process said, once all have ended as they should."""
    try:
        found = [process.wait(timeout=120) for process, _ in begun]
    finally:
        for process, _ in begun:
            process.kill()
            process.wait()
    said = [log.read_text(encoding="utf-8") for _, log in begun]
    assert found == list(codes or [0] * len(begun)), "\n".join(
        f"process {rank} ended with {code}:\n{words[-3000:]}"
        for rank, (code, words) in enumerate(zip(found, said, strict=True))
    )
    return said


@pytest.mark.parametrize("world", [2, 3])
def test_steps_of_several_processes_are_those_of_one(world: int, folder: Path) -> None:
    finish(start(world, folder, "every_kind", "own_statistics", "whole", "stopped", "refused"))


def test_a_killed_process_leaves_a_run_that_another_number_resumes(folder: Path) -> None:
    """The others end with one line; three processes go on, and then one, to one's very weights."""
    told = finish(start(2, folder, "killed"), codes=[3, -9])
    assert "another process of this job ended" in told[0] and "Traceback" not in told[0]
    finish(start(3, folder, "resumed"))
