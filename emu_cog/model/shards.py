"""A folder of safetensors: what its headers say, and its tensors straight onto a device."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emu_cog.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
READERS = 4
"""Shards read at a time: enough to keep a fast disk busy, few enough that a slow one does not seek."""


@dataclass(frozen=True)
class TensorHeader:
    """Where a tensor lies and its shape, known without reading it."""

    file: Path
    shape: tuple[int, ...]


def shard_files(folder: Path) -> list[Path]:
    """The weight files of `folder`: the index's shards, else the single file. CheckpointError when one is missing."""
    index = folder / INDEX_FILE
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged: {error!r}") from None
        bad = [name for name in names if not isinstance(name, str) or "/" in name or "\\" in name]
        if bad:
            raise CheckpointError(f"{index} names a file outside its folder: {bad[0]!r}")
    else:
        names = [SINGLE_FILE]
    files = [folder / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(f"{folder} lacks {', '.join(missing[:3])}{more}: the weights are not complete")
    return files


def read_headers(folder: Path) -> Mapping[str, TensorHeader]:
    """Every tensor of `folder` by name. Reads headers only."""
    headers: dict[str, TensorHeader] = {}
    for file in shard_files(folder):
        with _open(file, "cpu") as shard:
            for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                headers[name] = TensorHeader(file, tuple(shard.get_slice(name).get_shape()))
    return headers


def read_tensors(
    file: Path, names: Sequence[str], *, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """`names` of one file, one by one, on `device` in `dtype`. The file is mapped: no second copy stays in memory."""
    with _open(file, str(device)) as shard:
        for name in names:
            yield name, shard.get_tensor(name).to(dtype)


def _open(file: Path, device: str) -> Any:
    try:
        return safe_open(file, framework="pt", device=device)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or cut off: {error}") from None


def check_state(expected: Mapping[str, Tensor], found: Mapping[str, Any], *, where: str) -> None:
    """Compare names and shapes; CheckpointError names the first few that are lacking, unknown or misshapen.

    Values need only a `.shape`.
    """
    problems = [f"lacks {name}" for name in expected if name not in found]
    problems += [f"has the unknown key {name}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name].shape)}, expected {list(value.shape)}"
        for name, value in expected.items()
        if name in found and tuple(found[name].shape) != tuple(value.shape)
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"{where}: {'; '.join(problems[:3])}{more}")
