"""Replicate's parallel downloader, where its binary is on PATH. (The PyPI package of that name is another thing.)

    pget URL FOLDER -x     unpacks the tar while it downloads

It writes each file from its beginning, in the archive's order, so what it left when it ended early can be completed.
On Linux only: there the kernel ends it together with this process, and two never write into one folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from emu_cog.errors import redacted
from emu_cog.log import log
from emu_cog.weights.fetch import Meter
from emu_cog.weights.http import Patience

_LOOK_EVERY = 0.5
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def program() -> str | None:
    return shutil.which("pget") if sys.platform == "linux" else None


def unpack(url: str, folder: Path, *, meter: Meter, patience: Patience) -> bool:
    """Run pget into `folder`. False, logged, if it failed, or wrote nothing for twice the stall time."""
    binary = program()
    assert binary is not None
    clear(folder)
    log.info("pget unpacks %s", redacted(url))
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()  # before the fork, after which little may be called

    def die_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)

    with tempfile.TemporaryFile() as output:
        # The kernel's signal follows the thread that starts the child, not the process. This thread waits for the
        # child below, whatever happens, so it can't end first unless the process does.
        child = subprocess.Popen(
            [binary, url, str(folder.absolute()), "-x"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
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
    log.warning("pget %s; going on without it%s", why, f". It said: {redacted(said)}" if said else "")
    return False


def clear(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


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
