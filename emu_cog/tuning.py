"""How the kernels cut their work: chosen once for a number of rows, from measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from emu_cog.decode import DecodeWeights
from emu_cog.decode_ops import Weight

MAX_ROWS = 16
"""Rows the kernels take: one tile of the tensor cores."""
DEFAULT_SHARED = 99 * 1024
"""Bytes of shared memory a program may take where the device does not say: the least of CUDA 8.0 and later."""


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
    layer, shared, hopper = w.layers[0], DEFAULT_SHARED, False
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        shared, hopper = getattr(properties, "shared_memory_per_block_optin", shared), properties.major >= 9
    tiles = {shape(weight): _tiles(weight, shared) for weight in (layer.qkv, layer.o, layer.down)}
    tiles[shape(layer.gate_up)] = _tiles(layer.gate_up, shared, swiglu=True)
    tiles[shape(Weight(w.visual_head))] = _tiles(Weight(w.visual_head), shared, whole=True)
    # A program a (row, kv head, part): about one for each multiprocessor, more where that leaves long parts.
    parts = max(4, min(8, 128 // (rows * w.shape.kv_heads)))
    # Early launches gained 1% at 2 rows and lost 0.5% at 16.
    return Plan(
        tiles=tiles,
        key_splits=1 << (parts.bit_length() - 1),
        key_block=64 if w.embed.dtype.itemsize == 2 else 32,
        pdl=hopper and rows <= 8,
    )


def shape(weight: Weight) -> tuple[int, int]:
    """(N, K)."""
    return weight.data.shape[0], weight.data.shape[1]


def _tiles(weight: Weight, shared: int, *, swiglu: bool = False, whole: bool = False) -> Tiles:
    """`whole` (and `swiglu`) leaves the sum over K in one piece; else about 400 programs share the work, three a
    multiprocessor. `shared` is the shared memory a program may take, bytes."""
    n, k = shape(weight)
    k, block = (k // 4, 64) if weight.scale is not None else (k, 128)
    wanted = 1 if whole or swiglu else round(400 / (n / 64))
    # Parts of equal length and of at least eight blocks: then no load needs a mask.
    fitting = [s for s in range(1, wanted + 1) if k % (s * block) == 0 and k >= 8 * s * block]
    splits = max(fitting, default=1)
    itemsize = 4 if weight.scale is not None else weight.data.dtype.itemsize
    stage = block * (64 * itemsize * (2 if swiglu else 1) + MAX_ROWS * max(itemsize * 2, 4))
    stages = min(6 if splits == 1 else 4, shared // stage)
    return Tiles(block_n=64, block_k=block, stages=max(stages, 1), splits=splits)
