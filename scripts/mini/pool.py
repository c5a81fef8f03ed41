"""Sample generation in worker processes. Each chunk has its own seed, so results do not depend on the worker count."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
Item = TypeVar("Item")


def workers() -> int:
    """Number of worker processes: the available cores minus one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return max(1, cores - 1)


def prefetched(work: Callable[[Item], Result], items: Sequence[Item], *, processes: int) -> Iterator[Result]:
    """Like `mapped`, but the work starts immediately, before results are requested."""
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork"))
    results = pool.map(work, items)

    def given() -> Iterator[Result]:
        try:
            yield from results
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    return given()


def mapped(work: Callable[[Item], Result], items: Sequence[Item], *, processes: int | None = None) -> Iterator[Result]:
    """`work` over `items` in order, in forked processes if more than one core is available."""
    count = processes or workers()
    if count == 1:
        yield from map(work, items)
        return
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(work, items)


SQUARE = (12, 12)
AREA = 192 * 192
"""Pixels per picture, the checkpoint's default for every task."""
OTHER_SIZES = ((10, 13), (13, 10), (10, 14), (14, 10), (10, 16), (16, 10), (11, 14), (14, 11), (9, 15), (15, 9))
"""(rows, columns) of the aspect-ratio presets at that area, to which references of those shapes are resized."""
