"""The decode step, prefill and synchronization, through the engine as requests use it."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from _compare.decoding import draw_step

from _bench import machine
from _bench.report import Report, Row
from _bench.sizes import Size, floor_seconds
from emu_cog.engine.engine import PREFILL_CHUNK, ROUND, Engine, Submission
from emu_cog.engine.runner import MAX_SEQUENCES, ModelRunner
from emu_cog.engine.sequence import (
    Draw,
    EngineRequest,
    GenerationConfig,
    Prefilled,
    SequenceState,
    Stats,
    Tokens,
)
from emu_cog.memory import GIB
from emu_cog.model.kv_cache import KVCache
from emu_cog.model.qwen3 import LanguageModel
from emu_cog.ops.interface import pages_for
from emu_cog.prompt.tokens import block_length, body_length
from emu_cog.request import Sampling

GUIDANCE = 5.0
IMAGE = Sampling(top_k=5120)
"""Upstream's settings for t2i."""
TEXT = Sampling(top_k=1024, top_p=0.9)
REFERENCE_TOKENS = block_length(64, 64)
PROMPT = 128
"""Tokens of each prompt of the picture that is drawn while another request's prompts are read."""
PICTURE = (64, 64)
PICTURE_TOKENS = body_length(*PICTURE)
START, MIDDLE, BODY = 300, 2300, 320
"""Tokens of a stream at the start of a picture and in its middle, and of what is made beyond it: the cache holds
as many pictures as are in progress at most."""
WARM, GROUP = 4, 8
STEPS = WARM + 6 * GROUP
"""Steps that are timed at one point."""
WORKSPACE = 4 * GIB
"""Left free beside the cache: activations of a prompt's pass, scores, graphs."""


@dataclass(kw_only=True)
class Bench:
    """What the parts share.

    `item`: bytes per number of the layers' weights. `bandwidth`: bytes per second. `columns` and `rows`: the part of an
    image that is timed, its first row not counted. `compile`: whether steps are captured where they can be. `pictures`:
    the most that are in progress at once.
    """

    report: Report
    lm: LanguageModel
    size: Size
    item: float
    bandwidth: float
    columns: int
    rows: int
    compile: bool
    pictures: int

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def streams(self) -> tuple[int, ...]:
        """Tokens of a stream at the start of a picture and in its middle."""
        return (START, MIDDLE) if self.size.context > MIDDLE else (START,)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Seconds: `step` of one token for all images, `first` from the end of prefill to the end of the first row."""

    step: float
    first: float
    prefill: float
    context: float


def prompt(ids: Any, length: int, salt: int) -> tuple[int, ...]:
    """`length` ids of text without a short cycle."""
    return (ids.bos, *((7919 * i + salt) % (ids.pad - 1) for i in range(length - 2)), ids.bss)


def image_only(size: tuple[int, int]) -> GenerationConfig:
    """An image of `size` rows and columns without any text, whatever the random model would write."""
    return GenerationConfig(cfg_scale=GUIDANCE, image=IMAGE, text=TEXT, size=size, max_new_tokens=0, single_image=True)


def engine_for(bench: Bench, *, tokens: int | None = None) -> Engine:
    """An engine with the cache that all parts need, or what memory has room for; or with one of `tokens` tokens."""
    lm = bench.lm
    if tokens is None:
        spare = 0.9 * machine.free_bytes(bench.device) - WORKSPACE
        room = int(spare // (2 * KVCache.bytes_per_token(lm.config, lm.dtype)))
        tokens = min(max(bench.pictures * (MIDDLE + BODY), bench.size.context), room)
    lm.context = min(bench.size.context, tokens)
    slots = min(bench.pictures, MAX_SEQUENCES)
    return Engine(ModelRunner.best(lm, slots=slots, tokens=tokens, compile=bench.compile))


def image(
    bench: Bench, engine: Engine, *, context: int, images: int, rows: int | None = None
) -> Generator[tuple[float, int], None, Stats]:
    """Make images side by side after prompts of `context` tokens; yield the time of each look at the first one and its
    tokens so far. Returns the engine's Stats."""
    ids, rows, made = bench.lm.ids, rows or bench.rows, 0
    requests = [
        EngineRequest(conditional=prompt(ids, context, 1), unconditional=prompt(ids, context, 2), seed=i)
        for i in range(images)
    ]
    for event in engine.generate(requests, image_only((rows, bench.columns))):
        if isinstance(event, Tokens) and event.index == 0:
            made += len(event.ids)
            yield time.perf_counter(), made
        elif isinstance(event, Stats):
            return event
    raise AssertionError("the engine yields its Stats last")


