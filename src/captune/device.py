"""Where to compute and in which precision: bf16 only where the hardware computes in it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading

import psutil
import pyarrow as pa
import torch
from torch import Tensor

from captune.errors import CaptuneError

MOST_WORKERS = 16  # each holds two batches and a Python of its own
MEMORY_TO_SPARE = 20e9  # bytes; a free Colab has 12 GB, and needs them


def best_device(name: str = "auto") -> torch.device:
    """``cuda``, ``mps`` or ``cpu``, whichever is there; ``cpu`` where asked for."""
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, which a step does not wait for.

    But on MPS it is waited for: what is copied there may be given back before it has been read.
    """
    return tensor.to(device, non_blocking=device.type != "mps")


def free_memory(device: torch.device) -> int:
    """Bytes that a tensor on a CUDA card can have, what torch keeps there for later included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def has_native_bf16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bf16 in hardware.

    CUDA from compute capability 8.0; CPUs with avx512_bf16 or AMX. Emulated bf16 (a T4, an old
    CPU) is slower than fp32 and no more exact than native.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    # torch >= 2.11 lists what the processor can do; earlier ones have a probe for each.
    listing = getattr(torch.cpu, "get_capabilities", None)
    if listing is not None:
        able = listing()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def choose_precision(name: str, device: torch.device) -> str:
    """``auto`` resolved for ``device``; any other name is passed through.

    bf16 where native; fp16 with loss scaling on other CUDA cards; else fp32.
    """
    if name != "auto":
        return name
    if has_native_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


def training_precision(name: str, device: torch.device) -> str:
    """:func:`choose_precision` for what has gradients.

    Raises:
        CaptuneError: fp16 on a CPU, where it would be fp32 without a word.
    """
    if name == "fp16" and device.type == "cpu":
        raise CaptuneError("precision=fp16 does not train on a CPU: take auto")
    return choose_precision(name, device)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Mixed precision for a forward pass in ``precision`` (``fp32``: none)."""
    if precision == "fp32":
        return contextlib.nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype)


def loader_workers(requested: int, device: torch.device | None = None) -> int:
    """Processes that decode images: as asked for, else by the machine.

    A step on the CPU (``device``) needs all of its cores: a process beside it would hold up one of
    its threads, and thereby all of them. There photos are decoded between two steps, by all cores.
    Else one core is left to the training step. Several training processes on a machine divide its
    cores among them. What counts is the cores that this process may use: a batch system often gives
    it a part of the machine's.
    """
    if requested >= 0:
        return requested
    if device is not None and device.type == "cpu":
        return 0
    own = getattr(os, "sched_getaffinity", None)  # Linux
    cores = len(own(0)) if own is not None else os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(1, min(MOST_WORKERS, cores - 1))


def leave_stopping_to_main(worker: int) -> None:
    """Only the main process acts on Ctrl-C and on a polite kill, which reach its loaders, too.

    A terminal interrupts all of its processes, and a batch system, a launcher or a container's end
    terminates all of a group. What the main process itself sends a loader is heeded.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux; elsewhere nothing tells who has sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_heed_main, args=(os.getppid(),), daemon=True).start()
    elif os.environ.get("LOCAL_WORLD_SIZE"):  # a launcher terminates all of them
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _heed_main(main: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != main:
        pass
    os._exit(0)


@functools.cache
def keep_freed_memory(device: torch.device) -> None:
    """Let the C library keep what a tensor gave back, for the next one; once for the process.

    glibc hands every large block back to the system and has it mapped and zeroed again page by
    page: on the CPU that can take a training step longer than its arithmetic does. Nothing happens
    for other devices, where the C library is another one, and where memory is short: what is kept
    has gaps, and a training may then hold half as much again.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    if psutil.virtual_memory().total < MEMORY_TO_SPARE:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from musl
    if mallopt is None:
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    for option, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 1 << 28)):
        mallopt(option, value)


@functools.cache
def compute_repeatably(device: torch.device) -> None:
    """Let a CUDA card choose kernels that give the same numbers each time; once for the process.

    Its fastest gradients of convolutions add up in whatever order they come, so that a seed would
    not give the same weights twice, nor a resumed run those of one that was never stopped. Where
    an operation has no such kernel it is done anyway. On the CPU all of them have.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may choose anew
    torch.backends.cudnn.benchmark = False  # chooses by the clock
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A guard that costs a pass each.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def give_back_freed_memory() -> None:
    """What the C library, torch's cache and Arrow's pool hold for later: the system gets it.

    Where memory ran out, this undoes :func:`keep_freed_memory`.
    """
    pa.default_memory_pool().release_unused()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform.startswith("linux"):
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent from musl
        if malloc_trim is not None:
            malloc_trim(0)
