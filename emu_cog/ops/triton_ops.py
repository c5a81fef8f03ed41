"""`interface.Ops` for CUDA, or for Triton's interpreter: own kernels for all passes that requests may share.

Where a pass reads one prompt alone, products of more rows than `_most` says are PyTorch's, and so is attention beyond
MAX_ROWS, unless the pass is captured.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError
from triton.tools.tensor_descriptor import TensorDescriptor

from emu_cog.ops.autotune import (
    CHUNK,
    FEW_WINDOWS,
    Card,
    KernelBuildError,
    KernelConfig,
    LinearConfig,
    autotune,
    default_config,
    open_queries,
    tile,
    window_queries,
)
from emu_cog.ops.interface import (
    INPUT_SCALE,
    MAX_ROWS,
    SCALE_BYTES,
    SMALLEST_INPUT,
    Batch,
    DiagonalState,
    Gates,
    Layer,
    ModelWeights,
    Shape,
    SlotState,
    Weight,
    ceil_div,
    power_of_two,
)
from emu_cog.ops.kernels import diagonals as diagonal_kernels
from emu_cog.ops.kernels import eight_bit, layers
from emu_cog.ops.kernels import sampling as sampling_kernels
from emu_cog.ops.reference import TorchOps
from emu_cog.ops.sampling import keep_sorted
from emu_cog.prompt.tokens import TokenIds

FEW_SCORES, MANY_SCORES, MANY_SAMPLED = 1024, 4096, 8
"""Scores per program of the sampling kernels, for a few tokens and from so many on. On an H200 one token takes 20 us,
with 2048 scores 22; 64 tokens take 174 us, with 2048 scores 204."""
ONE_HEAD_ROWS = 64
"""Up to so many rows, a program joins the parts of one head's attention; beyond, of two heads: with 128 rows two take
2.5 us less than one on an H200, with 64 rows 4 us more."""
FP8 = torch.float8_e4m3fn
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@contextmanager
def build_errors(device: torch.device) -> Iterator[None]:
    """Turn what keeps a kernel from being built for `device` into KernelBuildError.

    That is Triton's own errors (too little shared memory, a kernel that its compiler refuses), but also RuntimeError
    and OSError: a failed compiler pass, a missing C compiler, an assembler or driver that refuses the result. CUDA's
    own errors pass through: nothing that runs after them can be trusted.
    """
    try:
        yield
    except (KernelBuildError, torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        if "CUDA error" in str(error):
            raise
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # raises where the error came from a broken CUDA context
        raise KernelBuildError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


class TritonOps:
    """The fast operations, for CUDA or Triton's interpreter. Samples on one CUDA stream at a time."""

    def __init__(self, config: KernelConfig, dtype: torch.dtype, rows: int = MAX_ROWS) -> None:
        """`rows`: tokens of the largest pass that requests may share."""
        self.config, self.torch_dtype, self.dtype, self.rows = config, dtype, DTYPES[dtype], rows
        self._scratch: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._torch = TorchOps()
        self._alone = False
        self.launch: dict[str, Any] = {"PDL": config.pdl} | ({"launch_pdl": True} if config.pdl else {})

    @classmethod
    def autotuned(cls, w: ModelWeights, device: torch.device, rows: int = MAX_ROWS) -> tuple[TritonOps, list[str]]:
        """With the configuration that is fastest on `device` for the model's own weights; and lines for the log. Where
        none can be built that uses what Hopper brought, without.

        KernelBuildError where no configuration can be built.
        """
        card = Card.of(device)
        try:
            return cls._autotuned(w, device, rows, card)
        except KernelBuildError as error:
            if not card.hopper:
                raise
            ops, found = cls._autotuned(w, device, rows, replace(card, hopper=False, wgmma=False))
            return ops, [f"without copy engine and dependent launch: {error}", *found]

    @classmethod
    def _autotuned(cls, w: ModelWeights, device: torch.device, rows: int, card: Card) -> tuple[TritonOps, list[str]]:
        ops = cls(default_config(w, card, rows), w.embed.dtype, rows)

        def seconds(weights: Sequence[Weight], config: LinearConfig, rows: int, swiglu: bool) -> float:
            x = torch.randn((rows, weights[0].data.shape[1]), device=device)
            x = x.to(torch.float16 if weights[0].in_words else w.embed.dtype)
            with build_errors(device):
                return _replay_seconds(lambda: [ops.product(x, weight, config, swiglu=swiglu) for weight in weights])

        ops.config, found = autotune(ops.config, w, seconds, card)
        return ops, found

    # -- products ---------------------------------------------------------------------------------------------

    def product(self, x: Tensor, w: Weight, config: LinearConfig, *, swiglu: bool = False) -> Tensor:
        """Launch a linear kernel: partials (splits, M, N), with `swiglu` (1, M, N) ready for the next product."""
        if not x.is_contiguous():
            raise ValueError(f"the kernels read contiguous rows, not strides {tuple(x.stride())}")
        m, eight_bits = len(x), w.in_words
        # Four 8-bit weights are one word along K.
        data = w.data.view(torch.int32) if eight_bits else w.data.contiguous()  # on a CPU it may lie along N
        n, k = data.shape[0] // (2 if swiglu else 1), data.shape[1]
        unit = CHUNK if config.tma else config.block_k
        chunk = ceil_div(ceil_div(k, config.splits), unit) * unit
        splits = ceil_div(k, chunk)
        scale, (rows, beside) = None, tile(self.config.rows(m, w))
        if w.narrow:
            x = x if x.dtype == FP8 else self.narrowed(x)
            scale = x.view(torch.uint8)[:, k:].view(torch.float32)
        read = torch.float16 if eight_bits else self.torch_dtype  # by the next product
        partials = torch.empty((splits, m, n), dtype=read if swiglu else torch.float32, device=x.device)
        grid = (ceil_div(n, config.block_n) * ceil_div(m, rows + beside), splits)
        common: dict[str, Any] = {
            "ROWS": rows,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "STAGES": config.stages,
            "SWIGLU": swiglu,
            "KIND": self.dtype,
            "ASM": x.device.type != "cpu",
            "EVEN": n % config.block_n == 0 and k % chunk == 0 and chunk % config.block_k == 0,
            "num_warps": config.warps,
            **self.launch,
        }
        if eight_bits:
            fp8 = w.data.dtype == FP8
            eight_bit.linear8_kernel[grid](
                x,
                data,
                w.scale,
                partials,
                m,
                n,
                k,
                chunk,
                FP8=fp8,
                **common,
            )
        else:
            inputs = further = x[:, :k]
            weights = data
            if config.tma:
                if beside:
                    further = TensorDescriptor.from_tensor(inputs, [beside, config.block_k])
                inputs = TensorDescriptor.from_tensor(inputs, [rows, config.block_k])
                weights = TensorDescriptor.from_tensor(data, [config.block_n, config.block_k])
            layers.linear_kernel[grid](
                inputs,
                further if beside else None,
                weights,
                scale,
                w.scale,
                partials,
                m,
                n,
                k,
                chunk,
                x.stride(0),
                BESIDE=beside,
                TMA=config.tma,
                NARROW=w.narrow,
                **common,
            )
        return partials

    def narrowed(self, x: Tensor) -> Tensor:
        """`interface.narrowed`: rows of numbers, each with its scale behind them, (M, K + SCALE_BYTES) fp8."""
        (m, k), block = x.shape, power_of_two(x.shape[1])
        out = self._narrow_rows(x)
        layers.narrow_kernel[(m,)](
            x, out, k, BLOCK=block, num_warps=max(1, min(16, block // 512)), **self._narrowing(x), **self.launch
        )
        return out

    def _narrow_rows(self, like: Tensor) -> Tensor:
        """Empty rows for numbers in fp8, as many as (M, K) `like` has, and their scales."""
        return torch.empty((len(like), like.shape[1] + SCALE_BYTES), dtype=FP8, device=like.device)

    def _narrowing(self, x: Tensor) -> dict[str, Any]:
        """Arguments of the kernels that round to fp8."""
        return {"SMALLEST": SMALLEST_INPUT, "LARGEST": torch.finfo(FP8).max, "ASM": x.device.type != "cpu"}

    def for_prompt(self) -> TritonOps:
        ops = copy(self)
        ops._alone = True
        return ops

    def _most(self, w: Weight | None) -> int:
        """Rows up to which products with `w` are the kernels'. Beyond MAX_ROWS PyTorch's are faster, unless they widen
        8-bit weights first."""
        widened = w is not None and w.scale is not None and not self._fits_scaled_mm(w)
        return MAX_ROWS if self._alone and not widened else self.rows

    def _fits_scaled_mm(self, w: Weight) -> bool:
        """Whether PyTorch multiplies by it in fp8."""
        n, k = w.data.shape
        return w.narrow and w.data.is_cuda and self.torch_dtype == torch.bfloat16 and n % 16 == k % 16 == 0

    def linear(self, x: Tensor, w: Weight) -> Tensor:
        return self._product(x, w) if len(x) <= self._most(w) else self._wide(x, w)

    def swiglu(self, x: Tensor, w: Weight) -> Tensor:
        if len(x) <= self._most(w):
            return self._product(x, w, swiglu=True)[0]
        product, n = self._wide(x, w), len(w.data) // 2
        out = torch.empty((len(x), n), dtype=x.dtype, device=x.device)
        layers.swiglu_kernel[(len(x), ceil_div(n, 1024))](product, out, n, BLOCK=1024, **self.launch)
        return out

    def logits(self, x: Tensor, head: Tensor) -> Tensor:
        # In blocks: text may be sampled for any number of sequences, and no row may depend on the others.
        parts = [self._product(part.contiguous(), Weight(head))[0] for part in x.split(self.rows)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _wide(self, x: Tensor, w: Weight) -> Tensor:
        """A product of more rows than the kernels take, which belong to one prompt: by PyTorch. Where inputs are fp8,
        too, that is a fourth of what widening the weights takes: 0.43 instead of 2.05 ms for 2048 rows of `down`."""
        if w.scale is None or not self._fits_scaled_mm(w):
            return w.product(x)
        rows, k = self.narrowed(x), x.shape[1]
        scale = rows.view(torch.uint8)[:, k : k + 4].view(torch.float32).contiguous()
        return torch._scaled_mm(
            rows[:, :k].contiguous(), w.data.t(), scale_a=scale, scale_b=w.scale[None], out_dtype=self.torch_dtype
        )

    def _product(self, x: Tensor, w: Weight, *, swiglu: bool = False) -> Tensor:
        return self.product(x, w, self.config.of(len(x), w), swiglu=swiglu)

    # -- the rest of a layer ----------------------------------------------------------------------------------

    def add_norm(
        self, product: Tensor | None, residual: Tensor, weight: Tensor, eps: float, into: Weight | None
    ) -> Tensor:
        m, h = residual.shape
        out = self._input(residual, into)
        source, splits = (residual, 0) if product is None else (product, _splits(product))
        block = power_of_two(h)
        warps = max(1, min(16, block // 256))
        layers.add_norm_kernel[(m,)](
            source,
            residual,
            weight,
            out,
            h,
            eps,
            m,
            SPLITS=splits,
            BLOCK=block,
            INTERLEAVED=self._interleaved(into, m),
            NARROW=out.dtype == FP8,
            num_warps=warps,
            **self._narrowing(residual),
            **self.launch,
        )
        return out

    def rope_store(
        self, product: Tensor, layer: Layer, shape: Shape, rope: Tensor, batch: Batch, keys: Tensor, values: Tensor
    ) -> Tensor:
        m = len(batch.tokens)
        q = torch.empty((m, shape.heads, shape.head_dim), dtype=keys.dtype, device=product.device)
        # Steps of few rows want many programs, others large ones: 2048 tokens took 160 us an H200 with one head each.
        block = 8 if batch.last is not None else 1 if m <= self.rows else 16
        layers.rope_store_kernel[(m, ceil_div(shape.heads + 2 * shape.kv_heads, block))](
            product,
            layer.q_norm,
            layer.k_norm,
            rope,
            batch.positions,
            batch.streams,
            batch.tables,
            q,
            keys,
            values,
            batch.tables.stride(0),
            keys.stride(0),
            shape.eps,
            m,
            SPLITS=_splits(product),
            HEADS=shape.heads,
            KV=shape.kv_heads,
            D=shape.head_dim,
            PAGE=keys.shape[2],
            BLOCK=block,
            num_warps=1 if block == 1 else 4,
            **self.launch,
        )
        return q

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, batch: Batch, into: Weight) -> Tensor:
        m, heads, dim = q.shape
        if m > MAX_ROWS and batch.spans:
            out = self._torch.attend(q, keys, values, batch, into)
            return interleaved(out) if self._interleaved(into, m) else out
        kv, group, width, config = keys.shape[0], heads // keys.shape[0], batch.width, self.config
        last, opened = batch.positions if batch.last is None else batch.last, batch.last is not None
        queries = self._queries(width, group=group, head_dim=dim, opened=opened)
        tokens = max(queries // group, 1)
        if opened:
            splits, warps, stages = config.open_splits, max(queries // 16, 1), config.deep_stages
            grid = (m // width, kv, max(splits, power_of_two(ceil_div(width, tokens))))
        else:
            windows = m // width * ceil_div(width, tokens)
            splits, warps = config.key_splits, 2
            stages = config.deep_stages if windows <= FEW_WINDOWS else config.key_stages
            # Tokens of a window, which read up to themselves, may differ in how their keys are divided.
            grid = (windows, kv, splits if width == 1 else 2 * splits)
        acc = torch.empty((m, heads, splits, dim), dtype=torch.float32, device=q.device)
        logs = torch.empty((m, heads, splits), dtype=torch.float32, device=q.device)
        layers.attend_kernel[grid](
            q,
            keys,
            values,
            batch.positions,
            last,
            batch.streams,
            batch.tables,
            acc,
            logs,
            batch.tables.stride(0),
            keys.stride(0),
            dim**-0.5 * math.log2(math.e),
            width,
            KV=kv,
            GROUP=group,
            TOKENS=tokens,
            QUERIES=max(queries, power_of_two(group)),
            D=dim,
            PAGE=keys.shape[2],
            BLOCK=config.key_block,
            SPLITS=splits,
            STAGES=stages,
            OPEN=opened,
            num_warps=warps,
            **self.launch,
        )
        # Rounding to fp8 takes a row's largest number, and joining its heads in one program took up to 25 us.
        out = torch.empty(
            (m, heads * dim), dtype=torch.float16 if self._interleaved(into, m) else q.dtype, device=q.device
        )
        block = dim if m <= ONE_HEAD_ROWS else 2 * dim
        layers.combine_kernel[(m, ceil_div(heads * dim, block))](
            acc,
            logs,
            last,
            out,
            width,
            HEADS=heads,
            D=dim,
            SPLITS=splits,
            BLOCK=block,
            KIND=self.dtype,
            INTERLEAVED=self._interleaved(into, m),
            OPEN=opened,
            num_warps=max(1, block // 128),
            **self.launch,
        )
        return out

    def _queries(self, width: int, *, group: int, head_dim: int, opened: bool) -> int:
        """Rows of attention's programs."""
        if opened:
            return open_queries(width, group=group, most=self.config.open_queries)
        return window_queries(width, head_dim=head_dim, key_block=self.config.key_block)

    def unlike(self, widths: Sequence[int], shape: Shape, *, opened: bool) -> list[int]:
        """Of windows or, if `opened`, diagonals of these widths the first for each shape of attention's programs."""
        first: dict[int, int] = {}
        group = shape.heads // shape.kv_heads
        for width in widths:
            first.setdefault(self._queries(width, group=group, head_dim=shape.head_dim, opened=opened), width)
        return list(first.values())

    def _input(self, like: Tensor, into: Weight | None) -> Tensor:
        """An empty input for the weight `into`: fp16 for an 8-bit one (see kernels/eight_bit.py), rows with their scale
        where inputs are fp8, too."""
        if into is not None and into.narrow and len(like) <= self._most(into):
            return self._narrow_rows(like)
        return torch.empty_like(like, dtype=torch.float16 if self._interleaved(into, len(like)) else like.dtype)

    def _interleaved(self, into: Weight | None, rows: int) -> bool:
        return into is not None and into.in_words and rows <= self._most(into)

    # -- sampling ----------------------------------------------------------------------------------------------

    def sample(
        self, logits: Tensor, state: SlotState, slots: Tensor, ids: TokenIds, *, width: int, nucleus: bool
    ) -> None:
        best, counts = self._picked(logits, state, None, slots, width, nucleus)
        sampling_kernels.accept_kernel[(len(slots),)](
            slots,
            best,
            counts,
            state.columns,
            state.total,
            state.step,
            state.token,
            state.position,
            state.out,
            state.out.shape[1],
            ids.visual,
            ids.eol,
            ids.eoi,
            WIDTH=width,
            num_warps=8,
            **self.launch,
        )

    def _picked(
        self, logits: Tensor, state: SlotState, grid: DiagonalState | None, slots: Tensor, width: int, nucleus: bool
    ) -> tuple[Tensor, Tensor]:
        """Guide, filter and pick, with `grid` for the cells of diagonals: what `pick_kernel` has found (rows,), and the
        counts to be reset with it."""
        rows, vocabulary = len(slots) * width, logits.shape[1]
        if rows not in self._scratch:
            # Whoever takes the codes resets the first two to the values they have here.
            self._scratch[rows] = (
                torch.zeros((rows, 4, 256), dtype=torch.int32, device=logits.device),
                torch.full((rows,), -(2**63), dtype=torch.int64, device=logits.device),
                torch.zeros((rows, 4, 2), dtype=torch.int32, device=logits.device),
            )
        counts, best, found = self._scratch[rows]
        block = FEW_SCORES if rows < MANY_SAMPLED else MANY_SCORES
        programs, scores = (rows, ceil_div(vocabulary, block)), state.scores
        blocks = {"BLOCK": block, "num_warps": 8, **self.launch}
        sampling_kernels.guide_kernel[programs](
            logits, slots, state.cfg_scale, state.temperature, scores, counts, width, vocabulary, **blocks
        )
        for digit in (1, 2, 3):
            sampling_kernels.count_kernel[programs](
                scores, counts, found, slots, state.top_k, width, vocabulary, PASS=digit, **blocks
            )
        if nucleus:  # needs a sort; what it leaves lies above top-k's threshold
            scores = keep_sorted(scores[:rows], *state.filters(slots, width))
        sampling_kernels.pick_kernel[programs](
            scores,
            counts,
            found,
            slots,
            state.top_k,
            state.seed,
            state.sampled,
            state.columns,
            state.step,
            state.step if grid is None else grid.rows,
            best,
            width,
            vocabulary,
            DIAGONAL=grid is not None,
            **blocks,
        )
        return best, counts

    # -- diagonals ---------------------------------------------------------------------------------------------

    def head_input(self, gates: Gates, state: SlotState, grid: DiagonalState, slots: Tensor, width: int) -> Tensor:
        rows, (_, cells, hidden) = len(slots) * 2 * width, grid.h.shape
        where, block = (slots, state.step, grid.rows, state.columns), power_of_two(hidden)
        warps = max(1, min(8, block // 512))
        # The gates are products of MAX_ROWS rows, so that none depends on the pictures beside it.
        pair = grid.h.new_empty((ceil_div(rows, MAX_ROWS) * MAX_ROWS, 2 * hidden), dtype=torch.float32)
        diagonal_kernels.gather_kernel[(len(pair),)](
            *where,
            grid.h,
            grid.v,
            pair,
            width,
            rows,
            hidden,
            CELLS=cells,
            BLOCK=block,
            num_warps=warps,
            **self.launch,
        )
        gate = len(gates.pair_in)
        inner = pair.new_empty((len(pair), gate))
        for part, to in zip(pair.split(MAX_ROWS), inner.split(MAX_ROWS), strict=True):
            torch.mm(part, gates.pair_in.t(), out=to)
        out = grid.h.new_empty((rows, 2 * hidden))
        diagonal_kernels.weigh_kernel[(rows,)](
            *where,
            pair,
            inner,
            gates.pair_out,
            gates.pair_bias,
            gates.corner,
            gates.corner_bias,
            out,
            width,
            hidden,
            gate,
            BLOCK=block,
            GATE_BLOCK=power_of_two(gate),
            num_warps=warps,
            **self.launch,
        )
        return out

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
        n = len(slots)
        best, counts = self._picked(logits, state, grid, slots, width, nucleus)
        fed = torch.empty((7, n * 2 * width), dtype=torch.int64, device=slots.device)
        diagonal_kernels.store_kernel[(n, width)](
            slots,
            state.step,
            grid.rows,
            state.columns,
            state.position,
            best,
            counts,
            state.out,
            fed,
            state.out.shape[1],
            width,
            ids.visual,
            state.padding,
            num_warps=1,
            **self.launch,
        )
        tokens, positions, streams, rotary, last, image_positions, image_last = fed
        batch = Batch(
            tokens=tokens,
            positions=positions,
            streams=streams,
            tables=state.tables,
            width=width,
            rotary=rotary,
            last=last,
        )
        return batch, replace(batch, positions=image_positions, tables=grid.image_tables, last=image_last)

    def keep(self, state: SlotState, grid: DiagonalState, slots: Tensor, h: Tensor, v: Tensor) -> None:
        (rows, hidden), block = h.shape, power_of_two(h.shape[1])
        diagonal_kernels.keep_kernel[(rows,)](
            slots,
            state.step,
            state.total,
            h,
            v,
            grid.h,
            grid.v,
            rows // (2 * len(slots)),
            hidden,
            CELLS=grid.h.shape[1],
            BLOCK=block,
            num_warps=max(1, min(8, block // 512)),
            **self.launch,
        )


def _replay_seconds(work: Callable[[], object]) -> float:
    """Seconds of GPU time that `work` takes: the better of two replays of its CUDA graph, no launch overhead."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        work()
    graph.replay()
    best = float("inf")
    for _ in range(2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1000)
    return best


def interleaved(x: Tensor) -> Tensor:
    """(M, K) as the kernel of 8-bit weights reads it (kernels/eight_bit.py)."""
    scaled = (x.float() / INPUT_SCALE).clamp(-65504.0, 65504.0).half()
    return scaled.view(len(x), -1, 4).transpose(1, 2).reshape(x.shape)


def _splits(product: Tensor) -> int:
    return len(product) if product.dim() == 3 else 1
