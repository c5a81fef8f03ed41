"""How many tokens of a picture a pass draws: what a wider pass costs, against how many of its tokens are likely kept.

It changes the pace and never the picture, so it may follow from measured times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FIRST_CHANCE = 0.7
"""Chance that a draft is right, before a picture has shown its own: the trained miniature's."""
MEMORY = 0.97
"""What of the passes before counts beside the next: about the last 30 matter."""


@dataclass
class Acceptance:
    """How the drafts of one picture fare: a decaying mean over its passes."""

    passes: float = 8.0
    chance: float = FIRST_CHANCE
    """That a draft is right, where those before it are."""

    def add(self, tokens: int, *, passes: int, width: int) -> None:
        """Count `passes` passes of `width` tokens that kept `tokens` together."""
        if width == 1:
            return  # no draft was tested
        keep = MEMORY**passes
        mean = expected_tokens(self.chance, width)
        mean = (mean * self.passes * keep + tokens) / (self.passes * keep + passes)
        self.passes = self.passes * keep + passes
        self.chance = _chance(mean, width)


def expected_tokens(chance: float, width: int) -> float:
    """Mean tokens that a pass of `width` keeps where each draft is right with `chance`: the first is always kept."""
    return float(width) if chance >= 1 else (1 - chance**width) / (1 - chance)


def _chance(tokens: float, width: int) -> float:
    """The inverse of `expected_tokens`, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, width) < tokens else (low, middle)
    return low


def best_width(seconds: Mapping[int, float], chances: Sequence[float]) -> int:
    """The width with the most expected tokens per second, of those whose passes take `seconds`, for pictures with such
    chances."""
    return max(seconds, key=lambda width: sum(expected_tokens(c, width) for c in chances) / seconds[width])
