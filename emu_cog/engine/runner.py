"""The steps that run thousands of times, captured once as CUDA graphs and replayed once per token.

A captured graph holds addresses and launches, nothing else. Guidance, temperature, top-k, lengths, forced tokens and
random numbers are read from device memory, so every request replays the same graph. Only another batch size, another
cache, or top-p below 1 (which sorts) needs a new capture; the log reports it.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from emu_cog.log import log
from emu_cog.model.decode import forward, image_step, merge
from emu_cog.model.kv_cache import KVCache
from emu_cog.model.qwen3 import LanguageModel
from emu_cog.ops.autotune import KernelBuildError
from emu_cog.ops.interface import ImageState, Ops
from emu_cog.ops.reference import TorchOps
from emu_cog.request import Sampling

POSITION_SLACK = 512
"""Positions beyond the context that a step may write to although nothing reads them."""
MAX_STEPS = 99 * 100
"""Steps of the largest image that two-digit sizes allow: 99 rows of 99 codes, each followed by EOL."""


def why_eager(lm: LanguageModel, *, compile: bool) -> str | None:
    """Why the decode step of `lm` can't be captured as a CUDA graph, or None. The only condition of the fast path."""
    if not compile:
        return "EMU_COMPILE=0"
    if lm.device.type != "cuda":
        return f"the device is {lm.device.type}"
    if len({p.device for p in lm.model.parameters()}) > 1:
        return "the layers are spread over several devices"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    dim = lm.config.head_dim
    if dim < 16 or dim & (dim - 1):
        return f"heads of {dim} channels: the kernels need a power of two from 16"
    return None


def build(lm: LanguageModel, *, compile: bool) -> ModelRunner | None:
    """A runner for `lm`, its kernels built, or None where the engine has to use the modules; the log says why."""
    if reason := why_eager(lm, compile=compile):
        log.info("decoding goes through the modules, step by step: %s", reason)
        return None
    started = time.perf_counter()
    runner = ModelRunner(lm)
    try:
        runner.build_kernels()
    except KernelBuildError as error:
        log.warning("decoding goes through the modules, step by step: the kernels can't be built here: %s", error)
        return None
    log.info("decoding goes through captured steps, set up in %.1f s", time.perf_counter() - started)
    return runner


