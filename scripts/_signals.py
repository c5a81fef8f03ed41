"""Ctrl-C, SIGTERM and SIGHUP as one exception, so that a script stops its server on every way out."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal that asks the script to end. `code` is the exit code that shells expect: 130 for Ctrl-C, 143, 129."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


def raise_stopped() -> None:
    """Let each of ALL raise Stopped in the main thread. SIGHUP stays ignored under nohup."""
    for number in ALL:
        # Shells start background jobs with SIGINT ignored; `kill -INT` must stop them all the same.
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _raise)


def exit_code(main: Callable[[], int]) -> int:
    """Run `main`. Signals that arrive while it ends, or after it, are no traceback either."""
    try:
        code = main()
    except Stopped as stopped:
        code = stopped.code
    for number in ALL:
        signal.signal(number, signal.SIG_IGN)
    return code


@contextmanager
def first_calls(function: Callable[[], None]) -> Iterator[list[int]]:
    """In this block the first signal calls `function`, the next raises Stopped. Yields the signals that arrived."""
    arrived: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        if len(arrived) > 1:
            _raise(number, frame)
        function()

    changed = [number for number in ALL if signal.getsignal(number) == _raise]
    for number in changed:
        signal.signal(number, handle)
    try:
        yield arrived
    finally:
        for number in changed:
            signal.signal(number, _raise)


def _raise(number: int, _frame: FrameType | None) -> None:
    raise Stopped(number)
