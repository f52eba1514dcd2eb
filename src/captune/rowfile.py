"""An array on disk whose rows are computed in batches: resumable, and opened only when whole."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from captune.errors import CaptuneError
from captune.files import write_json
from captune.processes import processes

SECONDS_BETWEEN_MARKS = 10.0  # rows may be written scattered, so a flush is costly

Halves = npt.NDArray[np.float16]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowFile:
    """``name.npy`` in ``folder``: ``shape`` float16. On the way ``partial.*`` hold what is done.

    ``fingerprint`` tells whether what an interrupted computation left belongs to this one.
    """

    folder: Path
    name: str
    shape: tuple[int, int]
    fingerprint: str

    @property
    def path(self) -> Path:
        """The whole array; not there until it is."""
        return self.folder / f"{self.name}.npy"

    @property
    def _partial(self) -> Path:
        return self.folder / (
            "partial.npy" if self.name == "embeddings" else f"partial-{self.name}.npy"
        )

    @property
    def _mark(self) -> Path:
        return self._partial.with_suffix(".json")

    def fill(
        self,
        order: Rows,
        compute: Callable[[Rows], Halves],
        *,
        batch: int,
        words: str,
        unit: str,
        progress: bool,
    ) -> None:
        """Compute what is not there yet, ``batch`` rows at a time in ``order``, and make it whole.

        Several processes take turns, a batch each; the main one writes what all have computed.

        Args:
            order: ``(N,)`` a permutation of the rows.
            compute: row numbers ``(n,)`` to their values ``(n, D)``.
            words, unit: of the progress bar.
        """
        here = processes()
        done = here.from_main(self._rows_done)
        if not here.main:
            for start in range(done, len(order), here.count * batch):
                self._of_all(order[start:], compute, batch)
            return
        array = np.lib.format.open_memmap(
            self._partial, mode="r+" if done else "w+", dtype=np.float16, shape=self.shape
        )
        total = len(order)
        bar = tqdm(total=total, initial=done, desc=words, unit=unit, disable=not progress)
        try:
            marked = time.monotonic()
            with bar:
                for start in range(done, total, here.count * batch):
                    rows = order[start : start + here.count * batch]
                    array[rows] = self._of_all(rows, compute, batch)
                    bar.update(len(rows))
                    if time.monotonic() - marked >= SECONDS_BETWEEN_MARKS:
                        array.flush()
                        position = {"fingerprint": self.fingerprint, "done": start + len(rows)}
                        write_json(self._mark, position)
                        marked = time.monotonic()
        finally:
            array.flush()
            array._mmap.close()  # type: ignore[attr-defined]  # Windows renames no mapped file
        self._partial.replace(self.path)
        self._mark.unlink(missing_ok=True)

    def _of_all(self, rows: Rows, compute: Callable[[Rows], Halves], batch: int) -> Halves:
        """The values of the next ``batch`` rows of each process, of which each computes its own."""
        here = processes()
        mine = rows[here.rank * batch : (here.rank + 1) * batch]
        values = compute(mine) if len(mine) else np.empty((0, self.shape[1]), np.float16)
        return values if here.count == 1 else here.all_rows(torch.from_numpy(values)).numpy()

    def _rows_done(self) -> int:
        """How many rows of an interrupted computation can be kept; 0 where it is not this one's."""
        try:
            position = json.loads(self._mark.read_text(encoding="utf-8"))
            array = np.load(self._partial, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):  # numpy's word for an empty file
            return 0
        same = array.shape == self.shape and array.dtype == np.float16
        array._mmap.close()
        if not (same and isinstance(position, dict)):
            return 0
        return int(position["done"]) if position.get("fingerprint") == self.fingerprint else 0

    def open(self, what: str) -> Halves:
        """The whole array, memory-mapped, read only.

        Raises:
            CaptuneError: missing, unreadable or of another shape; ``what`` names it.
        """
        try:
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise CaptuneError(f"the {what} in {self.folder} is damaged ({error})") from None
        if array.shape != self.shape or array.dtype != np.float16:
            if isinstance(array, np.memmap):
                array._mmap.close()  # type: ignore[attr-defined]
            raise CaptuneError(f"the {what} in {self.folder} is damaged: wrong shape")
        return array  # type: ignore[no-any-return]
