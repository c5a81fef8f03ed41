"""How closely two ways of decoding agree: the same codes through both, distributions compared step by step.

For the bench and the tests. Scores are guided fp32 logits at temperature 1, yielded one image row at a time, so that
those of a full-size image are never in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emu_cog.engine.engine import PREFILL_CHUNK
from emu_cog.engine.runner import ModelRunner
from emu_cog.engine.sequence import Draw, EngineRequest, Feed, GenerationConfig, SequenceState
from emu_cog.model.kv_cache import KVCache
from emu_cog.model.qwen3 import Chunk, LanguageModel
from emu_cog.ops.interface import PAGE, pages_for
from emu_cog.ops.sampling import guide, probabilities
from emu_cog.prompt.tokens import block_length
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
def by_chunks(lm: LanguageModel, request: EngineRequest, codes: Codes, *, guidance: float) -> Iterator[Tensor]:
    """(columns, V) scores per image row, in plain torch: each stream by itself, in passes of many tokens."""
    plain, (header, body) = _plain(lm), _block(lm, codes)
    columns = len(codes[0])
    streams = []
    for prompt in (request.conditional, request.unconditional):
        ids = [*prompt, *header, *body]
        cache = plain.new_cache(len(ids))
        hidden = _feed(plain, cache, ids, cache.take(cache.free))
        first = len(prompt) + len(header) - 1  # IMG's hidden state predicts the first code
        streams.append(hidden[first : first + len(body) + 1])
    for row in range(len(codes)):
        at = slice(row * (columns + 1), row * (columns + 1) + columns)
        conditional, unconditional = (plain.visual_logits(hidden[at]) for hidden in streams)
        yield guide(conditional, unconditional, guidance)


@torch.inference_mode()
def by_passes(lm: LanguageModel, request: EngineRequest, codes: Codes, *, guidance: float) -> Iterator[Tensor]:
    """(columns, V) scores per image row, in plain torch, as upstream steps: two passes per token, one per stream.

    Prompts are read as in `by_steps`, so that only the steps are compared.
    """
    plain, (header, body) = _plain(lm), _block(lm, codes)
    prompts = (request.conditional, request.unconditional)
    columns, fed = len(codes[0]), [*header, *body]
    cache = plain.new_cache(sum(len(prompt) + len(fed) + PAGE for prompt in prompts))
    pages = [cache.take(pages_for(len(prompt) + len(fed))) for prompt in prompts]
    for prompt, own in zip(prompts, pages, strict=True):
        _feed(plain, cache, prompt, own)

    def step(t: int) -> list[Tensor]:
        """The hidden states that follow token t of the image."""
        return [
            plain.feed(cache, [Chunk([fed[t]], len(prompt) + t, own)])
            for prompt, own in zip(prompts, pages, strict=True)
        ]

    for t in range(len(header) - 1):
        step(t)
    for row in range(len(codes)):
        seen = []
        for column in range(columns):
            hidden = step(len(header) - 1 + row * (columns + 1) + column)
            seen.append(guide(*map(plain.visual_logits, hidden), guidance)[0])
        if row + 1 < len(codes):
            step(len(header) - 1 + row * (columns + 1) + columns)  # EOL is forced: what is fed there is not compared
        yield torch.stack(seen)


@torch.inference_mode()
def by_steps(
    runner: ModelRunner, requests: Sequence[EngineRequest], codes: Sequence[Codes], *, guidance: float
) -> Iterator[Sequence[Tensor]]:
    """(columns, V) scores per image row for every request, through the steps of `runner`: all side by side.

    All images must have the same size, and nothing else may be in progress: slots and pages are taken here.
    """
    lm, state, cache = runner.lm, runner.state, runner.cache
    size = len(codes[0]), len(codes[0][0])
    sequences = begin(runner, requests, size=size, guidance=guidance)
    try:
        forced = torch.tensor([[*_block(lm, grid)[1], lm.ids.eoi] for grid in codes], device=lm.device)
        slots = torch.tensor([s.slot for s in sequences], device=lm.device)
        for _ in range(size[0]):
            seen = []
            for column in range(size[1] + 1):
                draw_step(runner, sequences)
                made = sequences[0].made - 1
                state.out[slots, made] = forced[:, made]
                state.token[2 * slots] = state.token[2 * slots + 1] = forced[:, made]
                if column < size[1]:
                    seen.append(torch.cat([runner.scores(i) for i in range(len(sequences))]))
            yield torch.stack(seen, dim=1).unbind()
    finally:
        for s in sequences:
            runner.end(s)
            for pages in s.pages:
                cache.release(pages)


def begin(
    runner: ModelRunner, requests: Sequence[EngineRequest], *, size: tuple[int, int], guidance: float
) -> list[SequenceState]:
    """Sequences in slots 0, 1, ... of `runner`, without an engine: prompts read, and an image of `size` (rows, columns)
    begun up to its header. `draw_step` takes its steps; whoever called this releases pages and slots."""
    lm, cache = runner.lm, runner.cache
    config = GenerationConfig(
        cfg_scale=guidance, image=Sampling(), text=Sampling(), size=size, max_new_tokens=0, single_image=True
    )
    sequences = []
    for i, request in enumerate(requests):
        s = SequenceState(index=i, request=request, config=config, emit=lambda _: None, slot=i)
        for stream, prompt in enumerate((request.conditional, request.unconditional)):
            s.pages[stream].extend(cache.take(pages_for(len(prompt) + block_length(*size))))
            _feed(lm, cache, prompt, s.pages[stream])
            s.lengths[stream] = len(prompt)
        runner.begin(s)
        runner.place(s)
        sequences.append(s)
    for token in lm.ids.header(*size)[:-1]:
        for s in sequences:
            s.doing = Feed(token, both=True)
        runner.step(sequences)
        for s in sequences:
            s.lengths = [n + 1 for n in s.lengths]
    for s in sequences:
        s.doing = draw = Draw(size)
        runner.open(s, draw)
    return sequences


def draw_step(runner: ModelRunner, sequences: Sequence[SequenceState], width: int = 1) -> None:
    """One step of images that are all in progress. Wider captured ones leave the host's lengths as they are."""
    runner.step(sequences, width)
    if width == 1 or not runner.captured:
        made = runner.made(sequences) if width > 1 else [s.made + 1 for s in sequences]
        for s, now in zip(sequences, made, strict=True):
            s.move(now - s.made)


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


def _plain(lm: LanguageModel) -> LanguageModel:
    """The same weights through plain torch, whatever a runner has built for `lm`."""
    return LanguageModel(lm.config, lm.weights, lm.ids)


def _feed(lm: LanguageModel, cache: KVCache, ids: Sequence[int], pages: Sequence[int]) -> Tensor:
    """Read one stream in chunks; its hidden states."""
    parts = [
        lm.feed(cache, [Chunk(ids[at : at + PREFILL_CHUNK], at, pages)]) for at in range(0, len(ids), PREFILL_CHUNK)
    ]
    return torch.cat(parts)


def _block(lm: LanguageModel, codes: Codes) -> tuple[list[int], list[int]]:
    """The ids of an image up to IMG, and those after it without EOI."""
    ids = lm.ids
    body = [token for row in codes for token in (*(ids.visual + code for code in row), ids.eol)]
    return list(ids.header(len(codes), len(codes[0]))), body[:-1]
