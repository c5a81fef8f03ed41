"""The steps that are taken thousands of times, recorded once as CUDA graphs and played back once a token.

A recording holds addresses and launches, nothing else: guidance, temperature, top-k, lengths, forced tokens and random
numbers are read from the device, so that another request plays the same recording. Only another number of rows,
another cache or top-p below 1 (which sorts) makes a new one; the log tells.
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

from emu_cog.config import Sampling, log
from emu_cog.decode import forward, image_step, merge
from emu_cog.decode_ops import ImageState, Ops, TorchOps
from emu_cog.lm import LanguageModel, SlotCache

ROOM = 512
"""Positions beyond the context that a step may write to, though nothing reads them."""
MAX_STEPS = 99 * 100
"""Steps of the largest image that two-digit sizes allow: 99 rows of 99 codes, each with its EOL."""


def why_eager(lm: LanguageModel, *, compile: bool) -> str | None:
    """Why the decode step of `lm` can't be recorded; None where it can. The one condition of the fast path."""
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


def build(lm: LanguageModel, *, compile: bool) -> Steps | None:
    """The fast steps of `lm`, or None, told with the reason, where the engine has to go through the modules."""
    if reason := why_eager(lm, compile=compile):
        log.info("decoding goes through the modules, step by step: %s", reason)
        return None
    started = time.perf_counter()
    steps = Steps(lm)
    log.info("decoding goes through recorded steps; weights merged in %.1f s", time.perf_counter() - started)
    return steps


class Steps:
    """Image steps and text steps over one model's merged weights.

    With `twin` the same steps run in plain torch and nothing is recorded: any device, for tests.
    """

    MAX_ROWS = 16
    """Rows a step can take; the engine makes larger batches through the modules."""

    def __init__(self, lm: LanguageModel, *, twin: bool = False) -> None:
        self.lm, self.twin = lm, twin
        ids = lm.ids
        # Caches are rounded up beyond the context, and rows that have ended are fed at their end: angles for those too.
        self.weights = merge(lm.model, visual=ids.visual, vocabulary=ids.vocab_size, context=lm.context + ROOM)
        self.recorded_seconds = 0.0
        self._plays: dict[str, Callable[[], None]] = {}  # over the cache of `_version`
        self._version: object = None
        self._ops: Ops | None = None
        self._images: dict[int, ImageState] = {}
        self._texts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._pool: Any = None

    # -- 1. images -------------------------------------------------------------------------------------------

    def image(
        self,
        cache: SlotCache,
        *,
        forced: Tensor,
        uniform: Tensor,
        advance: Tensor,
        lengths: Sequence[int],
        guidance: float,
        sampling: Sampling,
    ) -> tuple[ImageState, Callable[[], None]]:
        """Make ready for images: (steps, lanes) tables as in `image_loop.Schedule`, IMG to be fed at `lengths`.

        Returns the state, whose `out` fills up row by row, and the function that takes one step without waiting
        for the device.
        """
        lanes, device = forced.shape[1], self.lm.device
        if lanes not in self._images or len(self._images[lanes].forced) < len(forced):
            self._forget("image")  # recorded over the tables that go
            steps = max(MAX_STEPS, len(forced))
            self._images[lanes] = ImageState.empty(lanes, steps, self.lm.ids.visual_count, device)
        state = self._images[lanes]
        # With top-p the filters are part of the recording; without, they are numbers that it reads.
        static = replace(sampling, temperature=1.0) if sampling.top_p < 1.0 else Sampling()

        def step() -> None:
            image_step(self._operations(cache), self.weights, state, cache.keys, cache.values, static)

        state.step.zero_()  # recording takes steps too: they must stay within the tables
        what = "image" if static.top_p == 1.0 else f"image, top-k {static.top_k}, top-p {static.top_p!r}"
        if what not in self._plays:
            self._forget("image, ")  # of filters that anyone may choose, one recording at a time is kept
        play = self._recorded(cache, what, step, state.position)
        count, size = len(forced), self.lm.ids.visual_count
        state.forced[:count].copy_(forced)
        state.uniform[:count].copy_(uniform)
        state.advance[:count].copy_(advance)
        state.token.fill_(self.lm.ids.img)
        state.position.copy_(torch.tensor(lengths))
        state.step.zero_()
        state.knobs.copy_(torch.tensor([guidance, sampling.temperature]))
        state.top_k.fill_(sampling.top_k if 0 < sampling.top_k < size else size)
        return state, play

    # -- 2. text ---------------------------------------------------------------------------------------------

    def text(self, cache: SlotCache, tokens: Sequence[int], starts: Sequence[int]) -> Tensor:
        """Feed one token to every row of `cache`, at `starts`; the final hidden states (rows, hidden)."""
        rows, device = cache.rows, self.lm.device
        if rows not in self._texts:
            token, position = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
            hidden = torch.zeros((rows, self.lm.config.hidden_size), dtype=self.lm.dtype, device=device)
            self._texts[rows] = token, position, hidden
        token, position, hidden = self._texts[rows]

        def step() -> None:
            operations = self._operations(cache)
            hidden.copy_(forward(operations, self.weights, token, position, cache.keys, cache.values))

        play = self._recorded(cache, "text", step, position)
        token.copy_(torch.tensor(tokens))
        position.copy_(torch.tensor(starts))
        play()
        return hidden.clone()

    def text_logits(self, hidden: Tensor) -> Tensor:
        """`LanguageModel.text_logits`, each row by itself: no row depends on how many there are."""
        with self._current_device():
            return self._operations().logits(hidden, self.weights.text_head)

    # -- 3. recording ----------------------------------------------------------------------------------------

    def _forget(self, prefix: str) -> None:
        self._plays = {what: play for what, play in self._plays.items() if not what.startswith(prefix)}

    def _recorded(self, cache: SlotCache, what: str, step: Callable[[], None], position: Tensor) -> Callable[[], None]:
        """The function that plays `step` over `cache`: a graph's replay, or in the twin `step` itself."""
        if self.twin:
            return step
        if cache.version is not self._version:
            self._plays.clear()  # those recordings write to a cache that is gone
            self._version = cache.version
        if what not in self._plays:
            # Recording needs one ordinary run before it (kernels are built then). It writes to the last cell of each
            # row, which no row has reached yet and which is written again before anything reads it.
            position.fill_(cache.capacity - 1)
            with self._current_device():
                self._plays[what] = self._record(f"the {what} step of {cache.rows} rows", step)
        return self._plays[what]

    def _record(self, what: str, step: Callable[[], None]) -> Callable[[], None]:
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
        self.recorded_seconds += done - started
        log.info("recorded %s: kernels %.1f s, graph %.1f s", what, built - started, done - built)
        return graph.replay

    def _current_device(self) -> AbstractContextManager[None]:
        """Kernels and new streams go to the current device, which in this thread need not be the model's."""
        device = self.lm.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _operations(self, cache: SlotCache | None = None) -> Ops:
        if self.twin:
            return TorchOps(cache.capacity if cache else 0)
        if self._ops is None:
            from emu_cog.triton_ops import TritonOps

            started = time.perf_counter()
            self._ops, told = TritonOps.tuned(self.weights, self.lm.device)
            log.info("products timed in %.1f s: %s", time.perf_counter() - started, "; ".join(told))
        return self._ops
