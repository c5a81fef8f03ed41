"""What a run gives back: texts, pictures, the end of an output, progress, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

from emu_cog.prompt.segments import Text


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One finished picture. `number` counts the pictures of its output from 1; `settings` made it."""

    output: int
    number: int
    image: Image.Image
    codes: tuple[tuple[int, ...], ...]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """An output is done; `reason` is "image", "eos", "limit" or "context"."""

    output: int
    reason: str


@dataclass(frozen=True)
class Progress:
    """How far the current pictures are: `row` of `rows` done in picture `number` (counted from 1 an output)."""

    number: int
    row: int
    rows: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class RunStats:
    """What a request cost, in wall seconds. `tokens` are sampled ones; `size` is the last picture's (width, height).

    Requests generated side by side share the time of prefill and decoding: each counts all of it.
    """

    seed: int
    size: tuple[int, int] | None = None
    pictures: int = 0
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    vq_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.decode_seconds if self.decode_seconds else 0.0


Event = Text | Picture | Finished | RunStats
