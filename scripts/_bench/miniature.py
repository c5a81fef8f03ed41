"""How near the fast ways of decoding come to the plain modules on the trained miniature, in bfloat16 as on a GPU.

Random weights spread their scores thinly, so that rounding alone changes the likeliest token; a trained model is the
fair judge.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor
from tqdm import tqdm

from _bench import machine
from _bench.report import Report, Row
from emu_cog import prompts, quality, tasks
from emu_cog.config import InputError, Request
from emu_cog.jobs import Job, Tokens
from emu_cog.pipeline import Pipeline, rules_of
from emu_cog.quality import Codes
from emu_cog.quantize import FORMATS, check_format
from emu_cog.segments import ImageCodes, Reader
from emu_cog.steps import Steps
from emu_cog.weights import MINIATURE

PROMPTS = (
    "two small red stars above a blue circle on a yellow background",
    "a large orange fish on a blue background",
    "three brown houses on a green background",
    "a white moon in the top right corner on a black background",
    "a green tree between a red house and a yellow house",
    "a big pink heart next to a small purple star",
    "a grey cross below a yellow triangle on a striped purple background",
    "a small black square, a red fish and a white star",
)

ROUNDS = 3
"""Each a picture of every prompt, all in one batch; in one round alone chance moves the share by 0.3 points."""
Drawn = list[tuple[Job, Codes]]


def measure(report: Report, device: torch.device, *, compile: bool) -> None:
    """Full precision and every 8-bit format that the device has, along ROUNDS pictures of each of PROMPTS."""
    if not (MINIATURE / "model").is_dir():
        report.not_measured("mini", "this package holds no trained miniature")
        return
    plain = _load(device, None, compile)
    plan = tasks.plan(Request(prompt="-"), plain.defaults)
    rounds = [_drawn(plain, _jobs(plain, plan, first), plan) for first in range(0, ROUNDS * len(PROMPTS), len(PROMPTS))]
    exact = [
        list(quality.by_passes(plain.lm, job, grid, guidance=plan.guidance))
        for drawn in rounds
        for job, grid in tqdm(drawn, desc="two passes a token", leave=False)
    ]
    steps = plain.engine.steps
    what = "recorded steps" if steps else "their twin in plain torch"
    _tell(
        report,
        f"emu-mini: {what} against two passes a token through the modules",
        exact,
        _batched(plain, rounds, plan),
        plan,
    )
    for name in FORMATS:
        try:
            check_format(name, device)
        except InputError as error:
            report.not_measured(f"emu-mini in {name}", str(error))
            continue
        machine.free_bytes(device)
        small = _load(device, name, compile)
        _tell(report, f"emu-mini in {name} against bfloat16", exact, _batched(small, rounds, plan), plan)


def _load(device: torch.device, quantize: str | None, compile: bool) -> Pipeline:
    return Pipeline.load(
        MINIATURE / "model",
        MINIATURE / "vision",
        device=str(device),
        dtype="bfloat16",
        quantize=quantize,
        compile=compile,
        max_outputs=len(PROMPTS),
    )


def _jobs(pipeline: Pipeline, plan: tasks.Plan, first: int) -> list[Job]:
    """One job a prompt, with seeds from `first` on."""
    built = [prompts.build(plan.task, words, [], pipeline.tokenizer) for words in PROMPTS]
    return [Job(conditional=p.conditional, unconditional=p.unconditional, seed=first + i) for i, p in enumerate(built)]


def _drawn(pipeline: Pipeline, jobs: list[Job], plan: tasks.Plan) -> Drawn:
    """The jobs with their pictures as codes; nothing is decoded to pixels, which on a GPU would compile the decoder."""
    found: dict[int, Codes] = {}
    readers = [Reader(pipeline.tokenizer, output=i) for i in range(len(jobs))]
    for event in pipeline.engine.generate(jobs, rules_of(plan)):
        if isinstance(event, Tokens):
            for segment in readers[event.job].feed(event.ids):
                if isinstance(segment, ImageCodes):
                    found[event.job] = segment.codes
    return [(job, found[i]) for i, job in enumerate(jobs)]


def _batched(pipeline: Pipeline, rounds: list[Drawn], plan: tasks.Plan) -> list[list[Tensor]]:
    """Scores by job and row, all jobs of a round side by side through the steps."""
    steps = pipeline.engine.steps or Steps(pipeline.lm, twin=True)
    scores: list[list[Tensor]] = []
    for drawn in rounds:
        rows = quality.by_steps(steps, [job for job, _ in drawn], [grid for _, grid in drawn], guidance=plan.guidance)
        scores += [list(job) for job in zip(*rows, strict=True)]
    return scores


def _tell(report: Report, what: str, exact: list[list[Tensor]], other: list[list[Tensor]], plan: tasks.Plan) -> None:
    def flat(scores: list[list[Tensor]]) -> Iterator[Tensor]:
        return chain.from_iterable(scores)

    found = quality.compare(flat(exact), flat(other), plan.image)
    report.add(
        Row(
            part="mini",
            what=f"{what}: the same likeliest token",
            value=100 * found.top1,
            unit=f"% of {found.steps}",
            note=f"KL {found.kl_mean:.5f} nats on average, {found.kl_max:.4f} at most; {len(PROMPTS)} side by side",
        )
    )
