"""Answers drawn for training: their two streams of tokens, and the likelihood of what was drawn, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emu_cog.config import Sampling
from emu_cog.jobs import Job
from emu_cog.sampling import guide
from emu_cog.tokens import TokenIds
from scripts.mini.language_model import LanguageModel


@dataclass(frozen=True)
class Attempt:
    """One answer as the engine drew it. `drawn` are the visual tokens, in order; `conditional` and `unconditional`
    the two streams, prompts included, `places` where each drawn token stands in both, `numbers` which of the answer's
    pictures it is part of."""

    conditional: tuple[int, ...]
    unconditional: tuple[int, ...]
    drawn: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    numbers: tuple[int, ...]
    guidance: float
    temperature: float


def attempt(job: Job, answer: Sequence[int], ids: TokenIds, *, guidance: float, sampling: Sampling) -> Attempt:
    """The streams of a job and its answer: the unconditional one sees the images alone, as the engine feeds it.

    ValueError where the sampling cuts tokens off: the likelihood reckoned here is that of the whole distribution.
    """
    if sampling.top_p < 1 or 0 < sampling.top_k < ids.visual_count:
        raise ValueError(f"{sampling} cuts some of the {ids.visual_count} visual tokens off")
    streams = list(job.conditional), list(job.unconditional)
    drawn, places, numbers, inside, number = [], [], [], False, -1
    for token in answer:
        inside = inside or token == ids.boi
        number += token == ids.boi
        for stream in streams if inside else streams[:1]:
            stream.append(token)
        if token >= ids.visual:
            drawn.append(token)
            places.append((len(streams[0]) - 1, len(streams[1]) - 1))
            numbers.append(number)
        inside = inside and token != ids.eoi
    return Attempt(
        conditional=tuple(streams[0]),
        unconditional=tuple(streams[1]),
        drawn=tuple(drawn),
        places=tuple(places),
        numbers=tuple(numbers),
        guidance=guidance,
        temperature=sampling.temperature,
    )


def log_likelihoods(model: LanguageModel, made: Sequence[Attempt], visual: int) -> list[Tensor]:
    """For each attempt the (drawn,) fp32 log-probabilities of its visual tokens, guided and tempered as drawn."""
    device = model.embed.device
    lines = [line for a in made for line in (a.conditional, a.unconditional)]
    length = max(map(len, lines))
    # What follows a line's end is never looked back at: the padding changes nothing.
    tokens = torch.tensor([[*line, *[0] * (length - len(line))] for line in lines], device=device)
    hidden = model.hidden(tokens)
    found = []
    for i, a in enumerate(made):
        at = torch.tensor(a.places, device=device) - 1  # a token's scores come from the one before it
        conditional, unconditional = (
            model.logits(hidden[(2 * i + s) * length + at[:, s]], first=visual) for s in range(2)
        )
        scores = guide(conditional, unconditional, a.guidance) / a.temperature
        chosen = torch.tensor(a.drawn, device=device)[:, None] - visual
        found.append(scores.log_softmax(-1).gather(1, chosen)[:, 0])
    return found
