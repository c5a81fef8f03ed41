"""Complete checkpoint folders on this disk: found by name, checked, and given a manifest once."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from emu_cog.errors import CheckpointError
from emu_cog.log import log
from emu_cog.weights.checkpoint import Part, check_part
from emu_cog.weights.fetch import gigabytes
from emu_cog.weights.manifest import (
    MANIFEST_FILE,
    Manifest,
    Pin,
    hash_files,
    read_manifest,
    size_problems,
    write_manifest,
)
from emu_cog.weights.progress import Progress


@dataclass(frozen=True)
class Found:
    """A complete folder. `keeps_manifest` is False where none may be written: the hub's cache, read-only disks."""

    folder: Path
    revision: str
    keeps_manifest: bool = True

    @property
    def has_manifest(self) -> bool:
        return (self.folder / MANIFEST_FILE).is_file()


def candidates(root: Path, part: Part) -> list[Path]:
    """Folders by the names of `part` in `root` or one level down, and last those that hold its files among others. A
    clone of upstream's code is none of them."""
    places = [root]
    if root.is_dir():
        places += sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    folders = [place / name for names in (part.names, part.within) for place in places for name in names]
    return [f for f in folders if f.is_dir() and not (f / ".git").exists()]


def check_local(part: Part, folder: Path) -> str:
    """The revision of a complete folder; CheckpointError says what it lacks.

    With a manifest this costs one stat a file. Without one every header is read and the small files are parsed.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        check_part(part, folder)
        return "local"
    if problems := part.lacking(manifest.files) or size_problems(folder, manifest):
        raise CheckpointError(f"by its manifest {'; '.join(problems[:3])}")
    return manifest.revision


def find(root: Path, part: Part) -> tuple[Found | None, list[str]]:
    """The first complete candidate, and why the earlier ones are not complete."""
    reasons = []
    for folder in candidates(root, part):
        try:
            revision = check_local(part, folder)
        except CheckpointError as error:
            reasons.append(f"{folder} is not complete: {error}")
            log.warning("local: %s", reasons[-1])
            continue
        log.info("local: %s is complete (revision %s)", folder, revision)
        keeps_manifest = folder.name in part.names and os.access(folder, os.W_OK)
        return Found(folder, revision, keeps_manifest=keeps_manifest), reasons
    return None, reasons or [f"no folder {' or '.join(part.names)} in {root} or one level below it"]


def keep_manifest(
    part: Part, found: Found, pin: Pin, *, on_progress: Callable[[int, int], None] | None = None
) -> Found:
    """Write the manifest of a complete folder that somebody else put there. Reads every byte, once."""
    names = list(check_part(part, found.folder))
    total = sum((found.folder / name).stat().st_size for name in names)
    log.info("local: hashing %s of %s once, for its manifest", gigabytes(total), found.folder)
    with Progress(f"hashing {part.folder}", total, on_progress=on_progress) as progress:
        files = hash_files(found.folder, names, progress=progress.add)
    differing = [name for name, entry in pin.files.items() if files.get(name) != entry]
    if differing:
        log.warning("local: %s is not what weights.pins.json pins: %s differs", found.folder, ", ".join(differing[:3]))
    revision = pin.commit if pin.commit and pin.files and not differing else "local"
    write_manifest(found.folder, Manifest("local", revision, files))
    return Found(found.folder, revision)
