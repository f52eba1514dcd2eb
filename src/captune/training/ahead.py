"""Preparing a step while the one before is computed."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")


def ahead(items: Iterator[Item]) -> Generator[Item]:
    """``items``, each made in a thread while the caller works on the one before it.

    Both compute on half of torch's threads: two jobs side by side keep the cores busier than one
    job whose short operations are each divided, for then all threads wait at the end of each. What
    making an item raises reaches the caller in its place. Close what is returned
    (:func:`contextlib.closing`): that ends the thread and gives the caller all threads back.

    Args:
        items: made without a draw from torch's global generator and without a word to other
            processes, whose order both would depend on who is faster.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads((threads + 1) // 2)  # a thread that starts from here on has them, too
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
            coming = pool.submit(next, items, None)
            while (item := coming.result()) is not None:
                coming = pool.submit(next, items, None)
                yield item
    finally:
        torch.set_num_threads(threads)
