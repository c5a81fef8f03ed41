"""weights.pins.json, written from the hub, and files on the disk hashed and compared with it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from emu_cog.errors import CheckpointError, InputError
from emu_cog.log import log
from emu_cog.settings import Settings
from emu_cog.weights import local
from emu_cog.weights.checkpoint import MODEL_REPOS, PARTS, Part, check_part
from emu_cog.weights.fetch import Piece, fetch_all, gigabytes
from emu_cog.weights.http import Patience, Remote
from emu_cog.weights.hub import Hub
from emu_cog.weights.manifest import Entry, Pin, hash_files, read_manifest, read_pins, size_problems, write_pins
from emu_cog.weights.progress import Progress
from emu_cog.weights.store import resolve


def pin_all(settings: Settings, *, patience: Patience | None = None) -> Mapping[str, Pin]:
    """Ask the hub what it holds now and write that to `settings.weights_pins`: all repositories, or nothing.

    Commits are those of the branch main, the vision tokenizer's the pinned one. The hub lists the SHA-256 of large
    files; small ones are fetched and hashed, after a check against git's hash. Raises CheckpointError.
    """
    hub = Hub(settings.environ, patience or Patience())
    hub.check()
    before = read_pins(settings.weights_pins)
    pins = {PARTS[key].repo.name: _pin_of(hub, PARTS[key]) for key in (*MODEL_REPOS, "vision")}
    for name, pin in pins.items():
        old = before.get(name, Pin())
        known = old.commit or old.seen
        if known and pin.commit and not pin.commit.startswith(known):
            log.warning("%s has moved on: %s before, %s now", name, known, pin.commit)
    write_pins(pins, settings.weights_pins)
    return pins


def _pin_of(hub: Hub, part: Part) -> Pin:
    listing = hub.listing(part, part.repo.revision)
    log.info("%s is at commit %s", part.repo.name, listing.commit)
    files = {name: Entry(f.size, f.sha256) for name, f in listing.files.items() if f.sha256 is not None}
    with tempfile.TemporaryDirectory(prefix="emu-cog-") as folder:
        pieces = [
            Piece(
                remote=Remote(url=hub.url(part, listing.commit, name), size=file.size, token=hub.token),
                path=Path(folder) / name,
                size=file.size,
                git_sha1=file.git_sha1,
            )
            for name, file in listing.files.items()
            if name not in files
        ]
        with Progress(part.repo.name, sum(piece.size for piece in pieces)) as progress:
            fetch_all(
                pieces,
                workers=4,
                meter=progress,
                patience=hub.patience,
                done=lambda piece, entry: files.update({piece.path.name: entry}),
            )
    return Pin(commit=listing.commit, files=files)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What hashing `folder` found: `size` bytes in `count` files; no `problems` means all is as it was, or as pinned.

    `by` names what the files were held against.
    """

    folder: Path
    count: int
    size: int
    by: str
    problems: tuple[str, ...]


def verify(settings: Settings) -> Iterator[Verdict]:
    """Hash every file of the checkpoint that `settings` name, against its manifest and weights.pins.json; no network.

    Raises InputError where there is nothing that could be held against anything, CheckpointError for a missing part.
    """
    if settings.checkpoint in MODEL_REPOS:
        pins = read_pins(settings.weights_pins)
        for part in (PARTS[settings.checkpoint], PARTS["vision"]):
            yield _verdict(_folder(settings, part), pins.get(part.repo.name, Pin()))
        return
    found = resolve(replace(settings, weights_source="local"))
    for folder in (found.model, found.vision_tokenizer):
        yield _verdict(folder, Pin())


def _folder(settings: Settings, part: Part) -> Path:
    """The part's folder, damaged or not; the first with a manifest, else the first that is complete."""
    root = settings.weights_dir.expanduser().absolute()
    folders = local.candidates(root, part)
    if found := [folder for folder in folders if read_manifest(folder) is not None]:
        return found[0]
    for folder in folders:
        check_part(part, folder)
        return folder
    raise CheckpointError(f"there is no {part.folder} in {root}: scripts/download-weights downloads it")


def _verdict(folder: Path, pin: Pin) -> Verdict:
    manifest = read_manifest(folder)
    if manifest is None and not pin.files:
        raise InputError(
            f"{folder} has no manifest to be held against: only {', '.join(MODEL_REPOS)}, once brought or found whole, "
            "keep one"
        )
    expected = {name: ("weights.pins.json", entry) for name, entry in pin.files.items()}
    if manifest is not None:
        # A folder of another commit than the pinned one is held against its own manifest alone.
        expected = expected if pin.commit == manifest.revision else {}
        expected |= {name: ("its manifest", entry) for name, entry in manifest.files.items() if name not in expected}
    problems = [] if manifest is None else size_problems(folder, manifest)
    missing = {problem.split(" ", 1)[0] for problem in problems}
    names = [name for name in expected if name not in missing and (folder / name).is_file()]
    problems += [f"{n} is missing" for n in expected if n not in missing and n not in names]
    total = sum((folder / name).stat().st_size for name in names)
    log.info("hashing %s of %s", gigabytes(total), folder)
    with Progress(f"hashing {folder.name}", total) as progress:
        found = hash_files(folder, names, progress=progress.add)
    problems += [
        f"{name} has SHA-256 {found[name].sha256}, {by} says {entry.sha256}"
        for name, (by, entry) in expected.items()
        if name in found and found[name] != entry
    ]
    by = sorted({by for by, _ in expected.values()}, reverse=True)
    return Verdict(folder=folder, count=len(names), size=total, by=" and ".join(by), problems=tuple(problems))
