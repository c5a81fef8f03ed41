"""Hundreds of mixed requests through one pipeline from several threads: nothing lost, mixed up, leaked or left behind.

Good requests of all tasks, refused ones, cancelled and dropped ones, slow readers, and a trace that raises. What a
request makes in this company must be what it makes alone, code for code.
"""

from __future__ import annotations

import gc
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import psutil
import torch
from PIL import Image

from _bench.report import Report, Row
from emu_cog.errors import InputError
from emu_cog.events import Event, Picture
from emu_cog.log import log
from emu_cog.memory import GIB
from emu_cog.pipeline import Pipeline
from emu_cog.prompt.segments import Text
from emu_cog.request import Request
from emu_cog.weights.store import MINIATURE

WORKERS = 6
FLAT = 1.02
"""Memory at the end may be this much of what it was after the first tenth."""
KINDS = {"read": 12, "slow": 2, "cancelled": 3, "dropped": 2, "trace": 1, "refused": 2}
"""What becomes of a request, and how often."""
Made = list[object]
"""Texts and codes of one request, in order."""


class TraceError(Exception):
    """What the trace raises."""


@dataclass
class Found:
    """What the requests came to. `wrong` names every failure."""

    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    pictures: int = 0
    seconds: float = 0.0
    early: float = 0.0
    late: float = 0.0
    """Bytes of the process after the first tenth of the requests, and at the end."""
    early_device: float = 0.0
    late_device: float = 0.0


def catalogue(photos: Sequence[Image.Image], **common: object) -> list[Request]:
    """Distinct good requests: all tasks, sizes, seeds, numbers of pictures, filters and limits."""
    made: list[dict[str, object]] = [
        {"prompt": "a red heart", "size": (4, 5), "seed": 1},
        {"prompt": "a red heart", "size": (4, 5), "seed": 1, "num_outputs": 4},
        {"prompt": "two small stars above a blue circle", "seed": 2, "size": (10, 3), "image_top_p": 0.9},
        {"prompt": "an orange fish " * 12, "size": (3, 10), "seed": 3, "guidance_scale": 1.0},
        {"prompt": "a house", "size": (8, 8), "seed": 4, "num_outputs": 2, "image_top_k": 7},
        {"task": "x2i", "prompt": "make it green", "images": tuple(photos[:1]), "seed": 5},
        {"task": "x2i", "prompt": "remove the star", "images": tuple(photos[:2]), "size": (3, 4), "num_outputs": 2},
        {"task": "story", "prompt": "a fish", "size": (3, 4), "seed": 6, "max_new_tokens": 60},
        {"task": "howto", "prompt": "draw a house", "size": (4, 3), "seed": 7, "max_new_tokens": 90},
        {
            "task": "explore",
            "prompt": "go right, down",
            "images": tuple(photos[:1]),
            "size": (2, 3),
            "max_new_tokens": 40,
        },
        {
            "task": "vla",
            "prompt": "put the ball down",
            "images": tuple(photos[:1]),
            "size": (3, 3),
            "max_new_tokens": 40,
        },
    ]
    return [Request(**({"seed": 10 + i, "image_area": 64 * 64} | common | one)) for i, one in enumerate(made)]  # type: ignore[arg-type]


REFUSED = (
    {"prompt": ""},
    {"prompt": "-", "task": "x2i"},
    {"prompt": "-", "size": (100, 100_000)},
    {"prompt": "word " * 40_000},
)
"""Requests that raise InputError before any model work."""


