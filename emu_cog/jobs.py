"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from emu_cog.config import Sampling
from emu_cog.tokens import block_length

Reason = Literal["image", "eos", "limit", "context"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One output: the ids of its two prompts and the seed of its random numbers."""

    conditional: tuple[int, ...]
    unconditional: tuple[int, ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What holds for every job of a run. `size` is (rows, columns); None lets the model choose with its first image.

    `max_new_tokens` bounds the sampled tokens at which text may go on or an image may start; None: the context does.
    With `single_image` a job ends with its first image, and gets one even if the model never asks for it.
    """

    guidance: float
    image: Sampling
    text: Sampling
    size: tuple[int, int] | None
    max_new_tokens: int | None
    single_image: bool

    def longest(self, prompt: int, context: int) -> int:
        """Tokens that a stream of a `prompt` of so many may come to, text and images together, at most `context`."""
        text = context if self.max_new_tokens is None else self.max_new_tokens  # 0 is a limit, too
        return min(prompt + text + block_length(*(self.size or (99, 99))), context)


@dataclass(frozen=True)
class Tokens:
    """The next ids of job `job`'s answer, in order; forced ones included."""

    job: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Opened:
    """Job `job` begins an image of (rows, columns)."""

    job: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Ended:
    """Job `job` is done: its image is there, the model said so, or the token limit or the context is reached."""

    job: int
    reason: Reason


Event = Tokens | Opened | Ended


@dataclass
class Stats:
    """Counters of one run. Seconds are wall time; `sampled` leaves out forced tokens."""

    sampled: int = 0
    steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def add(self, other: Stats) -> None:
        """Count `other` in."""
        self.sampled += other.sampled
        self.steps += other.steps
        self.prefill_seconds += other.prefill_seconds
        self.decode_seconds += other.decode_seconds
