"""What goes into the engine, what comes out of it, and how one sequence is written, from its prompt to its end.

A sequence is a pair of streams, conditional and unconditional, that step together inside pictures. The unconditional
stream sees its own prompt and every image block made so far, but none of the text in between.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from emu_cog.engine.window import Acceptance
from emu_cog.ops.sampling import TIES, Uniforms, probabilities, sample, sample_likely
from emu_cog.prompt.tokens import TokenIds, block_length, body_length
from emu_cog.request import Sampling

Reason = Literal["image", "eos", "limit", "context"]
Kind = Literal["text", "digit", "first digit"]
"""What is sampled from text logits: any token, or a digit of a size, the first of two not 0."""
Trace = Callable[[str, Tensor], None]
"""Called with the kind ("text", "digit" or "visual") and the (1, V) distribution of each sampled token."""
SMALLEST = (10, 10)
"""The least (rows, columns) that the model can choose: numbers of two digits."""
LARGEST = (99, 99)


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """One output: the ids of its two prompts and the seed of its random numbers."""

    conditional: tuple[int, ...]
    unconditional: tuple[int, ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How outputs are generated. `size` is (rows, columns); None lets the model choose with its first image.

    `max_new_tokens` bounds the sampled tokens: past it no new text token or image begins. None: only the context
    bounds them. With `single_image` a sequence ends with its first image, and gets one even if the model never starts
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
        return min(prompt + text + block_length(*(self.size or LARGEST)), context)


@dataclass(frozen=True)
class Prefilled:
    """The prompt of output `index` is in the cache."""

    index: int


@dataclass(frozen=True)
class Tokens:
    """The next ids of the answer of output `index`, in order, forced ones included. `ahead` tokens of its image are
    made besides, but follow others that are not."""

    index: int
    ids: tuple[int, ...]
    ahead: int = 0


@dataclass(frozen=True)
class Opened:
    """Output `index` begins an image of (rows, columns)."""

    index: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Ended:
    """Output `index` is done after `sampled` sampled tokens: its image is complete, the model ended its answer, or
    the token limit or the context is reached."""

    index: int
    reason: Reason
    sampled: int


@dataclass
class Stats:
    """Counters of one submission, the last of its events. `sampled` leaves out forced tokens; `steps` counts the passes
    after the prompt that any of its outputs took part in, `passes` those that made image tokens. Wall seconds:
    `prefill_seconds` of its own prompt's passes, `decode_seconds` from the end of the first prompt to the last token,
    in whatever company."""

    sampled: int = 0
    steps: int = 0
    passes: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


Event = Prefilled | Tokens | Opened | Ended | Stats


@dataclass(frozen=True)
class Feed:
    """Feed `token` to the conditional stream, or to `both`; the sequence waits until `room` tokens fit its pages. With
    `read` it gets what is sampled next."""

    token: int
    both: bool
    room: int = 1
    read: Kind | None = None


@dataclass(frozen=True)
class Draw:
    """Make the (rows, columns) image whose header up to IMG is written; IMG is not fed yet."""

    size: tuple[int, int]

    @property
    def total(self) -> int:
        """Tokens to be made."""
        return body_length(*self.size)

    @property
    def room(self) -> int:
        return 1 + self.total

    def forced(self, step: int) -> bool:
        """Whether token `step` is EOL or EOI."""
        columns = self.size[1]
        return step % (columns + 1) == columns

    def tokens(self, made: int) -> int:
        """Tokens in each stream when `made` of `total` are made."""
        return made

    def ahead(self, made: int) -> int:
        """Tokens made by then that others are to precede."""
        return 0


@dataclass(frozen=True)
class Choice:
    """A token, or a digit, that was sampled from the (1, V) text logits, or the (1, 10) of digits. It counts once the
    answer takes it."""

    kind: Kind
    token: int
    logits: Tensor


@dataclass(kw_only=True, eq=False)
class SequenceState:
    """One output in progress. `lengths` are the tokens in its streams, conditional and unconditional; `pages` theirs in
    the cache."""

    index: int
    request: EngineRequest
    config: GenerationConfig
    emit: Callable[[Event], None]
    trace: Trace | None = None
    lengths: list[int] = field(default_factory=lambda: [0, 0])
    pages: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    shared: int = 0
    """Pages of `pages` that belong to the prompt."""
    slot: int = -1
    size: tuple[int, int] | None = None
    sampled: int = 0
    images: int = 0
    doing: Feed | Draw | None = None
    """What the next step does for this sequence."""
    opened: bool = False
    """Whether the image that it is to draw has been begun."""
    made: int = 0
    """How far the image in progress is, of its Draw's `total`, as far as the host knows."""
    unread: int = 0
    """Passes over the image since then."""
    acceptance: Acceptance = field(default_factory=Acceptance)

    def __post_init__(self) -> None:
        self.uniforms = Uniforms(self.request.seed)
        self.size = self.config.size

    @property
    def forced(self) -> bool:
        """Whether the next token of the image in progress is EOL or EOI."""
        assert isinstance(self.doing, Draw)
        return self.doing.forced(self.made)

    def move(self, steps: int) -> None:
        """`steps` more of the image in progress are made, and in both streams."""
        assert isinstance(self.doing, Draw)
        before = self.doing.tokens(self.made)
        self.made += steps
        self.lengths = [length + self.doing.tokens(self.made) - before for length in self.lengths]

    def sampling(self, kind: Kind) -> Sampling:
        return self.config.text if kind == "text" else self.config.image

    def take(self, choice: Choice) -> int:
        """Count the choice as sampled."""
        if self.trace:
            probs = probabilities(choice.logits, self.sampling(choice.kind))
            self.trace(choice.kind.removeprefix("first "), probs)
        self.sampled += 1
        return choice.token


