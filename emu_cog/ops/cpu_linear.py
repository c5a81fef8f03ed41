"""Products with few rows on a CPU, taken the other way round.

A decode step multiplies two rows, a pair of streams, with every weight. PyTorch's `F.linear` is slow at that: for
2 x 640 by 131072 x 640 in fp32 it took 70 ms on one core of an AMD EPYC, `weight @ x.T` 18 ms, which is what reading
the weight takes. From 16 rows on the first is the faster one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_ROWS = 8


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(..., K) by (N, K) to (..., N), as `F.linear`; the same product up to the order of its sums."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() > MAX_ROWS * x.shape[-1]:
        return F.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    return (weight @ rows.T).T.contiguous().view(*x.shape[:-1], weight.shape[0])


class FewRowsLinear(nn.Linear):
    """A linear layer without bias over another's weight, by `linear`."""

    def __init__(self, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)


def use_in(model: nn.Module) -> None:
    """Put FewRowsLinear in the place of every linear layer without bias of `model`; the weights stay theirs."""
    for name, module in list(model.named_modules()):
        # What accelerate has hooked up to move between devices keeps its hooks.
        if type(module) is nn.Linear and module.bias is None and not hasattr(module, "_hf_hook"):
            model.set_submodule(name, FewRowsLinear(module.weight))
