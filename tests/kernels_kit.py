"""The kernels compiled ahead of time, without a GPU: the project's own launches on tensors without memory.

`python -m tests.kernels_kit 80 16` prints a JSON object for compute capability 8.0 and passes of 16 rows: bytes of
shared memory by weight format and kernel. With "all" for 16 it does so for all of ROWS, and adds what autotuning makes
of all candidates; with "layouts" it tells how attention divides its work. It needs a process of its own, where
TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from transformers import Qwen3Config

from emu_cog.engine.diagonals import DiagonalRunner
from emu_cog.model.kv_cache import KVCache
from emu_cog.model.quantize import FORMATS
from emu_cog.model.qwen3 import forward
from emu_cog.ops.autotune import (
    BESIDE,
    ROWS,
    Card,
    KernelBuildError,
    LinearConfig,
    autotune,
    default_config,
    kind,
)
from emu_cog.ops.interface import (
    MAX_ROWS,
    PAGE,
    Batch,
    DiagonalState,
    Gates,
    Layer,
    ModelWeights,
    Ops,
    Shape,
    SlotState,
    Weight,
    power_of_two,
)
from tests.decoder_kit import IDS

META = torch.device("meta")
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory per program, by compute capability times ten. Source: CUDA C++ Programming Guide."""
TEXT, VISUAL, HIDDEN = 151854, 131072, 5120


def released(weight_dtype: torch.dtype = torch.bfloat16, layers: int = 1, *, narrow: bool = False) -> ModelWeights:
    """The released model's shapes, without its numbers; `narrow`: see Weight."""

    def weight(n: int, k: int) -> Weight:
        scale = torch.empty(n, device=META) if weight_dtype.itemsize == 1 else None
        return Weight(torch.empty((n, k), dtype=weight_dtype, device=META), scale, narrow)

    def half(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=META)

    layer = Layer(
        qkv=weight(10240, HIDDEN),
        o=weight(HIDDEN, 8192),
        gate_up=weight(51200, HIDDEN),
        down=weight(HIDDEN, 25600),
        input_norm=half(HIDDEN),
        post_norm=half(HIDDEN),
        q_norm=half(128),
        k_norm=half(128),
    )
    head = half(TEXT + VISUAL, HIDDEN)
    return ModelWeights(
        embed=head,
        layers=(layer,) * layers,
        norm=half(HIDDEN),
        head=head,
        visual=slice(TEXT, TEXT + VISUAL),
        rope=half(2, 32768, 128),
        shape=Shape(heads=64, kv_heads=8, head_dim=128, eps=1e-6),
    )


class _Driver:
    """As much of Triton's driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        return self._target


@contextmanager
def compiled(capability: int, listing: dict[str, str] | None = None) -> Iterator[dict[str, list[int]]]:
    """Launches compile for the capability and do nothing else; yields the bytes of shared memory by kernel. `listing`
    takes each kernel's intermediate code, of its last launch."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found: dict[str, list[int]] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.setdefault(self.__name__, []).append(int(kernel.metadata.shared))
        if listing is not None:
            listing[self.__name__] = kernel.asm["ttgir"]
        return kernel

    driver.set_active(_Driver(capability))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run


def most_rows(weights: ModelWeights) -> int:
    """Of a pass: inputs in fp8 are FlashAR's."""
    return DiagonalRunner.pass_rows if weights.layers[0].qkv.narrow else MAX_ROWS


def card(capability: int) -> Card:
    return Card(
        name=f"sm_{capability}", shared=SHARED[capability] * 1024, hopper=capability >= 90, wgmma=capability == 90
    )


