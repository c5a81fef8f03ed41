"""FlashAR: the decoder with a second, vertical branch, which draws a picture of H x W tokens in H + W - 1 passes.

Source: lxazjk/Emu3.5-FlashAR at 2d4a74e, flashar/model/modeling_emu_flashar.py (`_generate_with_kv_cache` and what it
calls); XiaomiRobotics/Xiaomi-Robotics-U0 at 777c620, xr_u0_flashar/model.py, is the same code.

Cell (r, c) is sampled from its left neighbour's final hidden state h and its upper neighbour's vertical hidden state v,
so that all cells of a diagonal r + c are sampled together and fed in one pass: each attends to its stream's prompt, all
earlier diagonals and all of its own. The vertical branch reads what enters the decoder's layer `start`; its layers have
a cache of their own, which holds cells alone. There is no EOL and no EOI in between.

In the caches, a stream's cells follow each other in the order in which they are sampled. Their RoPE positions are those
of the grid, row by row, after the longer of the two prompts (`rotary_positions`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel
from transformers import Qwen3Config

from emu_cog.errors import CheckpointError
from emu_cog.model.headers import MARKER
from emu_cog.model.kv_cache import KVCache
from emu_cog.model.qwen3 import (
    ATTENTION,
    Chunk,
    Destination,
    batch_of,
    check_vocabulary,
    destinations,
    empty_layer,
    empty_weights,
    layer_destinations,
    run_layers,
)
from emu_cog.ops import linear
from emu_cog.ops.interface import Batch, Layer, ModelWeights, Ops
from emu_cog.ops.reference import TorchOps
from emu_cog.prompt.tokens import TokenIds


@dataclass(frozen=True, kw_only=True)
class FlashWeights:
    """All weights. The gates are fp32; everything else is in the model's dtype, the layers perhaps in 8 bits."""

    decoder: ModelWeights
    """Its head is both heads side by side, (visual tokens, 2 hidden): horizontal, vertical. Text is never written, so
    the heads' text rows are not kept."""
    vertical: tuple[Layer, ...]
    vertical_norm: Tensor
    start: int
    """The decoder's layer whose input the vertical layers read."""
    pair_in: Tensor  # (gate, 2 hidden)
    pair_out: Tensor  # (1, gate)
    pair_bias: Tensor  # (1,)
    corner: Tensor  # (1, hidden)
    corner_bias: Tensor  # (1,)

    @property
    def split(self) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
        """The decoder's layers below and from `start` on."""
        return self.decoder.layers[: self.start], self.decoder.layers[self.start :]

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that one pass reads, whatever its number of cells."""
        gates = (self.pair_in, self.pair_out, self.pair_bias, self.corner, self.corner_bias)
        vertical = replace(self.decoder, layers=self.vertical).bytes_read - self.decoder.visual_head.nbytes
        return self.decoder.bytes_read + vertical + sum(gate.nbytes for gate in gates)


# -- 1. the grid -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diagonal:
    """The cells (r, c) of a grid with r + c = number, from top to bottom."""

    number: int
    rows: int
    columns: int

    @property
    def top(self) -> int:
        """The row of the first cell."""
        return max(0, self.number - self.columns + 1)

    @property
    def count(self) -> int:
        return min(self.rows - 1, self.number) - self.top + 1

    @property
    def cells(self) -> list[int]:
        """r * columns + c of each."""
        return [row * self.columns + self.number - row for row in range(self.top, self.top + self.count)]

    @property
    def before(self) -> Diagonal:
        return Diagonal(self.number - 1, self.rows, self.columns)

    @property
    def left(self) -> list[int]:
        """Each cell's left neighbour as a place in the diagonal before; -1 in the first column."""
        return [row - self.before.top if row < self.number else -1 for row in range(self.top, self.top + self.count)]

    @property
    def above(self) -> list[int]:
        """Each cell's upper neighbour as a place in the diagonal before; -1 in the first row."""
        return [row - 1 - self.before.top if row else -1 for row in range(self.top, self.top + self.count)]


def diagonals(rows: int, columns: int) -> Iterator[Diagonal]:
    """All of a grid's, in the order in which they are drawn."""
    return (Diagonal(number, rows, columns) for number in range(rows + columns - 1))


def rotary_positions(diagonal: Diagonal, longest: int) -> list[int]:
    """The RoPE positions of a diagonal's cells, where the longer of the two prompts has `longest` tokens."""
    return [longest + cell for cell in diagonal.cells]


# -- 2. passes ---------------------------------------------------------------------------------------------


def run_decoder(ops: Ops, w: FlashWeights, batch: Batch, cache: KVCache) -> tuple[Tensor, Tensor]:
    """Store the batch's tokens; returns their final hidden states and what entered layer `start`, (M, hidden) each. Of
    a prompt's last token these are h and v."""
    residual, (lower, upper) = F.embedding(batch.tokens, w.decoder.embed), w.split
    first, into = w.decoder.layers[0], upper[0]
    x = ops.add_norm(None, residual, first.input_norm, w.decoder.shape.eps, first.qkv)
    if lower:
        x, residual = run_layers(ops, lower, (into.input_norm, into.qkv), w.decoder, x, residual, batch, cache)
    inner = residual.clone()  # the layers above add to it in place
    h, _ = run_layers(ops, upper, (w.decoder.norm, None), w.decoder, x, residual, batch, cache, first=w.start)
    return h, inner


