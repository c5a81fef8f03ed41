"""How closely captured steps and 8-bit weights agree with the modules in full precision, and what 8 bits gain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from _compare import decoding as ways
from torch import Tensor

from _bench import decoding, machine
from _bench.decoding import GUIDANCE, IMAGE, Bench
from _bench.report import Row
from emu_cog.engine.engine import Engine
from emu_cog.engine.runner import ModelRunner, build
from emu_cog.engine.sequence import EngineRequest
from emu_cog.memory import GIB
from emu_cog.model.quantize import check_format, quantize
from emu_cog.model.qwen3 import LanguageModel

__all__ = ["agreement", "check_format", "eight_bits", "exact_scores"]

CONTEXT = 32768
"""Tokens of one output that 8-bit weights should leave room for on an 80 GB device."""


def _request(bench: Bench) -> tuple[EngineRequest, list[list[int]]]:
    ids = bench.lm.ids
    grid = [[(7919 * (row * 64 + column)) % ids.visual_count for column in range(64)] for row in range(4)]
    prompts = [decoding.prompt(ids, 256, salt) for salt in (1, 2)]
    return EngineRequest(conditional=prompts[0], unconditional=prompts[1], seed=0), grid


def exact_scores(bench: Bench) -> list[Tensor]:
    """Guided scores along one fixed piece of an image, through the modules: one tensor per image row, on the host."""
    request, grid = _request(bench)
    return [row.cpu() for row in ways.by_modules(bench.lm, request, grid, guidance=GUIDANCE)]


def _scores(bench: Bench, lm: LanguageModel, steps: ModelRunner | None) -> Iterator[Tensor]:
    request, grid = _request(bench)
    if steps is None:
        return (row.cpu() for row in ways.by_modules(lm, request, grid, guidance=GUIDANCE))
    return (rows[0].cpu() for rows in ways.by_steps(steps, [request], [grid], guidance=GUIDANCE))


def agreement(bench: Bench, exact: list[Tensor], lm: LanguageModel, steps: ModelRunner | None, what: str) -> None:
    """Compare with `exact` and report."""
    found = ways.compare(exact, _scores(bench, lm, steps), IMAGE)
    bench.report.add(
        Row(
            part="agreement",
            what=f"{what}: the same likeliest token",
            value=100 * found.top1,
            unit=f"% of {found.steps}",
            note=f"KL {found.kl_mean:.5f} nats on average, {found.kl_max:.4f} at most; random weights",
        )
    )


def eight_bits(bench: Bench, name: str, exact: list[Tensor], *, short: int, step: float | None) -> None:
    """Convert the model's layers to format `name`, for good, and measure. `step`: seconds with full weights."""
    lm = bench.lm
    quantize(lm.model, name)
    machine.free_bytes(bench.device)
    steps = build(lm, compile=bench.compile)
    held = sum(v.nbytes for v in (*lm.model.parameters(), *lm.model.buffers()))
    caches = bench.size.cache_bytes(tokens=CONTEXT, rows=2, item=lm.dtype.itemsize)
    note = f"{(held + caches) / GIB:.1f} GiB with one output of {CONTEXT} tokens"
    bench.report.add(Row(part=name, what=f"{name}: weights", value=held / GIB, unit="GiB", note=note))
    small = replace(bench, item=1.0)
    timed = decoding.time_image(small, Engine(lm, steps), context=short, images=1)
    decoding.add_step(small, f"{name}: step, 1 image, {short} tokens", timed, 1, name)
    if step:
        what = f"{name} against {str(lm.dtype).removeprefix('torch.')}"
        bench.report.add(Row(part=name, what=what, value=step / timed.step, unit="x as fast"))
    agreement(bench, exact, lm, steps, name)
