"""The operations of a pass in plain torch, for any device: what CPUs run, and what the kernels are tested against."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from emu_cog.ops import diagonals, linear
from emu_cog.ops.diagonals import Places
from emu_cog.ops.interface import Batch, DiagonalState, Gates, Layer, Ops, Shape, SlotState, Weight
from emu_cog.ops.noise import gumbel_noise
from emu_cog.ops.sampling import guide, keep_sorted
from emu_cog.prompt.tokens import TokenIds


class TorchOps:
    """`Ops` for any device."""

    def for_prompt(self) -> Ops:
        return self

    def linear(self, x: Tensor, w: Weight) -> Tensor:
        return w.product(x)

    def swiglu(self, x: Tensor, w: Weight) -> Tensor:
        gate, up = w.product(x).chunk(2, dim=-1)
        return F.silu(gate) * up

    def logits(self, x: Tensor, head: Tensor) -> Tensor:
        return linear.logits(x, head)

    def add_norm(
        self, product: Tensor | None, residual: Tensor, weight: Tensor, eps: float, into: Weight | None
    ) -> Tensor:
        if product is not None:
            residual += summed(product, residual.dtype)
        return _norm(residual, weight, eps)

    def rope_store(
        self, product: Tensor, layer: Layer, shape: Shape, rope: Tensor, batch: Batch, keys: Tensor, values: Tensor
    ) -> Tensor:
        heads = summed(product, keys.dtype).view(len(batch.tokens), -1, shape.head_dim)
        q, k, v = heads.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
        cos, sin = rope[:, :, None]
        page, cell = batch.cells
        keys[:, page, cell] = _rotate(_norm(k, layer.k_norm, shape.eps), cos, sin).transpose(0, 1)
        values[:, page, cell] = v.transpose(0, 1)
        return _rotate(_norm(q, layer.q_norm, shape.eps), cos, sin)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, batch: Batch, into: Weight) -> Tensor:
        m, heads, dim = q.shape
        out = q.new_zeros((m, heads * dim))
        for group in batch.groups:
            rows, streams, flat = group.rows, len(group.tables), group.tables.flatten()
            # index_select copies whole pages, a tenth of what plain indexing takes on a CPU. (streams, kv_heads, L, D)
            k, v = (x.index_select(1, flat).view(len(x), streams, -1, dim).transpose(0, 1) for x in (keys, values))
            if group.span:
                length = group.span.start + group.span.count  # the host knows it: nothing waits for the device here
                out[rows] = _attention(q[rows], k[0, :, :length], v[0, :, :length], causal=not group.span.open)
            elif isinstance(rows, Tensor):
                tokens, positions = (x.index_select(0, rows) for x in (q, batch.positions))
                out.index_copy_(0, rows, _read(tokens, k, v, positions))
        return out

    def sample(
        self, logits: Tensor, state: SlotState, slots: Tensor, ids: TokenIds, *, width: int, nucleus: bool
    ) -> None:
        numbers = state.sampled[slots, None] + visual_number(state, slots, width)
        accept(state, slots, _codes(logits, state, slots, numbers, nucleus), ids)

    def head_input(self, gates: Gates, state: SlotState, grid: DiagonalState, slots: Tensor, width: int) -> Tensor:
        return diagonals.head_input(gates, state, grid, slots, width)

    def sample_cells(
        self,
        logits: Tensor,
        state: SlotState,
        grid: DiagonalState,
        slots: Tensor,
        ids: TokenIds,
        *,
        width: int,
        nucleus: bool,
    ) -> tuple[Batch, Batch]:
        at = Places.next(state, grid, slots, width)
        codes = _codes(logits, state, slots, state.sampled[slots, None] + at.cell, nucleus)
        return diagonals.stored(codes, state, grid, slots, at, ids)

    def keep(self, state: SlotState, grid: DiagonalState, slots: Tensor, h: Tensor, v: Tensor) -> None:
        diagonals.keep(state, grid, slots, h, v)


def _codes(logits: Tensor, state: SlotState, slots: Tensor, numbers: Tensor, nucleus: bool) -> Tensor:
    """Sample codes (n, width) for pictures in `slots` (n,), from (n * 2 * width, V) logits. `numbers` (n, width) are
    those of their tokens' noise. Writes `scores` and nothing else of the state."""
    width = numbers.shape[1]
    conditional, unconditional = logits.view(len(slots), 2, width, -1).unbind(1)
    guided = guide(conditional, unconditional, state.cfg_scale[slots, None, None])
    scores = state.scores[: len(slots) * width]
    scores.copy_((guided / state.temperature[slots, None, None]).flatten(0, 1))
    top_k, top_p = state.filters(slots, width)
    kept = keep_sorted(scores, top_k, top_p if nucleus else None)
    noise = gumbel_noise(state.seed[slots].repeat_interleave(width), numbers.flatten(), scores.shape[1])
    return (kept + noise).argmax(dim=-1).view(-1, width)


def visual_number(state: SlotState, slots: Tensor, width: int) -> Tensor:
    """How many of its picture's visual tokens come before each of the next `width` (n, width), forced ones aside."""
    columns = state.columns[slots, None]
    place = state.step[slots, None] + torch.arange(width, device=slots.device)
    return place // (columns + 1) * columns + place % (columns + 1)


