"""Where the weights are, or how they get there: a complete local folder, the CDN's tar, the Hugging Face hub.

A checkpoint is two folders, the language model's and the vision tokenizer's, or three where the former lacks the files
of its text tokenizer. Each is looked for on the disk; what is missing is brought, by one process at a time, into a
staging folder and put in place by one rename. A folder is used only after every file in it was found whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from emu_cog.errors import CheckpointError, InputError
from emu_cog.log import log
from emu_cog.model.headers import CONFIG_FILE, FLASH_TYPE, MARKER, U0_TYPE, config_json, read_headers
from emu_cog.settings import Settings
from emu_cog.weights import local, pget
from emu_cog.weights.cdn import Archive
from emu_cog.weights.checkpoint import CDN_TAR, MODEL_REPOS, PARTS, Part, has_tokenizer
from emu_cog.weights.fetch import DiskFullError
from emu_cog.weights.http import Patience
from emu_cog.weights.hub import Hub
from emu_cog.weights.local import Found
from emu_cog.weights.manifest import COMMIT, Pin, read_manifest, read_pins
from emu_cog.weights.staging import STAGING_FOLDER, Staging, sweep

Kind = Literal["image", "base", "u0", "u0-flash", "flash", "mini", "folder"]
SOURCES = ("local", "cdn", "hub")
"""What EMU_WEIGHTS_SOURCE accepts, in the order they are tried. What is complete on the disk is always used."""
_LOCK = ".weights.lock"
MINIATURE = Path(__file__).resolve().parent.parent / "mini"
"""The trained miniatures, which are package data, and their vision tokenizer."""
MINIATURES: Mapping[str, tuple[str, Kind]] = {"mini": ("model", "mini"), "mini-flash": ("flash", "u0-flash")}
"""What EMU_CHECKPOINT may name of them, its folder, and its kind."""
_TELL_WAITING = 30.0
_PGET_ENDS = 0.5
"""Seconds: our lock is free a moment before the kernel's SIGKILL has ended the pget of a killed process."""
_VISION_NAMES = ("Emu3.5-VisionTokenizer", "vision_tokenizer", "vision")


@dataclass(frozen=True)
class Checkpoint:
    """The folders to load from. `revision` is the model's: a commit, the archive's ETag or date, or "local"."""

    model: Path
    vision_tokenizer: Path
    revision: str
    kind: Kind
    tokenizer: Path | None = None
    """Where the tokenizer files lie, if not in `model`."""

    @property
    def guidance(self) -> str:
        """Whose defaults hold where the checkpoint itself does not say: a key of `tasks.TABLES`."""
        return "image" if self.kind in ("mini", "folder") else self.kind


def resolve(
    settings: Settings,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    patience: Patience | None = None,
) -> Checkpoint:
    """The folders of `settings.checkpoint`: a key of MINIATURES or MODEL_REPOS, or a folder's path; downloaded when
    missing.

    `on_progress` is called with (bytes done, bytes in all or 0) while weights arrive. Raises InputError for settings
    that can't be meant, DiskFullError when there is no room, CheckpointError with each source's reason otherwise.
    """
    _check_source(settings)
    vision = _named_folder("EMU_VISION_TOKENIZER", settings.vision_tokenizer) if settings.vision_tokenizer else None
    store = Store(
        settings, patience=patience or Patience(), pins=read_pins(settings.weights_pins), on_progress=on_progress
    )
    if settings.checkpoint in MINIATURES:
        name, kind = MINIATURES[settings.checkpoint]
        return Checkpoint(MINIATURE / name, vision or MINIATURE / "vision", settings.checkpoint, kind)
    if settings.checkpoint in MODEL_REPOS:
        found = store.resolve([PARTS[settings.checkpoint], *([] if vision else [PARTS["vision"]])])
        model, revision = found[settings.checkpoint].folder, found[settings.checkpoint].revision
        vision, kind = vision or found["vision"].folder, cast("Kind", settings.checkpoint)
    else:
        model = _named_folder("EMU_CHECKPOINT", settings.checkpoint)
        manifest, kind = read_manifest(model), _kind(model)
        revision = manifest.revision if manifest else "local"
        vision = vision or _vision_beside(model) or store.resolve([PARTS["vision"]])["vision"].folder
    elsewhere = kind in ("u0", "u0-flash", "flash") and not has_tokenizer(model)
    tokenizer = store.resolve([PARTS["tokenizer"]])["tokenizer"].folder if elsewhere else None
    return Checkpoint(model, vision, revision, kind, tokenizer)


