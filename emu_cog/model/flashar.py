"""FlashAR: the decoder with a second, vertical branch, which draws a picture of H x W tokens in H + W - 1 passes.

Source: lxazjk/Emu3.5-FlashAR at 2d4a74e, flashar/model/modeling_emu_flashar.py (`_generate_with_kv_cache` and what it
calls); XiaomiRobotics/Xiaomi-Robotics-U0 at 777c620, xr_u0_flashar/model.py, is the same code.

Cell (r, c) is sampled from its left neighbour's final hidden state h and its upper neighbour's vertical hidden state v,
so that all cells of a diagonal r + c are sampled together and fed in one pass: each attends to its stream's prompt, all
earlier diagonals and all of its own. The vertical branch reads what enters the decoder's layer `start`; its layers
cache cells alone. There is no EOL and no EOI in between.

In the cache, a stream's cells follow each other in the order in which they are sampled. Their RoPE positions are those
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
    LanguageModel,
    batch_of,
    destinations,
    empty_layer,
    empty_weights,
    layer_destinations,
    run_layers,
)
from emu_cog.ops import linear
from emu_cog.ops.diagonals import weighed
from emu_cog.ops.interface import PAGE, Batch, Gates, Layer, ModelWeights, Ops
from emu_cog.prompt.tokens import TokenIds


@dataclass(frozen=True, kw_only=True)
class FlashWeights:
    """All weights, but for the gates in the model's dtype, the layers perhaps in 8 bits."""

    decoder: ModelWeights
    """Its head is both heads side by side, (visual tokens, 2 hidden): horizontal, vertical. Text is never written, so
    the heads' text rows are not kept."""
    vertical: tuple[Layer, ...]
    vertical_norm: Tensor
    start: int
    """The decoder's layer whose input the vertical layers read."""
    gates: Gates

    @property
    def split(self) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
        """The decoder's layers below and from `start` on."""
        return self.decoder.layers[: self.start], self.decoder.layers[self.start :]

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that one pass reads, whatever its number of cells."""
        vertical = replace(self.decoder, layers=self.vertical).bytes_read - self.decoder.visual_head.nbytes
        return self.decoder.bytes_read + vertical + sum(gate.nbytes for gate in self.gates.tensors)


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
    def drawn(self) -> int:
        """Cells of the diagonals before; beyond the last one all cells."""
        rows, columns, number = self.rows, self.columns, self.number
        triangles = (max(n, 0) for n in (number, number - rows, number - columns, number - rows - columns))
        whole, below, beside, both = (n * (n + 1) // 2 for n in triangles)
        return whole - below - beside + both

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


def read(ops: Ops, w: FlashWeights, batch: Batch, cache: KVCache) -> tuple[Tensor, Tensor]:
    """Store a prompt's tokens; returns their final hidden states and what entered layer `start`, (M, hidden) each. Of
    the last token these are h and v."""
    x, residual = _lower(ops, w, batch, cache)
    inner = residual.clone()  # the layers above add to it in place
    return _upper(ops, w, batch, cache, x, residual), inner


def draw(
    ops: Ops, w: FlashWeights, batch: Batch, image: Batch, cache: KVCache, beside: torch.cuda.Stream | None = None
) -> tuple[Tensor, Tensor]:
    """Store the cells of diagonals, in open spans; returns their h and v (M, hidden) each. `image` is the same batch as
    the vertical layers store it, which count cells alone; theirs are the cache's last layers.

    The vertical layers need nothing of the decoder's from `start` on: given a stream `beside` they run there at the
    same time, so that one reads weights while the other attends.
    """
    x, residual = _lower(ops, w, batch, cache)
    inner = residual.clone()
    if beside is None:
        return _upper(ops, w, batch, cache, x, residual), _vertical(ops, w, image, cache, inner)
    here = torch.cuda.current_stream()
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        v = _vertical(ops, w, image, cache, inner)
    h = _upper(ops, w, batch, cache, x, residual)
    here.wait_stream(beside)  # until here `inner` must not be freed
    return h, v


def _lower(ops: Ops, w: FlashWeights, batch: Batch, cache: KVCache) -> tuple[Tensor, Tensor]:
    """The decoder's layers below `start`: what layer `start` reads, and what its norm read."""
    residual, (lower, upper) = F.embedding(batch.tokens, w.decoder.embed), w.split
    first, into = w.decoder.layers[0], upper[0]
    x = ops.add_norm(None, residual, first.input_norm, w.decoder.shape.eps, first.qkv)
    if lower:
        x, residual = run_layers(ops, lower, (into.input_norm, into.qkv), w.decoder, x, residual, batch, cache)
    return x, residual


def _upper(ops: Ops, w: FlashWeights, batch: Batch, cache: KVCache, x: Tensor, residual: Tensor) -> Tensor:
    last = (w.decoder.norm, None)
    return run_layers(ops, w.split[1], last, w.decoder, x, residual, batch, cache, first=w.start)[0]


