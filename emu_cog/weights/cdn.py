"""Weights from a tar on a CDN: read by ranges and in parallel where the server can, else unpacked as it streams.

By ranges, the headers are read first; then every file is a piece of the tar that is fetched and resumed by itself,
or pget unpacks them all at once and what it leaves undone is completed that way.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from emu_cog.errors import redacted
from emu_cog.log import log
from emu_cog.weights import pget
from emu_cog.weights.checkpoint import Part
from emu_cog.weights.fetch import Piece, fetch_all, raising_disk_full, require_space
from emu_cog.weights.http import (
    ChangedError,
    FetchError,
    Patience,
    RefusedError,
    Remote,
    Transient,
    open_range,
    retrying,
)
from emu_cog.weights.manifest import Entry
from emu_cog.weights.progress import Progress
from emu_cog.weights.staging import Staging
from emu_cog.weights.tar import Member, contents, survey

_WORKERS = 16
"""Files fetched at once; the released checkpoint has 15 shards."""


@dataclass(frozen=True)
class Archive:
    """A tar at `url`. `pins` maps a part's key to the SHA-256 its files must have, as far as known.

    `scratch` is a folder, on the weights' disk, for pget to unpack in.
    """

    url: str
    pins: Mapping[str, Mapping[str, Entry]]
    patience: Patience
    scratch: Path
    on_progress: Callable[[int, int], None] | None = None

    def download(self, stagings: list[Staging], nearby: Mapping[str, list[Path]]) -> list[Staging]:
        """Fill those of `stagings` that the archive has; returns them, complete. Others are logged.

        `nearby` maps a part's key to incomplete local folders. Raises FetchError or DiskFullError.
        """
        for attempt in range(2):
            try:
                return self._download(stagings, nearby)
            except ChangedError as error:
                if attempt:
                    raise
                log.warning("%s: starting again with the file as it is now", error)
        raise AssertionError

    def _download(self, stagings: list[Staging], nearby: Mapping[str, list[Path]]) -> list[Staging]:
        remote, ranges = retrying(self._probe, what="archive", patience=self.patience)
        if not ranges:
            if not any(staging.part.is_model for staging in stagings):
                raise FetchError(f"{self.url} can only be read as a whole, too much for the vision tokenizer alone")
            return self._stream(remote, stagings)
        members = survey(remote, [staging.part for staging in stagings], patience=self.patience)
        offered = [s for s in stagings if not s.part.lacking([m.name for m in members if m.part == s.part])]
        for staging in (s for s in stagings if s not in offered):
            log.info("archive: %s holds no complete %s", redacted(self.url), staging.part.folder)
        if not offered:
            raise FetchError(f"{self.url} holds none of {', '.join(s.part.folder for s in stagings)}, whole")
        self._prepare(remote, offered, nearby)
        members = [m for m in members if m.part in [s.part for s in offered]]
        self._fetch(remote, members, {s.part.key: s for s in offered})
        return offered

    def _probe(self) -> tuple[Remote, bool]:
        """The archive's size and validator, and whether the server can send parts of it."""
        with open_range(Remote(url=self.url), 0, 1, patience=self.patience) as body:
            remote = Remote(url=self.url, size=body.size, validator=body.validator)
            return remote, body.partial and body.size is not None

    def _prepare(self, remote: Remote, stagings: list[Staging], nearby: Mapping[str, list[Path]]) -> None:
        version = (remote.validator or f"{remote.size} bytes").removeprefix("W/").strip('"')
        origin = redacted(self.url)  # it is written beside the weights
        for staging in stagings:
            known = self.pins.get(staging.part.key, {})
            staging.begin(origin, f"cdn:{version}", {name: entry.sha256 for name, entry in known.items()})
            staging.adopt(nearby.get(staging.part.key, []), origin, f"cdn:{version}", known)

    def _fetch(self, remote: Remote, members: list[Member], stagings: Mapping[str, Staging]) -> None:
        total = sum(member.size for member in members)
        self._take_over(members, stagings)
        present = sum(staging.present() for staging in stagings.values())
        require_space(self.scratch.parent, total - present, "unpacking the archive")
        if not present and pget.program() is not None and remote.size is not None and total > remote.size // 2:
            # pget can't go on with what is there and can't choose: only for a fresh start that wants most of it.
            require_space(self.scratch.parent, remote.size, "unpacking the archive with pget")
            with Progress("pget", total, on_progress=self.on_progress) as progress:
                pget.unpack(self.url, self.scratch, meter=progress, patience=self.patience)
            self._take_over(members, stagings)
        with Progress("archive", total, on_progress=self.on_progress) as progress:
            done = {(m.part.key, m.name) for m in members if m.name in stagings[m.part.key].finished()}
            progress.found(sum(m.size for m in members if (m.part.key, m.name) in done))
            pieces = {
                Piece(
                    remote=remote,
                    path=stagings[m.part.key].folder / m.name,
                    size=m.size,
                    offset=m.offset,
                    sha256=self._pinned(m.part, m.name, m.size),
                ): m
                for m in members
                if (m.part.key, m.name) not in done
            }
            fetch_all(
                pieces,
                workers=_WORKERS,
                meter=progress,
                patience=self.patience,
                done=lambda piece, entry: stagings[pieces[piece].part.key].record(pieces[piece].name, entry),
                tries=1 if remote.validator is None else 2,
            )

    def _take_over(self, members: list[Member], stagings: Mapping[str, Staging]) -> None:
        """Move what pget unpacked, complete files and beginnings, into the staging folders."""
        for member in members:
            source, target = self.scratch / member.path, stagings[member.part.key].folder / member.name
            if source.is_file() and not source.is_symlink() and not target.exists():
                source.rename(target)
        pget.clear(self.scratch)

    def _pinned(self, part: Part, name: str, size: int) -> str | None:
        entry = self.pins.get(part.key, {}).get(name)
        if entry is not None and entry.size != size:
            raise FetchError(f"{self.url}: {part.folder}/{name} has {size} bytes, weights.pins.json says {entry.size}")
        return entry.sha256 if entry is not None else None

    def _stream(self, remote: Remote, stagings: list[Staging]) -> list[Staging]:
        """Unpack from a server without ranges: from the start again after each break of the connection."""
        self._prepare(remote, stagings, {})
        present = sum(staging.present() for staging in stagings)
        if remote.size is not None:
            require_space(stagings[0].weights_dir, remote.size - present, "unpacking the archive")
        by_key = {staging.part.key: staging for staging in stagings}
        with Progress("archive", remote.size, on_progress=self.on_progress) as progress:
            try:
                retrying(lambda: self._pass(remote, by_key, progress), what="archive", patience=self.patience)
            except RefusedError:
                for staging in stagings:  # nothing of such an archive is worth keeping
                    staging.discard()
                raise
        complete = [staging for staging in stagings if not staging.part.lacking(staging.finished())]
        if not complete:
            raise FetchError(f"{self.url} holds none of {', '.join(s.part.folder for s in stagings)}, whole")
        return complete

    def _pass(self, remote: Remote, stagings: Mapping[str, Staging], progress: Progress) -> None:
        """One reading of the stream. Files recorded as complete are kept, others written again."""
        fresh = passed = 0
        try:
            with open_range(remote, 0, None, patience=self.patience) as body:
                for member, blocks in contents(body, remote, [staging.part for staging in stagings.values()]):
                    progress.add(member.offset - passed)
                    passed = member.offset
                    staging = stagings[member.part.key]
                    entry = staging.finished().get(member.name)
                    if entry is None or entry.size != member.size or remote.validator is None:
                        staging.record(member.name, self._write(member, blocks, staging.folder / member.name))
                    fresh += entry is None
        except Transient as error:
            progress.lose(passed)
            error.progressed = fresh > 0
            raise

    def _write(self, member: Member, blocks: Iterator[bytes], path: Path) -> Entry:
        digest, size = hashlib.sha256(), 0
        with raising_disk_full(path):
            path.unlink(missing_ok=True)
            with path.open("xb") as file:
                for block in blocks:
                    file.write(block)
                    digest.update(block)
                    size += len(block)
                file.flush()
                os.fsync(file.fileno())
        if size != member.size:
            raise RefusedError(f"{self.url} is cut off within {member.path}: {size} of {member.size} bytes")
        pinned = self._pinned(member.part, member.name, size)
        if pinned is not None and pinned != digest.hexdigest():
            raise RefusedError(
                f"{self.url}: {member.path} has SHA-256 {digest.hexdigest()}, weights.pins.json says {pinned}"
            )
        return Entry(size, digest.hexdigest())