def _check_source(settings: Settings) -> None:
    if settings.weights_source not in (None, *SOURCES):
        raise InputError(
            f"EMU_WEIGHTS_SOURCE={settings.weights_source!r} is not known, accepted are {', '.join(SOURCES)}"
        )


def _named_folder(variable: str, value: str) -> Path:
    path = Path(value).expanduser()
    if not path.is_dir():
        names = "" if variable == "EMU_VISION_TOKENIZER" else f"{', '.join((*MINIATURES, *MODEL_REPOS))} or "
        raise InputError(f"{variable}={value} is no folder (from {Path.cwd()}); accepted are {names}a folder's path")
    return path


def _vision_beside(model: Path) -> Path | None:
    """A vision tokenizer within or beside a model folder that the user named."""
    places = [place / name for place in (model, model.absolute().parent) for name in _VISION_NAMES]
    return next((place for place in places if (place / "model.ckpt").is_file()), None)


def _kind(model: Path) -> Kind:
    """By the folder's name, else by what made it: which of the two repositories wrote its config.json."""
    name = model.absolute().name
    for key in MODEL_REPOS:
        if name in PARTS[key].names:
            return cast("Kind", key)
    if not (model / CONFIG_FILE).is_file():
        return "folder"
    made_by = config_json(model).get("model_type")
    if made_by == FLASH_TYPE:
        return "flash"
    if made_by == U0_TYPE:
        return "u0-flash" if MARKER in read_headers(model) else "u0"
    return "folder"


