"""Where a part's files gather until it is complete: a folder on the same disk, put in place by one rename.

    <weights>/.staging/<folder>/          the files, each growing from its beginning
    <weights>/.staging/<folder>.json      where they come from: origin and revision
    <weights>/.staging/<folder>.sha256    one line for each complete file: SHA-256, size, name

A file without a line is taken for a beginning and completed. Files of another origin are kept only where the new one
lists their SHA-256, because then a wrong beginning is detected.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from emu_cog.log import log
from emu_cog.weights.checkpoint import Part, check_part
from emu_cog.weights.fetch import raising_disk_full
from emu_cog.weights.manifest import (
    MANIFEST_FILE,
    Entry,
    Manifest,
    hash_files,
    read_manifest,
    size_problems,
    write_json,
    write_manifest,
)

STAGING_FOLDER = ".staging"


@dataclass(frozen=True)
class Staging:
    """The staging folder of `part` under `weights_dir`. One process at a time: the caller holds the lock."""

    weights_dir: Path
    part: Part

    @property
    def folder(self) -> Path:
        return self.weights_dir / STAGING_FOLDER / self.part.folder

    @property
    def target(self) -> Path:
        return self.weights_dir / self.part.folder

    @property
    def _state(self) -> Path:
        return self.folder.with_name(f"{self.part.folder}.json")

    @property
    def _journal(self) -> Path:
        return self.folder.with_name(f"{self.part.folder}.sha256")

    def source(self) -> tuple[str, str] | None:
        """(origin, revision) of what lies here, or None."""
        try:
            state = json.loads(self._state.read_bytes())
            return str(state["origin"]), str(state["revision"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def begin(self, origin: str, revision: str, known: Mapping[str, str]) -> None:
        """Prepare for files of (`origin`, `revision`); `known` holds the SHA-256 of the files whose hash it lists."""
        with raising_disk_full(self.folder):
            if self.source() != (origin, revision) and self.folder.exists():
                whole = self.finished()
                for path in [p for p in self.folder.rglob("*") if not p.is_dir() or p.is_symlink()]:
                    name = path.relative_to(self.folder).as_posix()
                    if name not in known or (name in whole and whole[name].sha256 != known[name]):
                        path.unlink()
                kept = sum(1 for p in self.folder.rglob("*") if p.is_file())
                log.info("%s: staging starts again from %s; %d file(s) kept", self.part.folder, origin, kept)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self._state, {"origin": origin, "revision": revision})

    def finished(self) -> dict[str, Entry]:
        """The files recorded as complete that are still there with that size."""
        try:
            lines = self._journal.read_text(encoding="utf-8").splitlines()
        except OSError:
            return {}
        entries = {}
        for line in lines:
            fields = line.split(" ", 2)
            if len(fields) == 3 and len(fields[0]) == 64 and fields[1].isdigit():  # else: the kill cut it off
                entries[fields[2]] = Entry(int(fields[1]), fields[0])
        return {n: e for n, e in entries.items() if _size(self.folder / n) == e.size}

    def record(self, name: str, entry: Entry) -> None:
        with raising_disk_full(self._journal), self._journal.open("a", encoding="utf-8") as file:
            file.write(f"\n{entry.sha256} {entry.size} {name}\n")  # a newline first: the last line may be cut off
            file.flush()
            os.fsync(file.fileno())

    def present(self) -> int:
        """Bytes that need not be fetched again."""
        return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())

    def adopt(self, folders: list[Path], origin: str, revision: str, known: Mapping[str, Entry]) -> None:
        """Link good files of incomplete local `folders` into the staging folder, so that they are not fetched again.

        Good means: the SHA-256 is that of `known`, or of the folder's own manifest if that is of the same source.
        """
        for folder in folders:
            manifest = read_manifest(folder)
            ours = manifest is not None and (manifest.origin, manifest.revision) == (origin, revision)
            trusted = {**(manifest.files if manifest is not None and ours else {}), **known}
            whole = self.finished()
            names = [
                name
                for name, entry in trusted.items()
                if self.part.wants(name) and name not in whole and _size(folder / name) == entry.size
            ]
            if names:
                log.info("%s: checking %d file(s) that lie in %s already", self.part.folder, len(names), folder)
            for name, entry in hash_files(folder, names).items():
                if entry != trusted[name]:
                    log.warning("%s is altered and is downloaded again", folder / name)
                elif _link(folder / name, self.folder / name):
                    self.record(name, entry)

    def ready(self) -> bool:
        """Whether everything is here and only the rename is missing, as after a kill at the last moment."""
        manifest = read_manifest(self.folder)
        return manifest is not None and not size_problems(self.folder, manifest)

    def publish(self) -> tuple[Path, str]:
        """Check what lies here, write its manifest and put it in place; returns the folder and its revision.

        CheckpointError if it is not a whole part.
        """
        if not self.ready():
            names = check_part(self.part, self.folder)
            entries = self.finished()
            entries |= hash_files(self.folder, [name for name in names if name not in entries])
            origin, revision = self.source() or ("unknown", "unknown")
            self._drop_others(names)
            with raising_disk_full(self.folder):
                write_manifest(self.folder, Manifest(origin, revision, {name: entries[name] for name in names}))
        manifest = read_manifest(self.folder)
        assert manifest is not None  # written above, or found ready
        if self.target.exists() or self.target.is_symlink():
            self._clear_target()
        os.rename(self.folder, self.target)
        _sync_folder(self.weights_dir)
        for path in (self._state, self._journal):
            path.unlink(missing_ok=True)
        log.info("%s is complete at %s", self.part.folder, self.target)
        return self.target, manifest.revision

    def _drop_others(self, names: tuple[str, ...]) -> None:
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in names:
                path.unlink()

    def _clear_target(self) -> None:
        """Make way for the rename: an incomplete folder of ours is removed, one that somebody else made is renamed."""
        if (self.target / MANIFEST_FILE).is_file():
            old = self.folder.with_name(f"{self.part.folder}.old")
            _remove(old)
            os.rename(self.target, old)
            _remove(old)
            return
        aside = self.target.with_name(f"{self.target.name}.incomplete-{time.strftime('%Y%m%d-%H%M%S')}")
        os.rename(self.target, aside)
        log.warning("%s was incomplete and is now %s: delete it when you don't need it", self.target, aside)

    def discard(self) -> None:
        """Delete everything here."""
        for path in (self.folder, self._state, self._journal):
            _remove(path)


def sweep(weights_dir: Path) -> None:
    """Delete what a kill left behind under the staging folder, and the folder itself when it is empty."""
    root = weights_dir / STAGING_FOLDER
    for path in root.glob("*.old"):
        _remove(path)
    if root.is_dir() and not any(root.iterdir()):
        root.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _link(source: Path, target: Path) -> bool:
    try:
        target.unlink(missing_ok=True)
        os.link(source.resolve(), target)
    except OSError as error:
        log.info("%s can't be linked (%s) and is downloaded again", source, error.strerror)
        return False
    return True


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