class ModelRunner:
    """Single-token image and text steps over one model's merged weights, captured once and replayed.

    With `twin` the same steps run in plain torch and nothing is captured: for any device, for tests.
    """

    MAX_ROWS = 16
    """Batch rows (sequences) a step can take; the engine runs larger batches through the modules."""

    def __init__(self, lm: LanguageModel, *, twin: bool = False) -> None:
        self.lm, self.twin = lm, twin
        ids = lm.ids
        # The cache is rounded up beyond the context, and ended sequences are fed at their end: those need angles too.
        self.weights = merge(
            lm.model, visual=ids.visual, vocabulary=ids.vocab_size, context=lm.context + POSITION_SLACK
        )
        self.capture_seconds = 0.0
        self._replays: dict[str, Callable[[], None]] = {}  # over the cache of `_version`
        self._version: object = None
        self._ops: Ops | None = None
        self._images: dict[int, ImageState] = {}
        self._texts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._pool: Any = None

    # -- 1. images -------------------------------------------------------------------------------------------

    def image(
        self,
        cache: KVCache,
        *,
        forced: Tensor,
        uniform: Tensor,
        advance: Tensor,
        lengths: Sequence[int],
        cfg_scale: float,
        sampling: Sampling,
    ) -> tuple[ImageState, Callable[[], None]]:
        """Prepare images: (steps, sequences) tables as in `image_schedule.Schedule`, with IMG to be fed at `lengths`.

        Returns the state, whose `out` fills up step by step, and the function that runs one step without
        synchronizing.
        """
        sequences, device = forced.shape[1], self.lm.device
        if sequences not in self._images or len(self._images[sequences].forced) < len(forced):
            self._forget("image")  # those graphs hold the addresses of the tables being replaced
            steps = max(MAX_STEPS, len(forced))
            self._images[sequences] = ImageState.empty(sequences, steps, self.lm.ids.visual_count, device)
        state = self._images[sequences]
        # With top-p the filters are baked into the graph; without it, they are numbers that the graph reads.
        static = replace(sampling, temperature=1.0) if sampling.top_p < 1.0 else Sampling()

        def step() -> None:
            image_step(self._operations(cache), self.weights, state, cache.keys, cache.values, static)

        state.step.zero_()  # capturing runs steps too: they must stay within the tables
        what = "image" if static.top_p == 1.0 else f"image, top-k {static.top_k}, top-p {static.top_p!r}"
        if what not in self._replays:
            self._forget("image, ")  # anyone may choose any filter: keep one such graph at a time
        replay = self._captured(cache, what, step, state.position)
        count, size = len(forced), self.lm.ids.visual_count
        state.forced[:count].copy_(forced)
        state.uniform[:count].copy_(uniform)
        state.advance[:count].copy_(advance)
        state.token.fill_(self.lm.ids.img)
        state.position.copy_(torch.tensor(lengths))
        state.step.zero_()
        state.cfg_scale.fill_(cfg_scale)
        state.temperature.fill_(sampling.temperature)
        state.top_k.fill_(sampling.top_k if 0 < sampling.top_k < size else size)
        return state, replay

    # -- 2. text ---------------------------------------------------------------------------------------------

    def text(self, cache: KVCache, tokens: Sequence[int], starts: Sequence[int]) -> Tensor:
        """Feed one token to every slot of `cache`, at `starts`; returns the final hidden states (slots, hidden)."""
        rows, device = cache.rows, self.lm.device
        if rows not in self._texts:
            token, position = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
            hidden = torch.zeros((rows, self.lm.config.hidden_size), dtype=self.lm.dtype, device=device)
            self._texts[rows] = token, position, hidden
        token, position, hidden = self._texts[rows]

        def step() -> None:
            operations = self._operations(cache)
            hidden.copy_(forward(operations, self.weights, token, position, cache.keys, cache.values))

        replay = self._captured(cache, "text", step, position)
        token.copy_(torch.tensor(tokens))
        position.copy_(torch.tensor(starts))
        replay()
        return hidden.clone()

    def text_logits(self, hidden: Tensor) -> Tensor:
        """`LanguageModel.text_logits`, computed so that no row's result depends on the number of rows."""
        with self._current_device():
            return self._operations().logits(hidden, self.weights.text_head)

    # -- 3. kernels and capture ------------------------------------------------------------------------------

    @torch.inference_mode()
    def build_kernels(self) -> None:
        """Autotune, and run each kernel once. KernelBuildError where one can't be built, so that no request finds out.

        The steps and logits are those of one image, over a cache just large enough.
        """
        from emu_cog.ops.triton_ops import build_errors

        cache = self.lm.new_cache(rows=2, capacity=64)
        state = ImageState.empty(1, 1, self.lm.ids.visual_count, self.lm.device)
        state.forced.fill_(-1)
        with self._current_device(), build_errors(self.lm.device):
            image_step(self._operations(), self.weights, state, cache.keys, cache.values, Sampling())
            hidden = torch.zeros((1, self.lm.config.hidden_size), dtype=self.lm.dtype, device=self.lm.device)
            self.text_logits(hidden)
            if self.lm.device.type == "cuda":
                torch.cuda.synchronize(self.lm.device)

    def _forget(self, prefix: str) -> None:
        self._replays = {what: replay for what, replay in self._replays.items() if not what.startswith(prefix)}

    def _captured(self, cache: KVCache, what: str, step: Callable[[], None], position: Tensor) -> Callable[[], None]:
        """The function that runs `step` over `cache`: a graph's replay, or `step` itself in the twin."""
        if self.twin:
            return step
        if cache.version is not self._version:
            self._replays.clear()  # those graphs write to a cache that no longer exists
            self._version = cache.version
        if what not in self._replays:
            # Capturing needs one ordinary run first, which compiles the kernels. It writes to the last position of each
            # slot, which no sequence has reached yet and which is overwritten before anything reads it.
            position.fill_(cache.capacity - 1)
            with self._current_device():
                self._replays[what] = self._capture(f"the {what} step of {cache.rows} rows", step)
        return self._replays[what]

    def _capture(self, what: str, step: Callable[[], None]) -> Callable[[], None]:
        started = time.perf_counter()
        device = self.lm.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        built = time.perf_counter()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            step()
        torch.cuda.synchronize(device)
        done = time.perf_counter()
        self.capture_seconds += done - started
        log.info("captured %s: kernels %.1f s, graph %.1f s", what, built - started, done - built)
        return graph.replay

    def _current_device(self) -> AbstractContextManager[None]:
        """Kernels and new streams use the current device, which in this thread need not be the model's."""
        device = self.lm.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _operations(self, cache: KVCache | None = None) -> Ops:
        if self.twin:
            return TorchOps(cache.capacity if cache else 0)
        if self._ops is None:
            from emu_cog.ops.triton_ops import TritonOps

            started = time.perf_counter()
            self._ops, found = TritonOps.autotuned(self.weights, self.lm.device)
            log.info("kernels autotuned in %.1f s: %s", time.perf_counter() - started, "; ".join(found))
        return self._ops
