"""Products with few batch rows on a CPU, computed as (W x^T)^T.

A decode step multiplies two rows, a conditional and an unconditional sequence, by every weight. PyTorch's `F.linear` is
slow at that: for 2 x 640 by 131072 x 640 in fp32 it took 70 ms on one core of an AMD EPYC, `weight @ x.T` 18 ms, which
is what reading the weight takes. From 16 rows on `F.linear` is faster.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_ROWS = 8


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear`, (..., K) by (N, K) to (..., N), up to the order of its sums."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() > MAX_ROWS * x.shape[-1]:
        return F.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    return (weight @ rows.T).T.contiguous().view(*x.shape[:-1], weight.shape[0])


class FewRowsLinear(nn.Linear):
    """A linear layer without bias over an existing weight, computed by `linear`."""

    def __init__(self, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)


def replace_linears(model: nn.Module) -> None:
    """Replace every linear layer without bias in `model` by a FewRowsLinear over the same weight."""
    for name, module in list(model.named_modules()):
        # Layers with hooks of accelerate, which move tensors between devices, have to stay.
        if type(module) is nn.Linear and module.bias is None and not hasattr(module, "_hf_hook"):
            model.set_submodule(name, FewRowsLinear(module.weight))
