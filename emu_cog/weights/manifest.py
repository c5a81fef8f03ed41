"""Sizes and SHA-256 of weight files: the manifest kept beside them and the repository's weights.pins.json."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from emu_cog.errors import CheckpointError
from emu_cog.log import log

MANIFEST_FILE = "weights.manifest.json"
COMMIT = re.compile(r"[0-9a-f]{40}")
_BLOCK = 4 << 20
_HASH_THREADS = 8
_ABOUT = (
    "Pins of the model repositories. commit null: not known when this was written; the branch main is then resolved "
    "once, logged and kept beside the weights. files empty: the hub's own hashes are used on arrival. "
    "seen: a commit by its first digits, as shown on the repository's page. "
    "Written by: scripts/download-weights --pin"
)


@dataclass(frozen=True)
class Entry:
    """One file: `size` in bytes, `sha256` in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a weights folder held when it was complete, and where that came from."""

    origin: str
    revision: str
    files: Mapping[str, Entry]


@dataclass(frozen=True)
class Pin:
    """What weights.pins.json says of one repository; `commit` None and empty `files` mean not known yet."""

    commit: str | None = None
    seen: str | None = None
    files: Mapping[str, Entry] = field(default_factory=dict)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of `folder`; None where there is none, or none that can be read (logged)."""
    path = folder / MANIFEST_FILE
    try:
        data = json.loads(path.read_bytes())
        files = {name: Entry(int(entry["size"]), str(entry["sha256"])) for name, entry in data["files"].items()}
        return Manifest(origin=str(data["origin"]), revision=str(data["revision"]), files=files)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s can't be read (%r) and counts as absent", path, error)
        return None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    files = {name: asdict(entry) for name, entry in sorted(manifest.files.items())}
    write_json(folder / MANIFEST_FILE, {"origin": manifest.origin, "revision": manifest.revision, "files": files})


def size_problems(folder: Path, manifest: Manifest) -> list[str]:
    """What of `manifest` is missing from `folder` or has another size. Costs one stat a file."""
    problems = []
    for name, entry in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            problems.append(f"{name} is missing")
            continue
        if size != entry.size:
            problems.append(f"{name} has {size} bytes, not {entry.size}")
    return problems


def hash_files(folder: Path, names: list[str], *, progress: Callable[[int], None] = lambda _: None) -> dict[str, Entry]:
    """Size and SHA-256 of each file, read by several threads; `progress` is called with bytes done since last."""

    def entry(name: str) -> Entry:
        digest = hashlib.sha256()
        return Entry(feed(folder / name, digest, progress=progress), digest.hexdigest())

    with ThreadPoolExecutor(max_workers=_HASH_THREADS) as pool:
        return dict(zip(names, pool.map(entry, names), strict=True))


def feed(path: Path, *digests: Any, progress: Callable[[int], None] = lambda _: None) -> int:
    """Update each of `digests` with the file's content; returns its size in bytes."""
    size = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            for digest in digests:
                digest.update(block)
            size += len(block)
            progress(len(block))
    return size


def read_pins(path: Path) -> dict[str, Pin]:
    """Repository name to Pin. No file means no pins; a file that can't be understood is a CheckpointError."""
    try:
        data = json.loads(path.read_bytes())
        return {
            name: Pin(
                commit=_commit(repo.get("commit")),
                seen=repo.get("seen"),
                files={f: Entry(int(e["size"]), str(e["sha256"])) for f, e in repo.get("files", {}).items()},
            )
            for name, repo in data["repositories"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} can't be understood ({error}): take it from version control again, or write it again with "
            "scripts/download-weights --pin"
        ) from None


def write_pins(pins: Mapping[str, Pin], path: Path) -> None:
    repositories = {}
    for name, pin in sorted(pins.items()):
        files = {file: asdict(entry) for file, entry in sorted(pin.files.items())}
        seen = {"seen": pin.seen} if pin.seen else {}
        repositories[name] = {"commit": pin.commit, **seen, "files": files}
    write_json(path, {"about": _ABOUT, "repositories": repositories})


def write_json(path: Path, value: Any) -> None:
    """Write `path` so that it is there whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _commit(value: str | None) -> str | None:
    if value is not None and not COMMIT.fullmatch(value):
        raise ValueError(f"commit {value!r} is not 40 hexadecimal digits")
    return value
