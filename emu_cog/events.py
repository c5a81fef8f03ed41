"""What a request gives back: texts, pictures, the end of each output, its progress and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """How much of a whole request is done: 0.0 before its prompt is read, never less than before, 1.0 at its end."""

    done: float


PROMPT_SHARE = 0.02
"""Of an output's progress, for reading its prompt: about one of 64 rows. With one photo that takes 1.3 s on an H100, a
row of 64 tokens 1.4 s (the README's table of speed)."""


class ProgressMeter:
    """Turns what the outputs of a request have made so far into Progress.

    Outputs count alike, whether they are made side by side or in turn. After the prompt, an output's share is
    - for a single picture, the visual tokens made of all in the picture; text before it is not counted;
    - for a sequence, whose number of pictures is not known beforehand, the tokens made of the most that
      max_new_tokens and the context allow. A sequence that ends earlier, as most do, jumps to its end.
    """

    def __init__(
        self, report: Callable[[Progress], None] | None, *, limits: Sequence[int | None], first_visual: int
    ) -> None:
        """`limits` has for every output the most tokens of a sequence, or None for a single picture; ids from
        `first_visual` on are visual tokens."""
        self._report, self._first_visual = report, first_visual
        self._single = [limit is None for limit in limits]
        self._whole = list(limits)
        self._made = [0] * len(limits)
        self._shares = [0.0] * len(limits)
        self._tell()

    def repeat(self) -> None:
        """Report again where nothing has happened: whoever is told may raise to end the request."""
        self._tell()

    def prompt_read(self, output: int) -> None:
        self._advance(output, PROMPT_SHARE)

    def opened(self, output: int, size: tuple[int, int]) -> None:
        """`output` begins a picture of (rows, columns)."""
        if self._single[output]:
            self._whole[output], self._made[output] = size[0] * size[1], 0

    def tokens(self, output: int, ids: Sequence[int], ahead: int = 0) -> None:
        """`output` has made `ids`, and `ahead` visual tokens that come later in reading order."""
        single, whole = self._single[output], self._whole[output]
        self._made[output] += sum(token >= self._first_visual for token in ids) if single else len(ids)
        if whole:
            self._advance(output, PROMPT_SHARE + (1 - PROMPT_SHARE) * min((self._made[output] + ahead) / whole, 1.0))

    def ended(self, output: int) -> None:
        self._advance(output, 1.0)

    def _advance(self, output: int, share: float) -> None:
        if share > self._shares[output]:
            self._shares[output] = share
            self._tell()

    def _tell(self) -> None:
        if self._report:
            self._report(Progress(sum(self._shares) / len(self._shares)))


@dataclass(frozen=True, kw_only=True)
class RunStats:
    """What a request cost, in wall seconds. `tokens` are sampled ones, `passes` the forward passes that made image
    tokens, 0 where that is not known; `size` is the last picture's (width, height); `clipped` is the requested aspect
    ratio where pictures of that area can't have it.

    Requests generated side by side share the time of prefill and decoding: each counts all of it.
    """

    seed: int
    size: tuple[int, int] | None = None
    clipped: str | None = None
    pictures: int = 0
    tokens: int = 0
    passes: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    vq_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.decode_seconds if self.decode_seconds else 0.0


Event = Text | Picture | Finished | RunStats