def time_image(bench: Bench, engine: Engine, *, context: int, images: int) -> Timed:
    """The median step after the first row, looks at the tokens included: the forced EOL is a step like any other."""
    started = time.perf_counter()
    looks: list[tuple[float, int]] = []
    stats = _drain(image(bench, engine, context=context, images=images), looks)
    row = len(bench.lm.ids.header(bench.rows, bench.columns)) + bench.columns + 1
    first = next(i for i, (_, made) in enumerate(looks) if made >= row)
    taken = [(b - a) / (n - m) for (a, m), (b, n) in pairwise(looks[first:])]
    return Timed(
        step=statistics.median(taken),
        first=looks[first][0] - started - stats.prefill_seconds,
        prefill=stats.prefill_seconds,
        context=context + block_length(bench.rows, bench.columns) / 2,
    )


def _drain(looks: Generator[tuple[float, int], None, Stats], into: list[tuple[float, int]]) -> Stats:
    """Run the generator to its end, what it yields appended to `into`; what it returns."""
    while True:
        try:
            into.append(next(looks))
        except StopIteration as done:
            stats: Stats = done.value
            return stats


def fits(bench: Bench, engine: Engine, *, context: int, images: int) -> bool:
    """Whether `images` images fit the engine's cache side by side."""
    longest = context + block_length(bench.rows, bench.columns)
    pages = images * pages_for(longest)
    room = 2 * pages <= engine.runner.cache.pages - 1 and images <= engine.runner.slots
    return longest < bench.lm.context and room


def along_images(bench: Bench, engine: Engine, counts: list[int], *, context: int) -> dict[int, float]:
    """Seconds per step by the number of images side by side."""
    steps = {}
    for images in counts:
        if timed := _point(bench, engine, context=context, images=images, part="images"):
            steps[images] = timed.step
    return steps


def along_contexts(bench: Bench, engine: Engine, contexts: list[int]) -> None:
    """Step times of one image after longer prompts."""
    for context in contexts:
        _point(bench, engine, context=context, images=1, part="context")


def _point(bench: Bench, engine: Engine, *, context: int, images: int, part: str) -> Timed | None:
    what = f"step, {images} image{'s' if images > 1 else ''}, {context} tokens"
    if not fits(bench, engine, context=context, images=images):
        bench.report.not_measured(what, "it does not fit the cache")
        return None
    timed = time_image(bench, engine, context=context, images=images)
    add_step(bench, what, timed, images, part)
    return timed


def scaling(bench: Bench, steps: Mapping[int, float]) -> None:
    """What several images side by side cost, from seconds per step by their number."""
    if 1 in steps and 4 in steps:
        value = steps[4] / steps[1]
        bench.report.add(Row(part="images", what="four images against one", value=value, unit="x the time"))
    if 1 in steps and 8 in steps:
        value = 8 * steps[1] / steps[8]
        bench.report.add(Row(part="images", what="eight images against one", value=value, unit="x the tokens/s"))


def floor_of(bench: Bench, context: float, images: int) -> float:
    """Seconds to read the weights once, and each sequence's keys and values once, at the copy's bandwidth."""
    weights = bench.size.step_weights(layer_bytes=bench.item, head_bytes=bench.lm.dtype.itemsize)
    cache = bench.size.cache_bytes(tokens=context, rows=2 * images, item=bench.lm.dtype.itemsize)
    return floor_seconds(weights + cache, bench.bandwidth)


def add_step(bench: Bench, what: str, timed: Timed, images: int, part: str) -> None:
    floor = floor_of(bench, timed.context, images)
    sampled = images * bench.columns / (bench.columns + 1) / timed.step
    bench.report.add(
        Row(
            part=part,
            what=what,
            value=1e3 * timed.step,
            unit="ms",
            against=f"{timed.step / floor:.2f} x the floor of {1e3 * floor:.2f} ms",
            note=f"{sampled:.1f} image tokens/s, first row {timed.first:.2f} s",
        )
    )


def prefill(bench: Bench, engine: Engine, references: Sequence[int]) -> None:
    """Both prompts of one request: a sentence, and with `references` references of 64x64 tokens. And how long they
    hold up a picture that another request is drawing."""
    sizes = [("text", 64)] + [(f"{n} reference{'s' if n > 1 else ''}", 64 + n * REFERENCE_TOKENS) for n in references]
    for name, tokens in sizes:
        if not fits(bench, engine, context=tokens, images=1):
            bench.report.not_measured(f"prefill, {name}", "it does not fit the cache")
            continue
        seconds = [_drain(image(bench, engine, context=tokens, images=1, rows=1), []).prefill_seconds for _ in range(2)]
        note = f"two streams of {tokens} tokens, {PREFILL_CHUNK} tokens per pass"
        bench.report.add(Row(part="prefill", what=f"prefill, {name}", value=seconds[-1], unit="s", note=note))
        if fits(bench, engine, context=tokens + PROMPT, images=2):
            stall(bench, engine, name, tokens)


