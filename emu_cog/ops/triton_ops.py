"""The decode step's operations in Triton: `decode_ops.Ops` for CUDA, or for Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from emu_cog.ops.autotune import Plan, Tiles, autotune, choose_plan, shape
from emu_cog.ops.interface import DecodeWeights, ImageState, Layer, Shape, Weight
from emu_cog.ops.kernels import eight_bit, layers
from emu_cog.ops.kernels import sampling as sampling_kernels
from emu_cog.ops.reference import TorchOps
from emu_cog.request import Sampling

KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class TritonOps:
    """The fast set: CUDA (or Triton's interpreter). Works on one stream at a time."""

    BLOCK = 2048
    """Scores a program of the draw handles."""

    def __init__(self, plan: Plan, dtype: torch.dtype) -> None:
        self.plan, self.kind = plan, KINDS[dtype]
        self._scratch: dict[int, dict[str, Tensor]] = {}
        self.launch: dict[str, Any] = {"PDL": plan.pdl} | ({"launch_pdl": True} if plan.pdl else {})

    @classmethod
    def autotuned(cls, w: DecodeWeights, device: torch.device) -> tuple[TritonOps, list[str]]:
        """With the plan that is fastest on `device` over the model's own weights; and what was found."""
        ops = cls(choose_plan(w, device), w.embed.dtype)

        def seconds(weights: Sequence[Weight], tiles: Tiles, swiglu: bool) -> float | None:
            x = torch.randn((2, weights[0].data.shape[1]), device=device)
            x = x.to(torch.float16 if _is_small(weights[0]) else w.embed.dtype)
            try:
                return _replay_seconds(lambda: [ops.product(x, weight, tiles, swiglu=swiglu) for weight in weights])
            except TritonError:  # too much shared memory, or a kernel that this compiler refuses
                return None

        ops.plan, told = autotune(ops.plan, w, seconds)
        return ops, told

    # -- products ---------------------------------------------------------------------------------------------

    def product(self, x: Tensor, w: Weight, tiles: Tiles, *, swiglu: bool = False) -> Tensor:
        """The linear kernels' launch: parts (splits, M, N), with `swiglu` (1, M, N) ready for the next product."""
        if not x.is_contiguous():
            raise ValueError(f"the kernels read rows that lie one after the other, not {tuple(x.stride())}")
        m, small = len(x), w.scale is not None
        # An 8-bit weight is counted in words of four along K.
        data = w.data.view(torch.int32) if small else w.data
        n, k = data.shape[0] // (2 if swiglu else 1), data.shape[1]
        chunk = _up(_up(k, tiles.splits), tiles.block_k) * tiles.block_k
        splits = _up(k, chunk)
        parts = torch.empty((splits, m, n), dtype=x.dtype if swiglu else torch.float32, device=x.device)
        grid = (_up(n, tiles.block_n), splits)
        common: dict[str, Any] = {
            "ROWS": 16,
            "BLOCK_N": tiles.block_n,
            "BLOCK_K": tiles.block_k,
            "STAGES": tiles.stages,
            "SWIGLU": swiglu,
            "EVEN": n % tiles.block_n == 0 and k % chunk == 0 and chunk % tiles.block_k == 0,
            "num_warps": tiles.warps,
            **self.launch,
        }
        if small:
            fp8 = w.data.dtype == torch.float8_e4m3fn
            eight_bit.linear8_kernel[grid](
                x, data, w.scale, parts, m, n, k, chunk, FP8=fp8, KIND=self.kind, ASM=x.is_cuda, **common
            )
        else:
            layers.linear_kernel[grid](x, data, parts, m, n, k, chunk, **common)
        return parts

    def linear(self, x: Tensor, w: Weight) -> Tensor:
        return self.product(x, w, self.plan.tiles[shape(w)])

    def swiglu(self, x: Tensor, w: Weight) -> Tensor:
        return self.product(x, w, self.plan.tiles[shape(w)], swiglu=True)[0]

    def logits(self, x: Tensor, head: Tensor) -> Tensor:
        return self.linear(x.contiguous(), Weight(head))[0]

    # -- the rest of a layer ----------------------------------------------------------------------------------

    def add_norm(
        self, parts: Tensor | None, residual: Tensor, weight: Tensor, eps: float, into: Weight | None
    ) -> Tensor:
        m, h = residual.shape
        out = self._input(residual, into)
        source, splits = (residual, 0) if parts is None else (parts, len(parts))
        block = _power(h)
        warps = max(1, min(16, block // 256))
        layers.add_norm_kernel[(m,)](
            source,
            residual,
            weight,
            out,
            h,
            eps,
            splits,
            m,
            BLOCK=block,
            SPREAD=_is_small(into),
            num_warps=warps,
            **self.launch,
        )
        return out

    def rope_store(
        self, parts: Tensor, layer: Layer, shape: Shape, rope: Tensor, position: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        splits, m, _ = parts.shape
        q = torch.empty((m, shape.heads, shape.head_dim), dtype=keys.dtype, device=parts.device)
        layers.rope_store_kernel[(m, shape.heads + 2 * shape.kv_heads)](
            parts,
            layer.q_norm,
            layer.k_norm,
            rope[0],
            rope[1],
            position,
            q,
            keys,
            values,
            *keys.stride()[:3],
            shape.eps,
            splits,
            m,
            HEADS=shape.heads,
            KV=shape.kv_heads,
            D=shape.head_dim,
            num_warps=1,
            **self.launch,
        )
        return q

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, position: Tensor, into: Weight) -> Tensor:
        m, heads, dim = q.shape
        kv, splits = keys.shape[2], self.plan.key_splits
        acc = torch.empty((m, heads, splits, dim), dtype=torch.float32, device=q.device)
        logs = torch.empty((m, heads, splits), dtype=torch.float32, device=q.device)
        out = self._input(q.view(m, heads * dim), into)
        layers.attend_kernel[(m, kv, splits)](
            q,
            keys,
            values,
            position,
            acc,
            logs,
            *keys.stride()[:3],
            dim**-0.5 * math.log2(math.e),
            KV=kv,
            GROUP=heads // kv,
            PADDED=max(16, _power(heads // kv)),
            D=dim,
            BLOCK=self.plan.key_block,
            SPLITS=splits,
            STAGES=3,
            num_warps=4,
            **self.launch,
        )
        layers.combine_kernel[(m, heads)](
            acc,
            logs,
            out,
            HEADS=heads,
            D=dim,
            SPLITS=splits,
            PADDED=_power(splits),
            KIND=self.kind,
            SPREAD=_is_small(into),
            num_warps=1,
            **self.launch,
        )
        return out

    def _input(self, like: Tensor, into: Weight | None) -> Tensor:
        """Room for what the weight `into` reads: fp16 for an 8-bit one (kernels8.py tells why)."""
        return torch.empty_like(like, dtype=torch.float16 if _is_small(into) else like.dtype)

    # -- the draw ---------------------------------------------------------------------------------------------

    def choose(self, logits: Tensor, state: ImageState, visual: int, sampling: Sampling) -> None:
        if sampling.top_p < 1.0:
            TorchOps(0).choose(logits, state, visual, sampling)
            return
        lanes, vocabulary = len(logits) // 2, logits.shape[1]
        blocks = _up(vocabulary, self.BLOCK)
        if lanes not in self._scratch:
            self._scratch[lanes] = _draw_scratch(lanes, blocks, logits.device)
        s = self._scratch[lanes]
        grid, some = (lanes, blocks), {"BLOCK": self.BLOCK, "num_warps": 8, **self.launch}
        counts, top, k = s["counts"], s["top"], state.top_k
        sampling_kernels.guide_kernel[grid](logits, state.knobs, state.scores, counts, top, vocabulary, **some)
        for digit in (1, 2, 3):
            sampling_kernels.count_kernel[grid](state.scores, counts, k, vocabulary, PASS=digit, **some)
        sampling_kernels.mass_kernel[grid](state.scores, counts, top, k, s["threshold"], s["mass"], vocabulary, **some)
        sampling_kernels.choose_kernel[(lanes,)](
            state.scores,
            counts,
            top,
            s["threshold"],
            s["mass"],
            state.uniform,
            state.forced,
            state.advance,
            state.step,
            state.token,
            state.position,
            state.out,
            visual,
            vocabulary,
            blocks,
            BLOCKS=_power(blocks),
            **some,
        )


def _draw_scratch(lanes: int, blocks: int, device: torch.device) -> dict[str, Tensor]:
    """What the draw's kernels hand to each other; `counts` and `top` are left as they are here by the last of them."""
    return {
        "counts": torch.zeros((lanes, 4, 256), dtype=torch.int32, device=device),
        "top": torch.full((lanes,), -(2**31), dtype=torch.int32, device=device),
        "threshold": torch.zeros((lanes,), dtype=torch.int32, device=device),
        "mass": torch.zeros((lanes, blocks), dtype=torch.float64, device=device),
    }


def _replay_seconds(work: Callable[[], object]) -> float:
    """Seconds of GPU time that `work` takes, the better of two replays of its graph: launching costs nothing then."""
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


def _is_small(weight: Weight | None) -> bool:
    return weight is not None and weight.scale is not None


def _up(a: int, b: int) -> int:
    return -(-a // b)


def _power(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()
