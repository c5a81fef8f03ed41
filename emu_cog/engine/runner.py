"""Forward passes on the device: long prompts as they come, short ones and steps as CUDA graphs, captured once.

A captured graph holds addresses and launches, nothing else. Tokens, positions, block tables, guidance, filters, grammar
and seeds are read from device memory by slot, so any sequences replay the same graph: one per number of sequences,
rounded up, width and kind of step. Without CUDA the same step runs in plain torch.

A step of `width` w draws up to w tokens of each picture: it feeds the last one and w - 1 drafts, and keeps what follows
from right drafts. The cache needs no more than that: what drafts have stored is overwritten.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from emu_cog.engine.prefill import CapturedPrompts
from emu_cog.engine.sequence import (
    LARGEST,
    Choice,
    Draw,
    EngineRequest,
    Feed,
    GenerationConfig,
    Reason,
    SequenceState,
    answer,
    choose,
)
from emu_cog.log import log
from emu_cog.model.kv_cache import KVCache
from emu_cog.model.qwen3 import Chunk, LanguageModel
from emu_cog.ops.autotune import KernelBuildError
from emu_cog.ops.interface import MAX_ROWS, Batch, SlotState, Span, pages_for, power_of_two
from emu_cog.ops.linear import CPU_BLOCK, CPU_ROWS
from emu_cog.ops.reference import TorchOps, accept
from emu_cog.prompt.tokens import body_length
from emu_cog.request import Sampling

if TYPE_CHECKING:
    from emu_cog.ops.triton_ops import TritonOps

MAX_SEQUENCES = 32
"""Sequences of one step."""
CPU_SEQUENCES = 8
"""The same on a CPU, by default: what more of them gain is less than what each then waits."""
EAGER_ROWS = 64
"""Rows of every eager pass on a GPU, padding included."""
WIDTHS = (1, 2, 4, 8, 16, 32, 64)
"""Tokens of a picture that a step may draw."""
EIGHT_BIT_ROWS = 64
"""Tokens of the widest pass with 8-bit weights: on an H200 the kernels that unpack them take 14 ms for the 34 B model's
products with 64 tokens, but 40 with 128."""
MEASURE_SECONDS = 2.0
"""For repeated measurements of what eager steps cost."""
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


@dataclass(frozen=True, kw_only=True)
class Step:
    """A kind of step that is captured: up to `width` tokens, or cells, of each picture."""

    width: int
    sampling: bool = True
    """Whether tokens of pictures are sampled; text is sampled from the hidden states that a step returns."""
    feeding: bool = True
    """Whether tokens are fed: none are after a picture's last diagonal."""
    nucleus: bool = False
    """Whether the top-p of some picture is below 1."""

    def __str__(self) -> str:
        kind = "text" if not self.sampling else "pictures" if self.feeding else "ends of pictures"
        return f"{kind} with top-p" if self.nucleus else kind


@dataclass
class _Slots:
    """Which slots the captured steps for a fixed number of sequences read, whatever their width."""

    tensor: Tensor
    written: Sequence[int] = ()

    def write(self, slots: Sequence[int]) -> None:
        """Write `slots`, padded, where they have changed."""
        if slots != self.written:
            self.tensor.copy_(torch.tensor(slots))
            self.written = slots


@dataclass
class _Captured:
    """A step for a fixed number of sequences: write the slots, replay, read the hidden states (2 sequences, hidden) of
    the first token of each stream, where the step leaves any."""

    slots: _Slots
    hidden: Tensor
    replay: Callable[[], None]


