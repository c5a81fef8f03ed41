"""Fused group norm and SiLU for channels-last tensors, in Triton, for training on a GPU.

PyTorch's group norm converts such tensors to channels-first and back, which takes half of a training step. Without a
GPU the unfused modules compute the same.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emu_cog.vision.ibq import IBQ, Decoder, Encoder, ResBlock

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU build of PyTorch
    triton = None

ROWS = 64
"""Positions per block."""
PARTS = 32
"""Programs per picture in the reductions."""

if triton is not None:

    @triton.jit
    def _sums(x, out, positions, C: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, share):  # type: ignore[no-untyped-def]
        """Per-channel sum and sum of squares over a part of a picture's positions."""
        picture, part = tl.program_id(0), tl.program_id(1)
        channel, row = tl.arange(0, C), tl.arange(0, ROWS)
        total, squares = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
        begin = 0
        while begin < share:
            at = part * share + begin + row
            there = ((begin + row < share) & (at < positions))[:, None]
            place = (picture * positions + at)[:, None] * C + channel[None, :]
            value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
            total += tl.sum(value, 0)
            squares += tl.sum(value * value, 0)
            begin += ROWS
        spot = (picture * PARTS + part) * 2 * C + channel
        tl.store(out + spot, total)
        tl.store(out + spot + C, squares)

    @triton.jit
    def _apply(x, scale, shift, out, positions, C: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
        """silu(x * scale + shift), with scale and shift per picture and channel."""
        picture = tl.program_id(1)
        channel, at = tl.arange(0, C), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        a, b = tl.load(scale + picture * C + channel)[None, :], tl.load(shift + picture * C + channel)[None, :]
        place = (picture * positions + at)[:, None] * C + channel[None, :]
        there = (at < positions)[:, None]
        y = tl.load(x + place, mask=there, other=0.0).to(tl.float32) * a + b
        tl.store(out + place, y * tl.sigmoid(y), mask=there)

    @triton.jit
    def _back_sums(
        x,
        dy,
        scale,
        shift,
        out,
        positions,
        C: tl.constexpr,
        ROWS: tl.constexpr,
        PARTS: tl.constexpr,
        share,
    ):  # type: ignore[no-untyped-def]
        """Sums over positions of the gradient before SiLU, and of its product with x."""
        picture, part = tl.program_id(0), tl.program_id(1)
        channel, row = tl.arange(0, C), tl.arange(0, ROWS)
        a, b = tl.load(scale + picture * C + channel)[None, :], tl.load(shift + picture * C + channel)[None, :]
        total, product = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
        begin = 0
        while begin < share:
            at = part * share + begin + row
            there = ((begin + row < share) & (at < positions))[:, None]
            place = (picture * positions + at)[:, None] * C + channel[None, :]
            value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
            y = value * a + b
            s = tl.sigmoid(y)
            g = tl.load(dy + place, mask=there, other=0.0).to(tl.float32) * s * (1 + y * (1 - s))
            total += tl.sum(g, 0)
            product += tl.sum(g * value, 0)
            begin += ROWS
        spot = (picture * PARTS + part) * 2 * C + channel
        tl.store(out + spot, total)
        tl.store(out + spot + C, product)

    @triton.jit
    def _back_apply(x, dy, scale, shift, of_g, of_x, rest, out, positions, C: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
        """dx = g * of_g + x * of_x + rest, with coefficients per picture and channel."""
        picture = tl.program_id(1)
        channel, at = tl.arange(0, C), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        spot = picture * C + channel
        a, b = tl.load(scale + spot)[None, :], tl.load(shift + spot)[None, :]
        u, v, w = tl.load(of_g + spot)[None, :], tl.load(of_x + spot)[None, :], tl.load(rest + spot)[None, :]
        place = (picture * positions + at)[:, None] * C + channel[None, :]
        there = (at < positions)[:, None]
        value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        y = value * a + b
        s = tl.sigmoid(y)
        g = tl.load(dy + place, mask=there, other=0.0).to(tl.float32) * s * (1 + y * (1 - s))
        tl.store(out + place, g * u + value * v + w, mask=there)


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        n, c, h, w = x.shape
        p = h * w
        sums = torch.empty(n, PARTS, 2, c, device=x.device)
        _sums[(n, PARTS)](x, sums, p, c, ROWS, PARTS, triton.cdiv(p, PARTS))
        # (N, 2, groups): the moments of each group
        first, second = (sums.sum(1).view(n, 2, groups, -1).sum(-1) / (p * c // groups)).unbind(1)
        rstd = torch.rsqrt((second - first.square()).clamp(min=0) + eps)
        mean, wide = (t.repeat_interleave(c // groups, 1) for t in (first, rstd))  # (N, C)
        scale = wide * weight.float()
        shift = bias.float() - mean * scale
        out = torch.empty_like(x)
        _apply[(triton.cdiv(p, ROWS), n)](x, scale, shift, out, p, c, ROWS)
        ctx.save_for_backward(x, weight, mean, wide, scale, shift)
        ctx.groups = groups
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, mean, wide, scale, shift = ctx.saved_tensors
        n, c, h, w = x.shape
        p, groups = h * w, ctx.groups
        dy = dy.contiguous(memory_format=torch.channels_last)
        sums = torch.empty(n, PARTS, 2, c, device=x.device)
        _back_sums[(n, PARTS)](x, dy, scale, shift, sums, p, c, ROWS, PARTS, triton.cdiv(p, PARTS))
        total, product = sums.sum(1).unbind(1)  # (N, C): of g, of g * x
        normed = (product - mean * total) * wide  # of g * the normed x
        weights = weight.float()
        count = p * c // groups
        of_group, of_normed = (
            (t * weights).view(n, groups, -1).sum(-1).repeat_interleave(c // groups, 1) / count for t in (total, normed)
        )
        of_x = -wide.square() * of_normed
        rest = -wide * of_group - of_x * mean
        out = torch.empty_like(x)
        _back_apply[(triton.cdiv(p, ROWS), n)](x, dy, scale, shift, scale, of_x, rest, out, p, c, ROWS)
        return out, normed.sum(0).to(weight.dtype), total.sum(0).to(weight.dtype), None, None


def norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """silu(norm(x)) for channels-last (N, C, H, W)."""
    x = x.contiguous(memory_format=torch.channels_last)
    return _NormSilu.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


def _block(self: ResBlock, x: Tensor) -> Tensor:
    h = self.conv1(norm_silu(x, self.norm1))
    h = self.conv2(norm_silu(h, self.norm2))
    return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


def _encode(self: Encoder, x: Tensor) -> Tensor:
    h = self.conv_in(x)
    for level in self.down:
        h = level(h)
    return self.conv_out(norm_silu(self.mid(h), self.norm_out))


def _decode(self: Decoder, z: Tensor) -> Tensor:
    h = self.mid(self.conv_in(z))
    for level in reversed(list(self.up)):
        h = level(h)
    return self.conv_out(norm_silu(h, self.norm_out))


def fuse(model: IBQ) -> IBQ:
    """Convert `model` in place to channels-last with fused norms and SiLUs."""
    forwards = {ResBlock: _block, Encoder: _encode, Decoder: _decode}
    for module in model.modules():
        if type(module) in forwards:
            module.forward = types.MethodType(forwards[type(module)], module)  # type: ignore[method-assign]
    return model.to(memory_format=torch.channels_last)


def plain_norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Reference implementation of `norm_silu`."""
    return F.silu(norm(x))
