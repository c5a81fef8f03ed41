"""The trained miniature through the pipeline: requests side by side against one after another."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence

import torch

from _bench.miniature import PROMPTS
from _bench.report import Report, Row
from emu_cog.events import Picture
from emu_cog.log import log
from emu_cog.pipeline import Pipeline, Running
from emu_cog.request import Request
from emu_cog.weights.store import MINIATURE

REPEATS = 3


def measure(report: Report, device: torch.device, *, compile: bool, repeats: int = REPEATS) -> None:
    """Pictures of all PROMPTS at once and one after another, in turn; seconds, their ratio, and whether codes and
    pixels are equal."""
    if not (MINIATURE / "model").is_dir():
        report.not_measured("company", "this package holds no trained miniature")
        return
    pipeline = Pipeline.load(
        MINIATURE / "model", MINIATURE / "vision", device=str(device), compile=compile, max_outputs=len(PROMPTS)
    )
    pipeline.warm_up()
    log.setLevel(logging.WARNING)  # a line per request would bury the figures
    requests = [Request(prompt=words, seed=i) for i, words in enumerate(PROMPTS)]
    pictures(pipeline.submit(requests[0]))
    alone, together, equal = list[float](), list[float](), True
    for _ in range(repeats):
        started = time.perf_counter()
        one_by_one = [pictures(pipeline.submit(request)) for request in requests]
        alone.append(time.perf_counter() - started)
        started = time.perf_counter()
        running = [pipeline.submit(request) for request in requests]
        at_once = [pictures(run) for run in running]
        together.append(time.perf_counter() - started)
        equal = equal and one_by_one == at_once
    ratios = sorted(a / b for a, b in zip(alone, together, strict=True))
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f} in {repeats} repeats"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    for what, seconds in (("one after another", alone), ("at once", together)):
        row = f"emu-mini, {len(PROMPTS)} pictures {what}{threads}"
        report.add(Row(part="company", what=row, value=statistics.median(seconds), unit="s"))
    report.add(
        Row(
            part="company",
            what=f"{len(PROMPTS)} pictures at once against one after another",
            value=statistics.median(ratios),
            unit="x as fast",
            against=spread,
            note="the pictures are equal, every byte" if equal else "THE PICTURES DIFFER",
        )
    )


def pictures(run: Running) -> Sequence[tuple[object, bytes]]:
    """Codes and pixels of a request's pictures."""
    return [(event.codes, event.image.tobytes()) for event in run if isinstance(event, Picture)]
