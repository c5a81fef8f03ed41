"""How closely the fast ways of decoding agree with plain torch on the trained miniature, in bfloat16 as on a GPU.

The scores of random weights are so close that rounding alone changes the likeliest token; a trained model is the fair
test.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from _compare import decoding
from _compare.decoding import Codes
from torch import Tensor
from tqdm import tqdm

from _bench import machine
from _bench.report import Report, Row
from emu_cog.engine.sequence import EngineRequest, Tokens
from emu_cog.errors import InputError
from emu_cog.model.quantize import FORMATS, check_format
from emu_cog.pipeline import Pipeline, generation_config
from emu_cog.prompt import tasks
from emu_cog.prompt.segments import ImageCodes, Reader
from emu_cog.request import Request
from emu_cog.weights.store import MINIATURE

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
Generated = list[tuple[EngineRequest, Codes]]


def measure(report: Report, device: torch.device, *, compile: bool) -> None:
    """Full precision and every 8-bit format that the device has, along ROUNDS pictures of each of PROMPTS."""
    if not (MINIATURE / "model").is_dir():
        report.not_measured("mini", "this package holds no trained miniature")
        return
    plain = _load(device, None, compile)
    plan = tasks.plan(Request(prompt="-"), plain.defaults)
    rounds = [
        _generated(plain, _requests(plain, first), plan) for first in range(0, ROUNDS * len(PROMPTS), len(PROMPTS))
    ]
    exact = [
        list(decoding.by_passes(plain.lm, request, grid, guidance=plan.guidance))
        for generated in rounds
        for request, grid in tqdm(generated, desc="two passes per token", leave=False)
    ]
    what = "captured steps" if plain.runner.captured else "steps side by side"
    _report(
        report,
        f"emu-mini: {what} against two passes per token in plain torch",
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
        _report(report, f"emu-mini in {name} against bfloat16", exact, _batched(small, rounds, plan), plan)


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


def _requests(pipeline: Pipeline, first: int) -> list[EngineRequest]:
    """One engine request per prompt, with seeds from `first` on."""
    return [pipeline.prepare(Request(prompt=words, seed=first + i)).outputs[0] for i, words in enumerate(PROMPTS)]


def _generated(pipeline: Pipeline, requests: list[EngineRequest], plan: tasks.Plan) -> Generated:
    """The requests with their pictures as codes; decoding to pixels would compile the decoder on a GPU."""
    found: dict[int, Codes] = {}
    readers = [Reader(pipeline.tokenizer, output=i) for i in range(len(requests))]
    for event in pipeline.engine.generate(requests, generation_config(plan)):
        if isinstance(event, Tokens):
            for segment in readers[event.index].feed(event.ids):
                if isinstance(segment, ImageCodes):
                    found[event.index] = segment.codes
    return [(request, found[i]) for i, request in enumerate(requests)]


def _batched(pipeline: Pipeline, rounds: list[Generated], plan: tasks.Plan) -> list[list[Tensor]]:
    """Scores by request and image row, all requests of a round side by side through single steps."""
    scores: list[list[Tensor]] = []
    for generated in rounds:
        rows = decoding.by_steps(
            pipeline.runner,
            [request for request, _ in generated],
            [grid for _, grid in generated],
            guidance=plan.guidance,
        )
        scores += [list(request) for request in zip(*rows, strict=True)]
    return scores


def _report(report: Report, what: str, exact: list[list[Tensor]], other: list[list[Tensor]], plan: tasks.Plan) -> None:
    def flat(scores: list[list[Tensor]]) -> Iterator[Tensor]:
        return chain.from_iterable(scores)

    found = decoding.compare(flat(exact), flat(other), plan.image)
    report.add(
        Row(
            part="mini",
            what=f"{what}: the same likeliest token",
            value=100 * found.top1,
            unit=f"% of {found.steps}",
            note=f"KL {found.kl_mean:.5f} nats on average, {found.kl_max:.4f} at most; {len(PROMPTS)} side by side",
        )
    )