def draw(
    ops: Ops, w: FlashWeights, batch: Batch, cache: KVCache, image: Batch, image_cache: KVCache
) -> tuple[Tensor, Tensor]:
    """Store the cells of diagonals, in open spans; returns their h and v (M, hidden) each. `image` is the same batch in
    the vertical layers' cache, which counts cells alone."""
    h, residual = run_decoder(ops, w, batch, cache)
    eps, first = w.decoder.shape.eps, w.vertical[0]
    x = ops.add_norm(None, residual, first.input_norm, eps, first.qkv)
    v, _ = run_layers(ops, w.vertical, (w.vertical_norm, None), w.decoder, x, residual, image, image_cache)
    return h, v


def share(w: FlashWeights, h: Tensor, v: Tensor) -> Tensor:
    """The horizontal head's share (M, 1) fp32 in cells with their left neighbour's h and upper neighbour's v."""
    pair = torch.cat([h, v], dim=-1).float()
    return torch.sigmoid(F.linear(F.silu(F.linear(pair, w.pair_in)), w.pair_out, w.pair_bias))


def corner_share(w: FlashWeights, h: Tensor) -> Tensor:
    """The same (M, 1) in the first cell, which has the prompt's h (M, hidden) for a left neighbour."""
    return torch.sigmoid(F.linear(h.float(), w.corner, w.corner_bias))


def head_input(w: FlashWeights, h: Tensor, v: Tensor, left: Tensor, above: Tensor) -> Tensor:
    """What the heads read for a diagonal's cells: (count, 2 hidden), from h and v (N, hidden) of the diagonal before.
    `left` and `above` (count,) int64 are the neighbours' places there, -1 where a cell has none; the first cell has
    neither, and h and v are the prompt's.

    Heads are linear, so the gate weighs their input: one product with both heads side by side is g H(h) + (1 - g) V(v).
    """
    h, v = h[left.clamp(min=0)], v[above.clamp(min=0)]
    leftmost, top = left[:, None] < 0, above[:, None] < 0
    gate = share(w, h, v).masked_fill(leftmost, 0.0).masked_fill(top, 1.0)
    gate = torch.where(leftmost & top, corner_share(w, h), gate)
    return torch.cat([gate * h, (1 - gate) * v], dim=-1).to(h.dtype)


@dataclass(frozen=True, kw_only=True)
class Cells:
    """A diagonal of one stream: its `tokens`, top to bottom, at RoPE positions `rotary`. They are stored in the
    stream's `pages` from place `start` on, and in its pages of the vertical cache from place `drawn` on, the number of
    cells before."""

    tokens: Sequence[int]
    rotary: Sequence[int]
    start: int
    pages: Sequence[int]
    drawn: int
    image_pages: Sequence[int]


class FlashModel:
    """The model as an engine sees it: prompts and diagonals in, h, v and the logits of visual tokens out."""

    def __init__(self, config: Qwen3Config, weights: FlashWeights, ids: TokenIds) -> None:
        check_vocabulary(config, ids)
        self.config, self.weights, self.ids = config, weights, ids
        self.context = int(config.max_position_embeddings)
        self.device, self.dtype = weights.decoder.embed.device, weights.decoder.embed.dtype
        self.ops: Ops = TorchOps()

    def new_caches(self, *, pages: int, image_pages: int) -> tuple[KVCache, KVCache]:
        """The decoder's cache and the vertical layers', of so many pages besides the first, which nobody has."""
        counts = ((len(self.weights.decoder.layers), pages), (len(self.weights.vertical), image_pages))
        one, two = (
            KVCache(self.config, pages=1 + count, dtype=self.dtype, devices=[self.device] * layers)
            for layers, count in counts
        )
        return one, two

    @torch.inference_mode()
    def read(self, cache: KVCache, chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor]:
        """One pass over prompts, in chunks: h and v (all tokens, hidden) each."""
        with sdpa_kernel(ATTENTION, set_priority=True):
            return run_decoder(self.ops, self.weights, batch_of(chunks).to(self.device), cache)

    @torch.inference_mode()
    def draw(self, cache: KVCache, image_cache: KVCache, streams: Sequence[Cells]) -> tuple[Tensor, Tensor]:
        """One pass over a diagonal of each stream: h and v (all cells, hidden) each."""
        rotary = torch.tensor([position for cells in streams for position in cells.rotary])
        batch, image = (
            _opened(batch_of(chunks), rotary).to(self.device)
            for chunks in (
                [Chunk(cells.tokens, cells.start, cells.pages) for cells in streams],
                [Chunk(cells.tokens, cells.drawn, cells.image_pages) for cells in streams],
            )
        )
        with sdpa_kernel(ATTENTION, set_priority=True):
            return draw(self.ops, self.weights, batch, cache, image, image_cache)

    @torch.inference_mode()
    def logits(self, h: Tensor, v: Tensor, diagonal: Diagonal) -> Tensor:
        """One stream's logits (count, visual tokens) fp32 of a diagonal, from h and v of the one before."""
        left, above = (torch.tensor(places, device=self.device) for places in (diagonal.left, diagonal.above))
        return self.ops.logits(head_input(self.weights, h, v, left, above), self.weights.decoder.visual_head)


