"""A remote tar's headers and contents. No member is trusted: links, devices and names that lead outside are refused."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

from emu_cog.weights.checkpoint import Part
from emu_cog.weights.http import BLOCK, Body, Patience, RefusedError, Remote, open_range, retrying

_WINDOW = 64 << 10
"""Bytes asked for at a time while only headers are read, and taken at a time from a stream."""
_MOST_MEMBERS = 100_000


@dataclass(frozen=True)
class Member:
    """A wanted file of an archive: `size` bytes from `offset` in the tar, to become `name` in the folder of `part`."""

    part: Part
    name: str
    path: PurePosixPath
    offset: int
    size: int


def survey(remote: Remote, parts: list[Part], *, patience: Patience) -> list[Member]:
    """The files of the archive that `parts` want. Reads only headers, by ranges: some ten kB a member."""
    with _open_tar(_RangeFile(remote, patience), "r:", remote.url) as tar:
        return [member for member, _ in _wanted(tar, remote, parts)]


def contents(body: Body, remote: Remote, parts: list[Part]) -> Iterator[tuple[Member, Iterator[bytes]]]:
    """The wanted files of an archive that comes in one stream, in blocks, to be read in this order or left unread."""
    with _open_tar(_Forward(body), "r|", remote.url) as tar:
        for member, info in _wanted(tar, remote, parts):
            file = tar.extractfile(info)
            assert file is not None  # only for members that are no files
            yield member, _blocks(file, member, remote.url)


def _blocks(file: IO[bytes], member: Member, url: str) -> Iterator[bytes]:
    try:
        while block := file.read(BLOCK):
            yield block
    except tarfile.TarError as error:
        raise RefusedError(f"{url} is cut off or damaged within {member.path} ({error})") from None


def _wanted(tar: tarfile.TarFile, remote: Remote, parts: list[Part]) -> Iterator[tuple[Member, tarfile.TarInfo]]:
    seen: set[tuple[str, str]] = set()
    count = 0
    while (info := tar.next()) is not None:
        count += 1
        if count > _MOST_MEMBERS:
            raise RefusedError(f"{remote.url} has over {_MOST_MEMBERS} members: it is no checkpoint")
        path = _checked(info, remote.url)
        place = _placed(path, parts)
        if place is None or not info.isreg():
            continue
        part, name = place
        if (part.key, name) in seen:
            raise RefusedError(f"{remote.url} is refused: it holds {part.folder}/{name} twice")
        seen.add((part.key, name))
        if remote.size is not None and info.offset_data + info.size > remote.size:
            raise RefusedError(f"{remote.url} is cut off: it ends within {info.name}")
        yield Member(part, name, path, info.offset_data, info.size), info


def _checked(info: tarfile.TarInfo, url: str) -> PurePosixPath:
    """The member's path. RefusedError unless it is a plain file or folder that stays inside."""
    path = PurePosixPath(info.name)
    if not (info.isreg() or info.isdir()) or info.issparse():
        kind = "a link" if info.issym() or info.islnk() else "neither a plain file nor a folder"
        raise RefusedError(f"{url} is refused: its member {info.name!r} is {kind}")
    try:
        # The filter makes an absolute name relative; here it counts as a sign of ill will.
        if path.is_absolute() or ".." in path.parts:
            raise tarfile.OutsideDestinationError(info, info.name)
        tarfile.data_filter(info, "/destination")
    except tarfile.FilterError:
        raise RefusedError(f"{url} is refused: its member {info.name!r} points outside") from None
    return path


def _placed(path: PurePosixPath, parts: list[Part]) -> tuple[Part, str] | None:
    """Part and file name of `<folder>/<file>` or `<anything>/<folder>/<file>`."""
    if len(path.parts) not in (2, 3):
        return None
    folder, name = path.parts[-2:]
    return next(((part, name) for part in parts if folder in part.names and part.wants(name)), None)


@contextmanager
def _open_tar(file: IO[bytes] | io.BufferedIOBase | io.RawIOBase, mode: str, url: str) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(fileobj=file, mode=mode, bufsize=_WINDOW) as tar:  # type: ignore[call-overload]
            yield tar
    except tarfile.TarError as error:
        raise RefusedError(f"{url} is no tar, or a damaged one: {error}") from None


class _RangeFile(io.RawIOBase):
    """A remote file to seek and read in; asks for a window of bytes at a time."""

    def __init__(self, remote: Remote, patience: Patience) -> None:
        super().__init__()
        self._remote, self._patience = remote, patience
        self._position = self._window_start = 0
        self._window = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert self._remote.size is not None  # only surveyed when known
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._remote.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        assert self._remote.size is not None
        if self._position >= self._remote.size:
            return 0
        offset = self._position - self._window_start
        if not 0 <= offset < len(self._window):
            self._window = retrying(self._fetch, what="archive", patience=self._patience)
            self._window_start, offset = self._position, 0
        data = self._window[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _fetch(self) -> bytes:
        assert self._remote.size is not None
        stop = min(self._position + _WINDOW, self._remote.size)
        with open_range(self._remote, self._position, stop, patience=self._patience) as body:
            if not body.partial:
                raise RefusedError(f"{self._remote.url} is no longer sent in parts")
            return b"".join(body.blocks())


class _Forward(io.RawIOBase):
    """An answer's body as a file that is read once, from the beginning to the end."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self._blocks = body.blocks()
        self._block = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        if not self._block:
            self._block = memoryview(next(self._blocks, b""))
        count = min(len(buffer), len(self._block))
        buffer[:count] = self._block[:count]
        self._block = self._block[count:]
        return count
