"""Which device, in which precision, with how many processes that decode."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from captune import device as hardware


def test_fp16_and_bf16_are_chosen_by_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for capability, expected in (((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        assert hardware.choose_precision("auto", cuda) == expected
    for able, expected in (
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_f": True}, "fp32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda a=able: a, raising=False)
        assert hardware.choose_precision("auto", cpu) == expected
    assert hardware.choose_precision("auto", torch.device("mps")) == "fp32"
    assert hardware.choose_precision("fp16", cpu) == "fp16"


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(1, 1, 1), (2, 1, 1), (6, 1, 5), (6, 3, 1), (64, 1, 16)]
)
def test_workers_leave_a_core_of_those_that_are_given(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, workers: int
) -> None:
    """Of 128 in the machine: a batch system gives a job a part of them."""
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert hardware.loader_workers(-1) == workers
    assert hardware.loader_workers(-1, torch.device("cuda")) == workers
    # What computes on the CPU needs all of its cores: photos are decoded between steps.
    assert hardware.loader_workers(-1, torch.device("cpu")) == 0
    assert hardware.loader_workers(2, torch.device("cpu")) == 2
    assert hardware.loader_workers(0) == 0 and hardware.loader_workers(40) == 40


def test_where_no_cores_are_assigned_all_of_them_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert hardware.loader_workers(-1) == 3


def test_what_torch_keeps_for_later_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3, 16))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 11)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 4)
    assert hardware.free_memory(torch.device("cuda")) == 3 + 11 - 4


def wait_for_the_end() -> None:
    hardware.leave_stopping_to_main(0)
    time.sleep(60)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="signals tell no sender")
def test_a_loader_is_ended_by_the_main_process_alone() -> None:
    loader = multiprocessing.get_context("fork").Process(target=wait_for_the_end)
    loader.start()
    time.sleep(0.5)  # until it listens
    numbers = [int(number) for number in (signal.SIGINT, signal.SIGTERM)]
    kill = f"import os; [os.kill({loader.pid}, number) for number in {numbers}]"
    subprocess.run([sys.executable, "-c", kill], check=True)
    loader.join(1)
    assert loader.is_alive()
    loader.terminate()
    loader.join(30)
    assert loader.exitcode == 0