def stall(bench: Bench, engine: Engine, name: str, tokens: int) -> None:
    """The longest time between two steps of a picture while another request's prompts of `tokens` tokens are read."""
    ids, config = bench.lm.ids, image_only((99, bench.columns))
    drawn = EngineRequest(conditional=prompt(ids, PROMPT, 1), unconditional=prompt(ids, PROMPT, 2), seed=0)
    read = EngineRequest(conditional=prompt(ids, tokens, 3), unconditional=prompt(ids, tokens, 4), seed=0)
    picture = engine.submit([drawn], config)
    looks: list[float] = []
    made: list[int] = []
    begun, ended, other = 0, None, None
    try:
        for event in picture.events():
            if not isinstance(event, Tokens):
                continue
            looks.append(time.perf_counter())
            made.append(len(event.ids))
            if len(looks) == 12:
                begun, other = len(looks), _Reading(engine.submit([read], image_only((1, bench.columns))))
            elif other and other.seconds is not None:
                ended = ended or len(looks)
                if len(looks) >= ended + 4:
                    break
    finally:
        picture.cancel()
        if other:
            other.end()
        idle(engine)
    if ended is None or other is None or other.seconds is None:
        bench.report.not_measured(f"stall, {name}", "the picture was finished before the prompt was read")
        return
    alone = statistics.median((looks[i] - looks[i - 1]) / made[i] for i in range(5, begun))
    beside = max(looks[i] - looks[i - 1] - alone * (made[i] - 1) for i in range(begun, ended + 1))
    bench.report.add(
        Row(
            part="prefill",
            what=f"longest time between two steps of a picture while a prompt is read, {name}",
            value=1e3 * beside,
            unit="ms",
            against=f"{1e3 * alone:.1f} ms alone",
            note=f"the prompt was read in {other.seconds:.2f} s beside the picture; one chunk, then {ROUND} steps",
        )
    )


class _Reading:
    """A submission whose prompt is being read: `seconds` it took, once it has been."""

    def __init__(self, submission: Submission) -> None:
        self.seconds: float | None = None
        self._submission = submission
        self._thread = threading.Thread(target=self._watch, args=(time.perf_counter(),))
        self._thread.start()

    def _watch(self, started: float) -> None:
        for event in self._submission.events():
            if isinstance(event, Prefilled):
                self.seconds = time.perf_counter() - started

    def end(self) -> None:
        self._submission.cancel()
        self._submission.put(Stats())  # a cancelled submission has no last event
        self._thread.join()


def idle(engine: Engine) -> None:
    """Return when the engine has dropped what was cancelled: after the round that follows the first call."""
    for _ in range(2):
        engine.call(lambda: None)


WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def synchronisations(bench: Bench, engine: Engine) -> None:
    """How often the host synchronizes with the device inside an image, counted in a profile of two looks."""
    if bench.device.type != "cuda":
        bench.report.not_measured("synchronisations", "the device is a CPU: nothing is asynchronous")
        return
    looks = image(bench, engine, context=512, images=1)
    before = [next(looks)[1] for _ in range(4)][-1]
    tokens: list[int] = []
    found = _waits(lambda: tokens.extend(next(looks)[1] for _ in range(2)))
    looks.close()
    idle(engine)
    own = _waits(lambda: None)  # the profiler itself synchronizes at its end
    waits = {name: found[name] - own[name] for name in WAITS}
    counts = ", ".join(f"{name} {count}" for name, count in waits.items() if count)
    bench.report.add(
        Row(
            part="sync",
            what="synchronizations with the device",
            value=sum(waits.values()) / 2,
            unit=f"per look of {(tokens[-1] - before) / 2:.0f} steps",
            note=f"in two looks: {counts}",
        )
    )


def _waits(work: Callable[[], object]) -> Mapping[str, int]:
    """Synchronizing calls that `work` made, by name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        work()
    return Counter(event.name for event in seen.events() or () if event.name in WAITS)


def write_trace(bench: Bench, engine: Engine, path: str) -> None:
    """A trace of 16 steps, for chrome://tracing or Perfetto, and the kernels that took longest."""
    from torch.profiler import ProfilerActivity, profile

    cuda = bench.device.type == "cuda"
    with (
        drawing(engine, pictures=1, context=512) as step,
        profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen,
    ):
        for _ in range(16):
            step()
        machine.wait(bench.device)
    seen.export_chrome_trace(path)
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    bench.report.print(seen.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))
    bench.report.print(f"  trace written to {path}")


# -- many pictures at once -----------------------------------------------------------------------------------------


