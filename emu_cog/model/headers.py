"""What config.json and the headers of a folder's safetensors say, without reading a tensor and without torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from emu_cog.errors import CheckpointError

FLASH_FILE = "flashar.safetensors"
"""A FlashAR checkpoint's weights, decoder included, where both repositories look for them first."""
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
U0_TYPE, FLASH_TYPE = "UNIS", "emu3_flashar"
"""`model_type` of Xiaomi-Robotics-U0's configuration files, and of what lxazjk/Emu3.5-FlashAR saves
(`_write_hf_checkpoint_dir`), which has the decoder's configuration inside."""
MARKER = "horizontal_head.weight"
"""A key that every FlashAR checkpoint has and no other."""
FLASH_HEADS = (MARKER, "vertical_head.weight")
PICKLES = ("flashar.pt", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What else the FlashAR repositories load. A pickle can run code when it is opened, so these are refused."""


@dataclass(frozen=True)
class TensorHeader:
    """Where a tensor lies and its shape."""

    file: Path
    shape: tuple[int, ...]


def vertical_blocks(names: Iterable[str]) -> int:
    """FlashAR's vertical layers, by the keys of a checkpoint."""
    return len({name.split(".")[1] for name in names if name.startswith("vertical_block.")})


def config_json(folder: Path) -> dict[str, Any]:
    """`folder/config.json`. CheckpointError when it is missing or unreadable."""
    path = folder / CONFIG_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: a checkpoint folder holds {CONFIG_FILE}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return data


def read_header(file: Path) -> dict[str, TensorHeader]:
    """The tensors of one file. The library compares the header with the file's size; CheckpointError if they differ."""
    try:
        with safe_open(file, framework="numpy") as shard:
            return {name: TensorHeader(file, tuple(shard.get_slice(name).get_shape())) for name in shard.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, OSError) as error:
        size = f" ({file.stat().st_size} bytes)" if file.is_file() else ""
        raise CheckpointError(f"{file} is damaged or cut off: {error}{size}") from None


def read_headers(folder: Path) -> Mapping[str, TensorHeader]:
    """Every tensor of `folder` by name. CheckpointError if a file, or a tensor that the index names, is missing."""
    weight_map = _weight_map(folder)
    headers: dict[str, TensorHeader] = {}
    for file in shard_files(folder):
        held = read_header(file)
        if lost := [tensor for tensor, name in weight_map.items() if name == file.name and tensor not in held]:
            raise CheckpointError(f"{file} lacks {len(lost)} tensor(s) of the index, first {lost[0]}")
        headers |= held
    return headers


def shard_files(folder: Path) -> list[Path]:
    """The weight files of `folder`: FLASH_FILE, else the index's shards, else the single file. CheckpointError when one
    is missing."""
    names = sorted(set(_weight_map(folder).values())) or [SINGLE_FILE]
    if (folder / FLASH_FILE).is_file():
        names = [FLASH_FILE]
    elif not any((folder / name).is_file() for name in (*names, INDEX_FILE)):
        for pickle in (name for name in PICKLES if (folder / name).is_file()):
            raise CheckpointError(
                f"{folder / pickle} is a pickle, which can run code when it is opened: convert it to {SINGLE_FILE}"
            )
    if missing := [name for name in names if not (folder / name).is_file()]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        without_index = "" if (folder / INDEX_FILE).is_file() else f" and has no {INDEX_FILE}"
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing[:3])}{more}{without_index}: the weights are not complete"
        )
    return [folder / name for name in names]


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name to file name, by the index; empty without one."""
    index = folder / INDEX_FILE
    if not index.is_file() or (folder / FLASH_FILE).is_file():
        return {}
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = list(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged or cut off: {error!r}") from None
    if not names:
        raise CheckpointError(f"{index} has no weight_map")
    for name in names:
        if not isinstance(name, str) or "/" in name or "\\" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{index} names a file outside its folder: {name!r}")
    return dict(weight_map)