def _opened(batch: Batch, rotary: Tensor) -> Batch:
    return replace(batch, rotary=rotary, spans=tuple(replace(span, open=True) for span in batch.spans))


# -- 3. weights --------------------------------------------------------------------------------------------


def check_start(start: int, *, layers: int, vertical: int, where: str) -> None:
    """CheckpointError unless the decoder has `vertical` layers from `start` on, as theirs requires."""
    if not 0 <= start <= layers - vertical:
        raise CheckpointError(
            f"{where}: vertical_start_layer is {start}, but it must be from 0 to {layers - vertical}: the decoder has "
            f"{layers} layers and the vertical branch {vertical}"
        )


def shapes(config: Qwen3Config, vertical: int) -> dict[str, tuple[int, ...]]:
    """Every FlashAR key besides the decoder's, and its shape."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    gate = max(64, hidden // 8)
    query, kv = (n * config.head_dim for n in (config.num_attention_heads, int(config.num_key_value_heads or 0)))
    inner, dim = config.intermediate_size, config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (query, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, query), "self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    return {
        MARKER: (vocabulary, hidden),
        "vertical_head.weight": (vocabulary, hidden),
        "vertical_norm.weight": (hidden,),
        "hv_gate_mlp.0.weight": (gate, 2 * hidden),
        "hv_gate_mlp.2.weight": (1, gate),
        "hv_gate_mlp.2.bias": (1,),
        "hv_gate_corner.weight": (1, hidden),
        "hv_gate_corner.bias": (1,),
        **{f"vertical_block.{i}.{name}.weight": shape for i in range(vertical) for name, shape in layer.items()},
    }


def empty_flash_weights(
    config: Qwen3Config,
    ids: TokenIds,
    *,
    vertical: int,
    start: int,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None = None,
) -> FlashWeights:
    """Uninitialized weights; the angles are right. `config` ties the embeddings: there is no `lm_head`."""
    assert config.tie_word_embeddings
    hidden = config.hidden_size
    decoder = empty_weights(config, ids, dtype=dtype, place=lambda _: device, quantize=quantize)
    heads = linear.empty(ids.visual_count, 2 * hidden, dtype=dtype, device=device)

    def gate(name: str) -> Tensor:
        return torch.empty(shapes(config, 0)[name], dtype=torch.float32, device=device)

    return FlashWeights(
        decoder=replace(decoder, head=heads, visual=slice(0, ids.visual_count)),
        vertical=tuple(empty_layer(config, dtype=dtype, device=device, quantize=quantize) for _ in range(vertical)),
        vertical_norm=torch.empty(hidden, dtype=dtype, device=device),
        start=start,
        pair_in=gate("hv_gate_mlp.0.weight"),
        pair_out=gate("hv_gate_mlp.2.weight"),
        pair_bias=gate("hv_gate_mlp.2.bias"),
        corner=gate("hv_gate_corner.weight"),
        corner_bias=gate("hv_gate_corner.bias"),
    )


def flash_destinations(
    config: Qwen3Config, ids: TokenIds, w: FlashWeights, quantize: str | None = None
) -> Iterator[tuple[str, Destination]]:
    """Every key of a FlashAR checkpoint, and what takes its tensor into `w`."""
    visual, hidden = slice(ids.visual, ids.vocab_size), config.hidden_size
    tied = replace(w.decoder, head=w.decoder.embed)
    for key, fill in destinations(config, tied, quantize):
        yield f"backbone.{key.removeprefix('model.')}", fill
    yield MARKER, lambda tensor: w.decoder.head[:, :hidden].copy_(tensor[visual])
    yield "vertical_head.weight", lambda tensor: w.decoder.head[:, hidden:].copy_(tensor[visual])
    yield "vertical_norm.weight", w.vertical_norm.copy_
    yield "hv_gate_mlp.0.weight", w.pair_in.copy_
    yield "hv_gate_mlp.2.weight", w.pair_out.copy_
    yield "hv_gate_mlp.2.bias", w.pair_bias.copy_
    yield "hv_gate_corner.weight", w.corner.copy_
    yield "hv_gate_corner.bias", w.corner_bias.copy_
    for i, layer in enumerate(w.vertical):
        yield from layer_destinations(f"vertical_block.{i}", config, layer, w.decoder.shape, quantize)
