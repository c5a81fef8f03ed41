"""What one decode step is made of: the tensors it works on and its operations.

M is the number of rows in the batch: two streams a picture. reference.py holds the operations in plain torch,
triton_ops.py in kernels. Both keep the layers' own roundings (after each norm, product and rotation), so that they
differ by the order of sums alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from emu_cog.request import Sampling


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


@dataclass(frozen=True, kw_only=True)
class DecodeWeights:
    """All a step reads. `rope` (2, context, head_dim): cosines and sines by position, in the model's dtype."""

    embed: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    visual_head: Tensor
    text_head: Tensor
    visual: int
    rope: Tensor
    shape: Shape

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that one step reads, whatever the number of rows."""
        held = [w for layer in self.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        scales = sum(w.scale.nbytes for w in held if w.scale is not None)
        return sum(w.data.nbytes for w in held) + scales + self.visual_head.nbytes


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
