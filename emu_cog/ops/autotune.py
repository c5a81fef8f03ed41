"""How the kernels cut their work: a first choice from the shapes, then the fastest by the clock on this device.

Whatever is tried, every sum is taken in the same order: `splits` and `block_k` follow from the shape alone and no
choice depends on the number of rows. So a picture is the same bit by bit on every start of one device, alone or in a
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from emu_cog.ops.interface import DecodeWeights, Weight

MAX_ROWS = 16
"""Rows the kernels take: one tile of the tensor cores."""
TIMED = 16
"""Layers whose weights a timing goes over: together far more than any cache holds."""
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
    """All choices. `tiles` by the weight's shape (N, K); `pdl` is early launching (kernels.py tells)."""

    tiles: Mapping[tuple[int, int], Tiles]
    key_splits: int = 8
    key_block: int = 64
    pdl: bool = False


def choose_plan(w: DecodeWeights, device: torch.device) -> Plan:
    """The first choice for `device`.

    Measured on an H100 over the released model's shapes and 2 to 16 rows, 26 ways of cutting each: tiles of 64
    outputs by 128 inputs were within 2% of the best everywhere, and so were eight parts of each row's keys.
    """
    layer, shared, hopper = w.layers[0], DEFAULT_SHARED, False
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        shared, hopper = getattr(properties, "shared_memory_per_block_optin", shared), properties.major >= 9
    tiles = {shape(weight): _tiles(weight, shared) for weight in (layer.qkv, layer.o, layer.down)}
    tiles[shape(layer.gate_up)] = _tiles(layer.gate_up, shared, swiglu=True)
    for head in (Weight(w.visual_head), Weight(w.text_head)):
        tiles[shape(head)] = _tiles(head, shared, whole=True)
    return Plan(tiles=tiles, key_block=64 if w.embed.dtype.itemsize == 2 else 32, pdl=hopper)


def autotune(
    plan: Plan, w: DecodeWeights, seconds: Callable[[Sequence[Weight], Tiles, bool], float | None]
) -> tuple[Plan, list[str]]:
    """`plan` with the fastest of `alternatives` for each kind of weight, and what was found, to be told.

    `seconds(weights, tiles, swiglu)` times the products of some weights of one shape; None where the device can't.
    """
    kinds = {name: [getattr(layer, name) for layer in w.layers[:TIMED]] for name in ("qkv", "o", "gate_up", "down")}
    tiles, told = dict(plan.tiles), []
    for name, weights in (kinds | {"head": [Weight(w.visual_head)]}).items():
        first = plan.tiles[shape(weights[0])]
        timed = {choice: seconds(weights, choice, name == "gate_up") for choice in alternatives(first)}
        found = {choice: time for choice, time in timed.items() if time is not None}
        best = min(found, key=lambda choice: found[choice])
        tiles[shape(weights[0])] = best
        pace = sum(weight.data.nbytes for weight in weights) / found[best] / 1e12
        told.append(f"{name} {best.block_n}x{best.block_k}, {best.stages} stages, {best.warps} warps: {pace:.2f} TB/s")
    return replace(plan, tiles=tiles), told


def alternatives(first: Tiles) -> list[Tiles]:
    """`first` and other ways that sum in the same order; none below 64 outputs, where Triton leaves Hopper's own
    matrix instructions for older ones, which may round differently."""
    shapes = [(64, 2, 4), (64, 3, 4), (64, 4, 4), (64, 6, 4), (128, 2, 8), (128, 3, 8), (128, 4, 8)]
    others = [replace(first, block_n=n, stages=stages, warps=warps) for n, stages, warps in shapes]
    return [first, *(choice for choice in others if choice != first)]


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
