"""Examples in bulk: worker processes make them, each chunk from a seed of its own, so that any number of workers
gives the same examples."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
Item = TypeVar("Item")


def workers() -> int:
    """Processes worth starting here: all cores this process may use but one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return max(1, cores - 1)


def begin(work: Callable[[Item], Result], items: Sequence[Item], *, processes: int) -> Iterator[Result]:
    """As `mapped`, but the work begins with this call and goes on while nobody asks for results."""
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork"))
    results = pool.map(work, items)

    def given() -> Iterator[Result]:
        try:
            yield from results
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    return given()


def mapped(work: Callable[[Item], Result], items: Sequence[Item], *, processes: int | None = None) -> Iterator[Result]:
    """`work` over `items` in order, in forked processes where there are cores for them."""
    count = processes or workers()
    if count == 1:
        yield from map(work, items)
        return
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(work, items)


SQUARE = (12, 12)
AREA = 192 * 192
"""Pixels of a picture, the checkpoint's default for every task."""
OTHER_SIZES = ((10, 13), (13, 10), (10, 14), (14, 10), (10, 16), (16, 10), (11, 14), (14, 11), (9, 15), (15, 9))
"""What the presets give at that area, and what references of those shapes are resized to."""
