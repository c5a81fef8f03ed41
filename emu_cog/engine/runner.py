"""Forward passes on the device: prompts as they come, steps captured once as CUDA graphs and replayed.

A captured graph holds addresses and launches, nothing else. Tokens, positions, block tables, guidance, filters, grammar
and random numbers are read from device memory by slot, so any sequences replay the same graph: one per number of
sequences, rounded up, and kind of step. Without CUDA the same step runs in plain torch.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from emu_cog.engine.sequence import LARGEST, Draw, Feed, SequenceState
from emu_cog.log import log
from emu_cog.model.kv_cache import KVCache
from emu_cog.model.qwen3 import Chunk, LanguageModel
from emu_cog.ops.autotune import KernelBuildError
from emu_cog.ops.interface import MAX_ROWS, Batch, SlotState, Span, pages_for
from emu_cog.ops.linear import CPU_BLOCK, CPU_ROWS
from emu_cog.ops.reference import TorchOps, advance
from emu_cog.prompt.tokens import body_length

MAX_SEQUENCES = MAX_ROWS // 2
"""Sequences of one step: two streams each."""
MAX_STEPS = body_length(*LARGEST)
"""Tokens of the largest image that two-digit sizes allow."""


def why_eager(lm: LanguageModel, *, compile: bool) -> str | None:
    """Why the steps of `lm` can't be captured as CUDA graphs, or None. The only condition of the fast path."""
    if not compile:
        return "EMU_COMPILE=0"
    if lm.device.type != "cuda":
        return f"the device is {lm.device.type}"
    if len(set(lm.devices)) > 1:
        return "the layers are spread over several devices"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    dim = lm.config.head_dim
    if dim < 16 or dim & (dim - 1):
        return f"heads of {dim} channels: the kernels need a power of two from 16"
    return None


@dataclass(frozen=True)
class _Captured:
    """A step for a fixed number of sequences: write the slots, replay, read the hidden states (2 sequences, hidden)."""

    slots: Tensor
    hidden: Tensor
    replay: Callable[[], None]


