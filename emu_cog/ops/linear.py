"""Products in plain torch: of few rows on a CPU, and with the head, never rounded to the weights' half precision."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn import functional as F

CPU_BLOCK = 8
"""Rows of a decode step that a CPU multiplies at a time: one shape, so that no row's sums depend on the other rows."""
CPU_WIDE = 6 * CPU_BLOCK
"""Rows that it multiplies at once, at most, where that gives the same bits (`widest`). emu-mini's layers take 15.0 ms
for 48 rows in blocks and 4.8 at once, on two cores with PyTorch 2.13; 64 rows at once gave other bits."""
CPU_ROWS = 8 * CPU_BLOCK
"""Rows of a CPU's largest pass of a decode step."""
HEAD_SLICE = 2**25
"""Weights of a half-precision head that a CPU converts to fp32 at a time: 128 MiB. CUDA needs no copy."""


_widest: dict[tuple[object, ...], int] = {}


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear`, (M, K) by (N, K) to (M, N); up to CPU_ROWS rows on a CPU as if in blocks."""
    if x.device.type != "cpu" or len(x) <= CPU_BLOCK or len(x) > CPU_ROWS:
        return F.linear(x, weight)
    whole = len(x) - len(x) % CPU_BLOCK
    parts = [part for part in (*x[:whole].split(widest(weight)), x[whole:]) if len(part)]
    return F.linear(parts[0], weight) if len(parts) == 1 else torch.cat([F.linear(part, weight) for part in parts])


def widest(weight: Tensor) -> int:
    """Rows, a multiple of CPU_BLOCK, that a product with a weight of this layout takes at a time: of the numbers that
    give the bits of blocks, the fastest for each row.

    Tried once, with random numbers. Only in fp32: half-precision results would hide most differences. Larger products
    are not always faster: 384 x 768 took 81 us with 16 rows and 605 with 24, 384 x 960 98 and 123.
    """
    if weight.dtype != torch.float32:
        return CPU_BLOCK
    key = (weight.shape, weight.stride(), torch.get_num_threads())
    if key not in _widest:
        x = torch.randn((CPU_WIDE, weight.shape[1]), generator=torch.Generator().manual_seed(1))
        blocks = torch.cat([F.linear(part, weight) for part in x.split(CPU_BLOCK)])
        paces = {}
        for rows in range(CPU_BLOCK, CPU_WIDE + 1, CPU_BLOCK):
            if not torch.equal(F.linear(x[:rows], weight), blocks[:rows]):
                break
            paces[rows] = _seconds(x[:rows], weight) / rows
        _widest[key] = min(paces, key=lambda rows: paces[rows])
    return _widest[key]


def _seconds(x: Tensor, weight: Tensor) -> float:
    """The best of five runs."""
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        F.linear(x, weight)
        taken.append(time.perf_counter() - started)
    return min(taken)


def empty(n: int, k: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized (N, K) weight. A CPU's fp32 weights are laid out along N: with 8 rows its products take half the
    time (384 x 384 on two cores: 37 us instead of 69)."""
    if device.type == "cpu" and dtype == torch.float32:
        return torch.empty((k, n), dtype=dtype).T
    return torch.empty((n, k), dtype=dtype, device=device)


def logits(hidden: Tensor, head: Tensor) -> Tensor:
    """(M, K) hidden states by a (V, K) head of the same dtype, on one device: (M, V) fp32.

    bfloat16 keeps 8 bits: among 131072 codes many scores would round to the same number, and guidance, c - u times a
    scale, magnifies rounding errors. A product in the head's dtype reads as much and is summed in fp32 anyway; here
    that sum is kept.
    """
    if head.dtype == torch.float32:
        return linear(hidden, head)
    if head.is_cuda:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    wide, rows = hidden.float(), max(1, HEAD_SLICE // head.shape[1])
    return torch.cat([linear(wide, part.float()) for part in head.split(rows)], dim=-1)
