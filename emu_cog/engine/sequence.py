"""What goes into the engine, what comes out of it, and the state of one output in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from emu_cog.ops.sampling import Uniforms
from emu_cog.prompt.tokens import block_length
from emu_cog.request import Sampling

Reason = Literal["image", "eos", "limit", "context"]


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """One output: the ids of its two prompts and the seed of its random numbers."""

    conditional: tuple[int, ...]
    unconditional: tuple[int, ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What all requests of one batch share. `size` is (rows, columns); None lets the model choose with its first image.

    `max_new_tokens` bounds the sampled tokens: past it no new text token or image begins. None: only the context
    bounds them. With `single_image` a request ends with its first image, and gets one even if the model never starts
    one.
    """

    cfg_scale: float
    image: Sampling
    text: Sampling
    size: tuple[int, int] | None
    max_new_tokens: int | None
    single_image: bool

    def longest(self, prompt: int, context: int) -> int:
        """The most tokens a stream with a prompt of `prompt` tokens can reach, text and images included, at most
        `context`."""
        text = context if self.max_new_tokens is None else self.max_new_tokens  # 0 is a limit, too
        return min(prompt + text + block_length(*(self.size or (99, 99))), context)


@dataclass
class SequenceState:
    """One output in progress. `lengths` are the tokens in its two cache slots, conditional and unconditional."""

    uniforms: Uniforms
    lengths: list[int]
    size: tuple[int, int] | None
    state: Literal["text", "image", "ended"] = "text"
    sampled: int = 0
    images: int = 0


@dataclass(frozen=True)
class Tokens:
    """The next ids of the answer to request `index` (its place in the batch), in order, forced ones included."""

    index: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Opened:
    """Request `index` begins an image of (rows, columns)."""

    index: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Ended:
    """Request `index` is done after `sampled` sampled tokens: its image is complete, the model ended its answer, or
    the token limit or the context is reached."""

    index: int
    reason: Reason
    sampled: int


@dataclass
class Stats:
    """Counters of one batch, the last thing the engine yields. Seconds are wall time, without the time the consumer
    spends between events; `sampled` leaves out forced tokens."""

    sampled: int = 0
    steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


Event = Tokens | Opened | Ended | Stats
