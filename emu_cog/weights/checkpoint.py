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
from emu_cog.model.headers import INDEX_FILE, read_headers, shard_files


@dataclass(frozen=True)
class HubRepo:
    """A repository on the Hugging Face hub. `revision` is a full or abbreviated commit, or a branch."""

    name: str
    revision: str


MODEL_REPOS: Mapping[str, HubRepo] = {
    "image": HubRepo("BAAI/Emu3.5-Image", "main"),
    "base": HubRepo("BAAI/Emu3.5", "main"),
}

VISION_REPO = HubRepo("BAAI/Emu3.5-VisionTokenizer", "91789bbaa3f49b4b8882fc823d6849207bb99f13")

CDN_TAR = "https://weights.replicate.delivery/default/BAAI/Emu3.5-Image/model.tar"

_MODEL_FILES = ("config.json", "emu3.tiktoken", "emu3_vision_tokens.txt")
_VISION_FILES = ("config.yaml", "model.ckpt")
_EXTRA_FILES = ("generation_config.json", INDEX_FILE)
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One folder of a checkpoint. `folder` is where this program puts it, `names` is where else it may lie."""

    key: str
    repo: HubRepo
    folder: str
    names: tuple[str, ...]
    required: tuple[str, ...]

    @property
    def is_model(self) -> bool:
        return self.key != "vision"

    def wants(self, name: str) -> bool:
        """Whether the file `name`, relative to the repository's or folder's root, is needed."""
        if not self.is_model:
            return name in self.required
        return name in self.required or name in _EXTRA_FILES or _SHARD.fullmatch(name) is not None

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
    return check_model(folder) if part.is_model else check_vision(folder)


def check_model(folder: Path) -> tuple[str, ...]:
    """Check a language model's folder: configuration, tokenizer files and every byte count of its safetensors."""
    from emu_cog.prompt.tokenizer import Tokenizer

    _check_present(folder, _MODEL_FILES)
    config = _read_json(folder / "config.json")
    read_headers(folder)
    shards = [file.name for file in shard_files(folder)]
    vocabulary = Tokenizer.load(folder).ids.vocab_size
    if config.get("vocab_size", vocabulary) != vocabulary:
        raise CheckpointError(
            f"{folder}: the tokenizer files make {vocabulary} tokens but config.json says {config['vocab_size']}: "
            "one of the three files is cut off or from another model"
        )
    return (*_MODEL_FILES, *(name for name in _EXTRA_FILES if (folder / name).is_file()), *shards)


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
