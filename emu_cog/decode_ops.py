"""What one decode step is made of: the tensors it works on, its operations, and those in plain torch.

M is the number of rows in the batch: two streams a picture. triton_ops.py holds the same operations in kernels. Both
keep the layers' own roundings (after each norm, product and rotation), so that they differ by the order of sums alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from emu_cog import head as heads
from emu_cog.config import Sampling
from emu_cog.sampling import draw, guide, keep_k, keep_top_k, keep_top_p


@dataclass(frozen=True)
class Weight:
    """A linear layer's (N, K) weight; int8 or fp8 with one fp32 `scale` a row, (N,), else in the model's dtype."""

    data: Tensor
    scale: Tensor | None = None

    def product(self, x: Tensor) -> Tensor:
        """(M, K) to (M, N), in x's dtype, or fp32 where the weight has a scale: that is applied after the sum."""
        if self.scale is None:
            return F.linear(x, self.data)
        return F.linear(x, self.data.to(x.dtype)).float() * self.scale


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer's weights: queries, keys and values in one matrix, gate and up in one."""

    qkv: Weight
    o: Weight
    gate_up: Weight
    down: Weight
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor
    k_norm: Tensor


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the kernels must know beside the tensors."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float


@dataclass(kw_only=True)
class ImageState:
    """Everything a step reads and writes beside weights and cache; lives on the device from the first step to the last.

    A lane is one picture. Tables have a row a step; `step` says which one is next.
    """

    token: Tensor  # (2 lanes,) int64: fed next
    position: Tensor  # (2 lanes,) int64: where it goes
    step: Tensor  # (lanes,) int64
    forced: Tensor  # (steps, lanes) int64, -1 where a token is drawn
    uniform: Tensor  # (steps, lanes) float64
    advance: Tensor  # (steps, 2 lanes) int64
    out: Tensor  # (steps, lanes) int64, written
    knobs: Tensor  # (2,) fp32: guidance, temperature
    top_k: Tensor  # (1,) int32: at least 1
    scores: Tensor  # (lanes, V) fp32, written: what the last step drew from, guided and over the temperature

    @classmethod
    def empty(cls, lanes: int, steps: int, vocabulary: int, device: torch.device) -> ImageState:
        """All zeros but the knobs; room for `steps` steps over `vocabulary` tokens."""

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return cls(
            token=ints(2 * lanes),
            position=ints(2 * lanes),
            step=ints(lanes),
            forced=ints(steps, lanes),
            uniform=torch.zeros((steps, lanes), dtype=torch.float64, device=device),
            advance=ints(steps, 2 * lanes),
            out=ints(steps, lanes),
            knobs=torch.ones(2, device=device),
            top_k=torch.ones(1, dtype=torch.int32, device=device),
            scores=torch.zeros((lanes, vocabulary), device=device),
        )


class Ops(Protocol):
    """The operations of a step. `parts` (splits, M, N) fp32 is a product not summed over its first axis yet."""

    def linear(self, x: Tensor, w: Weight) -> Tensor:
        """(M, K) times (N, K) transposed: parts (splits, M, N)."""

    def swiglu(self, x: Tensor, w: Weight) -> Tensor:
        """silu(x @ gate.T) * (x @ up.T): (M, N) of a (2N, K) weight, as the next product reads it."""

    def logits(self, x: Tensor, head: Tensor) -> Tensor:
        """(M, K), its rows side by side or not, to (M, V) fp32."""

    def add_norm(
        self, parts: Tensor | None, residual: Tensor, weight: Tensor, eps: float, into: Weight | None
    ) -> Tensor:
        """Add the parts to `residual` (M, H) in place; give back its RMSNorm, as the weight `into` reads it."""

    def rope_store(
        self, parts: Tensor, layer: Layer, shape: Shape, rope: Tensor, position: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Norm and rotate queries and keys, put keys and values at `position`; gives the queries (M, heads, D)."""

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, position: Tensor, into: Weight) -> Tensor:
        """Attention over each row's keys 0..position: (M, heads * D), as the weight `into` reads it."""

    def choose(self, logits: Tensor, state: ImageState, visual: int, sampling: Sampling) -> None:
        """Choose every lane's next token from (2 lanes, V) logits and move the state one step on.

        Guidance, temperature and top-k are the state's. Only where `sampling.top_p` is below 1 are its top-k and
        top-p part of the step."""


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