@dataclass(frozen=True)
class Store:
    """The weights folder of `settings` and the ways to fill it."""

    settings: Settings
    patience: Patience
    pins: Mapping[str, Pin]
    on_progress: Callable[[int, int], None] | None = None

    @property
    def root(self) -> Path:
        return self.settings.weights_dir.expanduser().absolute()

    @property
    def hub(self) -> Hub:
        return Hub(self.settings.environ, self.patience)

    def pin(self, part: Part) -> Pin:
        """What is pinned of the files that `part` wants: two parts may come from one repository."""
        pin = self.pins.get(part.repo.name, Pin())
        return replace(pin, files={name: entry for name, entry in pin.files.items() if part.wants(name)})

    def resolve(self, parts: list[Part]) -> dict[str, Found]:
        """Part key to complete folder, for each of `parts`."""
        found = {part.key: here for part in parts if (here := self._find(part)[0]) is not None}
        if len(found) == len(parts) and all(f.has_manifest or not f.keeps_manifest for f in found.values()):
            return found
        with self.exclusive_lock():
            reasons: dict[str, list[str]] = {part.key: [] for part in parts}
            for part in parts:  # again: another process may have been at work in the meantime
                here, reasons[part.key] = self._find(part)
                if here is not None and here.keeps_manifest and not here.has_manifest:
                    here = local.keep_manifest(part, here, self.pin(part), on_progress=self.on_progress)
                if here is not None:
                    found[part.key] = here
            missing = [part for part in parts if part.key not in found]
            if missing:
                found |= self._download(missing, {key: [f"local: {r}" for r in reasons[key]] for key in reasons})
        return found

    def _find(self, part: Part) -> tuple[Found | None, list[str]]:
        """A complete folder of `part` under the weights folder or in the hub's own cache, or why there is none."""
        found, reasons = local.find(self.root, part)
        if found is None and (cached := self.hub.cached(part, self.pin(part).commit or part.repo.revision)):
            log.info("local: %s, in the hub's cache, is complete", cached)
            found = Found(cached, cached.name, keeps_manifest=False)
        return found, reasons

    @contextmanager
    def exclusive_lock(self) -> Iterator[None]:
        """Hold the weights folder's lock, which the kernel releases should this process die."""
        from filelock import FileLock, Timeout

        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / _LOCK)
            waited = 0.0
            while not lock.is_locked:
                try:
                    lock.acquire(timeout=_TELL_WAITING if waited else 0)
                except Timeout:
                    waited += 1
                    log.info("another process is downloading weights to %s; waiting to use them", self.root)
        except OSError as error:
            raise CheckpointError(
                f"can't write to the weights folder {self.root} ({error.strerror}): set EMU_WEIGHTS_DIR to a folder "
                "that can be written to, or put complete weights there"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def _download(self, missing: list[Part], reasons: dict[str, list[str]]) -> dict[str, Found]:
        """Complete each of `missing` from the first source that can; CheckpointError with every reason if none can."""
        if self._scratch.exists():  # a killed process: the kernel is ending its pget, which must write no more
            time.sleep(_PGET_ENDS)
        sweep(self.root)
        stagings = {part.key: Staging(self.root, part) for part in missing}
        # A kill between the last byte and the rename leaves a folder that only has to be put in place.
        found = {key: Found(*staging.publish()) for key, staging in stagings.items() if staging.ready()}
        sources = self._sources(list(stagings.values()))
        if "hub" in sources:
            self.hub.check()
        for source in sources:
            wanted = [staging for key, staging in stagings.items() if key not in found]
            if not wanted:
                break
            log.info("%s: downloading %s to %s", source, " and ".join(s.part.folder for s in wanted), self.root)
            brought = self._from_cdn(wanted, reasons) if source == "cdn" else self._from_hub(wanted, reasons)
            found |= {staging.part.key: done for staging, done in brought}
        if lacking := [staging.part for key, staging in stagings.items() if key not in found]:
            raise CheckpointError(self._failure(lacking, reasons))
        pget.clear(self._scratch)
        sweep(self.root)
        return found

    @property
    def _scratch(self) -> Path:
        """Where pget unpacks; a killed process may have left something there."""
        return self.root / STAGING_FOLDER / "pget"

    def _sources(self, stagings: list[Staging]) -> list[str]:
        """The sources to try: the forced one, else the one that an earlier start began with, then the others."""
        forced = self.settings.weights_source
        if forced is not None:
            return [] if forced == "local" else [forced]
        if any((staging.source() or ("", ""))[0] == self.hub.origin(staging.part) for staging in stagings):
            log.info("hub: going on with what an earlier start began")
            return ["hub", "cdn"]
        return ["cdn", "hub"]

    def _from_cdn(self, wanted: list[Staging], reasons: dict[str, list[str]]) -> list[tuple[Staging, Found]]:
        own = self.settings.environ.get("EMU_WEIGHTS_CDN_URL")
        pins = {s.part.key: self.pin(s.part).files for s in wanted}
        archive = Archive(own or CDN_TAR, pins, self.patience, self._scratch, self.on_progress)
        done = []
        try:
            if not own and any(staging.part.key not in ("image", "vision") for staging in wanted):
                raise CheckpointError("the CDN has the image model only; EMU_WEIGHTS_CDN_URL may name another tar")
            for staging in archive.download(wanted, {s.part.key: local.candidates(self.root, s.part) for s in wanted}):
                done.append((staging, Found(*staging.publish())))
        except DiskFullError:
            raise
        except CheckpointError as error:
            _note(reasons, "cdn", str(error), [s for s in wanted if s not in [d for d, _ in done]])
        else:
            rest = [s for s in wanted if s not in [d for d, _ in done]]
            _note(reasons, "cdn", f"{archive.url} does not hold it, whole", rest)
        return done

    def _from_hub(self, wanted: list[Staging], reasons: dict[str, list[str]]) -> list[tuple[Staging, Found]]:
        done = []
        for staging in wanted:
            nearby = local.candidates(self.root, staging.part) + local.candidates(self._scratch, staging.part)
            try:
                self.hub.download(
                    staging,
                    self.pin(staging.part),
                    kept_revision=self._kept_commit(staging, nearby),
                    nearby=nearby,
                    on_progress=self.on_progress,
                )
                done.append((staging, Found(*staging.publish())))
            except DiskFullError:
                raise
            except CheckpointError as error:
                _note(reasons, "hub", str(error), [staging])
        return done

    def _kept_commit(self, staging: Staging, nearby: list[Path]) -> str | None:
        """The commit that an earlier start resolved the branch to, kept in the staging folder or a manifest."""
        origin = self.hub.origin(staging.part)
        sources = [staging.source(), *((m.origin, m.revision) for f in nearby if (m := read_manifest(f)) is not None)]
        return next((s[1] for s in sources if s is not None and s[0] == origin and COMMIT.fullmatch(s[1])), None)

    def _failure(self, lacking: list[Part], reasons: Mapping[str, list[str]]) -> str:
        lines = []
        for part in lacking:
            lines += [
                f"{part.folder} could not be found or downloaded:",
                *(f"  {reason}" for reason in reasons[part.key]),
            ]
        forced = self.settings.weights_source
        lines.append(
            f"EMU_WEIGHTS_SOURCE={forced} rules out the other sources. "
            * (forced is not None)
            + f"What arrived is kept in {self.root} and the next start resumes from there: fix what is named above, "
            "or put the complete folders there, or set EMU_WEIGHTS_DIR to where they are"
        )
        return "\n".join(lines)


def _note(reasons: dict[str, list[str]], source: str, reason: str, stagings: list[Staging]) -> None:
    for staging in stagings:
        log.warning("%s: %s: %s", source, staging.part.folder, reason)
        reasons[staging.part.key].append(f"{source}: {reason}")
