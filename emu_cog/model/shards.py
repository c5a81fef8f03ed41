"""Tensors of safetensors files straight onto a device, and the comparison of a state dict with what is expected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emu_cog.errors import CheckpointError

READERS = 4
"""Shards read at a time: enough to keep a fast disk busy, few enough that a slow one does not seek."""


def read_tensors(
    file: Path, names: Sequence[str], *, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """`names` of one file, one by one, on `device` in `dtype`. The file is mapped: no second copy stays in memory."""
    try:
        with safe_open(file, framework="pt", device=str(device)) as shard:
            for name in names:
                yield name, shard.get_tensor(name).to(dtype)
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
