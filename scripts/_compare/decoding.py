"""How closely two ways of decoding agree: the same codes through both, distributions compared step by step.

For the bench and the tests. Scores are guided fp32 logits at temperature 1, yielded one image row at a time, so that
those of a full-size image are never in memory at once.
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
"""Probability of a token that the other filter removed: keeps the divergence finite."""


@dataclass(frozen=True)
class Agreement:
    """Over `steps` steps: the share with the same top-1 token, and KL(reference || other) in nats."""

    steps: int
    top1: float
    kl_mean: float
    kl_max: float


@torch.inference_mode()
def by_modules(lm: LanguageModel, request: EngineRequest, codes: Codes, *, guidance: float) -> Iterator[Tensor]:
    """(columns, V) scores per image row, through the modules: each sequence by itself, in passes of many tokens."""
    header, body = _block(lm, codes)
    columns = len(codes[0])
    sequences = []
    for prompt in (request.conditional, request.unconditional):
        ids = [*prompt, *header, *body]
        cache = lm.new_cache(rows=1, capacity=len(ids))
        parts = []
        for begin in range(0, len(ids), PREFILL_CHUNK):
            tokens = torch.tensor([ids[begin : begin + PREFILL_CHUNK]], device=lm.device)
            start = torch.tensor([begin], device=lm.device)
            parts.append(lm.forward(tokens, start, cache, rows=slice(None), filled=begin + tokens.shape[1])[0])
        first = len(prompt) + len(header) - 1  # IMG's hidden state predicts the first code
        sequences.append(torch.cat(parts)[first : first + len(body) + 1])
    for row in range(len(codes)):
        at = slice(row * (columns + 1), row * (columns + 1) + columns)
        conditional, unconditional = (lm.visual_logits(hidden[at]) for hidden in sequences)
        yield guide(conditional, unconditional, guidance)


@torch.inference_mode()
def by_passes(lm: LanguageModel, request: EngineRequest, codes: Codes, *, guidance: float) -> Iterator[Tensor]:
    """(columns, V) scores per image row, through the modules as upstream steps: two passes per token, one per sequence.

    Prompts are prefilled as in `by_steps`, so that only the steps are compared.
    """
    header, body = _block(lm, codes)
    sequences = request.conditional, request.unconditional
    cache = lm.new_cache(rows=2, capacity=max(map(len, sequences)) + len(header) + len(body) + 1)
    starts = _begin(lm, cache, [request], header)
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
        yield torch.stack(seen[:columns])  # the last token is forced: EOL or EOI


@torch.inference_mode()
def by_steps(
    runner: ModelRunner, requests: Sequence[EngineRequest], codes: Sequence[Codes], *, guidance: float
) -> Iterator[Sequence[Tensor]]:
    """(columns, V) scores per image row for every request, through `runner`: all in one batch, token by token.

    All images must have the same size.
    """
    lm = runner.lm
    header, body = _block(lm, codes[0])
    rows, columns = len(codes[0]), len(codes[0][0])
    longest = max(len(sequence) for request in requests for sequence in (request.conditional, request.unconditional))
    cache = lm.new_cache(rows=2 * len(requests), capacity=longest + len(header) + len(body) + 1)
    starts = _begin(lm, cache, requests, header)
    plan = image_schedule.schedule([(rows, columns)] * len(requests), [(Uniforms(0), 0)] * len(requests), lm.ids)
    forced = torch.tensor([[*_block(lm, grid)[1], lm.ids.eoi] for grid in codes]).T
    state, replay = runner.image(
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
    """Compare image rows of (columns, V) scores from two ways of decoding, filtered by `sampling`."""
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


def _begin(lm: LanguageModel, cache: KVCache, requests: Sequence[EngineRequest], header: Sequence[int]) -> list[int]:
    """Prefill prompts and the image header without IMG; returns the number of tokens in each slot."""
    lengths = [len(sequence) for request in requests for sequence in (request.conditional, request.unconditional)]
    prefill(lm, cache, requests)
    tokens = torch.tensor([header[:-1]] * len(lengths), device=lm.device)
    starts, filled = torch.tensor(lengths, device=lm.device), max(lengths) + len(header) - 1
    lm.forward(tokens, starts, cache, rows=slice(None), filled=filled)
    return [n + len(header) - 1 for n in lengths]


def _block(lm: LanguageModel, codes: Codes) -> tuple[list[int], list[int]]:
    """The ids of an image up to IMG, and those after it without EOI."""
    ids = lm.ids
    body = [token for row in codes for token in (*(ids.visual + code for code in row), ids.eol)]
    return list(ids.header(len(codes), len(codes[0]))), body[:-1]
