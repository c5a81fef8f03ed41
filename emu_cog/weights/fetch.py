"""Bytes from a server into files: resumed, verified, several at a time. Knows ranges and hashes, nothing of models."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from emu_cog.errors import CheckpointError
from emu_cog.log import log
from emu_cog.weights.http import ChangedError, FetchError, Patience, Remote, Stopped, Transient, open_range, retrying
from emu_cog.weights.manifest import Entry, feed


class DiskFullError(CheckpointError):
    """There is no room for the weights; no other source can help."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """`size` bytes of `remote` from `offset` on, to be put into the file `path`.

    What `path` already holds is taken for the beginning. `sha256` or `git_sha1` (the hub's hash of files kept in git:
    the SHA-1 of "blob <size>\\0" and the content), where given, decides whether the whole is right.
    """

    remote: Remote
    path: Path
    size: int
    offset: int = 0
    sha256: str | None = None
    git_sha1: str | None = None


class Meter(Protocol):
    """What counts bytes: `found` those that were there already, `add` those that arrived, `lose` those to do again."""

    def found(self, count: int) -> None: ...
    def add(self, count: int) -> None: ...
    def lose(self, count: int) -> None: ...


def fetch_piece(
    piece: Piece, *, meter: Meter, patience: Patience, stop: threading.Event | None = None, tries: int = 3
) -> Entry:
    """Download `piece`; returns its size and SHA-256. Content with a wrong hash is fetched again, `tries` times in all.

    Raises FetchError, DiskFullError or Stopped; what arrived stays in `piece.path` for the next call.
    """
    stop = stop or threading.Event()
    for attempt in range(1, tries + 1):
        digest, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % piece.size)
        if piece.path.exists() and piece.path.stat().st_size > piece.size:
            piece.path.unlink()
        have = feed(piece.path, digest, git, progress=meter.found) if piece.path.exists() else 0
        _append(piece, have, (digest, git), meter=meter, patience=patience, stop=stop)
        wrong = [
            f"{name} {got.hexdigest()}, expected {expected}"
            for name, got, expected in (("SHA-256", digest, piece.sha256), ("git SHA-1", git, piece.git_sha1))
            if expected is not None and got.hexdigest() != expected
        ]
        if not wrong:
            return Entry(piece.size, digest.hexdigest())
        piece.path.unlink()
        meter.lose(piece.size)
        if attempt < tries:
            log.warning("%s arrived altered (%s): downloading it again", piece.path.name, wrong[0])
    raise FetchError(f"{piece.remote.url} arrived altered, {tries} time(s): {piece.path.name} has {wrong[0]}")


def _append(
    piece: Piece, have: int, digests: tuple[Any, ...], *, meter: Meter, patience: Patience, stop: threading.Event
) -> None:
    """Complete `piece.path`, of which `have` bytes are there, updating `digests` and `meter`."""
    piece.path.parent.mkdir(parents=True, exist_ok=True)
    with raising_disk_full(piece.path), piece.path.open("ab") as file:

        def read_on() -> None:
            nonlocal have
            want = piece.offset + have
            with open_range(piece.remote, want, piece.offset + piece.size, patience=patience) as body:
                skip = want - body.start
                for block in body.blocks():
                    if stop.is_set():
                        raise Stopped
                    data = block[skip : skip + piece.size - have]
                    skip = max(0, skip - len(block))
                    file.write(data)
                    for digest in digests:
                        digest.update(data)
                    have += len(data)
                    meter.add(len(data))
                    if have == piece.size:
                        return
                raise Transient(f"the answer ended at {have} of {piece.size} bytes")

        def attempt() -> None:
            begun, before = time.monotonic(), have
            try:
                if have < piece.size:
                    read_on()
            except Transient as error:
                # A connection that was at least slow, rather than dead, has moved the download on.
                error.progressed = have - before > patience.slowest * (time.monotonic() - begun)
                raise
            except ChangedError as error:
                if piece.sha256 is None and piece.git_sha1 is None:
                    raise
                raise Transient(str(error)) from None  # its hash says what it must be: the server may come round

        retrying(attempt, what=piece.path.name, patience=patience, stop=stop)
        file.flush()
        os.fsync(file.fileno())


def fetch_all(
    pieces: Iterable[Piece],
    *,
    workers: int,
    meter: Meter,
    patience: Patience,
    done: Callable[[Piece, Entry], None],
    tries: int = 3,
) -> None:
    """`fetch_piece` for each, `workers` at a time, small ones first.

    `done` is called, in this thread, for each that is whole. The first failure stops the others and is raised.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="weights") as pool:
        futures = {
            pool.submit(fetch_piece, piece, meter=meter, patience=patience, stop=stop, tries=tries): piece
            for piece in sorted(pieces, key=lambda piece: piece.size)
        }
        try:
            for future in as_completed(futures):
                done(futures[future], future.result())
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def raising_disk_full(path: Path) -> Iterator[None]:
    """Turn the system's errors for a full disk, quota or file size limit into a DiskFullError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFullError(
            f"no room to write {path} ({error.strerror}; {gigabytes(shutil.disk_usage(path.parent).free)} free on its "
            "disk). What arrived is kept and the next start resumes from there: free space, or set EMU_WEIGHTS_DIR "
            "to a folder on a larger disk"
        ) from None


def require_space(folder: Path, need: int, what: str) -> None:
    """DiskFullError, with the numbers, if fewer than `need` bytes (and a hundredth more) are free under `folder`."""
    free = shutil.disk_usage(folder).free
    if free < need + need // 100:
        raise DiskFullError(
            f"{what} needs {gigabytes(need)} more on the disk of {folder}, where {gigabytes(free)} are free: free "
            f"{gigabytes(need + need // 100 - free)}, or set EMU_WEIGHTS_DIR to a folder on a larger disk"
        )


def gigabytes(count: float) -> str:
    """A number of bytes, for people: `68.2 GB`, `930 bytes`. Powers of ten, as the hub counts."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
