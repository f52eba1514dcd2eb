"""Several processes that do one job: who they are, and what they tell one another.

``torchrun`` and ``accelerate launch`` start the same command several times and say in the
environment which of them each is. All walk the same way through captune; what must be done once is
done by process 0, *the main one*, and what it found is told to the others.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from filelock import FileLock
from torch import Tensor

from captune.errors import CaptuneError

T = TypeVar("T")

# What ends a wait is that the other side's connection closes; this only bounds a frozen machine.
LONGEST_WAIT = timedelta(days=1)

SECONDS_TO_APPEAR = 90.0  # network file systems look again at a folder after a minute


class ProcessLostError(CaptuneError):
    """Another process of the job ended while this one was waiting for it."""


class Processes:
    """The ``count`` processes of a job, seen by number ``rank``.

    With a count of 1 nothing is sent anywhere, and torch.distributed is not touched. All methods
    but :meth:`share` are collective: every process must call them, in the same order.

    Args:
        rank: from 0, which is the main one.
        count: at least 1.
        host: the group for what lies in host memory.
    """

    def __init__(
        self, rank: int = 0, count: int = 1, host: dist.ProcessGroup | None = None
    ) -> None:
        self.rank = rank
        self.count = count
        self._host = host

    @property
    def main(self) -> bool:
        """Whether this one writes, prints and logs."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """This process's rows of ``rows``: as even as can be, in the order of the processes."""
        return slice(rows * self.rank // self.count, rows * (self.rank + 1) // self.count)

    # -- agreement --------------------------------------------------------------------------
    def from_main(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the main process, which alone calls it: what JSON can hold.

        Raises:
            CaptuneError: in all processes, where ``make`` raised it in the main one.
        """
        if self.count == 1:
            return make()
        if not self.main:
            said = json.loads(self._broadcast(b""))
            if "error" in said:
                raise CaptuneError(said["error"])
            return said["value"]  # type: ignore[no-any-return]
        try:
            value = make()
        except CaptuneError as error:
            self._broadcast(json.dumps({"error": str(error)}).encode())
            raise
        self._broadcast(json.dumps({"value": value}).encode())
        return value

    def wait_for_main(self) -> None:
        """Go on when the main process, too, has come here."""
        self.from_main(lambda: None)

    def main_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns here, after the main process has called it: what it downloads is
        then on disk.

        Raises:
            CaptuneError: as :meth:`from_main`.
        """
        made: list[T] = []
        self.from_main(lambda: made.append(make()))
        return made[0] if made else make()

    @contextlib.contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        """Keep other jobs from writing ``folder`` meanwhile."""
        with FileLock(f"{folder}.lock") if self.main else contextlib.nullcontext():
            yield

    def see(self, path: Path) -> None:
        """See that all processes find the file that the main one has just written.

        Raises:
            CaptuneError: one does not; its machine does not share the folder.
        """
        waited = time.monotonic() + SECONDS_TO_APPEAR
        while self.count > 1 and not path.is_file() and time.monotonic() < waited:
            time.sleep(0.05)
        if self.any(not path.is_file()):
            raise CaptuneError(
                f"{path} was written and is not seen on every machine: runs and $CAPTUNE_CACHE "
                "must lie in folders that all machines of the job share"
            )

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in one of them at least."""
        if self.count == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.uint8)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._host)
        return bool(flags)

    def check_same(self, words: str, what: str) -> None:
        """See that all processes hold the same ``words``.

        Raises:
            CaptuneError: one of them differs from the main one's; ``what`` names it.
        """
        if self.any(self.from_main(lambda: words) != words):
            raise CaptuneError(
                f"the processes do not see the same {what}: all machines need the same files, the "
                "same command and the same release of captune"
            )

    # -- exchange ---------------------------------------------------------------------------
    def all_rows(self, rows: Tensor) -> Tensor:
        """``(n, ...)`` of each process, n its own, to ``(sum of n, ...)`` in all, in their order.

        On the host and without a gradient; :func:`captune.training.sharing.gather` has one.
        """
        return torch.cat(self.rows_of_each(rows)) if self.count > 1 else rows

    def added(self, numbers: Tensor) -> Tensor:
        """``numbers``, on the host and of the same shape in each, added up over all processes."""
        if self.count == 1:
            return numbers
        total = numbers.clone()
        dist.all_reduce(total, group=self._host)
        return total

    def all_words(self, words: list[str]) -> list[str]:
        """The strings of all processes, in their order."""
        if self.count == 1:
            return words
        code = torch.tensor(list(json.dumps(words).encode()), dtype=torch.uint8)
        return [w for part in self.rows_of_each(code) for w in json.loads(bytes(part.tolist()))]

    def rows_of_each(self, rows: Tensor) -> list[Tensor]:
        """The rows ``(n, ...)`` of each process, n its own; on the host and without a gradient."""
        if self.count == 1:
            return [rows]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(rows)]), group=self._host)
        longest = max(map(int, sizes))
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded, group=self._host)
        return [part[: int(size)] for part, size in zip(found, sizes, strict=True)]

    def _broadcast(self, code: bytes) -> bytes:
        size = torch.tensor([len(code)])
        dist.broadcast(size, 0, group=self._host)
        body = torch.zeros(int(size), dtype=torch.uint8)
        if self.main:
            body = torch.tensor(list(code), dtype=torch.uint8)
        dist.broadcast(body, 0, group=self._host)
        return bytes(body.tolist())


ALONE = Processes()
_alone_depth = 0


def processes() -> Processes:
    """Those that this process belongs to; joined at the first call.

    Raises:
        CaptuneError: the environment says that there are several, but not how to reach them.
    """
    return ALONE if _alone_depth else _joined()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """What happens inside concerns this process only: the others are elsewhere meanwhile."""
    global _alone_depth
    _alone_depth += 1
    try:
        yield
    finally:
        _alone_depth -= 1


def launched() -> int:
    """How many processes the launcher started, as the environment says; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


@functools.cache
def _joined() -> Processes:
    if launched() == 1:
        return ALONE
    if not dist.is_available():
        raise CaptuneError(f"WORLD_SIZE={launched()}, but this torch has no torch.distributed")
    if not dist.is_initialized():
        _initialise()
    host = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    return Processes(dist.get_rank(), dist.get_world_size(), host)


def _initialise() -> None:
    missing = [k for k in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(k)]
    if missing:
        raise CaptuneError(
            f"WORLD_SIZE={launched()}, but {', '.join(missing)} not set: start with torchrun, or "
            "unset WORLD_SIZE to train in one process"
        )
    if torch.cuda.is_available():
        local, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= cards:
            raise CaptuneError(
                f"process {local} of this machine has no GPU of its own, {cards} are there: start "
                f"with --nproc-per-node {cards}, or with CUDA_VISIBLE_DEVICES= on the CPU"
            )
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (RuntimeError, ValueError) as error:
        raise CaptuneError(f"the other processes cannot be reached: {error}") from None


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Turn a broken connection to another process into one clear line.

    Raises:
        ProcessLostError: another process ended.
    """
    try:
        yield
    except RuntimeError as error:  # gloo's, through autograd too, are plain ones
        lost = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
        if launched() == 1 or not lost:
            raise
        raise ProcessLostError(
            "another process of this job ended, so this one cannot go on: what it said tells why; "
            "a training goes on from its last saved step with --resume"
        ) from None


def leave() -> None:
    """Say goodbye, so that no process ends in the middle of what another one sends, or with its
    own threads at work."""
    if _joined.cache_info().currsize and dist.is_available() and dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # another one has ended already
            dist.destroy_process_group()
        _joined.cache_clear()
        # Its threads may just hold the last tensor that went anywhere, and need the interpreter to
        # let it go: where that has ended they abort the process.
        time.sleep(0.1)
