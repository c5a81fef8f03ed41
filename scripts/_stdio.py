"""Standard streams that may be closed, broken or full: a script's own messages never end it."""

from __future__ import annotations

import os
import sys

_line_is_open = False


def ensure_open() -> None:
    """Put /dev/null where a standard stream is closed (`2>&-`), else the next file opened would take its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number, which is this one
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def note(text: str, *, end: str = "\n") -> None:
    """Write to standard error; from the first failure on (a closed pipe, a full disk) to nowhere.

    A whole line never begins within one that an `end=""` left open, such as a progress bar.
    """
    global _line_is_open
    if end and _line_is_open:
        text = f"\n{text}"
    _line_is_open = not (text + end).endswith("\n")
    try:
        sys.stderr.write(text + end)
        sys.stderr.flush()
    except OSError:
        discard(2)


def result(text: str) -> None:
    """Write a line to standard output. A reader that is gone (`| head -1`) is no error; a full disk is an OSError."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard(1)
    except OSError as error:
        discard(1)
        raise OSError(error.errno, f"standard output can't be written: {error.strerror}") from None


def sentence(error: OSError) -> str:
    """An OSError in words, without its number."""
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"


def discard(number: int) -> None:
    """Send all further output on this file descriptor to /dev/null, the flush at exit included."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