def choose(sequences: Sequence[SequenceState], kinds: Sequence[Kind], logits: Tensor, ids: TokenIds) -> list[Choice]:
    """The next sample of each sequence, from its row of the text logits (n, V): no one's depends on the others. The
    host waits for the device once, for all of them."""
    rows = list(logits.split(1))
    alike: dict[Sampling, list[int]] = {}
    uniforms = torch.cat([s.uniforms.take(s.sampled, 1) for s in sequences]).to(logits.device)
    tokens, complete = torch.zeros((2, len(rows)), dtype=torch.int64, device=logits.device).unbind()
    for i, (s, kind) in enumerate(zip(sequences, kinds, strict=True)):
        if kind != "text":
            rows[i] = rows[i][:, list(ids.digits)]
            rows[i][:, : kind == "first digit"] = -torch.inf
        elif 0 < s.config.text.top_k <= logits.shape[1] - TIES:
            alike.setdefault(s.config.text, []).append(i)
    for sampling, some in alike.items():
        found, sure = sample_likely(logits[some], sampling, uniforms[some])
        tokens[some], complete[some] = found, sure.long()
    choices = []
    for i, (token, whole) in enumerate(torch.stack([tokens, complete], dim=1).tolist()):
        if not whole:
            probs = probabilities(rows[i], sequences[i].sampling(kinds[i]))
            token = int(sample(probs, uniforms[i : i + 1]))
        choices.append(Choice(kinds[i], token, rows[i]))
    return choices


def answer(
    s: SequenceState, choice: Choice | None, ids: TokenIds, context: int
) -> Generator[Feed | Draw, Choice | None, Reason]:
    """Write sequence `s` after its prompt, which `choice` follows. Yields what is to be done next, is sent the choice
    that it asked for, and returns why it ended."""
    limit = s.config.max_new_tokens
    while True:
        # 1. The next text token, unless the answer must end here. A sequence that owes an image begins it instead.
        owes = s.config.single_image and s.images == 0
        reason: Reason | None = None
        token = ids.boi
        if limit is not None and s.sampled >= limit:
            reason = "limit"
        elif s.lengths[0] + 1 + (block_length(*(s.size or SMALLEST)) if owes else 0) > context:
            reason = "context"
        else:
            assert choice is not None
            token = s.take(choice)
            reason = "eos" if token == ids.eos else None
        if reason and not owes:
            if reason == "eos":
                s.emit(Tokens(s.index, (ids.eos,)))
            return reason
        # 2. Text. Upstream's logits processor feeds every EOI to the unconditional stream, even one within text.
        if not reason and token != ids.boi:
            s.emit(Tokens(s.index, (token,)))
            choice = yield Feed(token, both=token == ids.eoi, read="text")
            continue
        # 3. An image. One that is begun is always finished, so the whole of it must fit first.
        block = block_length(*(s.size or SMALLEST))
        if max(s.lengths) + block > context:
            return "context"
        if s.size is None:
            s.size = yield from _choose_size(s, ids, block)
        else:
            for place, header in enumerate(ids.header(*s.size)[:-1]):
                yield Feed(header, both=True, room=block - place)
        draw = Draw(s.size)
        if max(s.lengths) + draw.room > context:
            return "context"
        s.emit(Opened(s.index, s.size))
        s.emit(Tokens(s.index, ids.header(*s.size)))
        yield draw
        s.images += 1
        if s.config.single_image:
            return "image"
        choice = yield Feed(ids.eoi, both=True, read="text")


def _choose_size(s: SequenceState, ids: TokenIds, block: int) -> Generator[Feed | Draw, Choice | None, tuple[int, int]]:
    """Let the model write `h*w` matching [1-9][0-9]*[1-9][0-9], from unguided logits.

    Source: in_image_logits_processor in upstream's logits_processor.py.
    """
    digits: list[int] = []
    token = ids.boi
    for place in range(4):
        choice = yield Feed(token, both=True, room=block, read="digit" if place % 2 else "first digit")
        assert choice is not None
        digits.append(s.take(choice))
        token = ids.digits[digits[-1]]
        if place == 1:
            yield Feed(token, both=True)
            token = ids.star
    yield Feed(token, both=True)
    return 10 * digits[0] + digits[1], 10 * digits[2] + digits[3]
