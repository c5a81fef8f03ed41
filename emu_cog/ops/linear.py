"""Products in plain torch: with few rows on a CPU, and with the head, never rounded to the weights' half precision."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CPU_ROWS = 16
"""Rows of an eager step on a CPU, padded: one shape, so that no row's sums depend on the number of sequences.

Up to here a product is computed as (W x^T)^T, whose time hardly depends on the number of rows: 131072 x 640 in fp32
take 24 ms on two cores, `F.linear` 13 ms with 2 rows and 40 with 8."""
HEAD_SLICE = 2**25
"""Weights of a half-precision head that a CPU converts to fp32 at a time: 128 MiB. CUDA needs no copy."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear`, (M, K) by (N, K) to (M, N), up to the order of its sums."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or len(x) > CPU_ROWS:
        return F.linear(x, weight)
    return (weight @ x.T).T.contiguous()


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
