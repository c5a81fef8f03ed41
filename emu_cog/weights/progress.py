"""How far a long transfer is: a bar on a terminal, a line in the log now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from emu_cog.log import log
from emu_cog.weights.fetch import gigabytes

_LOG_EVERY = 15.0
_RATE_OVER = 30.0
"""Seconds: the rate is that of the last half minute, so that the time left follows a change of the line."""


class Progress:
    """Counts bytes from any thread. A context manager; `total` in bytes, None where it is not known.

    `on_progress` is called with (bytes done, bytes in all or 0) at most twice a second and once at the end.
    """

    def __init__(self, label: str, total: int | None, *, on_progress: Callable[[int, int], None] | None = None) -> None:
        from tqdm import tqdm

        self.done, self.total = 0, total
        self._label, self._on_progress = label, on_progress
        self._bar = tqdm(
            total=total, desc=label, unit="B", unit_scale=True, file=sys.stderr, disable=None, dynamic_ncols=True
        )
        self._lock = threading.Lock()
        self._arrived = 0
        now = time.monotonic()
        self._marks = deque([(now, 0)])
        self._logged = self._told = now

    def found(self, count: int) -> None:
        """`count` bytes were there already: done, but no part of the rate."""
        self._count(count, arrived=0)

    def add(self, count: int) -> None:
        """`count` bytes arrived."""
        self._count(count, arrived=count)

    def lose(self, count: int) -> None:
        """`count` bytes must be done again."""
        self._count(-count, arrived=0)

    def _count(self, count: int, *, arrived: int) -> None:
        with self._lock:
            now = time.monotonic()
            self.done += count
            self._arrived += arrived
            self._move_bar(count, arrived)
            while len(self._marks) > 1 and now - self._marks[1][0] > _RATE_OVER:
                self._marks.popleft()
            if now - self._marks[-1][0] > 1:
                self._marks.append((now, self._arrived))
            if now - self._logged > _LOG_EVERY:
                self._logged = now
                log.info("%s", self.line(now))
            if self._on_progress is not None and now - self._told > 0.5:
                self._told = now
                self._on_progress(self.done, self.total or 0)

    def _move_bar(self, count: int, arrived: int) -> None:
        if self._bar.disable:
            return
        if not arrived:  # what did not come over the line must not count for the bar's rate
            self._bar.n += count
            self._bar.initial += count
            self._bar.last_print_n += count
        self._bar.update(arrived)

    def line(self, now: float) -> str:
        """For people: `Emu3.5-Image: 12.3 GB of 68.2 GB (18 %), 350.1 MB/s, 2 min 40 s left`."""
        then, before = self._marks[0]
        rate = (self._arrived - before) / max(now - then, 1e-3)
        if self.total is None:
            return f"{self._label}: {gigabytes(self.done)}, {gigabytes(rate)}/s"
        left = f"{duration((self.total - self.done) / rate)} left" if rate > 0 else "nothing arrives"
        share = 100 * self.done / max(self.total, 1)
        return f"{self._label}: {gigabytes(self.done)} of {gigabytes(self.total)} ({share:.0f} %), " + (
            f"{gigabytes(rate)}/s, {left}"
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._on_progress is not None:
            self._on_progress(self.done, self.total or 0)


def duration(seconds: float) -> str:
    """For people: `2 h 05 min`, `2 min 40 s`, `7 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole} s"