def steps(capability: int, weights: ModelWeights, row_counts: Sequence[int]) -> dict[str, list[int]]:
    """Compile all kernels of passes, of text logits and of sampling in their default configuration."""
    from emu_cog.ops.triton_ops import TritonOps

    ops = TritonOps(default_config(weights, card(capability), most_rows(weights)), torch.bfloat16)
    config = Qwen3Config(num_hidden_layers=1, num_attention_heads=64, num_key_value_heads=8, head_dim=128)
    cache = KVCache(config, pages=64, dtype=torch.bfloat16, devices=[META])
    state = SlotState.empty(32, pages=64, steps=16, vocabulary=VISUAL, device=META)
    with compiled(capability) as found:
        for rows, width in [(count, width) for count in row_counts for width in (1, count // 2)]:
            at = torch.empty(rows, dtype=torch.int64, device=META)
            batch = Batch(tokens=at, positions=at, streams=at, tables=state.tables, width=width)
            hidden = forward(ops, weights, batch, cache)
            forward(ops, weights, replace(batch, last=at), cache)
            ops.logits(hidden[::2], weights.text_head)
            logits = ops.logits(hidden, weights.visual_head)
            if width == power_of_two(width):  # plain pictures have no other
                ops.sample(logits, state, at[:: 2 * width], IDS, width=width, nucleus=False)
            diagonals(ops, logits, state, at[:: 2 * width], width)
    return found


def diagonals(ops: Ops, logits: torch.Tensor, state: SlotState, slots: torch.Tensor, width: int) -> None:
    """A step over diagonals around its pass."""
    wide = torch.float32
    shapes = {"pair_in": (640, 2 * HIDDEN), "pair_out": (1, 640), "pair_bias": (1,), "corner": (1, HIDDEN)}
    shapes["corner_bias"] = (1,)
    gates = Gates(**{name: torch.empty(shape, dtype=wide, device=META) for name, shape in shapes.items()})
    grid = DiagonalState.empty(state, cells=width, hidden=HIDDEN, dtype=torch.bfloat16)
    inputs = ops.head_input(gates, state, grid, slots, width)
    ops.sample_cells(logits, state, grid, slots, IDS, width=width, nucleus=False)
    ops.keep(state, grid, slots, *inputs.view(-1, 2, HIDDEN).unbind(1))


def tuned(capability: int, weights: ModelWeights) -> dict[str, dict[str, list]]:
    """Autotune over all candidates, each one as fast as it has stages. By rows and weight shape: "tried", a list of
    (block_n, block_k, stages, bytes of shared memory), the default first, and "chosen", without the last."""
    from emu_cog.ops.triton_ops import TritonOps

    limits = card(capability)
    ops = TritonOps(default_config(weights, limits, most_rows(weights)), torch.bfloat16)
    tried: dict[tuple[int, int, int], list[tuple[int, int, int, int]]] = {}

    def seconds(some: Sequence[Weight], config: LinearConfig, rows: int, swiglu: bool) -> float:
        dtype = torch.bfloat16 if some[0].scale is None else torch.float16
        x = torch.empty((rows, some[0].data.shape[1]), dtype=dtype, device=META)
        with compiled(capability) as found:
            ops.product(x, some[0], config, swiglu=swiglu)
        (needed,) = (shared for kernel, (shared,) in found.items() if kernel.startswith("linear"))
        tried.setdefault((rows, *kind(some[0])), []).append((config.block_n, config.block_k, config.stages, needed))
        if needed > limits.shared:  # as Triton refuses to load it
            raise KernelBuildError(f"out of resource: shared memory, Required: {needed}")
        return 1.0 / config.stages

    linear = autotune(ops.config, weights, seconds, limits)[0].linear
    return {
        str(at): {"tried": all_, "chosen": [linear[at].block_n, linear[at].block_k, linear[at].stages]}
        for at, all_ in tried.items()
    }


def layouts(capability: int) -> dict[str, dict[int, list[list[str]]]]:
    """How the warps of the attention kernel divide its products: of "windows" and of "diagonals", by head size, for
    several widths."""
    from emu_cog.ops.triton_ops import TritonOps

    found: dict[str, dict[int, list[list[str]]]] = {"windows": {}, "diagonals": {}}
    for dim in (16, 32, 64, 128, 256):
        weights = released()
        weights = replace(weights, shape=replace(weights.shape, head_dim=dim))
        ops = TritonOps(default_config(weights, card(capability), most_rows(weights)), torch.bfloat16)
        cache = torch.empty((2, 9, PAGE, dim), dtype=torch.bfloat16, device=META)
        into = Weight(torch.empty((64, 16 * dim), dtype=torch.bfloat16, device=META))
        tables = torch.empty((2, 4), dtype=torch.int32, device=META)
        for name, width in (("windows", 1), ("windows", 8), ("windows", 32), ("diagonals", 8), ("diagonals", 64)):
            at = torch.empty(2 * width, dtype=torch.int64, device=META)
            last = at if name == "diagonals" else None
            batch = Batch(tokens=at, positions=at, streams=at, tables=tables, width=width, last=last)
            listing: dict[str, str] = {}
            with compiled(capability, listing):
                ops.attend(torch.empty((2 * width, 16, dim), dtype=cache.dtype, device=META), cache, cache, batch, into)
            of_products = sorted(set(re.findall(r"nvidia_mma<(.*?)>", listing["attend_kernel"])))
            found[name].setdefault(dim, []).append(of_products)
    return found


def main() -> None:
    if sys.argv[2] == "layouts":
        print(json.dumps(layouts(int(sys.argv[1]))))
        return
    capability, everything = int(sys.argv[1]), sys.argv[2] == "all"
    import triton

    formats = {"bfloat16": released()} | {name: released(dtype) for name, (dtype, _) in FORMATS.items()}
    formats["narrow"] = released(torch.float8_e4m3fn, narrow=True)
    document: dict[str, object] = {}
    for name, weights in formats.items():
        try:
            rows = sorted((*ROWS, *(BESIDE if most_rows(weights) > MAX_ROWS else ())))
            found = steps(capability, weights, rows if everything else (int(sys.argv[2]),))
            document[name] = {kernel: max(shared) for kernel, shared in found.items()}
            if everything:
                document[f"{name} candidates"] = tuned(capability, weights)
        except triton.errors.TritonError as error:
            document[name] = f"{type(error).__name__}: {str(error)[-300:]}"
    print(json.dumps(document))


if __name__ == "__main__":
    main()
