"""Progress of a long transfer: tqdm's bar on a terminal, elsewhere tqdm's line in the log at intervals."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm

from emu_cog.log import log

LOG_EVERY = 15.0
"""Seconds; also what the logged rate and time left are averaged over, roughly."""
_CALL_EVERY = 0.5
_LINE = "{desc}: {n_fmt}B of {total_fmt}B ({percentage:.0f} %), {rate_fmt}, {remaining} left"
_LINE_WITHOUT_TOTAL = "{desc}: {n_fmt}B, {rate_fmt}"


class Progress:
    """Counts bytes from any thread. A context manager; `total` in bytes, None where it is not known.

    `on_progress` is called with (bytes done, bytes in all or 0) at most twice a second and once at the end.
    """

    def __init__(self, label: str, total: int | None, *, on_progress: Callable[[int, int], None] | None = None) -> None:
        self._on_progress = on_progress
        self._called = time.monotonic()
        self._lock = threading.Lock()
        common: dict[str, Any] = {"desc": label, "total": total, "unit": "B", "unit_scale": True, "miniters": 1}
        self._bar: tqdm[Any]
        if sys.stderr.isatty():
            self._bar = tqdm(file=sys.stderr, dynamic_ncols=True, **common)
        else:
            self._bar = _LogLines(**common)

    @property
    def done(self) -> int:
        return int(self._bar.n)

    def found(self, count: int) -> None:
        """`count` bytes were there already: done, but no part of the rate."""
        self._count(count, arrived=False)

    def add(self, count: int) -> None:
        """`count` bytes arrived."""
        self._count(count, arrived=True)

    def lose(self, count: int) -> None:
        """`count` bytes must be done again."""
        self._count(-count, arrived=False)

    def _count(self, count: int, *, arrived: bool) -> None:
        with self._lock:
            if not arrived:
                self._bar.n += count
                self._bar.initial += count
                self._bar.last_print_n += count
            self._bar.update(count if arrived else 0)
            if time.monotonic() - self._called > _CALL_EVERY:
                self._call()

    def _call(self) -> None:
        self._called = time.monotonic()
        if self._on_progress is not None:
            self._on_progress(self.done, int(self._bar.total or 0))

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._call()


class _LogLines(tqdm):  # type: ignore[type-arg]
    """A bar whose every display is a line in the log."""

    def __init__(self, *, total: int | None, **options: Any) -> None:
        super().__init__(
            total=total,
            file=io.StringIO(),  # what tqdm writes itself, which is to move the cursor
            bar_format=_LINE_WITHOUT_TOTAL if total is None else _LINE,
            mininterval=LOG_EVERY,
            delay=LOG_EVERY,
            leave=False,
            **options,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:  # else it is the empty text with which a bar is wiped
            log.info("%s", self)
