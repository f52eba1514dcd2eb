"""Several processes against one: gradients, whole runs, what stops them, and where they go on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from captune import processes as processes_module
from captune.errors import CaptuneError
from conftest import COLOURS, write_scene
from shards import write_shards

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
    rows = [
        f"{path.relative_to(found)},{path.stem.replace('_', ' ')},{path.parent.name}"
        for path in sorted(found.glob("[tv]*/*.jpg"))
    ]
    (found / "scenes.csv").write_text("\n".join(["image,caption,split", *rows]), encoding="utf-8")
    write_shards(found / "shards", [9, 1, 6, 4], captions=2)
    # All that the first of several processes holds of a batch, and one of a later one's.
    for path in sorted((found / "broken").glob("*.jpg"))[:9]:
        path.write_bytes(b"no picture")
    return found


class Begun(NamedTuple):
    """A process, and the file that it writes into: a pipe that nobody reads would stop it."""

    process: subprocess.Popen[bytes]
    log: Path


def free_port() -> int:
    """Below those that outgoing connections are given: one of them might take it before the job's
    first process, which imports for seconds, listens there."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def start(
    world: int,
    folder: Path,
    *jobs: str,
    within: Sequence[Sequence[str]] = (),
    address: str = "",
    command: Sequence[str] = (),
) -> list[Begun]:
    """The processes of a job, as a launcher starts them; ``within``: words before each command;
    ``command``: of captune, in place of a job."""
    words = ["-m", "captune", *command] if command else [str(JOB), str(folder), *jobs]
    port = free_port()
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
                [*(within[rank] if within else ()), sys.executable, *words],
                env={**os.environ, **{key: str(value) for key, value in own.items()}},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        begun.append(Begun(process, log))
    return begun


def finish(begun: list[Begun], codes: Sequence[int] = ()) -> list[str]:
    """What each process said, once all have ended as they should."""
    try:
        found = [process.wait(timeout=240) for process, _ in begun]
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


ONE_BY_ONE = (
    "every_kind overlap again own_statistics stores ranks whole stopped streamed masks "
    "too_large told refused"
)


@pytest.mark.parametrize(
    ("world", "jobs"), [(2, ONE_BY_ONE.split()), (3, ["every_kind", "overlap", "ranks", "refused"])]
)
def test_several_processes_do_what_one_does(world: int, jobs: list[str], folder: Path) -> None:
    said = finish(start(world, folder, *jobs))
    assert [words.count(": done") for words in said] == [len(jobs)] * world


def test_a_process_without_a_card_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "x"}
    for name, value in {**names, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(CaptuneError, match=r"1 are there.*--nproc-per-node 1, or.*on the CPU"):
        processes_module._initialise()


@pytest.fixture
def two_nodes() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces with a cable between them: nodes that share a file system alone."""
    names = [f"captune-{os.getpid()}-{end}" for end in "ab"]
    cables = [f"ct{os.getpid() % 10**6}{end}" for end in "ab"]
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1], skip=True)
    try:
        for place, (name, cable) in enumerate(zip(names, cables, strict=True), 1):
            ip("netns", "add", name, skip=True)
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "address", "add", f"10.213.0.{place}/24", "dev", cable)
            for device in (cable, "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield list(zip(names, cables, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        subprocess.run(["ip", "link", "delete", cables[0]], capture_output=True)


def ip(*words: str, skip: bool = False) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode and skip:
        pytest.skip(f"network namespaces are not permitted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


def test_two_nodes_are_one_process(folder: Path, two_nodes: list[tuple[str, str]]) -> None:
    """Each has a network of its own: nothing goes over the loopback, which they do not share."""
    within = [
        ("ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={cable}")
        for name, cable in two_nodes
    ]
    said = finish(start(2, folder, "best", "broken", within=within, address="10.213.0.1"))
    assert all("best: done" in words and "broken: done" in words for words in said)


def test_commands_are_shared_and_one_process_prints(folder: Path) -> None:
    """The command line under a launcher: the result once, errors in one line, and what one process
    does is refused."""
    keys = (
        f"image_encoder={folder}/tiny-resnet text_encoder={folder}/tiny-sentence/model "
        "head_epochs=1 num_epochs=1 batch_size=7 head_batch_size=7 bank_negatives=8 "
        "hidden_dim=32 num_workers=0 log_with=none"
    )
    run = str(folder / "commanded")
    for command, printed in (
        (["train", str(folder / "scenes.csv"), "--out", run, *keys.split()], "rsum"),
        (["evaluate", run], "rsum"),
    ):
        main, other = finish(start(2, folder, command=command))
        assert printed in main and "Traceback" not in main + other
        assert printed not in other, other
    for command, code, error in (
        (["search", run, "a red square"], [2, 2], "search runs in one process, and 2 were started"),
        (["evaluate", str(folder / "nowhere")], [2, 2], "nowhere"),
    ):
        for said in finish(start(2, folder, command=command), codes=code):
            assert said.count("captune: error: ") == 1 and error in said
            assert "Traceback" not in said
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    place = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command = ["-m", "captune", "evaluate", run, "--json"]
    done = subprocess.run(
        [sys.executable, *launcher, *place, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["images"] > 0  # what the main one printed, and nothing else


def test_what_fails_while_gradients_are_sent_ends_with_its_own_code(folder: Path) -> None:
    said = finish(start(2, folder, "in_the_pass"), codes=[2, 3])
    assert "it failed in the pass" in said[0] and "another process of this job ended" in said[1]
    assert all("Traceback" not in words for words in said)


def test_a_killed_process_leaves_a_run_that_another_number_resumes(folder: Path) -> None:
    """The others end with one line; three processes go on, and then one, to one's very weights."""
    told = finish(start(2, folder, "killed"), codes=[3, -9])
    assert "another process of this job ended" in told[0] and "Traceback" not in told[0]
    finish(start(3, folder, "resumed"))