def accept(state: SlotState, slots: Tensor, codes: Tensor, ids: TokenIds) -> None:
    """Insert the grammar's tokens among the sampled `codes` (n, width) and store them; move the active pictures on by
    those that follow from right drafts, at least one.

    Those that follow from a wrong draft are the next drafts; places that have none yet get the last code. On the
    miniature that is as good as the code above, or the last scores with the new place's noise.
    """
    width, at = codes.shape[1], slots[:, None]
    step, columns, total = state.step[at], state.columns[at], state.total[at]
    window = torch.arange(width, device=slots.device)
    place, last = step + window, state.out.shape[1] - 1

    def forced(place: Tensor, tokens: Tensor) -> Tensor:
        tokens = torch.where(place % (columns + 1) == columns, ids.eol, tokens)
        return torch.where(place == total - 1, ids.eoi, tokens)

    def store(place: Tensor, tokens: Tensor) -> None:
        cells = place.clamp(max=last)
        state.out[at, cells] = torch.where(place < total, tokens, state.out[at, cells])

    tokens = forced(place, ids.visual + codes)
    right = state.out[at, place[:, :-1].clamp(max=last)] == tokens[:, :-1]
    accepted = 1 + right.long().cumprod(dim=1).sum(dim=1, keepdim=True)
    accepted = torch.minimum(accepted, (total - step).clamp(min=0))
    store(place, tokens)
    if width > 1:
        end = place[:, -1:]
        guess = torch.where(forced(end, tokens[:, -1:]) >= ids.visual, tokens[:, -1:], tokens[:, -2:-1])
        store(place + width, forced(place + width, guess))
    token = tokens.gather(1, (accepted - 1).clamp(min=0))
    for stream in (2 * slots, 2 * slots + 1):
        state.token[stream] = torch.where(accepted > 0, token, state.token[stream, None])[:, 0]
        state.position[stream] += accepted[:, 0]
    state.step[slots] += accepted[:, 0]


def summed(product: Tensor, dtype: torch.dtype) -> Tensor:
    """A product (see Ops) as (M, N) of `dtype`."""
    return product.sum(0).to(dtype) if product.dim() == 3 else product


def _read(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    """Attention of n tokens of each of S streams, one stream's beside each other, up to their positions (S * n,):
    (S * n, heads, D) over (S, kv_heads, L, D) to (S * n, heads * D).

    The heads that share keys become queries of one head, so that no key is copied or read twice. Of several tokens
    each is computed as if alone: where PyTorch can, as a head of its own, else by operations of one of each stream.
    """
    (streams, kv, length, dim), n = k.shape, len(q) // len(k)
    folded = q.view(streams, n, kv, -1, dim)
    mask = torch.arange(length, device=q.device) <= position.view(streams, n, 1, 1, 1)
    if n > 1 and not q.is_cuda and _heads_share_keys():
        heads = folded.transpose(1, 2).flatten(1, 2)  # (S, kv * n, group, D)
        mask = mask.transpose(1, 2).expand(-1, kv, -1, -1, -1).flatten(1, 2)
        out = F.scaled_dot_product_attention(heads, k, v, attn_mask=mask, enable_gqa=True)
        return out.view(streams, kv, n, -1, dim).transpose(1, 2).reshape(len(q), -1)
    out = torch.empty_like(folded)
    if streams < n:
        for s in range(streams):
            keys, values = (x[s : s + 1].expand(n, -1, -1, -1) for x in (k, v))
            out[s] = F.scaled_dot_product_attention(folded[s], keys, values, attn_mask=mask[s])
    else:
        for i in range(n):
            out[:, i] = F.scaled_dot_product_attention(folded[:, i], k, v, attn_mask=mask[:, i])
    return out.view(len(q), -1)


@cache
def _heads_share_keys() -> bool:
    """Whether a CPU computes several heads over the same keys each as if alone, to the last bit. PyTorch 2.13 does,
    2.8 does not."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, n, length, 32, generator=generator) for n, length in ((8, 3), (2, 80), (2, 80)))
    mask = torch.arange(80) <= torch.arange(60, 76).view(2, 8, 1, 1)
    together = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return all(
        torch.equal(together[:, i::4], F.scaled_dot_product_attention(q[:, i::4], k, v, attn_mask=mask[:, i::4]))
        for i in range(4)
    )


def _attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
    """Attention of the last T of L tokens, each up to itself if `causal`: (T, heads, D) over (kv_heads, L, D) to
    (T, heads * D)."""
    (t, heads, dim), (kv, length, _) = q.shape, k.shape
    if q.is_cuda and q.dtype != torch.float32:
        lower_right = causal_lower_right(t, length) if causal and t != length else None
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k[None], v[None], lower_right, is_causal=causal and t == length, enable_gqa=True
        )
        return out[0].transpose(0, 1).reshape(t, heads * dim)
    groups = heads // kv
    folded = q.view(t, kv, groups, dim).permute(1, 2, 0, 3).reshape(1, kv, groups * t, dim)
    at = torch.arange(length, device=q.device)
    mask = (at <= at[length - t :, None]).repeat(groups, 1) if causal else None
    out = F.scaled_dot_product_attention(folded, k[None], v[None], attn_mask=mask)
    return out.view(kv, groups, t, dim).permute(2, 0, 1, 3).reshape(t, heads * dim)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm as Qwen3RMSNorm rounds it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin
