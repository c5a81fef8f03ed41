"""What one decode step is made of: the tensors it works on, its operations, and those in plain torch.

M is the number of rows in the batch: two streams a picture. triton_ops.py holds the same operations in kernels. Both
keep the layers' own roundings (after each norm, product and rotation), so that they differ by the order of sums alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from emu_cog.ops import head as heads
from emu_cog.ops.interface import ImageState, Layer, Shape, Weight
from emu_cog.ops.sampling import draw, guide, keep_k, keep_top_k, keep_top_p
from emu_cog.request import Sampling


class TorchOps:
    """The twin: plain torch, any device. `filled` bounds every position from above, so that attention reads no more."""

    def __init__(self, filled: int) -> None:
        self.filled = filled

    def linear(self, x: Tensor, w: Weight) -> Tensor:
        return w.product(x).float()[None]

    def swiglu(self, x: Tensor, w: Weight) -> Tensor:
        gate, up = w.product(x).to(x.dtype).chunk(2, dim=-1)
        return F.silu(gate) * up

    def logits(self, x: Tensor, head: Tensor) -> Tensor:
        return heads.logits(x, head)

    def add_norm(
        self, parts: Tensor | None, residual: Tensor, weight: Tensor, eps: float, into: Weight | None
    ) -> Tensor:
        if parts is not None:
            residual += parts.sum(0).to(residual.dtype)
        return _norm(residual, weight, eps)

    def rope_store(
        self, parts: Tensor, layer: Layer, shape: Shape, rope: Tensor, position: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        heads = parts.sum(0).to(keys.dtype).view(parts.shape[1], -1, shape.head_dim)
        q, k, v = heads.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
        cos, sin = rope[:, position, None]
        row = torch.arange(len(q), device=q.device)
        keys[row, position] = _rotate(_norm(k, layer.k_norm, shape.eps), cos, sin)
        values[row, position] = v
        return _rotate(_norm(q, layer.q_norm, shape.eps), cos, sin)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, position: Tensor, into: Weight) -> Tensor:
        m, _, dim = q.shape
        mask = torch.arange(self.filled, device=q.device) <= position[:, None]
        keys, values = (x[:, : self.filled].transpose(1, 2) for x in (keys, values))
        folded = q.view(m, keys.shape[1], -1, dim)
        return F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask[:, None, None]).reshape(m, -1)

    def choose(self, logits: Tensor, state: ImageState, visual: int, sampling: Sampling) -> None:
        torch.div(guide(logits[0::2], logits[1::2], state.knobs[0]), state.knobs[1], out=state.scores)
        kept = keep_top_k(state.scores, sampling.top_k) if sampling.top_p < 1.0 else keep_k(state.scores, state.top_k)
        probs = keep_top_p(kept, sampling.top_p).softmax(dim=-1)
        at = state.step[:1]
        forced = state.forced[at][0]
        token = torch.where(forced < 0, visual + draw(probs, state.uniform[at][0]), forced)
        state.out[at] = token[None]
        state.token.copy_(token.repeat_interleave(2))
        state.position += state.advance[at][0]
        state.step += 1


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm as Qwen3RMSNorm rounds it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin
