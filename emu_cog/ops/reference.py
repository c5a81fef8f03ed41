"""The operations of a decode step in plain torch: the reference that the kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from emu_cog.ops import head as heads
from emu_cog.ops.interface import ImageState, Layer, Shape, Weight
from emu_cog.ops.sampling import guide, keep_top_k, keep_top_k_tensor, keep_top_p, sample
from emu_cog.request import Sampling


class TorchOps:
    """`Ops` for any device. `filled` is above every position, so that attention reads no further."""

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
        self, partials: Tensor | None, residual: Tensor, weight: Tensor, eps: float, into: Weight | None
    ) -> Tensor:
        if partials is not None:
            residual += partials.sum(0).to(residual.dtype)
        return _norm(residual, weight, eps)

    def rope_store(
        self, partials: Tensor, layer: Layer, shape: Shape, rope: Tensor, position: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        heads = partials.sum(0).to(keys.dtype).view(partials.shape[1], -1, shape.head_dim)
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

    def sample(self, logits: Tensor, state: ImageState, visual: int, sampling: Sampling) -> None:
        guided = guide(logits[0::2], logits[1::2], state.cfg_scale[0])
        torch.div(guided, state.temperature[0], out=state.scores)
        if sampling.top_p < 1.0:
            kept = keep_top_k(state.scores, sampling.top_k)
        else:
            kept = keep_top_k_tensor(state.scores, state.top_k)
        probs = keep_top_p(kept, sampling.top_p).softmax(dim=-1)
        at = state.step[:1]
        forced = state.forced[at][0]
        token = torch.where(forced < 0, visual + sample(probs, state.uniform[at][0]), forced)
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
