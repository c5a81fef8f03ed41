"""The slow, obvious twin of the engine: it checks a finished answer token by token.

For every token it runs two separate, uncached passes of the complete conditional and unconditional sequence through the
plain model, masks the full vocabulary, and filters with explicit sorts. It shares no code with the engine, its cache,
its grammar or its sampling.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emu_cog.engine.sequence import GenerationConfig
from emu_cog.prompt.tokens import TokenIds
from emu_cog.request import Sampling


@dataclass(frozen=True)
class Step:
    """One token of the answer, and the full-vocabulary distribution that it must have been sampled from."""

    kind: str  # "text", "digit", "visual" or "forced"
    probs: Tensor
    token: int


def processed(scores: Tensor, sampling: Sampling) -> Tensor:
    """(V,) masked scores to probabilities: temperature, top-k (ties are kept), top-p."""
    scores = scores / sampling.temperature
    if 0 < sampling.top_k < int(torch.isfinite(scores).sum()):
        kth = sorted(scores.tolist(), reverse=True)[sampling.top_k - 1]
        scores = torch.where(scores < kth, -torch.inf, scores)
    probs = scores.softmax(-1)
    if sampling.top_p < 1.0:
        total = 0.0
        for i in probs.argsort(descending=True).tolist():
            if total > sampling.top_p:
                scores[i] = -torch.inf
            total += float(probs[i])
        probs = scores.softmax(-1)
    return probs


def judge(
    model: torch.nn.Module,
    ids: TokenIds,
    conditional: Sequence[int],
    unconditional: Sequence[int],
    answer: Sequence[int],
    config: GenerationConfig,
) -> list[Step]:
    """The distribution that each token of `answer` should have come from."""
    steps = []
    size = config.size
    for at in range(len(answer)):
        made = list(answer[:at])
        seen = [*unconditional, *_blocks(made, ids)]

        @torch.no_grad()
        def last_logits(tokens: list[int]) -> Tensor:
            return model(input_ids=torch.tensor([tokens])).logits[0, -1].float()

        c = last_logits([*conditional, *made])
        inside = _open_image(made, ids)
        if inside is None:
            c[ids.visual :] = -torch.inf
            steps.append(Step("text", processed(c, config.text), answer[at]))
            continue
        if ids.img not in inside:
            head = "".join("0123456789*"[[*ids.digits, ids.star].index(t)] for t in inside)
            allowed = _header_next(head, size, ids)
            if head and size is None and re.fullmatch(r"\d\d\*\d\d", head):
                size = (int(head[:2]), int(head[3:]))
            mask = torch.full_like(c, -torch.inf)
            mask[allowed] = 0.0
            kind = "digit" if len(allowed) > 1 else "forced"
            steps.append(Step(kind, processed(c + mask, config.image), answer[at]))
            continue
        head = inside[: inside.index(ids.img)]
        star = head.index(ids.star)
        rows, columns = (
            int("".join(str(ids.digits.index(t)) for t in part)) for part in (head[:star], head[star + 1 :])
        )
        size = config.size or (rows, columns)
        done = len(inside) - inside.index(ids.img) - 1
        mask = torch.full_like(c, -torch.inf)
        if done == rows * (columns + 1) - 1:
            mask[ids.eoi] = 0.0
            steps.append(Step("forced", (c + mask).softmax(-1), answer[at]))
        elif done % (columns + 1) == columns:
            mask[ids.eol] = 0.0
            steps.append(Step("forced", (c + mask).softmax(-1), answer[at]))
        else:
            u = last_logits(seen)
            guided = u.log_softmax(-1) + config.cfg_scale * (c.log_softmax(-1) - u.log_softmax(-1))
            mask[ids.visual : ids.vocab_size] = 0.0
            steps.append(Step("visual", processed(guided + mask, config.image), answer[at]))
    return steps


def _blocks(made: list[int], ids: TokenIds) -> list[int]:
    """Every image block from BOI to EOI, a last one that is still open, and every EOI within text: upstream's processor
    feeds each EOI to the unconditional stream, whatever precedes it."""
    kept, inside = [], False
    for token in made:
        inside = inside or token == ids.boi
        if inside or token == ids.eoi:
            kept.append(token)
        inside = inside and token != ids.eoi
    return kept


def _open_image(made: list[int], ids: TokenIds) -> list[int] | None:
    """The ids after the last BOI, or None if an EOI follows it."""
    if ids.boi not in made:
        return None
    after = made[len(made) - made[::-1].index(ids.boi) :]
    return None if ids.eoi in after else after


def _header_next(head: str, size: tuple[int, int] | None, ids: TokenIds) -> list[int]:
    if size is not None:
        wanted = f"{size[0]}*{size[1]}"
        return [ids.img] if head == wanted else [_token(wanted[len(head)], ids)]
    place = len(head)
    return (
        [ids.img] if place == 5 else [_token(c, ids) for c in ("123456789", "0123456789", "*")[[0, 1, 2, 0, 1][place]]]
    )


def _token(character: str, ids: TokenIds) -> int:
    return ids.star if character == "*" else ids.digits[int(character)]
