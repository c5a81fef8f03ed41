"""Many sequences at once: submissions in, events out. Sees tensors and the image grammar, never text or files.

One thread, the engine's, uses the device. In rounds it admits what fits, queues one chunk of one waiting prompt, and
takes up to ROUND steps of all sequences together, or AHEAD; then it looks at what the steps have made. Whoever submits
waits for events in a thread of its own. Nothing that a sequence computes depends on what else is in progress.
"""

from __future__ import annotations

import atexit
import contextvars
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

from emu_cog.engine.runner import ModelRunner
from emu_cog.engine.scheduler import Prompt, Scheduler
from emu_cog.engine.sequence import (
    Choice,
    Draw,
    Ended,
    EngineRequest,
    Event,
    Feed,
    GenerationConfig,
    Prefilled,
    SequenceState,
    Stats,
    Tokens,
    Trace,
    choose,
)
from emu_cog.engine.window import best_width, expected_tokens
from emu_cog.model.device import DeviceTimer
from emu_cog.model.qwen3 import Chunk
from emu_cog.ops.sampling import probabilities
from emu_cog.request import Sampling

ROUND = 8
"""Steps between two looks at the submissions, cancellations and tokens: a fifth of a second at 34 B on an H100."""
AHEAD = 4
"""Steps that are queued before the tokens of those before are read, where the host knows what steps make: so the device
doesn't wait while the host reads. Together with them no more than ROUND are on their way."""
PREFILL_CHUNK = 2048
"""Prompt tokens per pass: on an H200 the products run at 780 TFLOP/s from 1024 on; 0.2 s at 34 B."""
LONG_PROMPT, LONG_CHUNK = 8192, 1536
"""Fewer for streams of more tokens, whose attention counts: three photos made running pictures wait for 0.36 s."""
TICK = 0.1
T = TypeVar("T")