class ModelRunner:
    """Runs the passes of up to `slots` sequences of `lm`, over a cache of `tokens` tokens of both streams."""

    def __init__(self, lm: LanguageModel, *, slots: int, tokens: int) -> None:
        assert slots <= MAX_SEQUENCES
        self.lm, self.slots, self.tokens = lm, slots, tokens
        self.captured = False
        """Whether steps are captured as CUDA graphs, over the kernels."""
        # Both streams end in a page that is not full, and so may their prompts.
        self.cache = KVCache(lm.config, pages=1 + 2 * (pages_for(tokens) + 2), dtype=lm.dtype, devices=lm.devices)
        self.state = SlotState.empty(
            slots,
            pages=pages_for(lm.context) + 1,
            steps=MAX_STEPS,
            vocabulary=lm.ids.visual_count,
            device=lm.device,
        )
        self.capture_seconds = 0.0
        self._graphs: dict[tuple[int, bool, bool], _Captured] = {}
        self._written: dict[int, tuple[int, ...]] = {}
        self._pool: Any = None

    @classmethod
    def best(cls, lm: LanguageModel, *, slots: int, tokens: int, compile: bool) -> ModelRunner:
        """With captured steps where they can be had; the log says why not."""
        runner = cls(lm, slots=slots, tokens=tokens)
        if reason := why_eager(lm, compile=compile):
            log.info("steps run in plain PyTorch: %s", reason)
            return runner
        started = time.perf_counter()
        try:
            runner.build_kernels()
            log.info("kernels ready in %.1f s", time.perf_counter() - started)
        except KernelBuildError as error:
            log.warning("steps run in plain PyTorch: the kernels can't be built here: %s", error)
        return runner

    # -- 1. sequences come and go ----------------------------------------------------------------------------

    def begin(self, s: SequenceState) -> None:
        """Write the parameters of `s` to its slot."""
        state, config, visual = self.state, s.config, self.lm.ids.visual_count
        top_k = config.image.top_k
        state.total[s.slot] = 0
        state.cfg_scale[s.slot] = config.cfg_scale
        state.temperature[s.slot] = config.image.temperature
        state.top_k[s.slot] = top_k if 0 < top_k < visual else visual
        state.top_p[s.slot] = config.image.top_p

    def open(self, s: SequenceState, draw: Draw) -> None:
        """Prepare the steps of an image: IMG is fed by the first of them."""
        state, (rows, columns), slot = self.state, draw.size, s.slot
        if draw.total > state.out.shape[1]:
            self._widen(draw.total)
        numbers = s.uniforms.take(s.sampled, rows * columns)
        state.uniform[slot, : len(numbers)] = numbers.to(state.uniform.device)
        state.columns[slot], state.total[slot], state.step[slot] = columns, draw.total, 0
        self._write([(s, self.lm.ids.img)])

    def place(self, s: SequenceState) -> None:
        """Write the block tables of `s`, after it has taken pages."""
        for stream, pages in enumerate(s.pages):
            self.state.tables[2 * s.slot + stream, : len(pages)] = torch.tensor(pages, dtype=torch.int32)

    def end(self, s: SequenceState) -> None:
        """Nothing of `s` is made or written any more."""
        self.state.total[s.slot] = 0
        self.state.tables[2 * s.slot : 2 * s.slot + 2] = 0
        self.state.position[2 * s.slot : 2 * s.slot + 2] = 0

    # -- 2. one step of all sequences ------------------------------------------------------------------------

    def step(self, sequences: Sequence[SequenceState]) -> Tensor:
        """Feed each sequence what it is doing: a Feed's token, or the last token of its image, whose next is chosen.

        Returns the conditional stream's hidden states (sequences, hidden). Captured steps that go on with the same
        images synchronize with no device.
        """
        fed = [(s, s.doing.token) for s in sequences if isinstance(s.doing, Feed)]
        if fed:
            self._write(fed)
        drawing = [s for s in sequences if isinstance(s.doing, Draw)]
        nucleus = any(s.config.image.top_p < 1.0 for s in drawing)
        with self._current_device():
            if self.captured:
                return self._replay(sequences, bool(drawing), nucleus)
            return self._eager(sequences, drawing)

    def read(self, begun: Sequence[tuple[SequenceState, int]]) -> list[tuple[int, ...]]:
        """The image tokens of each sequence from a given one to the last made. Synchronizes with the device."""
        parts = [self.state.out[s.slot, begin : s.made] for s, begin in begun]
        tokens = torch.cat(parts).tolist()
        at, rows = 0, []
        for part in parts:
            rows.append(tuple(tokens[at : at + len(part)]))
            at += len(part)
        return rows

    def scores(self, row: int) -> Tensor:
        """What the picture of the last step's sequence `row` was sampled from: (1, V), guided and divided by the
        temperature."""
        return self.state.scores[row : row + 1]

    def _write(self, fed: Sequence[tuple[SequenceState, int]]) -> None:
        """Write the tokens that sequences are fed, and where they are stored."""
        streams = [2 * s.slot + stream for s, _ in fed for stream in range(2)]
        numbers = [[token for _, token in fed for _ in range(2)], [n for s, _ in fed for n in s.lengths], streams]
        tokens, positions, where = torch.tensor(numbers).to(self.lm.device)
        self.state.token[where] = tokens
        self.state.position[where] = positions

    def _widen(self, steps: int) -> None:
        """Room for larger images than sizes of two digits allow: library callers may ask for them."""
        self._graphs.clear()  # those hold the addresses of the tables being replaced
        self._written.clear()
        for name in ("uniform", "out"):
            old = getattr(self.state, name)
            new = old.new_zeros((len(old), steps))
            new[:, : old.shape[1]] = old
            setattr(self.state, name, new)

    # -- 3. in plain torch -----------------------------------------------------------------------------------

    def _eager(self, sequences: Sequence[SequenceState], drawing: Sequence[SequenceState]) -> Tensor:
        """Passes in which products have a fixed number of rows: no result depends on the number of sequences."""
        spans = [
            Span(2 * s.slot + stream, s.lengths[stream], 1)
            for s in sequences
            for stream in range(2 if isinstance(s.doing, Draw) or (s.doing and s.doing.both) else 1)
        ]
        most, block = (CPU_ROWS, CPU_BLOCK) if self.lm.device.type == "cpu" else (MAX_ROWS, MAX_ROWS)
        hidden = torch.cat([self._pass(spans[at : at + most], block) for at in range(0, len(spans), most)])
        first = [i for i, span in enumerate(spans) if span.stream % 2 == 0]
        if drawing:
            pairs = [i + stream for i, s in zip(first, sequences, strict=True) if s in drawing for stream in range(2)]
            slots = torch.tensor([s.slot for s in drawing], device=self.lm.device)
            self._choose(hidden[pairs], slots, drawing, block)
        return hidden[first]

    def _pass(self, spans: Sequence[Span], block: int) -> Tensor:
        """One pass over a token of each stream, padded to a multiple of `block` rows."""
        padding = [2 * self.state.padding] * (-len(spans) % block)
        streams = torch.tensor([span.stream for span in spans] + padding, device=self.lm.device)
        batch = Batch(
            tokens=self.state.token[streams],
            positions=torch.tensor([span.start for span in spans] + [0] * len(padding), device=self.lm.device),
            streams=streams,
            tables=self.state.tables,
            spans=tuple(spans),
        )
        return self.lm.forward(batch, self.cache)[: len(spans)]

    def _choose(self, hidden: Tensor, slots: Tensor, drawing: Sequence[SequenceState], block: int) -> None:
        """The pictures' next tokens. Where the grammar forces all of them, nothing is computed."""
        ids = self.lm.ids
        if all(s.forced for s in drawing):
            advance(self.state, slots, torch.zeros_like(slots), ids)
            return
        padded = F.pad(hidden, (0, 0, 0, -len(hidden) % block))
        logits = torch.cat([self.lm.visual_logits(part) for part in padded.split(block)])
        self.lm.ops.sample(logits[: len(hidden)], self.state, slots, ids, nucleus=True)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """`LanguageModel.text_logits`, row by row as if each were alone."""
        if self.captured:
            with self._current_device():
                return self.lm.text_logits(hidden)
        return torch.cat([self.lm.text_logits(row) for row in hidden.split(1)])

    # -- 4. kernels and capture ------------------------------------------------------------------------------

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture the steps for every number of sequences."""
        for size in _sizes(self.slots):
            for drawing in (True, False):
                self._graph(size, drawing, False)

    @torch.inference_mode()
    def build_kernels(self) -> None:
        """Take the kernels: autotune, and run each once. KernelBuildError where one can't be built: no request is to
        find out."""
        from emu_cog.ops.triton_ops import TritonOps, build_errors

        with self._current_device(), build_errors(self.lm.device):
            started = time.perf_counter()
            ops, found = TritonOps.autotuned(self.lm.weights, self.lm.device)
            log.info("kernels autotuned in %.1f s: %s", time.perf_counter() - started, "; ".join(found))
            self.lm.ops = ops
            try:
                slots = torch.full((1,), self.state.padding, device=self.lm.device)
                self.lm.feed(self.cache, [Chunk([0] * (MAX_ROWS + 1), 0, [0, 0])])
                self.lm.text_logits(self._device_step(slots, True, False)[:1])
                if self.lm.device.type == "cuda":
                    torch.cuda.synchronize(self.lm.device)
            except BaseException:
                self.lm.ops = TorchOps()
                raise
        self.captured = True

    def _device_step(self, slots: Tensor, drawing: bool, nucleus: bool) -> Tensor:
        """A step that reads everything from the device: the hidden states (2 slots, hidden)."""
        state = self.state
        streams = torch.stack([2 * slots, 2 * slots + 1], dim=1).flatten()
        batch = Batch(
            tokens=state.token[streams], positions=state.position[streams], streams=streams, tables=state.tables
        )
        hidden = self.lm.forward(batch, self.cache)
        if drawing:
            self.lm.ops.sample(self.lm.visual_logits(hidden), state, slots, self.lm.ids, nucleus=nucleus)
        return hidden

    def _replay(self, sequences: Sequence[SequenceState], drawing: bool, nucleus: bool) -> Tensor:
        graph = self._graph(len(sequences), drawing, nucleus)
        slots = [s.slot for s in sequences] + [self.state.padding] * (len(graph.slots) - len(sequences))
        if self._written.get(id(graph)) != tuple(slots):
            graph.slots.copy_(torch.tensor(slots))
            self._written[id(graph)] = tuple(slots)
        graph.replay()
        return graph.hidden[: 2 * len(sequences) : 2]

    def _graph(self, sequences: int, drawing: bool, nucleus: bool) -> _Captured:
        size = next(size for size in _sizes(self.slots) if size >= sequences)
        key = size, drawing, drawing and nucleus
        if key not in self._graphs:
            self._graphs[key] = self._capture(*key)
        return self._graphs[key]

    def _capture(self, size: int, drawing: bool, nucleus: bool) -> _Captured:
        """Capturing needs one ordinary run first, which compiles the kernels. It steps the padding alone."""
        started, device = time.perf_counter(), self.lm.device
        slots = torch.full((size,), self.state.padding, device=device)
        hidden = torch.zeros((2 * size, self.lm.config.hidden_size), dtype=self.lm.dtype, device=device)

        def step() -> None:
            hidden.copy_(self._device_step(slots, drawing, nucleus))

        with self._current_device():
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
        kind = ("pictures with top-p" if nucleus else "pictures") if drawing else "text"
        log.info("captured %s, %d at once: kernels %.1f s, graph %.1f s", kind, size, built - started, done - built)
        return _Captured(slots, hidden, graph.replay)

    def _current_device(self) -> AbstractContextManager[None]:
        """Kernels and new streams use the current device, which in this thread need not be the model's."""
        device = self.lm.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _sizes(slots: int) -> list[int]:
    """Numbers of sequences that steps are captured for."""
    return [*(size for size in (1, 2, 4, 8, 16) if size < slots), slots]
