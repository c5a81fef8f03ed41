"""What one forward pass is made of: the weights, the tokens it is given, the pictures in progress, its operations.

M is the number of tokens of a pass, of any streams: two per picture in a step, thousands when a prompt is read.
reference.py holds the operations in plain torch, triton_ops.py in kernels. Both round where the layers do (after each
norm, product and rotation), so that they differ by the order of sums alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from emu_cog.ops.linear import linear
from emu_cog.prompt.tokens import TokenIds

PAGE = 64
"""Tokens per page of the cache: what the attention kernel reads at a time."""
MAX_ROWS = 128
"""Rows of the kernels' largest tile, and of the plain models' largest step. No row of a step depends on others,
to the last bit."""

INPUT_SCALE = 16.0
"""Inputs of 8-bit products are divided by this, so that fp16 holds them and the sums; the sum is multiplied by it."""
SMALLEST_INPUT = 1e-12
"""The least that a row's largest number counts as, where it is scaled by it."""

SCALE_BYTES = 128
"""Room for a row's scale behind its fp8 numbers, a multiple of four, where kernels keep both together: a cache line.
With 16 bytes rows began within lines, and passes with fp8 inputs took up to 5 % longer."""


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` tokens of one stream."""
    return ceil_div(tokens, PAGE)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Weight:
    """A linear layer's (N, K) weight; int8 or fp8 with fp32 `scale` (N,) per weight row, else the model's dtype."""

    data: Tensor
    scale: Tensor | None = None
    narrow: bool = False
    """Whether the inputs of its products are rounded to fp8 as well, each row by a scale of its own (`narrowed`)."""

    @property
    def in_words(self) -> bool:
        """Whether `linear8_kernel` reads it, four weights at a time: in 8 bits, with inputs of 16."""
        return self.scale is not None and not self.narrow

    def product(self, x: Tensor) -> Tensor:
        """(M, K) to (M, N), in x's dtype; on a CPU no row's bits depend on the others."""
        if self.scale is None:
            return linear(x, self.data)
        if self.narrow:
            inputs, scale = narrowed(x)
            kind = torch.bfloat16 if x.dtype == torch.float16 else x.dtype  # fp16 can't hold these sums
            product = linear(inputs.to(kind), self.data.to(kind)).float().mul_(scale[:, None])
        elif x.dtype == torch.float16:
            product = linear(x / INPUT_SCALE, self.data.to(x.dtype)).float().mul_(INPUT_SCALE)
        else:
            product = linear(x, self.data.to(x.dtype)).float()
        return product.mul_(self.scale).to(x.dtype)


def narrowed(x: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) to fp8 (e4m3) and fp32 scales (M,): each row's largest number becomes the largest of the format."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = x.float().abs().amax(dim=1).clamp(min=SMALLEST_INPUT) / largest
    return (x.float() / scale[:, None]).clamp(-largest, largest).to(torch.float8_e4m3fn), scale


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
    """What attention and norms need to know besides the tensors."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float


@dataclass(frozen=True, kw_only=True)
class ModelWeights:
    """All weights. `rope` (2, positions, head_dim): cosines and sines, in the model's dtype."""

    embed: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Tensor
    visual: slice
    """The head's rows of the visual tokens; those before it are text. Neither half is ever computed with the other."""
    rope: Tensor
    shape: Shape

    @property
    def text_head(self) -> Tensor:
        return self.head[: self.visual.start]

    @property
    def visual_head(self) -> Tensor:
        return self.head[self.visual]

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that one step of pictures reads, whatever their number."""
        held = [w for layer in self.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        scales = sum(w.scale.nbytes for w in held if w.scale is not None)
        return sum(w.data.nbytes for w in held) + scales + self.visual_head.nbytes


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one stream in a batch, as the host knows them: `count` from position `start` on."""

    stream: int
    start: int
    count: int
    open: bool = False
    """Whether its tokens read all of the span, and not each up to itself: the cells of a FlashAR diagonal."""


@dataclass(frozen=True)
class Group:
    """Rows of a batch whose attention is one operation: one `span`, or as many single tokens of each of some streams,
    those of a stream beside each other."""

    rows: slice | Tensor
    tables: Tensor  # (streams, pages) int32
    span: Span | None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The tokens of one forward pass. Each is stored at its position of its stream, and reads what lies up to there."""

    tokens: Tensor  # (M,) int64
    positions: Tensor  # (M,) int64
    streams: Tensor  # (M,) int64: the stream's row of `tables`
    tables: Tensor  # (streams, pages) int32: the cache page of every PAGE positions
    spans: tuple[Span, ...] = ()
    """The same, in the same order, as the host knows them; captured steps need none. Rows beyond them are padding."""
    width: int = 1
    """What captured steps know instead: every `width` rows are consecutive tokens of one stream, from the first of them
    on, or padding."""
    rotary: Tensor | None = None
    """(M,) int64: the tokens' RoPE positions, where these are not `positions`."""
    last: Tensor | None = None
    """(M,) int64, for captured steps: the last position of its stream that each token reads, where that is not its own.
    The same in all of a window, or 0 in padding."""

    @cached_property
    def groups(self) -> list[Group]:
        """The spans, divided for attention. Spans of one token go together where they have as many pages, which follows
        from each alone, and their streams as many of them."""
        groups, row = [], 0
        single: dict[tuple[int, int], list[int]] = {}  # rows, by stream and pages
        for span in self.spans:
            pages = pages_for(span.start + span.count)
            if span.count == 1:
                single.setdefault((span.stream, pages), []).append(row)
            else:
                groups.append(Group(slice(row, row + span.count), self._pages([span.stream], pages), span))
            row += span.count
        alike: dict[tuple[int, int], dict[int, list[int]]] = {}
        for (stream, pages), rows in single.items():
            alike.setdefault((pages, len(rows)), {})[stream] = rows
        for (pages, _), streams in alike.items():
            flat = torch.tensor([row for rows in streams.values() for row in rows], device=self.tables.device)
            groups.append(Group(flat, self._pages(list(streams), pages), None))
        return groups

    def _pages(self, streams: list[int], pages: int) -> Tensor:
        if len(streams) == 1:  # a view: copying an index would wait for the device
            return self.tables[streams[0] : streams[0] + 1, :pages]
        return self.tables[torch.tensor(streams, device=self.tables.device), :pages]

    @cached_property
    def cells(self) -> tuple[Tensor, Tensor]:
        """Page and place within it of every token, (M,) each."""
        return self.tables[self.streams, self.positions // PAGE], self.positions % PAGE

    def to(self, device: torch.device) -> Batch:
        if self.tokens.device == device:
            return self
        names = ("tokens", "positions", "streams", "tables", "rotary", "last")
        given = {name: getattr(self, name) for name in names}
        copied: dict[str, Any] = {name: _copied(x, device) for name, x in given.items() if x is not None}
        return replace(self, **copied)


def _copied(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`. From pinned memory the copy is queued; otherwise the host would wait for all that is."""
    if x.is_cpu and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


@dataclass(kw_only=True)
class SlotState:
    """Every sequence's streams and picture, on the device: what steps read and write besides weights and cache.

    A sequence has a slot; streams 2 * slot and 2 * slot + 1 are its conditional and its unconditional one. The last
    slot is never a sequence's: steps of fewer sequences than they were captured for are padded with it. A picture of
    `columns` columns and `total` tokens after IMG makes token `step` next; it is active while step < total. What lies
    in `out` from there on are drafts.

    Row i * width + j of `scores` is what token j of the i-th picture of the last `Ops.sample` was sampled from: guided,
    divided by the temperature.
    """

    token: Tensor  # (2 slots,) int64: fed next
    position: Tensor  # (2 slots,) int64: where it is stored
    tables: Tensor  # (2 slots, pages) int32
    columns: Tensor  # (slots,) int64
    total: Tensor  # (slots,) int64
    step: Tensor  # (slots,) int64
    seed: Tensor  # (slots,) int64: of the noise
    sampled: Tensor  # (slots,) int64: tokens sampled before the picture; its noise goes on from there
    out: Tensor  # (slots, steps) int64, written
    cfg_scale: Tensor  # (slots,) fp32
    temperature: Tensor  # (slots,) fp32
    top_k: Tensor  # (slots,) int32, at least 1
    top_p: Tensor  # (slots,) fp32
    scores: Tensor  # (MAX_ROWS / 2, V) fp32, written

    @classmethod
    def empty(cls, slots: int, *, pages: int, steps: int, vocabulary: int, device: torch.device) -> SlotState:
        """Room for `slots` sequences and the padding; streams of `pages` pages, pictures of `steps` tokens."""
        n = slots + 1

        def ints(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            token=ints(2 * n),
            position=ints(2 * n),
            tables=ints(2 * n, pages, dtype=torch.int32),
            columns=ints(n) + 1,
            total=ints(n),
            step=ints(n),
            seed=ints(n),
            sampled=ints(n),
            out=ints(n, steps),
            cfg_scale=torch.ones(n, device=device),
            temperature=torch.ones(n, device=device),
            top_k=ints(n, dtype=torch.int32) + 1,
            top_p=torch.ones(n, device=device),
            scores=torch.zeros((MAX_ROWS // 2, vocabulary), device=device),
        )

    @property
    def padding(self) -> int:
        return len(self.step) - 1

    def filters(self, slots: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Top-k and top-p of `width` tokens of each picture in `slots` (n,): (n * width, 1) each."""
        top_k, top_p = (x[slots].repeat_interleave(width)[:, None] for x in (self.top_k, self.top_p))
        return top_k, top_p

    def fed(self, slots: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, positions and streams, (n, 2, width) each, of a step of `slots` (n,): the token that is fed next, and
        the drafts that follow it. Drafts beyond a picture's end are fed to the padding."""
        pair, slots, window = pairs(slots), slots[:, None], torch.arange(width, device=slots.device)
        at = self.step[slots] + window - 1  # a draft's cell of `out`
        drafts = self.out[slots, at.clamp(0, self.out.shape[1] - 1)]
        live = (window == 0) | (at + 1 < self.total[slots])
        tokens = torch.where(window == 0, self.token[pair][:, :, None], drafts[:, None])
        positions = torch.where(live[:, None], self.position[pair][:, :, None] + window, 0)
        streams = torch.where(live[:, None], pair[:, :, None], 2 * self.padding)
        return tokens, positions, streams


@dataclass(frozen=True, kw_only=True)
class Gates:
    """What weighs FlashAR's two heads, fp32."""

    pair_in: Tensor  # (gate, 2 hidden)
    pair_out: Tensor  # (1, gate)
    pair_bias: Tensor  # (1,)
    corner: Tensor  # (1, hidden)
    corner_bias: Tensor  # (1,)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.pair_in, self.pair_out, self.pair_bias, self.corner, self.corner_bias


@dataclass(kw_only=True)
class DiagonalState:
    """What pictures that are drawn by diagonals have besides a SlotState. In that, `step` and `total` count diagonals,
    `position` are the lengths of a picture's prompts, and `out` holds its cells row by row."""

    rows: Tensor  # (slots,) int64
    image_tables: Tensor  # (2 slots, pages) int32: the vertical layers', which keep cells alone
    h: Tensor
    v: Tensor
    """(2 slots, cells, hidden), what the next diagonal is sampled from: of the one before, or in the first place of the
    prompt's last token."""

    @classmethod
    def empty(cls, state: SlotState, *, cells: int, hidden: int, dtype: torch.dtype) -> DiagonalState:
        """For the slots of `state`, and diagonals of up to `cells`."""
        kept = torch.zeros((2, len(state.token), cells, hidden), dtype=dtype, device=state.token.device)
        return cls(
            rows=torch.ones_like(state.columns), image_tables=torch.zeros_like(state.tables), h=kept[0], v=kept[1]
        )


def pairs(slots: Tensor) -> Tensor:
    """Both streams of each slot (n,): (n, 2)."""
    return 2 * slots[:, None] + torch.arange(2, device=slots.device)


class Ops(Protocol):
    """The operations of a pass. A `product` is (M, N) in the model's dtype, or fp32 (splits, M, N): split-K partial
    sums still to be added over the first axis."""

    def for_prompt(self) -> Ops:
        """The same for passes that read one prompt alone, where rows may depend on those beside them."""

    def linear(self, x: Tensor, w: Weight) -> Tensor:
        """(M, K) times (N, K) transposed: a product."""

    def swiglu(self, x: Tensor, w: Weight) -> Tensor:
        """silu(x @ gate.T) * (x @ up.T): (M, N) of a (2N, K) weight, as the next product reads it."""

    def logits(self, x: Tensor, head: Tensor) -> Tensor:
        """(M, K) to (M, V) fp32."""

    def add_norm(
        self, product: Tensor | None, residual: Tensor, weight: Tensor, eps: float, into: Weight | None
    ) -> Tensor:
        """Add the product to `residual` (M, H) in place; returns its RMSNorm, as the weight `into` reads it."""

    def rope_store(
        self, product: Tensor, layer: Layer, shape: Shape, rope: Tensor, batch: Batch, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Norm and rotate queries and keys, by `rope` (2, M, D), and store keys and values in their pages; returns the
        queries (M, heads, D)."""

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, batch: Batch, into: Weight) -> Tensor:
        """Attention of every token over its stream up to itself, or to the end of its open span: (M, heads * D), as the
        weight `into` reads it."""

    def sample(
        self, logits: Tensor, state: SlotState, slots: Tensor, ids: TokenIds, *, width: int, nucleus: bool
    ) -> None:
        """Sample `width` tokens of each picture in `slots` (n,), from (n * 2 * width, V) logits after the tokens of
        `SlotState.fed`. Accept those that follow from right drafts alone, at least one, and move the state on by them;
        the others are the next drafts. Slots without an active picture stay as they are. `nucleus` False says that no
        picture's top-p is below 1."""

    def head_input(self, gates: Gates, state: SlotState, grid: DiagonalState, slots: Tensor, width: int) -> Tensor:
        """What the heads read for up to `width` cells of the next diagonal of each picture in `slots` (n,):
        (n * 2 * width, 2 hidden)."""

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
        """Sample these cells from (n * 2 * width, V) logits and store them. Returns the pass that feeds them, as the
        decoder and as the vertical layers see it; rows beyond a diagonal's cells are padding."""

    def keep(self, state: SlotState, grid: DiagonalState, slots: Tensor, h: Tensor, v: Tensor) -> None:
        """Keep the pass's h and v (n * 2 * width, hidden), and move the pictures on."""