class ModelRunner:
    """Runs the passes of up to `slots` sequences of `lm`, over a cache of `tokens` tokens of both streams."""

    pass_rows = MAX_ROWS
    """Rows of the largest captured step."""
    step_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of sequences that steps are captured for, up to the number of slots."""

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
        self._graphs: dict[tuple[int, Step], _Captured] = {}
        self._slots: dict[int, _Slots] = {}
        self._seconds: dict[tuple[int, int], float] = {}
        self._pool: Any = None
        # Where products of more rows would widen 8-bit weights first, the device takes longer than the host.
        most = self.pass_rows if lm.weights.layers[0].qkv.in_words else None
        self.prompts = CapturedPrompts(lm, self.cache, self._record, most=most)
        self._side = torch.cuda.Stream(lm.device) if lm.device.type == "cuda" else None
        """Where steps are captured."""

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

    @property
    def eager_rows(self) -> int:
        """Rows of the largest eager pass of steps."""
        return CPU_ROWS if self.lm.device.type == "cpu" else EAGER_ROWS

    @property
    def eager_block(self) -> int:
        """Of which number every eager pass has a multiple of rows, padding included."""
        return CPU_BLOCK if self.lm.device.type == "cpu" else EAGER_ROWS

    # -- 1. sequences come and go ----------------------------------------------------------------------------

    def feed(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Read chunks of prompts, which fill no pass with others: the hidden states (1, hidden) of each one's last
        token."""
        if self.captured and self.prompts.fit(chunks):
            with self._current_device():
                return self.prompts.read(chunks)
        hidden = self.lm.feed(self.cache, chunks)
        return [part[-1:].clone() for part in hidden.split([len(chunk.tokens) for chunk in chunks])]

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
        state, (_, columns), slot = self.state, draw.size, s.slot
        if draw.total > state.out.shape[1]:
            self._widen(draw.total)
        state.columns[slot], state.total[slot], state.step[slot] = columns, draw.total, 0
        state.seed[slot], state.sampled[slot] = s.request.seed, s.sampled
        ids, place = self.lm.ids, torch.arange(draw.total, device=state.out.device)
        drafts = torch.where(place % (columns + 1) == columns, ids.eol, ids.visual)
        state.out[slot, : draw.total] = torch.where(place == draw.total - 1, ids.eoi, drafts)
        self._write([(s, self.lm.ids.img)])

    def answer(self, s: SequenceState, last: Mapping[int, Tensor]) -> Generator[Feed | Draw, Choice | None, Reason]:
        """What `s` does after its prompts, whose last hidden states (1, hidden) are `last`, by stream."""
        (choice,) = choose([s], ["text"], self.text_logits(last[0]), self.lm.ids)
        return answer(s, choice, self.lm.ids, self.lm.context)

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

    def widths(self, sequences: int) -> list[int]:
        """Widths that steps of so many sequences may have: the drafts fill the rows of a pass, or next to none."""
        size = self._size(sequences)
        if self.captured:
            most = self.pass_rows if self.lm.weights.layers[0].qkv.scale is None else EIGHT_BIT_ROWS
        else:
            most = self.eager_rows
        most //= 2 * size
        return [w for w in WIDTHS if w <= most and (w == 1 or size * w >= 4)]

    def seconds(self, sequences: int) -> dict[int, float]:
        """What a step of so many sequences takes, by width; measured first where it has not been."""
        if not self._seconds:
            self._measure()
        size = self._size(sequences)
        key = {w: (size, w) if self.captured else (1, power_of_two(size * w)) for w in self.widths(sequences)}
        return {w: self._seconds[at] for w, at in key.items() if at in self._seconds} or {1: 1.0}

    def step(self, sequences: Sequence[SequenceState], width: int = 1) -> Tensor:
        """Feed each sequence what it is doing: a Feed's token, or the last token of its image and drafts, after which
        up to `width` are chosen.

        Returns the conditional stream's hidden states (sequences, hidden), those of images after their first token.
        Captured steps that go on with the same images synchronize with no device.
        """
        fed = [(s, s.doing.token) for s in sequences if isinstance(s.doing, Feed)]
        if fed:
            self._write(fed)
        drawing = [s for s in sequences if isinstance(s.doing, Draw)]
        nucleus = any(s.config.image.top_p < 1.0 for s in drawing)
        with self._current_device():
            if self.captured:
                return self._replay(sequences, Step(width=width, sampling=bool(drawing), nucleus=nucleus))
            return self._eager(sequences, drawing, width, nucleus)

    def made(self, sequences: Sequence[SequenceState]) -> list[int]:
        """How many tokens of their images are made. Synchronizes with the device."""
        made: list[int] = self.state.step[torch.tensor([s.slot for s in sequences], device=self.lm.device)].tolist()
        return made

    def read(self, begun: Sequence[tuple[SequenceState, int]]) -> Callable[[], list[tuple[int, ...]]]:
        """The image tokens of each sequence from a given one to the last made: copied behind the steps that are queued,
        and returned by a function that waits for that."""
        parts = [self.state.out[s.slot, begin : s.made] for s, begin in begun]
        counts, copied = [len(part) for part in parts], _copied(torch.cat(parts))

        def rows() -> list[tuple[int, ...]]:
            tokens = iter(copied().tolist())
            return [tuple(islice(tokens, count)) for count in counts]

        return rows

    def scores(self, row: int) -> Tensor:
        """What the picture of sequence `row` of the last step, of width 1, was sampled from: (1, V), guided and divided
        by the temperature."""
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
        self._graphs.clear()  # those hold the addresses of the table being replaced
        old = self.state.out
        self.state.out = F.pad(old, (0, steps - old.shape[1]))

    # -- 3. in plain torch -----------------------------------------------------------------------------------

    def _eager(
        self, sequences: Sequence[SequenceState], drawing: Sequence[SequenceState], width: int, nucleus: bool
    ) -> Tensor:
        """Passes in which products have a fixed number of rows: no result depends on the number of sequences."""
        most = self.eager_rows
        slots = torch.tensor([s.slot for s in sequences], device=self.lm.device)
        rows, spans = [], []  # places in `fed`, and what the host knows of them
        for i, s in enumerate(sequences):
            left = min(width, s.doing.total - s.made) if isinstance(s.doing, Draw) else 1
            for stream in range(1 if isinstance(s.doing, Feed) and not s.doing.both else 2):
                rows += [(2 * i + stream) * width + j for j in range(left)]
                spans += [Span(2 * s.slot + stream, s.lengths[stream] + j, 1) for j in range(left)]
        fed = [x.flatten()[rows] for x in self.state.fed(slots, width)]
        parts = [
            self._pass([x[at : at + most] for x in fed], spans[at : at + most]) for at in range(0, len(spans), most)
        ]
        hidden = parts[0].new_zeros((len(sequences) * 2 * width, parts[0].shape[1]))
        hidden[rows] = torch.cat(parts)
        by_stream = hidden.view(len(sequences), 2 * width, -1)
        if drawing:
            images = [i for i, s in enumerate(sequences) if s in drawing]
            self._choose(by_stream[images].flatten(0, 1), slots[images], drawing, width, nucleus)
        return by_stream[:, 0]

    def _pass(self, fed: Sequence[Tensor], spans: Sequence[Span]) -> Tensor:
        """One pass over tokens, positions and streams, padded."""
        tokens, positions, streams = (F.pad(x, (0, -len(spans) % self.eager_block)) for x in fed)
        streams[len(spans) :] = 2 * self.state.padding
        batch = Batch(tokens=tokens, positions=positions, streams=streams, tables=self.state.tables, spans=tuple(spans))
        return self.lm.forward(batch, self.cache)[: len(spans)]

    def _choose(
        self,
        hidden: Tensor,
        slots: Tensor,
        drawing: Sequence[SequenceState],
        width: int,
        nucleus: bool,
    ) -> None:
        """The pictures' next tokens. Where the grammar forces all of them, nothing is computed."""
        ids, block = self.lm.ids, self.eager_block
        if width == 1 and all(s.forced for s in drawing):
            accept(self.state, slots, torch.zeros_like(slots)[:, None], ids)
            return
        padded = F.pad(hidden, (0, 0, 0, -len(hidden) % block))
        logits = torch.cat([self.lm.visual_logits(part) for part in padded.split(block)])
        self.lm.ops.sample(logits[: len(hidden)], self.state, slots, ids, width=width, nucleus=nucleus)

    def _measure(self) -> None:
        """What steps take, by the number of tokens: the best of three, where a step is slow of one."""
        if self.captured:
            self.warm_up()
            return
        begun, draw, sampling = time.perf_counter(), Draw((1, MAX_ROWS)), Sampling()
        config = GenerationConfig(
            cfg_scale=1.0, image=sampling, text=sampling, size=draw.size, max_new_tokens=None, single_image=True
        )
        request = EngineRequest(conditional=(), unconditional=(), seed=0)
        padding = SequenceState(index=0, request=request, config=config, emit=lambda event: None)
        padding.slot, padding.doing = self.state.padding, draw
        # A token each of several pictures counts as several of one.
        for width in (2**i for i in range(self.widths(1)[-1].bit_length())):
            taken: list[float] = []
            while not taken or (len(taken) < 3 and time.perf_counter() - begun < MEASURE_SECONDS):
                started = time.perf_counter()
                self.step([padding], width)
                self.made([padding])
                taken.append(time.perf_counter() - started)
            self._seconds[1, width] = min(taken)
        log.info(
            "a step takes, by tokens: %s",
            ", ".join(f"{width} {1000 * s:.1f} ms" for (_, width), s in self._seconds.items()),
        )

    def text_logits(self, hidden: Tensor) -> Tensor:
        """`LanguageModel.text_logits`, row by row as if each were alone."""
        if self.captured:
            with self._current_device():
                return self.lm.text_logits(hidden)
        return torch.cat([self.lm.text_logits(row) for row in hidden.split(1)])

    # -- 4. kernels and capture ------------------------------------------------------------------------------

    @torch.inference_mode()
    def warm_up(self, *, several: bool = True) -> None:
        """Capture the steps for every number of sequences, with `several` of every width, and short prompts; measure
        what steps take."""
        for size in self.sizes:
            self._graph(size, Step(width=1, sampling=False))
            for width in self.widths(size) if several else (1,):
                graph = self._graph(size, Step(width=width))
                self._pad_slots(size)
                self._seconds[size, width] = _device_seconds(graph.replay, self.lm.device)
        self._capture_prompts()
        self._log_passes("tokens")

    def _log_passes(self, what: str) -> None:
        taken = ", ".join(f"{size} x {width} {1000 * s:.2f} ms" for (size, width), s in self._seconds.items())
        log.info("a pass takes, by pictures x %s of each: %s", what, taken)

    def _capture_prompts(self) -> None:
        self.prompts.clear()
        for size in self.prompts.sizes:
            self.prompts.capture(size)

    @torch.inference_mode()
    def build_kernels(self) -> None:
        """Take the kernels: autotune, and run each once. KernelBuildError where one can't be built: no request is to
        find out."""
        from emu_cog.ops.triton_ops import TritonOps, build_errors

        with self._current_device(), build_errors(self.lm.device):
            started = time.perf_counter()
            ops, found = TritonOps.autotuned(self.lm.weights, self.lm.device, self.pass_rows)
            log.info("kernels autotuned in %.1f s: %s", time.perf_counter() - started, "; ".join(found))
            self.lm.ops = ops
            try:
                prompt = [0] * (self.pass_rows + 1)  # one that the kernels leave to PyTorch
                self.lm.feed(self.cache, [Chunk(prompt, 0, [0] * pages_for(len(prompt)))])
                self.prompts.clear()
                for size in self.prompts.sizes[:3]:  # up to one whose products are PyTorch's
                    self.prompts.run(size)
                self._run_once(ops)
                if self.lm.device.type == "cuda":
                    torch.cuda.synchronize(self.lm.device)
            except BaseException:
                self.lm.ops = TorchOps()
                raise
        self.captured = True

    def _run_once(self, ops: TritonOps) -> None:
        """Run each kernel of a step once, over the padding, attention in every shape that it has."""
        slots = torch.full((1,), self.state.padding, device=self.lm.device)
        for width in {1, 2, *ops.unlike(WIDTHS[:-1], self.lm.weights.shape, opened=False)}:
            hidden = self._device_step(slots, Step(width=width))
            assert hidden is not None
            self.lm.text_logits(hidden[:1])

    def _device_step(self, slots: Tensor, step: Step) -> Tensor | None:
        """A step that reads everything from the device: the hidden states (2 slots, hidden) of the first tokens."""
        state, width = self.state, step.width
        tokens, positions, streams = (x.flatten() for x in state.fed(slots, width))
        batch = Batch(tokens=tokens, positions=positions, streams=streams, tables=state.tables, width=width)
        hidden = self.lm.forward(batch, self.cache)
        if step.sampling:
            logits = self.lm.visual_logits(hidden)
            self.lm.ops.sample(logits, state, slots, self.lm.ids, width=width, nucleus=step.nucleus)
        return hidden[::width]

    def _replay(self, sequences: Sequence[SequenceState], step: Step) -> Tensor:
        graph, padding = self._graph(len(sequences), step), self.state.padding
        graph.slots.write([s.slot for s in sequences] + [padding] * (len(graph.slots.tensor) - len(sequences)))
        graph.replay()
        return graph.hidden[: 2 * len(sequences) : 2]

    def _size(self, sequences: int) -> int:
        """The number of sequences that a step for so many is captured for."""
        return next(size for size in self.sizes if size >= sequences)

    @property
    def sizes(self) -> list[int]:
        """`step_sizes`, as far as there are slots."""
        return [*(size for size in self.step_sizes if size < self.slots), self.slots]

    def _graph(self, sequences: int, step: Step) -> _Captured:
        key = self._size(sequences), replace(step, nucleus=step.sampling and step.nucleus)
        if key not in self._graphs:
            self._graphs[key] = self._capture(*key)
        return self._graphs[key]

    def _pad_slots(self, size: int) -> _Slots:
        """Write the padding to the slots that steps of `size` sequences read."""
        if size not in self._slots:
            self._slots[size] = _Slots(torch.empty((size,), dtype=torch.int64, device=self.lm.device))
        self._slots[size].write([self.state.padding] * size)
        return self._slots[size]

    def _capture(self, size: int, step: Step) -> _Captured:
        """A step of `size` sequences. Capturing runs it once, over the padding alone."""
        slots = self._pad_slots(size)
        hidden = torch.zeros((2 * size, self.lm.config.hidden_size), dtype=self.lm.dtype, device=self.lm.device)

        def work() -> None:
            found = self._device_step(slots.tensor, step)
            if found is not None:
                hidden.copy_(found)

        return _Captured(slots, hidden, self._record(work, f"{step}, {size} x {step.width}"))

    def _record(self, work: Callable[[], None], name: str) -> Callable[[], None]:
        """Run `work`, which compiles its kernels, and capture it as a CUDA graph; returns the graph's replay."""
        started, device = time.perf_counter(), self.lm.device
        with self._current_device():
            side = self._side
            assert side is not None
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                work()
            torch.cuda.current_stream(device).wait_stream(side)
            torch.cuda.synchronize(device)
            built = time.perf_counter()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                work()
            torch.cuda.synchronize(device)
        done = time.perf_counter()
        self.capture_seconds += done - started
        log.info("captured %s: kernels %.1f s, graph %.1f s", name, built - started, done - built)
        return graph.replay

    def _current_device(self) -> AbstractContextManager[None]:
        """Kernels and new streams use the current device, which in this thread need not be the model's."""
        device = self.lm.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _copied(x: Tensor) -> Callable[[], Tensor]:
    """`x` on its way to the host; a function that waits for it."""
    if not x.is_cuda:
        return lambda: x
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> Tensor:
        done.synchronize()
        return copy

    return wait


def _device_seconds(replay: Callable[[], None], device: torch.device) -> float:
    """The better of two runs, the device's queue empty before and after."""
    taken = []
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        replay()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken)