def soak(
    pipeline: Pipeline, requests: Sequence[Request], *, count: int, workers: int = WORKERS, seed: int = 0
) -> Found:
    """Run `count` requests, drawn from `requests`, in `workers` threads. Each distinct one runs alone first."""
    expected = [keep(pipeline.stream(request)) for request in requests]
    rng = random.Random(seed)
    deck: list[str] = []
    while len(deck) < count:
        deck += rng.sample(list(KINDS), sum(KINDS.values()), counts=list(KINDS.values()))
    plan = [(kind, rng.randrange(len(requests)), rng.random()) for kind in deck[:count]]
    found, lock, left = Found(), threading.Lock(), iter(enumerate(plan))
    started = time.perf_counter()

    def work() -> None:
        while True:
            with lock:
                number, (kind, which, chance) = next(left, (-1, ("", 0, 0.0)))
            if number < 0:
                return
            try:
                wrong, pictures = _one(pipeline, kind, requests[which], expected[which], chance)
            except BaseException as error:  # any failure is one of the soak's
                wrong, pictures = f"{type(error).__name__}: {error}", 0
            with lock:
                found.ended[kind] += 1
                found.pictures += pictures
                if wrong:
                    found.wrong.append(f"request {number} ({kind}, number {which} of the catalogue): {wrong}")
                if sum(found.ended.values()) == max(count // 10, 1):
                    found.early, found.early_device = _memory(pipeline)

    threads = [threading.Thread(target=work, name=f"soak-{i}") for i in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.seconds = time.perf_counter() - started
    for _ in range(2):  # what was cancelled is dropped in the round after the first call
        pipeline.engine.call(lambda: None)
    found.late, found.late_device = _memory(pipeline)
    cache = pipeline.runner.cache
    if cache.free != cache.pages - 1:
        found.wrong.append(f"{cache.pages - 1 - cache.free} pages of the cache are still taken")
    scheduler = pipeline.engine.scheduler
    if scheduler.running or scheduler.waiting or scheduler.prompts:
        found.wrong.append("sequences are left in the engine")
    if sum(found.ended.values()) != count:
        found.wrong.append(f"{count - sum(found.ended.values())} requests are lost")
    return found


def _one(pipeline: Pipeline, kind: str, request: Request, expected: Made, chance: float) -> tuple[str, int]:
    """Run one request; what went wrong, and how many pictures were compared."""
    if kind == "refused":
        try:
            pipeline.submit(Request(**REFUSED[int(chance * len(REFUSED))]))  # type: ignore[arg-type]
        except InputError:
            return "", 0
        return "it was not refused", 0
    if kind == "trace":
        return _with_failing_trace(pipeline, request, after=int(20 * chance)), 0
    run = pipeline.submit(request)
    made: Made = []
    if kind == "cancelled":
        timer = threading.Timer(0.3 * chance, run.cancel)
        timer.start()
        made = keep(run)  # ends with the cancel, or whole where that came too late
        timer.cancel()
        return _prefix(made, expected), 0
    with closing(iter(run)) as events:
        for seen, event in enumerate(events):
            made += kept(event)
            if kind == "dropped" and seen >= int(3 * chance):
                break
            if kind == "slow":
                time.sleep(0.05 * chance)
    if kind == "dropped":
        return _prefix(made, expected), 0
    return "" if made == expected else "it differs from the same request alone", sum(isinstance(p, tuple) for p in made)


def _with_failing_trace(pipeline: Pipeline, request: Request, *, after: int) -> str:
    """A trace that raises at its call number `after` must end its own request alone, with its own error."""
    calls = 0

    def trace(kind: str, probs: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise TraceError

    try:
        keep(pipeline.submit(request, trace=trace))
    except TraceError:
        return ""
    return "" if calls <= after else "the trace's error did not reach the caller"


def keep(events: Iterable[Event]) -> Made:
    """What is compared of all `events`."""
    return [part for event in events for part in kept(event)]


def kept(event: Event) -> Made:
    """What is compared of one event: a text, or a picture's place, seed and codes."""
    if isinstance(event, Picture):
        return [(event.output, event.number, event.settings["seed"], event.codes)]
    return [event.text] if isinstance(event, Text) else []


def _prefix(made: Made, expected: Made) -> str:
    return "" if made == expected[: len(made)] else "what came before its end differs from the same request alone"


def _memory(pipeline: Pipeline) -> tuple[float, float]:
    """Bytes of this process and of its GPU memory in use."""
    gc.collect()
    device = pipeline.lm.device
    return float(psutil.Process().memory_info().rss), float(
        torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    )


def photos() -> list[Image.Image]:
    """Two smooth pictures of different shapes."""
    return [Image.linear_gradient("L").convert("RGB").resize(size) for size in ((96, 64), (64, 80))]


def measure(report: Report, device: torch.device, *, compile: bool, requests: int) -> None:
    """The soak on the trained miniature. RuntimeError names what went wrong."""
    if not (MINIATURE / "model").is_dir():
        report.not_measured("soak", "this package holds no trained miniature")
        return
    pipeline = Pipeline.load(MINIATURE / "model", MINIATURE / "vision", device=str(device), compile=compile)
    pipeline.warm_up()
    log.setLevel(logging.WARNING)  # a line per request would bury the figures
    found = soak(pipeline, catalogue(photos()), count=requests)
    ended = ", ".join(f"{count} {kind}" for kind, count in sorted(found.ended.items()))
    note = f"{ended}; {found.pictures} pictures compared, {len(found.wrong)} failures"
    report.add(
        Row(
            part="soak",
            what=f"{requests} mixed requests in {WORKERS} threads",
            value=found.seconds,
            unit="s",
            note=note,
        )
    )
    memory = [("the process", found.early, found.late)]
    if device.type == "cuda":
        memory.append(("the GPU", found.early_device, found.late_device))
    for what, early, late in memory:
        report.add(
            Row(
                part="soak",
                what=f"memory of {what} at the end against after the first tenth",
                value=100 * late / early,
                unit="%",
                note=f"{late / GIB:.3f} GiB",
            )
        )
        if late > FLAT * early:
            found.wrong.append(f"memory of {what} grew from {early / GIB:.3f} to {late / GIB:.3f} GiB")
    if found.wrong:
        raise RuntimeError("; ".join(found.wrong[:5]))
