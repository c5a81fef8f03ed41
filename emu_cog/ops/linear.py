"""Products in plain torch: of few rows on a CPU, and with the head, never rounded to the weights' half precision."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CPU_BLOCK = 8
"""Rows of a decode step that a CPU multiplies at a time: one shape, so that no row's sums depend on the other rows."""
CPU_ROWS = 8 * CPU_BLOCK
"""Rows of a CPU's largest pass of a decode step."""
HEAD_SLICE = 2**25
"""Weights of a half-precision head that a CPU converts to fp32 at a time: 128 MiB. CUDA needs no copy."""


def linear(x: Tensor, weight: Tensor, block: int = CPU_BLOCK) -> Tensor:
    """`F.linear`, (M, K) by (N, K) to (M, N); up to CPU_ROWS rows on a CPU in blocks."""
    if x.device.type != "cpu" or len(x) <= block or len(x) > CPU_ROWS:
        return F.linear(x, weight)
    return torch.cat([F.linear(part, weight) for part in x.split(block)])


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