def _vertical(ops: Ops, w: FlashWeights, image: Batch, cache: KVCache, residual: Tensor) -> Tensor:
    first, last, below = w.vertical[0], (w.vertical_norm, None), len(w.decoder.layers)
    x = ops.add_norm(None, residual, first.input_norm, w.decoder.shape.eps, first.qkv)
    return run_layers(ops, w.vertical, last, w.decoder, x, residual, image, cache, first=below)[0]


@dataclass(frozen=True, kw_only=True)
class Cells:
    """A diagonal of one stream: its `tokens`, top to bottom, at RoPE positions `rotary`. They are stored in the
    stream's `pages` after the `prompt` tokens and `drawn` cells before."""

    tokens: Sequence[int]
    rotary: Sequence[int]
    prompt: int
    drawn: int
    pages: Sequence[int]


def image_pages(prompt: int, pages: Sequence[int]) -> Sequence[int]:
    """Where the vertical layers keep the cells of a stream that has `pages`, the first after `prompt` tokens: in those
    that are not full of prompt, which other streams may share. They always suffice."""
    return pages[prompt // PAGE :]


class FlashModel(LanguageModel):
    """The model as the engine sees it: prompts and diagonals in; h, v and the logits of visual tokens out. `weights`
    are the decoder's."""

    def __init__(self, config: Qwen3Config, flash: FlashWeights, ids: TokenIds) -> None:
        super().__init__(config, flash.decoder, ids)
        self.flash = flash

    @property
    def devices(self) -> list[torch.device]:
        """Where each layer is, the vertical ones last."""
        return [*super().devices, *(layer.qkv.data.device for layer in self.flash.vertical)]

    def forward(self, batch: Batch, cache: KVCache, ops: Ops | None = None) -> Tensor:
        """One pass over prompts: h and v side by side (M, 2 hidden)."""
        return torch.cat(read(ops or self.ops, self.flash, batch, cache), dim=-1)

    @torch.inference_mode()
    def draw(self, cache: KVCache, streams: Sequence[Cells]) -> tuple[Tensor, Tensor]:
        """One pass over a diagonal of each stream: h and v (all cells, hidden) each."""
        rotary = torch.tensor([position for cells in streams for position in cells.rotary])
        batch, image = (
            _opened(batch_of(chunks), rotary).to(self.device)
            for chunks in (
                [Chunk(cells.tokens, cells.prompt + cells.drawn, cells.pages) for cells in streams],
                [Chunk(cells.tokens, cells.drawn, image_pages(cells.prompt, cells.pages)) for cells in streams],
            )
        )
        with sdpa_kernel(ATTENTION, set_priority=True):
            return draw(self.ops, self.flash, batch, image, cache)

    @torch.inference_mode()
    def logits(self, h: Tensor, v: Tensor, diagonal: Diagonal) -> Tensor:
        """One stream's logits (count, visual tokens) fp32 of a diagonal, from h and v of the one before."""
        left, above = (torch.tensor(places, device=self.device) for places in (diagonal.left, diagonal.above))
        h, v = h[left.clamp(min=0)], v[above.clamp(min=0)]
        return self.visual_logits(weighed(self.flash.gates, h, v, left[:, None] < 0, above[:, None] < 0))


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
    """Uninitialized weights; the angles are right. `config` ties the embeddings: there is no `lm_head`.

    With fp8 weights products take fp8 inputs: a diagonal has up to 128 rows, where those in fp16 would take longer than
    reading the weights does.
    """
    narrow = quantize == "fp8"
    assert config.tie_word_embeddings
    hidden = config.hidden_size
    decoder = empty_weights(config, ids, dtype=dtype, place=lambda _: device, quantize=quantize, narrow=narrow)
    heads = linear.empty(ids.visual_count, 2 * hidden, dtype=dtype, device=device)

    def gate(name: str) -> Tensor:
        return torch.empty(shapes(config, 0)[name], dtype=torch.float32, device=device)

    return FlashWeights(
        decoder=replace(decoder, head=heads, visual=slice(0, ids.visual_count)),
        vertical=tuple(
            empty_layer(config, dtype=dtype, device=device, quantize=quantize, narrow=narrow) for _ in range(vertical)
        ),
        vertical_norm=torch.empty(hidden, dtype=dtype, device=device),
        start=start,
        gates=Gates(
            pair_in=gate("hv_gate_mlp.0.weight"),
            pair_out=gate("hv_gate_mlp.2.weight"),
            pair_bias=gate("hv_gate_mlp.2.bias"),
            corner=gate("hv_gate_corner.weight"),
            corner_bias=gate("hv_gate_corner.bias"),
        ),
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
    yield "hv_gate_mlp.0.weight", w.gates.pair_in.copy_
    yield "hv_gate_mlp.2.weight", w.gates.pair_out.copy_
    yield "hv_gate_mlp.2.bias", w.gates.pair_bias.copy_
    yield "hv_gate_corner.weight", w.gates.corner.copy_
    yield "hv_gate_corner.bias", w.gates.corner_bias.copy_
    for i, layer in enumerate(w.vertical):
        yield from layer_destinations(f"vertical_block.{i}", config, layer, w.decoder.shape, quantize)