class Submission:
    """Outputs of one request in the engine. `events` may be read by one thread, `cancel` called by any."""

    def __init__(self, sequences: int) -> None:
        self._queue: SimpleQueue[Event | BaseException] = SimpleQueue()
        self.cancelled = False
        self.left = sequences
        """Outputs that have not ended."""
        self.stats = Stats()
        self.decoding_since: float | None = None
        self.engine: Engine | None = None
        """Kept until this has ended, whoever else has let it go."""

    def events(self, *, waiting: Callable[[], None] | None = None) -> Generator[Event, None, None]:
        """Yield the events as they happen, Stats last, or none where it was cancelled. Raises what kept the engine
        from going on with this submission; leaving early cancels it. `waiting` is called every TICK seconds in which
        nothing happens."""
        try:
            while True:
                try:
                    event = self._queue.get(timeout=TICK)
                except Empty:
                    if waiting:
                        waiting()
                    if self.cancelled:
                        return
                    continue
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Stats):
                    return
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Let its sequences go at the next look; nothing happens where they have ended."""
        self.cancelled = True
        self.engine = None

    def put(self, event: Event | BaseException) -> None:
        self._queue.put(event)
        if isinstance(event, Stats | BaseException):
            self.engine = None


class Engine:
    """Generates for any number of submissions, side by side as far as `runner` has room."""

    def __init__(self, runner: ModelRunner, *, decoding: str = "auto") -> None:
        self.decoding = decoding
        self._last_width = 1
        """Tokens of each picture that the last step drew."""
        self.lm, self.runner, self.ids = runner.lm, runner, runner.lm.ids
        assert self.lm.context <= runner.tokens, "the cache must hold the longest sequence"
        self.scheduler = Scheduler(runner.cache, slots=runner.slots, context=self.lm.context)
        self._new: deque[list[_Entry]] = deque()
        self._calls: deque[tuple[Callable[[], None], Future[Any]]] = deque()
        self._entries: list[_Entry] = []
        self._looked: _Look | None = None
        """Tokens that are still to be shown."""
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._work = threading.Event()
        """Set when there is something to do; and when nobody uses the engine any more, so that its thread ends."""
        self._closing = False
        self._why = "the process is about to end"
        weakref.finalize(self, self._work.set).atexit = False
        # A thread that still computes while the interpreter ends can crash it.
        closer = weakref.WeakMethod(self.close)
        atexit.register(lambda: (close := closer()) and close())

    # -- 1. from any thread ----------------------------------------------------------------------------------

    def submit(
        self, requests: Sequence[EngineRequest], config: GenerationConfig, *, trace: Trace | None = None
    ) -> Submission:
        """Queue the outputs of one request. Equal prompts are read once.

        `trace(kind, probs)` is called with each sampled distribution, in the engine's thread: kind "text", "digit" or
        "visual", probs (1, V) over the ids legal there (or the ten digits).
        """
        submission = Submission(len(requests))
        submission.engine = self
        prompts: dict[tuple[tuple[int, ...], tuple[int, ...]], Prompt] = {}
        entries = []
        for index, request in enumerate(requests):
            key = request.conditional, request.unconditional
            if key not in prompts:
                long = max(map(len, key)) > LONG_PROMPT
                prompts[key] = Prompt(*key, chunk=LONG_CHUNK if long else PREFILL_CHUNK)
            state = SequenceState(index=index, request=request, config=config, emit=submission.put, trace=trace)
            entries.append(_Entry(state, prompts[key], submission))
        with self._lock:
            self._new.append(entries)
            self._start()
        return submission

    def generate(
        self, requests: Sequence[EngineRequest], config: GenerationConfig, *, trace: Trace | None = None
    ) -> Generator[Event, None, None]:
        """Submit, and yield the events; closing the iterator cancels."""
        return self.submit(requests, config, trace=trace).events()

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` in the engine's thread between two rounds, and return what it returns: for other work on the
        device. Its log lines belong to the caller's context."""
        context, future = contextvars.copy_context(), Future[T]()
        with self._lock:
            self._calls.append((lambda: context.run(_settle, future, function), future))
            self._start()
        return future.result()

    def close(self) -> None:
        """Stop the engine's thread after its round. What is in progress gets RuntimeError."""
        with self._lock:
            self._closing, thread = True, self._thread
            self._work.set()
        if thread:
            thread.join()

    def _start(self) -> None:
        """Wake the thread; start it if there is none."""
        if self._closing:
            raise RuntimeError(f"the engine is closed: {self._why}")
        if self._thread is None:
            arguments = weakref.ref(self), self._work
            self._thread = threading.Thread(target=_serve, args=arguments, name="emu-engine", daemon=True)
            self._thread.start()
        self._work.set()

    # -- 2. the engine's thread ------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self) -> bool:
        """Rounds until nothing is left to do. In the engine's thread. False once the engine is closed."""
        if self.lm.device.type == "cuda":
            torch.cuda.set_device(self.lm.device)  # a thread's own; kernels are launched there
        while True:
            with self._lock:
                new, calls = list(self._new), list(self._calls)
                self._new.clear()
                self._calls.clear()
                for entry in (entry for entries in new for entry in entries):
                    self._entries.append(entry)
                    self.scheduler.add(entry.state, entry.prompt)
                if self._closing:
                    for _, future in calls:
                        future.cancel()
                    break
                if not (calls or self._entries):
                    return True
            for run, _ in calls:
                run()
            try:
                self._round()
            except BaseException as error:  # of unknown reach: nothing in progress can be trusted any more
                self._looked = None
                try:
                    for submission in {entry.submission for entry in self._entries}:
                        self._fail(submission, error)
                except BaseException:  # not even the device's memory can be written
                    self._end(error)
                    return False
        for submission in {entry.submission for entry in self._entries}:
            self._fail(submission, RuntimeError("the engine was closed"))
        return False

    def _end(self, error: BaseException) -> None:
        """Nothing can be computed any more: whoever waits gets `error`."""
        with self._lock:
            self._closing = True
            self._why = (
                f"an error that it can't recover from ({type(error).__name__}: {error}): start the program again"
            )
            entries = [*self._entries, *(entry for entries in self._new for entry in entries)]
            calls = list(self._calls)
            for waiting in (self._entries, self._new, self._calls):
                waiting.clear()
        for submission in {entry.submission for entry in entries}:
            submission.put(error)
        for _, future in calls:
            future.set_exception(error)

    def _round(self) -> None:
        # 1. Who leaves, who comes.
        for submission in {entry.submission for entry in self._entries if entry.submission.cancelled}:
            self._drop(submission)
        self.scheduler.round()
        admitted = {id(s) for s, _ in self.scheduler.admit()}
        if self._entries and not self.scheduler.running:
            raise RuntimeError("a sequence waits for memory that nobody uses")  # can't happen: submit checks
        for entry in list(self._entries):
            if id(entry.state) in admitted and not entry.gone:
                self.runner.begin(entry.state)
                if not entry.prompt.unread:
                    self._begin(entry)
        # 2. A chunk of the first prompt that is not read.
        if self.scheduler.prompts:
            self._read(self.scheduler.prompts[0])
        # 3. Steps.
        for number in range(1, ROUND + 1):
            if not self._step() or (number == AHEAD and self._foreseen and not self.scheduler.prompts):
                break
        self._look()

    def _read(self, prompt: Prompt) -> None:
        """Queue the next chunk of a prompt; after the last, its outputs begin.

        The device never waits for the host between two chunks: one is queued while it reads the one before. Not more,
        so that it is soon free after a cancel.
        """
        chunk, timer = prompt.chunks[prompt.read], DeviceTimer(self.lm.device)
        try:
            last = self.runner.feed(
                [Chunk(prompt.streams[i][begin:end], begin, prompt.pages[i]) for i, begin, end in chunk]
            )
        except torch.OutOfMemoryError:
            tokens = sum(map(len, prompt.streams))
            self._out_of_memory(
                next(entry.submission for entry in self._entries if entry.prompt is prompt),
                f"a prompt of {tokens} tokens was read",
            )
            return
        timer.stop()
        prompt.timers.append(timer)
        prompt.read += 1
        for (stream, _, end), hidden in zip(chunk, last, strict=True):
            if end == len(prompt.streams[stream]):
                prompt.last[stream] = hidden
        if prompt.unread:
            if len(prompt.timers) > 1:
                prompt.timers[-2].wait()
        else:
            self.scheduler.prompts.remove(prompt)
            for entry in list(self._entries):
                if entry.prompt is prompt and entry.state.slot >= 0 and not entry.gone:
                    self._begin(entry)

    def _begin(self, entry: _Entry) -> None:
        """Start the answer of an output whose prompt is read."""
        s, submission, prompt = entry.state, entry.submission, entry.prompt
        prompt.begin(self.runner.cache, s)
        self.runner.place(s)
        submission.stats.prefill_seconds += sum(timer.seconds() for timer in prompt.timers)
        prompt.timers.clear()
        if submission.decoding_since is None:
            submission.decoding_since = time.perf_counter()
        submission.put(Prefilled(s.index))
        entry.answer = self.runner.answer(s, prompt.last)
        self._go_on(entry, None)

    def _step(self) -> bool:
        """One step of all sequences that can take one; False where none can, or where the host has to look first."""
        ready = []
        for entry in self._entries:
            if entry.answer and entry.state.doing and self._prepared(entry):
                ready.append(entry)
        if not ready:
            return False
        sequences = [entry.state for entry in ready]
        self._last_width = width = self._width(sequences)
        try:
            hidden = self.runner.step(sequences, width)
        except torch.OutOfMemoryError:  # before the state was moved on: the others can go on
            self._out_of_memory(ready[-1].submission, f"{len(ready)} outputs were generated side by side")
            return False
        for submission in {entry.submission for entry in ready}:
            submission.stats.steps += 1
        for submission in {entry.submission for entry in ready if isinstance(entry.state.doing, Draw)}:
            submission.stats.passes += 1
        reading = [i for i, s in enumerate(sequences) if isinstance(s.doing, Feed) and s.doing.read]
        choices = dict(zip(reading, self._choose([sequences[i] for i in reading], hidden[reading]), strict=True))
        drawing = [i for i, s in enumerate(sequences) if isinstance(s.doing, Draw)]
        for i, entry in enumerate(ready):
            s = entry.state
            if entry.gone:  # another output of its submission has failed
                continue
            if isinstance(s.doing, Feed):
                s.lengths[0] += 1
                s.lengths[1] += s.doing.both
                self._go_on(entry, choices.get(i))
            elif isinstance(s.doing, Draw):
                if s.trace and not s.forced:
                    try:
                        self._trace_picture(s, s.trace, i if self.runner.captured else drawing.index(i))
                    except Exception as error:
                        self._fail(entry.submission, error)
                        continue
                if width == 1 and not s.unread:
                    s.move(1)
                else:
                    s.unread += 1
        pictures = [sequences[i] for i in drawing]
        if not self.runner.captured:
            self._catch_up(pictures)
        return not any(self._likely_made(s) for s in pictures)

    def _choose(self, sequences: Sequence[SequenceState], hidden: Tensor) -> list[Choice]:
        """What each sequence that reads text logits samples after its hidden state (n, hidden)."""
        kinds = [s.doing.read for s in sequences if isinstance(s.doing, Feed) and s.doing.read]
        return choose(sequences, kinds, self.runner.text_logits(hidden), self.ids) if sequences else []

    def _width(self, sequences: Sequence[SequenceState]) -> int:
        """Tokens of each picture that the next step draws. A trace is called with every distribution, one by one."""
        drawing = [s for s in sequences if isinstance(s.doing, Draw)]
        if self.decoding == "sequential" or not drawing or any(s.trace for s in drawing):
            return 1
        seconds = self.runner.seconds(len(sequences))
        if self.decoding == "parallel":
            seconds = {width: s for width, s in seconds.items() if width > 1} or seconds
        return best_width(seconds, [s.acceptance.chance for s in drawing])

    def _catch_up(self, sequences: Sequence[SequenceState]) -> None:
        """Read how far the pictures have come. How many tokens their last passes kept, only the device knows."""
        unread = [s for s in sequences if s.unread]
        for s, made in zip(unread, self.runner.made(unread) if unread else (), strict=True):
            if isinstance(s.doing, Draw) and made < s.doing.total:  # the last pass is cut short
                s.acceptance.add(made - s.made, passes=s.unread, width=self._last_width)
            s.move(made - s.made)
            s.unread = 0

    def _likely_made(self, s: SequenceState) -> bool:
        """Whether the picture of `s` is complete, or should be by the passes that the host has not read."""
        if not isinstance(s.doing, Draw):
            return False
        likely = s.made + s.unread * expected_tokens(s.acceptance.chance, self._last_width)
        return likely >= s.doing.total

    def _trace_picture(self, s: SequenceState, trace: Trace, row: int) -> None:
        filters = Sampling(top_k=s.config.image.top_k, top_p=s.config.image.top_p)
        for scores in self.runner.scores(row).split(1):
            trace("visual", probabilities(scores, filters))

    def _prepared(self, entry: _Entry) -> bool:
        """Whether the sequence has the pages for what it does next."""
        s = entry.state
        assert s.doing is not None
        if s.opened:
            return True
        held = [len(pages) for pages in s.pages]
        if not self.scheduler.grow(s, s.doing.room):
            return False
        if [len(pages) for pages in s.pages] != held:
            self.runner.place(s)
        if isinstance(s.doing, Draw):
            self.runner.open(s, s.doing)
            s.opened = True
        return True

    @property
    def _foreseen(self) -> bool:
        """Whether the host knows what the queued steps make without asking the device, and nothing is complete: then it
        may read their tokens while the device goes on."""
        drawing = [entry.state for entry in self._entries if isinstance(entry.state.doing, Draw)]
        known = drawing and not any(s.unread or self._likely_made(s) for s in drawing)
        return self.runner.captured and bool(known)

    def _look(self) -> None:
        """Read what the pictures in progress have made; go on with those that are complete. What the host has foreseen
        is shown by the next look."""
        foreseen = self._foreseen
        self._catch_up([entry.state for entry in self._entries])
        drawing = [e for e in self._entries if isinstance(e.state.doing, Draw) and e.state.made > e.seen]
        before, self._looked = self._looked, None
        if drawing:
            read = self.runner.read([(e.state, e.seen) for e in drawing])
            self._looked = _Look([(e, e.state.made) for e in drawing], read)
            for entry in drawing:
                entry.seen = entry.state.made
        if before:
            self._show(before)
        if self._looked and not foreseen:
            now, self._looked = self._looked, None
            self._show(now)

    def _show(self, look: _Look) -> None:
        for (entry, made), ids in zip(look.entries, look.read(), strict=True):
            s = entry.state
            if entry.gone:
                continue
            assert isinstance(s.doing, Draw)
            s.sampled += sum(token >= self.ids.visual for token in ids)
            entry.submission.put(Tokens(s.index, ids, s.doing.ahead(made)))
            if made == s.doing.total:
                entry.seen = s.made = 0
                s.opened = False
                self._go_on(entry, None)

    def _go_on(self, entry: _Entry, choice: Choice | None) -> None:
        """Let the answer choose what it does next, or end."""
        s, submission = entry.state, entry.submission
        assert entry.answer is not None
        try:
            s.doing = entry.answer.send(choice)
        except StopIteration as stop:
            s.doing = None
            submission.put(Ended(s.index, stop.value, s.sampled))
            self._remove(entry)
            submission.stats.sampled += s.sampled
            submission.left -= 1
            if not submission.left:
                assert submission.decoding_since is not None
                submission.stats.decode_seconds = time.perf_counter() - submission.decoding_since
                submission.put(submission.stats)
        except Exception as error:  # a trace's, for example: it concerns this submission alone
            s.doing = None
            self._fail(submission, error)

    # -- 3. endings ------------------------------------------------------------------------------------------

    def _remove(self, entry: _Entry) -> None:
        if entry.state.slot >= 0:
            self.runner.end(entry.state)
        self.scheduler.remove(entry.state, entry.prompt)
        self._entries.remove(entry)
        entry.gone = True

    def _drop(self, submission: Submission) -> None:
        for entry in [entry for entry in self._entries if entry.submission is submission]:
            self._remove(entry)

    def _fail(self, submission: Submission, error: BaseException) -> None:
        submission.put(error)
        self._drop(submission)

    def _out_of_memory(self, submission: Submission, when: str) -> None:
        """Let the submission that did not fit go, so that the others can go on."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._fail(
            submission,
            RuntimeError(
                f"memory ran out while {when}: try again later, or set EMU_MAX_OUTPUTS or EMU_MAX_CONTEXT lower"
            ),
        )


class _Entry:
    """One output in the engine."""

    def __init__(self, state: SequenceState, prompt: Prompt, submission: Submission) -> None:
        self.state, self.prompt, self.submission = state, prompt, submission
        self.answer: Generator[Feed | Draw, Choice | None, Any] | None = None
        self.seen = 0
        """Tokens of the image in progress that the host has read, or is about to."""
        self.gone = False
        """Whether it has ended, in any way: loops over entries meet some that ended in the same loop."""


@dataclass(frozen=True)
class _Look:
    """Tokens on their way to the host: of each entry up to those `made`."""

    entries: list[tuple[_Entry, int]]
    read: Callable[[], list[tuple[int, ...]]]


def _serve(engine: weakref.ref[Engine], work: threading.Event) -> None:
    """The engine's thread, one for all requests: cuDNN keeps the plans of its convolutions by thread.

    It holds the engine only while there is work, so that one that nobody uses is freed, and its thread ends.
    """
    while work.wait():
        work.clear()
        if (this := engine()) is None or not this.run():
            return
        del this


def _settle(future: Future[T], function: Callable[[], T]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
