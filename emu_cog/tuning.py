"""How the kernels cut their work: chosen once for a number of rows, from measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from emu_cog.decode import DecodeWeights
from emu_cog.decode_ops import Weight


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a linear kernel cuts its work; `splits` cuts the sum over K. For 8-bit weights K counts words of four."""

    block_n: int
    block_k: int
    stages: int
    warps: int = 4
    splits: int = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All choices for one number of rows. `tiles` by the weight's shape (N, K)."""

    tiles: Mapping[tuple[int, int], Tiles]
    key_splits: int
    key_block: int = 64
    pdl: bool = False


def choose_plan(w: DecodeWeights, rows: int, device: torch.device) -> Plan:
    """The plan for `rows` rows on `device`.

    Measured on an H100 over the released model's shapes and 2 to 16 rows, 26 ways of cutting each: tiles of 64
    outputs by 128 inputs were within 2% of the best everywhere.
    """
    layer = w.layers[0]
    tiles = {shape(weight): _tiles(weight, whole=False) for weight in (layer.qkv, layer.o, layer.down)}
    tiles |= {shape(weight): _tiles(weight, whole=True) for weight in (layer.gate_up, Weight(w.visual_head))}
    # A program a (row, kv head, part): about one for each multiprocessor, more where that leaves long parts.
    parts = max(4, min(8, 128 // (rows * w.shape.kv_heads)))
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return Plan(tiles=tiles, key_splits=1 << (parts.bit_length() - 1), pdl=hopper)


def shape(weight: Weight) -> tuple[int, int]:
    """(N, K)."""
    return weight.data.shape[0], weight.data.shape[1]


def _tiles(weight: Weight, *, whole: bool) -> Tiles:
    """`whole` leaves the sum over K in one piece; else about 400 programs share the work, three a multiprocessor."""
    n, k = shape(weight)
    k, block = (k // 4, 64) if weight.scale is not None else (k, 128)
    wanted = 1 if whole else round(400 / (n / 64))
    # Parts of equal length and of at least eight blocks: then no load needs a mask.
    fitting = [s for s in range(1, wanted + 1) if k % (s * block) == 0 and k >= 8 * s * block]
    splits = max(fitting, default=1)
    return Tiles(block_n=64, block_k=block, stages=6 if splits == 1 else 4, splits=splits)
