"""Replicate's parallel downloader, where its binary is on PATH. (The PyPI package of that name is another thing.)

    pget URL FOLDER -x     unpacks the tar while it downloads

It writes each file from its beginning, in the archive's order, so what it left when it ended early can be completed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from emu_cog.log import log
from emu_cog.weights.fetch import Meter
from emu_cog.weights.http import Patience

_LOOK_EVERY = 0.5


def program() -> str | None:
    return shutil.which("pget")


def unpack(url: str, folder: Path, *, meter: Meter, patience: Patience) -> bool:
    """Run pget into `folder`. False, told in the log, if it failed, or wrote nothing for twice the stall time."""
    binary = program()
    assert binary is not None
    clear(folder)
    log.info("pget unpacks %s", url)
    with tempfile.TemporaryFile() as output, _held(folder) as handle:
        # The child inherits the lock: should this process be killed, the next start sees that pget still writes.
        command = [binary, url, str(folder.absolute()), "-x"]
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, pass_fds=(handle,)
        )
        try:
            stalled = _watch(child, folder, meter, patience)
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
        output.seek(0)
        said = output.read()[-500:].decode(errors="replace").strip()
    if child.returncode == 0:
        return True
    why = "wrote nothing for too long and was stopped" if stalled else f"ended with {child.returncode}"
    log.warning("pget %s; going on without it%s", why, f". It said: {said}" if said else "")
    return False


def wait_for_orphan(folder: Path) -> None:
    """Wait until no pget of a killed process writes into `folder` any more."""
    if not _lock_file(folder).exists():
        return
    with _held(folder, why="a pget that outlived its program is still unpacking; waiting for it to end"):
        pass


def clear(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    _lock_file(folder).unlink(missing_ok=True)


def _watch(child: subprocess.Popen[bytes], folder: Path, meter: Meter, patience: Patience) -> bool:
    """Count what appears in `folder` until pget ends. True if nothing did for too long."""
    seen, since = 0, time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_LOOK_EVERY)
        size = _size(folder)
        if size > seen:
            meter.add(size - seen)
            seen, since = size, time.monotonic()
        if child.poll() is not None:
            return False
        if time.monotonic() - since > 2 * patience.stall:
            return True


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size if path.is_file() else 0
    return total


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


@contextlib.contextmanager
def _held(folder: Path, why: str = "") -> Iterator[int]:
    """An exclusive lock beside `folder`, released when every holder of the descriptor has closed it."""
    handle = os.open(_lock_file(folder), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("%s", why)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)