@contextmanager
def drawing(engine: Engine, *, pictures: int, context: int, width: int = 1) -> Iterator[Callable[[], object]]:
    """`pictures` pictures in progress, their streams `context` tokens long, and the function that takes one step of
    all, of `width` tokens each. No prompt is read: the cache holds random numbers, of the size that keys and values
    have after their norm."""
    idle(engine)
    with torch.inference_mode():
        runner, cache = engine.runner, engine.runner.cache
        draw, sequences = Draw(PICTURE), []
        request = EngineRequest(conditional=(), unconditional=(), seed=0)
        config = image_only(PICTURE)
        for buffer in (*cache.keys, *cache.values):
            buffer.normal_()
        for i in range(pictures):
            s = SequenceState(index=i, request=request, config=config, emit=lambda _: None, slot=i)
            for pages in s.pages:
                pages.extend(cache.take(pages_for(context + STEPS + width)))
            s.lengths, s.doing = [context, context], draw
            runner.begin(s)
            runner.place(s)
            runner.open(s, draw)
            sequences.append(s)

        def step() -> None:
            draw_step(runner, sequences, width)

        try:
            yield step
        finally:
            for s in sequences:
                runner.end(s)
                for pages in s.pages:
                    cache.release(pages)


def many(bench: Bench, engine: Engine, counts: Sequence[int], contexts: Sequence[int], *, part: str) -> None:
    """One step of several pictures, by their number and the length of their streams."""
    runner = engine.runner
    how = "captured step" if runner.captured else "step in plain PyTorch"
    form = "" if part == "many" else f"{part.removeprefix('many-')}: "
    for context in contexts:
        alone = None
        for pictures in counts:
            what = f"{form}{how}, {pictures} picture{'s' if pictures > 1 else ''}, streams of {context} tokens"
            pages = 2 * pictures * pages_for(context + STEPS)
            if pictures > runner.slots or pages >= runner.cache.pages or context + STEPS > bench.lm.context:
                bench.report.not_measured(what, "it does not fit the cache")
                continue
            with drawing(engine, pictures=pictures, context=context) as step:
                seconds = step_seconds(step, bench.device)
            alone = seconds if pictures == 1 else alone
            floor = floor_of(bench, context + STEPS / 2, pictures)
            ratio = f"{pictures * alone / seconds:.2f} x the tokens/s of one, " if alone and pictures > 1 else ""
            bench.report.add(
                Row(
                    part=part,
                    what=what,
                    value=1e3 * seconds,
                    unit="ms",
                    against=f"{seconds / floor:.2f} x the floor of {1e3 * floor:.2f} ms",
                    note=f"{ratio}{pictures / seconds:.0f} tokens/s",
                )
            )


def windows(bench: Bench, engine: Engine, contexts: Sequence[int], *, part: str) -> None:
    """A pass that draws several tokens of one picture, against one that draws one; and of as many rows, shared by
    several pictures. With random weights next to no draft is right: what a picture takes is reckoned from the tokens
    that a pass keeps."""
    runner = engine.runner
    form = "" if part == "windows" else f"{part.removeprefix('windows-')}: "
    for context in contexts:
        taken: dict[tuple[int, int], float] = {}
        most = runner.widths(1)[-1]
        for pictures, width in [(1, w) for w in runner.widths(1)] + [(n, most // n) for n in (4, 8) if n < most]:
            what = f"{form}pass, {pictures} picture{'s' * (pictures > 1)} x {width} tokens, streams of {context}"
            if pictures > runner.slots or width not in runner.widths(pictures):
                bench.report.not_measured(what, "the engine holds fewer pictures")
                continue
            with drawing(engine, pictures=pictures, context=context, width=width) as step:
                seconds = taken[pictures, width] = step_seconds(step, bench.device)
            against = f"{seconds / taken[1, 1]:.2f} x one token"
            if pictures > 1:
                against += f", {seconds / taken[1, most]:.2f} x one picture's {most}"
            picture = [f"{PICTURE_TOKENS * seconds / kept:.1f}" for kept in (2, 3, 4) if kept <= width]
            note = f"a 64 x 64 picture at 2, 3, 4 tokens a pass: {', '.join(picture)} s" if len(picture) == 3 else ""
            bench.report.add(
                Row(
                    part=part,
                    what=what,
                    value=1e3 * seconds,
                    unit="ms",
                    against=against,
                    note=note if pictures == 1 else "",
                )
            )


def step_seconds(step: Callable[[], object], device: torch.device) -> float:
    """The median of several groups of steps; on CUDA by events around each group, queued without waiting."""
    for _ in range(WARM):
        step()
    if device.type != "cuda":
        taken = []
        for _ in range(STEPS - WARM):
            started = time.perf_counter()
            step()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range((STEPS - WARM) // GROUP + 1)]
    marks[0].record()
    for mark in marks[1:]:
        for _ in range(GROUP):
            step()
        mark.record()
    machine.wait(device)
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(marks)) / GROUP / 1e3
