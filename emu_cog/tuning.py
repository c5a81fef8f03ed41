"""How the kernels cut their work: chosen once for a number of rows, from measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from emu_cog.decode import DecodeWeights
from emu_cog.decode_ops import Weight


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a linear kernel cuts its work. `splits` cuts the sum over K; `gemv` goes without the tensor cores (M = 2)."""

    block_n: int
    block_k: int
    stages: int
    warps: int
    splits: int = 1
    gemv: bool = False
    prefetch: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All choices for one number of rows. `tiles` by the weight's shape (N, K)."""

    tiles: Mapping[tuple[int, int], Tiles]
    key_splits: int
    key_block: int = 64
    pdl: bool = False


def choose_plan(w: DecodeWeights, rows: int, device: torch.device) -> Plan:
    """The plan for `rows` rows on `device`."""
    layer = w.layers[0]
    linear = (layer.qkv, layer.o, layer.down)
    tiles = {shape(weight): _tiles(weight, splits=True) for weight in linear}
    tiles |= {shape(weight): _tiles(weight, splits=False) for weight in (layer.gate_up, Weight(w.visual_head))}
    # A program a (row, kv head, part): enough programs to fill the chip twice, parts of at least a few blocks.
    parts = max(2, min(16, 256 // (rows * w.shape.kv_heads)))
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return Plan(tiles=tiles, key_splits=1 << (parts.bit_length() - 1), pdl=hopper)


def shape(weight: Weight) -> tuple[int, int]:
    """(N, K)."""
    return weight.data.shape[0], weight.data.shape[1]


def _tiles(weight: Weight, *, splits: bool) -> Tiles:
    n, k = shape(weight)
    wanted = 1
    if splits:
        while wanted * 2 * 1024 <= k and wanted * (n // 64) < 528:
            wanted *= 2
    return Tiles(block_n=64, block_k=128, stages=4, warps=4, splits=wanted)
