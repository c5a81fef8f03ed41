"""Guidance, filters and sampling: pure tensor functions over fp32 logits, one row per sequence.

The order is upstream's (`apply_differential_topk` in logits_processor.py): guidance, temperature, top-k with
ties at the threshold kept, top-p, softmax.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from emu_cog.request import Sampling

TIES = 64
"""Scores beyond the k-th that may equal it."""
SAMPLED_ROWS = 32
"""Rows of every pass that samples text, padding included."""


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance `u + s(c - u)` on (..., V) logits, exact at scales 0 and 1.

    Upstream guides log-softmaxes; that shifts each row by a constant, which no later operation can see. Of operations
    that are rounded one by one, so that no number depends on its place in a vector.
    """
    scale = torch.as_tensor(scale, dtype=conditional.dtype, device=conditional.device)
    difference = conditional - unconditional
    return torch.where(scale < 0.5, unconditional + scale * difference, conditional - difference * (1 - scale))


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """-inf below the k-th largest of each row of (N, V); ties with it stay. k 0 or k >= V keeps all."""
    if not 0 < k < scores.shape[-1]:
        return scores
    threshold = scores.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    return scores.masked_fill(scores < threshold, -torch.inf)


def keep_sorted(scores: Tensor, k: Tensor, p: Tensor | None) -> Tensor:
    """`keep_top_k`, then `keep_top_p`, of (N, V) for (N, 1) numbers on the device: int k in 1..V and fp32 p. Never
    synchronizes; sorts, unless a CPU sees that nothing is to be dropped; and adds up row by row, so that no operation
    divides its work by their number."""
    if p is None and scores.is_cpu and bool((k >= scores.shape[-1]).all()):
        return scores
    ordered, order = scores.sort(dim=-1, descending=True)
    threshold = ordered.gather(-1, k.long() - 1)
    below = scores < threshold
    if p is None:
        return scores.masked_fill(below, -torch.inf)
    kept = ordered.masked_fill(ordered < threshold, -torch.inf)
    outside = torch.cat([_outside_nucleus(*row) for row in zip(kept.split(1), p.split(1), strict=True)]) & (p < 1.0)
    return scores.masked_fill(below | outside.scatter(-1, order, outside), -torch.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """-inf outside each row's nucleus: the likeliest tokens up to and including the one that takes the sum over p, of
    equal ones the first."""
    if p >= 1.0:
        return scores
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    outside = _outside_nucleus(ordered, p)
    return scores.masked_fill(outside.scatter(-1, order, outside), -torch.inf)


def _outside_nucleus(ordered: Tensor, p: float | Tensor) -> Tensor:
    """Where descending scores (N, V) lie outside the nucleus; the token that crosses p stays."""
    outside = ordered.softmax(dim=-1).cumsum(dim=-1) > p
    return torch.cat([torch.zeros_like(outside[:, :1]), outside[:, :-1]], dim=-1)


def probabilities(scores: Tensor, sampling: Sampling) -> Tensor:
    """(N, V) guided or plain logits to the (N, V) distribution that is sampled."""
    scores = scores if sampling.temperature == 1.0 else scores / sampling.temperature
    return keep_top_p(keep_top_k(scores, sampling.top_k), sampling.top_p).softmax(dim=-1)


def sample_likely(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """`sample` of `probabilities` for (N, V) logits and (N,) numbers, from the top-k alone, so that V numbers are read
    once instead of sorted: (N,) tokens, and (N,) bool, False where TIES scores or more equal the k-th and the token may
    be wrong. `sampling.top_k` must be from 1 to V - TIES.

    Whatever N, sums are taken in passes of SAMPLED_ROWS rows: no result depends on the others.
    """
    k, rows = sampling.top_k, len(logits)
    if rows > SAMPLED_ROWS:
        parts = [
            sample_likely(some, sampling, numbers)
            for some, numbers in zip(logits.split(SAMPLED_ROWS), uniform.split(SAMPLED_ROWS), strict=True)
        ]
        tokens, complete = (torch.cat(part) for part in zip(*parts, strict=True))
        return tokens, complete
    scores, tokens = (logits / sampling.temperature).topk(k + TIES, dim=-1)
    complete = scores[:, -1] < scores[:, k - 1]
    scores = scores.masked_fill(scores < scores[:, k - 1 : k], -torch.inf)
    tokens, order = tokens.sort(dim=-1)
    scores = F.pad(scores.gather(-1, order), (0, 0, 0, SAMPLED_ROWS - rows))
    scores = keep_top_p(scores, sampling.top_p)
    places = sample(scores.softmax(dim=-1), F.pad(uniform, (0, SAMPLED_ROWS - rows)))[:rows]
    return tokens.gather(-1, places[:, None])[:, 0], complete


def sample(probs: Tensor, uniform: Tensor) -> Tensor:
    """Invert the cumulative distribution of (N, V) `probs` at (N,) `uniform` in [0, 1): (N,) int64 indices.

    The result depends on the sequence's own distribution and number alone, whatever else is in the batch. In double
    precision, so that 131072 small terms add up and no token of probability zero can be hit.
    """
    mass = probs.double().cumsum(dim=-1)
    target = uniform.double().unsqueeze(-1) * mass[:, -1:]
    return torch.searchsorted(mass, target, right=True).squeeze(-1).clamp_(max=probs.shape[-1] - 1)


class Uniforms:
    """The random numbers of one output: number `i` depends on (seed, i) only, on every machine.

    NumPy's Philox is counter-based and its stream is fixed by NumPy's compatibility policy.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.Generator(np.random.Philox(seed))
        self._numbers = np.empty(0)

    def take(self, start: int, count: int) -> Tensor:
        """Numbers start..start+count-1 as (count,) float64 in [0, 1)."""
        while len(self._numbers) < start + count:
            self._numbers = np.concatenate([self._numbers, self._rng.random(4096)])
        return torch.from_numpy(self._numbers[start : start + count].copy())
