"""The decode step, prefill and synchronization, through the engine as requests use it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from _bench import machine
from _bench.report import Report, Row
from _bench.sizes import Size, floor_seconds
from emu_cog.engine.engine import Engine
from emu_cog.engine.sequence import EngineRequest, GenerationConfig, Stats, Tokens
from emu_cog.model.qwen3 import LanguageModel
from emu_cog.prompt.tokens import block_length
from emu_cog.request import Sampling

GUIDANCE = 5.0
IMAGE = Sampling(top_k=5120)
"""Upstream's settings for t2i."""
TEXT = Sampling(top_k=1024, top_p=0.9)
REFERENCE_TOKENS = block_length(64, 64)


@dataclass(kw_only=True)
class Bench:
    """What the parts share.

    `item`: bytes per number of the layers' weights. `bandwidth`: bytes per second. `columns` and `rows`: the part of an
    image that is timed, its first row not counted. `compile`: whether steps are captured where they can be.
    """

    report: Report
    lm: LanguageModel
    size: Size
    item: float
    bandwidth: float
    columns: int
    rows: int
    compile: bool

    @property
    def device(self) -> torch.device:
        return self.lm.device


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


def image(
    bench: Bench, engine: Engine, *, context: int, images: int, rows: int | None = None
) -> Generator[float, None, Stats]:
    """Make images side by side after prompts of `context` tokens; yield the time at each finished row. Returns the
    engine's Stats."""
    ids, rows = bench.lm.ids, rows or bench.rows
    requests = [
        EngineRequest(conditional=prompt(ids, context, 1), unconditional=prompt(ids, context, 2), seed=i)
        for i in range(images)
    ]
    ends = (ids.eol, ids.eoi)
    for event in engine.generate(requests, image_only((rows, bench.columns))):
        if isinstance(event, Tokens) and event.index == 0 and event.ids[-1] in ends:
            yield time.perf_counter()
        elif isinstance(event, Stats):
            return event
    raise AssertionError("the engine yields its Stats last")


def time_image(bench: Bench, engine: Engine, *, context: int, images: int) -> Timed:
    """The median image row after the first, per token: the forced EOL is a step like any other."""
    started = time.perf_counter()
    ends: list[float] = []
    stats = _drain(image(bench, engine, context=context, images=images), ends)
    taken = sorted(b - a for a, b in pairwise(ends))
    step = taken[len(taken) // 2] / (bench.columns + 1)
    made = block_length(bench.rows, bench.columns)
    return Timed(
        step=step,
        first=ends[0] - started - stats.prefill_seconds,
        prefill=stats.prefill_seconds,
        context=context + made / 2,
    )


def _drain(ends: Generator[float, None, Stats], into: list[float]) -> Stats:
    """Run the generator to its end, its times appended to `into`; what it returns."""
    while True:
        try:
            into.append(next(ends))
        except StopIteration as done:
            stats: Stats = done.value
            return stats


def fits(bench: Bench, *, context: int, images: int) -> bool:
    """Whether the caches for `images` images fit, with a margin."""
    tokens = context + block_length(bench.rows, bench.columns) + 512
    needed = bench.size.cache_bytes(tokens=tokens, rows=2 * images, item=bench.lm.dtype.itemsize)
    return context + block_length(bench.rows, bench.columns) < bench.lm.context and (
        1.1 * needed < machine.free_bytes(bench.device)
    )


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
    engine.free()
    if not fits(bench, context=context, images=images):
        bench.report.not_measured(what, "its caches do not fit")
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
    """Both prompts of one request: a sentence, and with `references` references of 64x64 tokens."""
    sizes = [("text", 64)] + [(f"{n} reference{'s' if n > 1 else ''}", 64 + n * REFERENCE_TOKENS) for n in references]
    for name, tokens in sizes:
        engine.free()
        if not fits(bench, context=tokens, images=1):
            bench.report.not_measured(f"prefill, {name}", "its caches do not fit")
            continue
        seconds = []
        for _ in range(2):  # the first one allocates
            seconds.append(_drain(image(bench, engine, context=tokens, images=1, rows=1), []).prefill_seconds)
        note = f"two sequences of {tokens} tokens"
        bench.report.add(Row(part="prefill", what=f"prefill, {name}", value=seconds[-1], unit="s", note=note))


WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def synchronisations(bench: Bench, engine: Engine) -> None:
    """How often the host synchronizes with the device inside an image, counted in a profile of image rows."""
    if bench.device.type != "cuda":
        bench.report.not_measured("synchronisations", "the device is a CPU: nothing is asynchronous")
        return
    narrow = replace(bench, columns=16)  # a profile of more steps takes long to read
    rows = image(narrow, engine, context=512, images=1, rows=4)
    next(rows)
    found = _waits(lambda: (next(rows), next(rows)))
    rows.close()
    own = _waits(lambda: None)  # the profiler itself synchronizes at its end
    waits = {name: found[name] - own[name] for name in WAITS}
    counts = ", ".join(f"{name} {count}" for name, count in waits.items() if count)
    bench.report.add(
        Row(
            part="sync",
            what="synchronizations with the device",
            value=sum(waits.values()) / 2,
            unit=f"per row of {narrow.columns + 1} steps",
            note=f"in two rows: {counts}",
        )
    )


def _waits(work: Callable[[], object]) -> Mapping[str, int]:
    """Synchronizing calls that `work` made, by name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        work()
    return Counter(event.name for event in seen.events() or () if event.name in WAITS)


def write_trace(bench: Bench, engine: Engine, path: str) -> None:
    """A trace of one row of 16 codes, for chrome://tracing or Perfetto, and the kernels that took longest."""
    from torch.profiler import ProfilerActivity, profile

    cuda = bench.device.type == "cuda"
    rows = image(replace(bench, columns=16), engine, context=512, images=1, rows=3)
    next(rows)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        next(rows)
    rows.close()
    seen.export_chrome_trace(path)
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    bench.report.print(seen.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))
    bench.report.print(f"  trace written to {path}")
