"""Muon for matrices: the update is the momentum, orthogonalized by a Newton-Schulz iteration.

Works on stacks of equal matrices (layers, out, in). Scaled so that learning rate and weight decay can be shared with
AdamW. Method: Keller Jordan, 2024; scaling: Moonshot's Moonlight report, 2025.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Quintic iteration that drives all singular values to about 1; coefficients from Jordan's article.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonal(m: Tensor, steps: int = 5) -> Tensor:
    """The nearest stack of matrices to (L, out, in) `m` with all singular values about 1."""
    x = m.bfloat16() if m.is_cuda else m.float()
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = _A * x + (_B * square + _C * square @ square) @ x
    return x.mT if transposed else x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum and orthogonalized updates; weight decay is decoupled."""

    def __init__(self, params: list[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(torch.lerp(p.grad, momentum, group["momentum"]))
                scale = 0.2 * max(p.shape[-2:]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.to(p.dtype), alpha=-group["lr"] * scale)
