"""How near two ways of decoding come to each other: the same codes through both, distributions compared step by step.

For the bench and the tests. Scores are guided fp32 logits at temperature 1; each way gives them image row by image
row, so that a full-size image never lies in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emu_cog.engine import image_schedule
from emu_cog.engine.prefill import PREFILL_CHUNK, prefill
from emu_cog.engine.runner import ModelRunner
from emu_cog.engine.sequence import EngineRequest
from emu_cog.model.kv_cache import KVCache
from emu_cog.model.qwen3 import LanguageModel
from emu_cog.ops.sampling import Uniforms, guide, probabilities
from emu_cog.request import Sampling

Codes = Sequence[Sequence[int]]
"""An image's codes, row by row."""
FLOOR = 1e-8
"""Probability that a token cut by the other way's filter counts as: the divergence stays finite."""


@dataclass(frozen=True)
class Agreement:
    """Over `steps` steps: the share with the same likeliest token, and KL(reference || other) in nats."""

    steps: int
    top1: float
    kl_mean: float
    kl_max: float


@torch.inference_mode()
def by_modules(lm: LanguageModel, job: EngineRequest, codes: Codes, *, guidance: float) -> Iterator[Tensor]:
    """(columns, V) scores a row, by the modules: each stream alone, its whole sequence in passes of many tokens."""
    header, body = _block(lm, codes)
    columns = len(codes[0])
    streams = []
    for prompt in (job.conditional, job.unconditional):
        ids = [*prompt, *header, *body]
        cache = lm.new_cache(rows=1, capacity=len(ids))
        parts = []
        for begin in range(0, len(ids), PREFILL_CHUNK):
            tokens = torch.tensor([ids[begin : begin + PREFILL_CHUNK]], device=lm.device)
            start = torch.tensor([begin], device=lm.device)
            parts.append(lm.forward(tokens, start, cache, rows=slice(None), filled=begin + tokens.shape[1])[0])
        first = len(prompt) + len(header) - 1  # IMG's own state tells of the first code
        streams.append(torch.cat(parts)[first : first + len(body) + 1])
    for row in range(len(codes)):
        at = slice(row * (columns + 1), row * (columns + 1) + columns)
        conditional, unconditional = (lm.visual_logits(hidden[at]) for hidden in streams)
        yield guide(conditional, unconditional, guidance)


@torch.inference_mode()
def by_passes(lm: LanguageModel, job: EngineRequest, codes: Codes, *, guidance: float) -> Iterator[Tensor]:
    """(columns, V) scores a row, by the modules as upstream steps: two passes a token, each stream alone.

    The prompts are filled in as `by_steps` does it, so that the steps alone are compared.
    """
    header, body = _block(lm, codes)
    streams = job.conditional, job.unconditional
    cache = lm.new_cache(rows=2, capacity=max(map(len, streams)) + len(header) + len(body) + 1)
    starts = _begin(lm, cache, [job], header)
    columns, fed = len(codes[0]), [header[-1], *body]
    for row in range(len(codes)):
        seen = []
        for t in range(row * (columns + 1), (row + 1) * (columns + 1)):
            if t == len(fed):
                break
            token = torch.tensor([[fed[t]]], device=lm.device)
            scores = []
            for i, start in enumerate(starts):
                at = torch.tensor([start + t], device=lm.device)
                hidden = lm.forward(token, at, cache, rows=slice(i, i + 1), filled=start + t + 1)
                scores.append(lm.visual_logits(hidden[:, -1]))
            conditional, unconditional = scores
            seen.append(guide(conditional, unconditional, guidance)[0])
        yield torch.stack(seen[:columns])  # what the last one chooses is forced: EOL, or EOI


@torch.inference_mode()
def by_steps(
    steps: ModelRunner, jobs: Sequence[EngineRequest], codes: Sequence[Codes], *, guidance: float
) -> Iterator[Sequence[Tensor]]:
    """(columns, V) scores a row for every job, by `steps`: all jobs in one batch, a token at a time over the cache.

    All images must have one size.
    """
    lm = steps.lm
    header, body = _block(lm, codes[0])
    rows, columns = len(codes[0]), len(codes[0][0])
    longest = max(len(stream) for job in jobs for stream in (job.conditional, job.unconditional))
    cache = lm.new_cache(rows=2 * len(jobs), capacity=longest + len(header) + len(body) + 1)
    starts = _begin(lm, cache, jobs, header)
    plan = image_schedule.schedule([(rows, columns)] * len(jobs), [(Uniforms(0), 0)] * len(jobs), lm.ids)
    forced = torch.tensor([[*_block(lm, grid)[1], lm.ids.eoi] for grid in codes]).T
    state, replay = steps.image(
        cache,
        forced=forced,
        uniform=plan.uniform,
        advance=plan.advance,
        lengths=starts,
        cfg_scale=guidance,
        sampling=Sampling(),
    )
    for _ in range(rows):
        seen = []
        for _ in range(columns):
            replay()
            seen.append(state.scores.clone())
        replay()  # EOL or EOI
        yield torch.stack(seen, dim=1).unbind()


def compare(reference: Iterable[Tensor], other: Iterable[Tensor], sampling: Sampling) -> Agreement:
    """Rows of (columns, V) scores from two ways, filtered by `sampling`, against each other."""
    same, divergences = [], []
    for ours, theirs in zip(reference, other, strict=True):
        p, q = probabilities(ours, sampling), probabilities(theirs.to(ours.device), sampling)
        same.append(p.argmax(dim=-1) == q.argmax(dim=-1))
        gap = p.double() * (p.double().clamp(min=FLOOR).log() - q.double().clamp(min=FLOOR).log())
        divergences.append(gap.sum(dim=-1))
    agree, divergence = torch.cat(same), torch.cat(divergences)
    return Agreement(
        steps=len(agree),
        top1=float(agree.double().mean()),
        kl_mean=float(divergence.mean()),
        kl_max=float(divergence.max()),
    )


def _begin(lm: LanguageModel, cache: KVCache, jobs: Sequence[EngineRequest], header: Sequence[int]) -> list[int]:
    """Prompts and an image's header into the cache, IMG left out; the tokens that lie in each row."""
    lengths = [len(stream) for job in jobs for stream in (job.conditional, job.unconditional)]
    prefill(lm, cache, jobs)
    tokens = torch.tensor([header[:-1]] * len(lengths), device=lm.device)
    starts, filled = torch.tensor(lengths, device=lm.device), max(lengths) + len(header) - 1
    lm.forward(tokens, starts, cache, rows=slice(None), filled=filled)
    return [n + len(header) - 1 for n in lengths]


def _block(lm: LanguageModel, codes: Codes) -> tuple[list[int], list[int]]:
    """The ids of an image up to IMG, and those after it without EOI."""
    ids = lm.ids
    body = [token for row in codes for token in (*(ids.visual + code for code in row), ids.eol)]
    return list(ids.header(len(codes), len(codes[0]))), body[:-1]
