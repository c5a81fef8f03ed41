"""What the folders of a released checkpoint must hold, and the check that one is complete."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from emu_cog.errors import CheckpointError
from emu_cog.model.headers import FLASH_FILE, INDEX_FILE, read_headers, shard_files
from emu_cog.prompt.tokenizer import FILES as TOKENIZER_FILES
from emu_cog.prompt.tokenizer import Tokenizer


@dataclass(frozen=True)
class HubRepo:
    """A repository on the Hugging Face hub. `revision` is a full or abbreviated commit, or a branch."""

    name: str
    revision: str


MODEL_REPOS: Mapping[str, HubRepo] = {
    "image": HubRepo("BAAI/Emu3.5-Image", "main"),
    "base": HubRepo("BAAI/Emu3.5", "main"),
    "u0": HubRepo("XiaomiRobotics/Xiaomi-Robotics-U0", "main"),
    "u0-flash": HubRepo("XiaomiRobotics/Xiaomi-Robotics-U0-FlashAR", "main"),
    "flash": HubRepo("lxazjk/Emu3.5-Image-FlashAR", "main"),
}
"""What EMU_CHECKPOINT may name, besides the miniature and folders."""

VISION_REPO = HubRepo("BAAI/Emu3.5-VisionTokenizer", "91789bbaa3f49b4b8882fc823d6849207bb99f13")

CDN_TAR = "https://weights.replicate.delivery/default/BAAI/Emu3.5-Image/model.tar"

_EMU3_TOKENIZER, _ = TOKENIZER_FILES
_TOKENIZER_NAMES = tuple(name for pair in TOKENIZER_FILES for name in pair)
_MODEL_FILES = ("config.json", *_EMU3_TOKENIZER)
_VISION_FILES = ("config.yaml", "model.ckpt")
_EXTRA_FILES = ("generation_config.json", INDEX_FILE)
_SHARD = re.compile(rf"model(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(FLASH_FILE)}")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One folder of a checkpoint. `folder` is where this program puts it, `names` is where else it may lie; `within`
    are other parts' folders that hold its files, too."""

    key: str
    repo: HubRepo
    folder: str
    names: tuple[str, ...]
    required: tuple[str, ...]
    within: tuple[str, ...] = ()

    @property
    def is_model(self) -> bool:
        return self.key in MODEL_REPOS

    def wants(self, name: str) -> bool:
        """Whether the file `name`, relative to the repository's or folder's root, is needed."""
        if not self.is_model:
            return name in self.required
        extra = name in _EXTRA_FILES or name in _TOKENIZER_NAMES
        return name in self.required or extra or _SHARD.fullmatch(name) is not None

    def lacking(self, names: Collection[str]) -> list[str]:
        """What a listing of file names lacks to be this part."""
        missing = [name for name in self.required if name not in names]
        if self.is_model and not any(_SHARD.fullmatch(name) for name in names):
            missing.append("*.safetensors")
        return missing


PARTS: dict[str, Part] = {
    "image": Part(
        key="image",
        repo=MODEL_REPOS["image"],
        folder="Emu3.5-Image",
        names=("Emu3.5-Image",),
        required=_MODEL_FILES,
    ),
    # Weights of the base model are put into Emu3.5-Base, because Emu3.5 is also the name of upstream's source code
    # and its clone; a folder Emu3.5 that holds weights is accepted all the same.
    "base": Part(
        key="base",
        repo=MODEL_REPOS["base"],
        folder="Emu3.5-Base",
        names=("Emu3.5-Base", "Emu3.5"),
        required=_MODEL_FILES,
    ),
    # Nobody here has seen the three repositories that follow: their tokenizer files, Emu3's in any case, are used where
    # they are there, under either name, and taken from the image model's otherwise (lxazjk's training saves none).
    "u0": Part(
        key="u0",
        repo=MODEL_REPOS["u0"],
        folder="Xiaomi-Robotics-U0",
        names=("Xiaomi-Robotics-U0",),
        required=("config.json",),
    ),
    "u0-flash": Part(
        key="u0-flash",
        repo=MODEL_REPOS["u0-flash"],
        folder="Xiaomi-Robotics-U0-FlashAR",
        names=("Xiaomi-Robotics-U0-FlashAR",),
        required=("config.json",),
    ),
    "flash": Part(
        key="flash",
        repo=MODEL_REPOS["flash"],
        folder="Emu3.5-Image-FlashAR",
        names=("Emu3.5-Image-FlashAR", "Emu3.5-Image-Flash"),  # the latter in lxazjk's README
        required=("config.json",),
    ),
    "tokenizer": Part(
        key="tokenizer",
        repo=MODEL_REPOS["image"],
        folder="Emu3.5-Tokenizer",
        names=("Emu3.5-Tokenizer",),
        required=_EMU3_TOKENIZER,
        within=("Emu3.5-Image", "Emu3.5-Base", "Emu3.5"),
    ),
    "vision": Part(
        key="vision",
        repo=VISION_REPO,
        folder="Emu3.5-VisionTokenizer",
        names=("Emu3.5-VisionTokenizer",),
        required=_VISION_FILES,
    ),
}


def check_part(part: Part, folder: Path) -> tuple[str, ...]:
    """The names of the files that make `folder` a complete `part`; CheckpointError says what is lacking or damaged."""
    if part.is_model:
        return check_model(folder, part.required)
    if part.key == "tokenizer":
        _check_present(folder, part.required)
        Tokenizer.load(folder)
        return part.required
    return check_vision(folder)


def has_tokenizer(folder: Path) -> bool:
    """Whether any tokenizer file lies in `folder`."""
    return any((folder / name).is_file() for name in _TOKENIZER_NAMES)


def check_model(folder: Path, required: tuple[str, ...] = _MODEL_FILES) -> tuple[str, ...]:
    """Check a language model's folder: configuration, tokenizer files if it has any, and every byte count of its
    safetensors."""
    _check_present(folder, required)
    config = _read_json(folder / "config.json")
    read_headers(folder)
    shards = [file.name for file in shard_files(folder)]
    vocabulary = Tokenizer.load(folder).ids.vocab_size if has_tokenizer(folder) else None
    if vocabulary and config.get("vocab_size", vocabulary) != vocabulary:
        raise CheckpointError(
            f"{folder}: the tokenizer files make {vocabulary} tokens but config.json says {config['vocab_size']}: "
            "one of the three files is cut off or from another model"
        )
    further = [name for name in (*_TOKENIZER_NAMES, *_EXTRA_FILES) if name not in required]
    return (*required, *(name for name in further if (folder / name).is_file()), *shards)


def check_vision(folder: Path) -> tuple[str, ...]:
    """Check a vision tokenizer's folder: the configuration parses and the state dict opens without running code."""
    import torch

    from emu_cog.vision.ibq import VisionConfig

    _check_present(folder, _VISION_FILES)
    VisionConfig.read(folder)
    path = folder / "model.ckpt"
    try:
        # Files in torch's older format can't be mapped and are read whole; both kinds refuse anything but data.
        torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path} does not open safely: {first_line}") from None
    return _VISION_FILES


def _check_present(folder: Path, names: Iterable[str]) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(f"{folder} lacks {', '.join(missing[:3])}{more}")


def _read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): it is cut off or damaged") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value
