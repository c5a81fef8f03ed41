"""A step over diagonals around its pass (`ops/diagonals.py`) in four kernels; it took 160 small ones of PyTorch, 0.4 ms
of a step on an H200. The gates' product remains PyTorch's: it is in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

from emu_cog.ops.kernels.grid import _place, _triangle
from emu_cog.ops.kernels.layers import _begin
from emu_cog.ops.kernels.sampling import _code


@triton.jit
def _next(slot_ptr, step_ptr, rows_ptr, columns_ptr):
    """A picture's slot, the number of its next diagonal, and its rows and columns."""
    slot = tl.load(slot_ptr)
    return slot, tl.load(step_ptr + slot), tl.load(rows_ptr + slot), tl.load(columns_ptr + slot)


@triton.jit
def gather_kernel(
    slots_ptr,  # (n,) int64
    step_ptr,
    rows_ptr,
    columns_ptr,  # (slots,) int64
    h_ptr,
    v_ptr,  # (2 slots, CELLS, H)
    pair_ptr,  # (M, 2H) fp32
    width,
    rows,  # n * 2 * width; those of pair_ptr beyond become zeros
    H,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The left neighbour's h and the upper one's v, side by side. One program per row: picture, stream, cell."""
    _begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    h = tl.zeros((BLOCK,), tl.float32)
    v = tl.zeros((BLOCK,), tl.float32)
    if row < rows:
        slot, number, high, columns = _next(slots_ptr + row // (2 * width), step_ptr, rows_ptr, columns_ptr)
        stream = 2 * slot + row // width % 2
        _, _, left, above, _ = _place(number, high, columns, row % width)
        h = tl.load(h_ptr + (stream * CELLS + tl.maximum(left, 0)) * H + i, mask=i < H, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + (stream * CELLS + tl.maximum(above, 0)) * H + i, mask=i < H, other=0.0).to(tl.float32)
    tl.store(pair_ptr + row * 2 * H + i, h, mask=i < H)
    tl.store(pair_ptr + row * 2 * H + H + i, v, mask=i < H)


@triton.jit
def weigh_kernel(
    slots_ptr,
    step_ptr,
    rows_ptr,
    columns_ptr,
    pair_ptr,  # (M, 2H) fp32
    inner_ptr,  # (M, GATE) fp32: pair @ pair_in.T
    out_weight_ptr,  # (GATE,) fp32
    out_bias_ptr,  # (1,)
    corner_ptr,  # (H,) fp32
    corner_bias_ptr,  # (1,)
    out_ptr,  # (M, 2H)
    width,
    H,
    GATE,
    BLOCK: tl.constexpr,
    GATE_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """`weighed`. One program per row."""
    i, g = tl.arange(0, BLOCK), tl.arange(0, GATE_BLOCK)
    weight = tl.load(out_weight_ptr + g, mask=g < GATE, other=0.0)
    _begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    _slot, number, high, columns = _next(slots_ptr + row // (2 * width), step_ptr, rows_ptr, columns_ptr)
    _, _, left, above, _ = _place(number, high, columns, row % width)
    h = tl.load(pair_ptr + row * 2 * H + i, mask=i < H, other=0.0)
    v = tl.load(pair_ptr + row * 2 * H + H + i, mask=i < H, other=0.0)
    if left >= 0 and above >= 0:
        inner = tl.load(inner_ptr + row * GATE + g, mask=g < GATE, other=0.0)
        share = tl.sigmoid(tl.sum(inner * tl.sigmoid(inner) * weight, axis=0) + tl.load(out_bias_ptr))
    elif left < 0 and above < 0:
        corner = tl.load(corner_ptr + i, mask=i < H, other=0.0)
        share = tl.sigmoid(tl.sum(h * corner, axis=0) + tl.load(corner_bias_ptr))
    else:
        share = tl.where(left < 0, 0.0, 1.0)
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + row * 2 * H + i, (share * h).to(kind), mask=i < H)
    tl.store(out_ptr + row * 2 * H + H + i, ((1.0 - share) * v).to(kind), mask=i < H)


@triton.jit
def store_kernel(
    slots_ptr,
    step_ptr,
    rows_ptr,
    columns_ptr,
    position_ptr,  # (2 slots,) int64
    best_ptr,  # (n * width,) int64: see `pick_kernel`
    counts_ptr,  # (n * width, 1024) int32
    out_ptr,  # (slots, steps) int64
    fed_ptr,  # (7, n, 2, width) int64: tokens, positions, streams, rotary, last; the vertical layers' positions, last
    steps,
    width,
    visual,
    padding,
    PDL: tl.constexpr,
):
    """`stored`, and reset for the next step what was picked. Program (picture, cell)."""
    _begin(PDL)
    image, j = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot, number, high, columns = _next(slots_ptr + image, step_ptr, rows_ptr, columns_ptr)
    live, cell, _, _, count = _place(number, high, columns, j)
    drawn = _triangle(number) - _triangle(number - high) - _triangle(number - columns)
    drawn += _triangle(number - high - columns)
    row = image * width + j
    token = visual + _code(tl.load(best_ptr + row))
    if live:
        tl.store(out_ptr + slot * steps + cell, token)
    stream = tl.arange(0, 2)
    prompt = tl.load(position_ptr + 2 * slot + stream)
    longest = tl.max(prompt, axis=0)
    at = fed_ptr + (image * 2 + stream) * width + j
    next_ptr = tl.num_programs(0).to(tl.int64) * 2 * width
    zero = prompt * 0
    tl.store(at, tl.where(live, token, zero))
    tl.store(at + next_ptr, tl.where(live, prompt + drawn + j, zero))
    tl.store(at + 2 * next_ptr, tl.where(live, 2 * slot + stream, zero + 2 * padding))
    tl.store(at + 3 * next_ptr, tl.where(live, longest + cell, zero))
    tl.store(at + 4 * next_ptr, tl.where(live, prompt + drawn + count - 1, zero))
    tl.store(at + 5 * next_ptr, tl.where(live, drawn + j, zero))
    tl.store(at + 6 * next_ptr, tl.where(live, drawn + count - 1, zero))
    tl.debug_barrier()
    tl.store(best_ptr + row, -9223372036854775808)
    tl.store(counts_ptr + row * 1024 + tl.arange(0, 1024), tl.zeros((1024,), tl.int32))


@triton.jit
def keep_kernel(
    slots_ptr,
    step_ptr,
    total_ptr,
    from_h_ptr,
    from_v_ptr,  # (n, 2, width, H)
    h_ptr,
    v_ptr,  # (2 slots, CELLS, H)
    width,
    H,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """`keep`. One program per row: picture, stream, cell."""
    _begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    slot = tl.load(slots_ptr + row // (2 * width))
    at = ((2 * slot + row // width % 2) * CELLS + row % width) * H + i
    tl.store(h_ptr + at, tl.load(from_h_ptr + row * H + i, mask=i < H), mask=i < H)
    tl.store(v_ptr + at, tl.load(from_v_ptr + row * H + i, mask=i < H), mask=i < H)
    if row % (2 * width) == 0:
        tl.store(step_ptr + slot, tl.minimum(tl.load(step_ptr + slot) + 1, tl.load(total_ptr + slot)))
