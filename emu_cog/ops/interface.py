"""What one decode step is made of: the tensors it works on and its operations.

M is the number of batch rows: two per image, its conditional and its unconditional sequence. reference.py holds the
operations in plain torch, triton_ops.py in kernels. Both round where the layers do (after each norm, product and
rotation), so that they differ by the order of sums alone.
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
    """A linear layer's (N, K) weight; int8 or fp8 with fp32 `scale` (N,) per weight row, else the model's dtype."""

    data: Tensor
    scale: Tensor | None = None

    def product(self, x: Tensor) -> Tensor:
        """(M, K) to (M, N), in x's dtype; fp32 where the weight has a scale, which is applied after the sum."""
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
    """What the kernels need to know besides the tensors."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float


@dataclass(frozen=True, kw_only=True)
class DecodeWeights:
    """All weights of a step. `rope` (2, context, head_dim): cosines and sines by position, in the model's dtype."""

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
        """Bytes of weights that one step reads, whatever the number of batch rows."""
        held = [w for layer in self.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        scales = sum(w.scale.nbytes for w in held if w.scale is not None)
        return sum(w.data.nbytes for w in held) + scales + self.visual_head.nbytes


@dataclass(kw_only=True)
class ImageState:
    """What a step reads and writes besides weights and cache; stays on the device for the whole image.

    One entry per image, or two where the conditional and the unconditional sequence differ. Tables have one row per
    step; `step` is the index of the next one.
    """

    token: Tensor  # (2 images,) int64: fed next
    position: Tensor  # (2 images,) int64: where it is stored
    step: Tensor  # (images,) int64
    forced: Tensor  # (steps, images) int64, -1 where a token is sampled
    uniform: Tensor  # (steps, images) float64
    advance: Tensor  # (steps, 2 images) int64
    out: Tensor  # (steps, images) int64, written
    cfg_scale: Tensor  # (1,) fp32
    temperature: Tensor  # (1,) fp32
    top_k: Tensor  # (1,) int32: at least 1
    scores: Tensor  # (images, V) fp32, written: what the last step sampled from, guided and divided by the temperature

    @classmethod
    def empty(cls, images: int, steps: int, vocabulary: int, device: torch.device) -> ImageState:
        """Zeros, and ones for the parameters; with tables of `steps` steps over `vocabulary` tokens."""

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return cls(
            token=ints(2 * images),
            position=ints(2 * images),
            step=ints(images),
            forced=ints(steps, images),
            uniform=torch.zeros((steps, images), dtype=torch.float64, device=device),
            advance=ints(steps, 2 * images),
            out=ints(steps, images),
            cfg_scale=torch.ones(1, device=device),
            temperature=torch.ones(1, device=device),
            top_k=torch.ones(1, dtype=torch.int32, device=device),
            scores=torch.zeros((images, vocabulary), device=device),
        )


class Ops(Protocol):
    """The operations of a step. `partials` (splits, M, N) fp32 is a product whose split-K partial sums are still to be
    added over the first axis."""

    def linear(self, x: Tensor, w: Weight) -> Tensor:
        """(M, K) times (N, K) transposed: partials (splits, M, N)."""

    def swiglu(self, x: Tensor, w: Weight) -> Tensor:
        """silu(x @ gate.T) * (x @ up.T): (M, N) of a (2N, K) weight, as the next product reads it."""

    def logits(self, x: Tensor, head: Tensor) -> Tensor:
        """(M, K), contiguous or not, to (M, V) fp32."""

    def add_norm(
        self, partials: Tensor | None, residual: Tensor, weight: Tensor, eps: float, into: Weight | None
    ) -> Tensor:
        """Add the partials to `residual` (M, H) in place; returns its RMSNorm, as the weight `into` reads it."""

    def rope_store(
        self, partials: Tensor, layer: Layer, shape: Shape, rope: Tensor, position: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Norm and rotate queries and keys, store keys and values at `position`; returns the queries (M, heads, D)."""

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, position: Tensor, into: Weight) -> Tensor:
        """Attention over each sequence's keys 0..position: (M, heads * D), as the weight `into` reads it."""

    def sample(self, logits: Tensor, state: ImageState, visual: int, sampling: Sampling) -> None:
        """Sample every image's next token from (2 images, V) logits and move the state one step on.

        cfg_scale, temperature and top-k are the state's. Only where `sampling.top_p` is below 1 are its top-k and top-p
        used instead, as constants of the step."""
