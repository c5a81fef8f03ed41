"""The product with the head, never rounded to the weights' half precision.

bfloat16 keeps 8 bits: among 131072 codes many scores round to the same number, and guidance, c - u times a scale,
magnifies the rounding errors. A product in the head's dtype has to read as much and is summed in fp32 anyway; here
that sum is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emu_cog.ops import cpu_linear

SLICE = 2**25
"""Weights that a CPU converts to fp32 at a time: 128 MiB. CUDA needs no copy."""


def logits(hidden: Tensor, head: Tensor) -> Tensor:
    """(M, K) hidden states by a (V, K) head of the same dtype, on one device: (M, V) fp32."""
    if head.dtype == torch.float32:
        return cpu_linear.linear(hidden, head)
    if head.is_cuda:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    wide, rows = hidden.float(), max(1, SLICE // head.shape[1])
    return torch.cat([cpu_linear.linear(wide, part.float()) for part in head.split(rows)], dim=-1)
