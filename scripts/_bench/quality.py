"""How closely captured steps and 8-bit weights agree with plain torch in full precision, and what 8 bits gain."""

from __future__ import annotations

from _compare import decoding as ways
from torch import Tensor

from _bench import decoding
from _bench.decoding import GUIDANCE, IMAGE, Bench
from _bench.models import held_bytes
from _bench.report import Row
from emu_cog.engine.engine import Engine
from emu_cog.engine.runner import ModelRunner
from emu_cog.engine.sequence import EngineRequest
from emu_cog.memory import GIB
from emu_cog.model.quantize import check_format

__all__ = ["agreement", "check_format", "eight_bits", "exact_scores"]

CONTEXT = 32768
"""Tokens of one output that 8-bit weights should leave room for on an 80 GB device."""


def _request(bench: Bench) -> tuple[EngineRequest, list[list[int]]]:
    ids = bench.lm.ids
    grid = [[(7919 * (row * 64 + column)) % ids.visual_count for column in range(64)] for row in range(4)]
    prompts = [decoding.prompt(ids, 256, salt) for salt in (1, 2)]
    return EngineRequest(conditional=prompts[0], unconditional=prompts[1], seed=0), grid


def exact_scores(bench: Bench) -> list[Tensor]:
    """Guided scores along one fixed piece of an image, in plain torch: one tensor per image row, on the host."""
    request, grid = _request(bench)
    return [row.cpu() for row in ways.by_chunks(bench.lm, request, grid, guidance=GUIDANCE)]


def agreement(bench: Bench, exact: list[Tensor], steps: ModelRunner, what: str) -> None:
    """Compare the steps of `steps` with `exact` and report."""
    request, grid = _request(bench)
    scores = (rows[0].cpu() for rows in ways.by_steps(steps, [request], [grid], guidance=GUIDANCE))
    found = ways.compare(exact, scores, IMAGE)
    bench.report.add(
        Row(
            part="agreement",
            what=f"{what}: the same likeliest token",
            value=100 * found.top1,
            unit=f"% of {found.steps}",
            note=f"KL {found.kl_mean:.5f} nats on average, {found.kl_max:.4f} at most; random weights",
        )
    )


def eight_bits(bench: Bench, name: str, engine: Engine, exact: list[Tensor], *, short: int, step: float | None) -> None:
    """Measure `engine`, over a model in format `name`. `step`: seconds of a step with full weights."""
    held = held_bytes(bench.lm.weights)
    caches = bench.size.cache_bytes(tokens=CONTEXT, rows=2, item=bench.lm.dtype.itemsize)
    note = f"{(held + caches) / GIB:.1f} GiB with one output of {CONTEXT} tokens"
    bench.report.add(Row(part=name, what=f"{name}: weights", value=held / GIB, unit="GiB", note=note))
    timed = decoding.time_image(bench, engine, context=short, images=1)
    decoding.add_step(bench, f"{name}: step, 1 image, {short} tokens", timed, 1, name)
    if step:
        what = f"{name} against {str(bench.lm.dtype).removeprefix('torch.')}"
        bench.report.add(Row(part=name, what=what, value=step / timed.step, unit="x as fast"))
    agreement(bench, exact, engine.runner, name)
