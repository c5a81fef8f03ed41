"""Where the cells of a diagonal lie (`Places` of ops/diagonals.py), for the kernels that need to know."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(number, rows, columns, j):
    """Cell j of diagonal `number` as `Places` has it: live, cell, left, above, count."""
    top, before = tl.maximum(number - columns + 1, 0), tl.maximum(number - columns, 0)
    count = tl.minimum(rows - 1, number) - top + 1
    row = top + j
    live = j < count
    cell = tl.where(live, row * (columns - 1) + number, 0)
    left = tl.where(live & (row < number), row - before, -1)
    above = tl.where(live & (row > 0), row - 1 - before, -1)
    return live, cell, left, above, count


@triton.jit
def _triangle(n):
    n = tl.maximum(n, 0)
    return n * (n + 1) // 2
