"""From EMU_CHECKPOINT to the folders to load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emu_cog.config import InputError, Settings, log


@dataclass(frozen=True, kw_only=True)
class Folders:
    """A checkpoint folder, its vision tokenizer's, and the revision that pictures' metadata tell."""

    model: Path
    vision_tokenizer: Path
    revision: str


def locate(settings: Settings) -> Folders:
    """The folders that `settings` name. InputError where a folder is missing or has no vision tokenizer."""
    name = settings.checkpoint
    if name == "mini":
        return _random_miniature(settings)
    folder = Path(name)
    if not folder.is_dir():
        raise InputError(f"EMU_CHECKPOINT={name!r} is neither mini, image, base nor a folder")
    if settings.vision_tokenizer is None:
        raise InputError(f"EMU_CHECKPOINT={name!r} is a folder: name its vision tokenizer's in EMU_VISION_TOKENIZER")
    vision = Path(settings.vision_tokenizer)
    if not vision.is_dir():
        raise InputError(f"EMU_VISION_TOKENIZER={settings.vision_tokenizer!r} is not a folder")
    return Folders(model=folder, vision_tokenizer=vision, revision=folder.name)


def _random_miniature(settings: Settings) -> Folders:
    from emu_cog.tiny import make_tiny

    folder = settings.weights_dir / "mini"
    if not (folder / "model" / "config.json").exists():
        log.info("making a tiny random checkpoint in %s", folder)
        make_tiny(folder)
    return Folders(model=folder / "model", vision_tokenizer=folder / "vision", revision="mini (random)")
