"""Prompts in, tokens out: prefill, then a decode loop over a batch of outputs. Sees tensors and the image grammar,
never text or files.

Every output is a pair of cache slots that step together: slot 2i holds output i's conditional stream, slot 2i+1 its
unconditional one. The unconditional stream sees its own prompt and every image block made so far, but none of the text
in between. The loop alternates between two states: text (one stream, the host reads every token) and image (both
streams; the grammar is known in advance, so the host synchronizes with the device only once per image row).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from emu_cog.engine import image_schedule
from emu_cog.engine.image_schedule import Trace
from emu_cog.engine.prefill import prefill
from emu_cog.engine.runner import ModelRunner
from emu_cog.engine.sequence import (
    Ended,
    EngineRequest,
    Event,
    GenerationConfig,
    Opened,
    Reason,
    SequenceState,
    Stats,
    Tokens,
)
from emu_cog.model.kv_cache import KVCache
from emu_cog.model.qwen3 import LanguageModel
from emu_cog.ops.sampling import Uniforms, probabilities, sample
from emu_cog.prompt.tokens import block_length, body_length
from emu_cog.request import Sampling

CACHE_STEP = 256
"""Where its size is not known in advance, the cache grows by this many tokens at a time."""


class Engine:
    """Generates for a batch of requests. Not re-entrant: one `generate` at a time.

    `runner` runs single-token steps as captured graphs; without one every pass goes through the model's modules.
    """

    def __init__(self, lm: LanguageModel, runner: ModelRunner | None = None) -> None:
        self.lm, self.ids, self.runner = lm, lm.ids, runner
        self._cache: KVCache | None = None

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[EngineRequest], config: GenerationConfig, *, trace: Trace | None = None
    ) -> Iterator[Event]:
        """Yield the batch's events as they happen, and its Stats last.

        `trace(kind, probs)` is called with each sampled distribution: kind "text", "digit" or "visual", probs (N, V)
        over the ids legal there (or the ten digits).
        """
        batch = _Batch(self, requests, config, trace)
        started = time.perf_counter()
        for event in batch.events():
            # Time the consumer spends between two events (on files, on pixels) is not decoding time.
            batch.stats.decode_seconds += time.perf_counter() - started
            yield event
            started = time.perf_counter()
        batch.stats.decode_seconds -= batch.stats.prefill_seconds
        yield batch.stats

    def cache(self, *, rows: int, capacity: int) -> KVCache:
        """The engine's cache, reallocated only if the current one is too small or has another number of slots."""
        if self._cache is None or self._cache.rows != rows or self._cache.capacity < capacity:
            self._cache = None  # free the old one first
            self._cache = self.lm.new_cache(rows=rows, capacity=capacity)
        return self._cache

    def free(self) -> None:
        """Release the cache's memory; the next `generate` allocates a new one."""
        self._cache = None


class _Batch:
    """The state of one `generate` call."""

    def __init__(
        self, engine: Engine, requests: Sequence[EngineRequest], config: GenerationConfig, trace: Trace | None
    ) -> None:
        self.lm, self.ids = engine.lm, engine.lm.ids
        self.requests, self.config, self.trace = requests, config, trace
        self.runner = engine.runner if 2 * len(requests) <= ModelRunner.MAX_ROWS else None
        self.stats = Stats()
        self.sequences = [
            SequenceState(Uniforms(request.seed), [len(request.conditional), len(request.unconditional)], config.size)
            for request in requests
        ]
        longest = max(max(sequence.lengths) for sequence in self.sequences)
        capacity = longest + self._block(config.size) + CACHE_STEP
        if self.runner:
            # A captured graph holds the cache's address, so the cache can't grow: allocate for the longest answer.
            capacity = max(capacity, config.longest(longest, self.lm.context))
        self.cache = engine.cache(rows=2 * len(requests), capacity=_round_up(capacity))

    # -- 1. the main loop -----------------------------------------------------------------------------------

    def events(self) -> Iterator[Event]:
        started = time.perf_counter()
        self.hidden = prefill(self.lm, self.cache, self.requests)
        if self.lm.device.type == "cuda":
            torch.cuda.synchronize(self.lm.device)
        self.stats.prefill_seconds = time.perf_counter() - started
        while any(sequence.state != "ended" for sequence in self.sequences):
            yield from self._write_text()
            if any(sequence.state == "image" for sequence in self.sequences):
                yield from self._make_images()

    def _write_text(self) -> Iterator[Event]:
        """Sample text for every sequence in text mode until each has begun an image or ended."""
        while True:
            for i, sequence in enumerate(self.sequences):
                if sequence.state == "text" and (reason := self._exhausted(sequence)):
                    yield from self._finish_or_force(i, sequence, reason)
            if not any(sequence.state == "text" for sequence in self.sequences):
                return
            chosen = self._sample_text()
            chunks: list[tuple[int, ...] | None] = [None] * len(self.sequences)
            for i, sequence in enumerate(self.sequences):
                if sequence.state != "text":
                    continue
                self._count(sequence)
                if chosen[i] == self.ids.eos:
                    yield from self._finish_or_force(i, sequence, "eos")
                elif chosen[i] == self.ids.boi:
                    yield from self._open(i, sequence)
                else:
                    yield Tokens(i, (chosen[i],))
                    chunks[i] = (chosen[i],)
            if any(chunks):
                # Upstream's logits processor feeds every EOI to the unconditional stream, even one sampled within text.
                self.hidden = self._feed(chunks, both=[chunk == (self.ids.eoi,) for chunk in chunks])

    def _make_images(self) -> Iterator[Event]:
        """Generate one image for every sequence in image mode, all in lockstep."""
        yield from self._write_headers()
        yield from self._write_codes()
        chunks: list[tuple[int, ...] | None] = [None] * len(self.sequences)
        for i, sequence in enumerate(self.sequences):
            if sequence.state != "image":
                continue
            sequence.images += 1
            if self.config.single_image:
                yield self._ended(i, sequence, "image")
            else:
                sequence.state = "text"
                chunks[i] = (self.ids.eoi,)
        if any(chunks):
            self.hidden = self._feed(chunks, both=True)

    # -- 2. stop conditions ----------------------------------------------------------------------------------

    def _exhausted(self, sequence: SequenceState) -> Reason | None:
        """The reason why `sequence` must not sample another text token, or None."""
        limit = self.config.max_new_tokens
        if limit is not None and sequence.sampled >= limit:
            return "limit"
        owed = self._block(sequence.size) if self._owes_image(sequence) else 0
        return "context" if sequence.lengths[0] + 1 + owed > self.lm.context else None

    def _owes_image(self, sequence: SequenceState) -> bool:
        return self.config.single_image and sequence.images == 0

    def _finish_or_force(self, i: int, sequence: SequenceState, reason: Reason) -> Iterator[Event]:
        """End `sequence`, unless it still owes an image: then begin that image on the model's behalf."""
        if self._owes_image(sequence):
            yield from self._open(i, sequence)
            return
        if reason == "eos":
            yield Tokens(i, (self.ids.eos,))
        yield self._ended(i, sequence, reason)

    def _open(self, i: int, sequence: SequenceState) -> Iterator[Event]:
        """Switch `sequence` to image mode if the whole image fits the context: an image begun is always finished."""
        if max(sequence.lengths) + self._block(sequence.size) > self.lm.context:
            yield self._ended(i, sequence, "context")
        else:
            sequence.state = "image"

    def _ended(self, i: int, sequence: SequenceState, reason: Reason) -> Ended:
        sequence.state = "ended"
        return Ended(i, reason, sequence.sampled)

    def _block(self, size: tuple[int, int] | None) -> int:
        """Tokens of an image block of `size`, or of the smallest size the model can choose if it is not known yet."""
        return block_length(*(size or (10, 10)))

    # -- 3. host-driven steps ---------------------------------------------------------------------------------

    def _feed(self, chunks: Sequence[tuple[int, ...] | None], *, both: bool | Sequence[bool]) -> Tensor:
        """Feed each sequence its chunk (all chunks have one length; None: the sequence is inactive), to both streams or
        to the conditional one alone. Returns the conditional hidden states after the last token, (requests, hidden).

        Inactive slots are written beyond their length, where nothing reads before real tokens overwrite it.
        """
        length = next(len(chunk) for chunk in chunks if chunk)
        both = [both] * len(chunks) if isinstance(both, bool) else both
        if self.runner:
            # Token by token: the modules' matrix products would depend slightly on the number of sequences.
            for place in range(length):
                hidden = self._feed_one(self.runner, [chunk[place] if chunk else None for chunk in chunks], both)
            return hidden
        stride = 1 if any(both) else 2
        lines = [list(chunk or (self.ids.pad,) * length) for chunk in chunks for _ in range(2 // stride)]
        starts = [n for sequence in self.sequences for n in sequence.lengths[: 2 // stride]]
        self._reserve(max(starts) + length)
        hidden = self.lm.forward(
            torch.tensor(lines, device=self.lm.device),
            torch.tensor(starts, device=self.lm.device),
            self.cache,
            rows=slice(0, None, stride),
            filled=max(starts) + length,
        )
        for sequence, chunk, pair in zip(self.sequences, chunks, both, strict=True):
            for stream in range(1 + pair) if chunk else ():
                sequence.lengths[stream] += length
        self.stats.steps += 1
        return hidden[:: 2 // stride, -1]

    def _feed_one(self, runner: ModelRunner, tokens: Sequence[int | None], both: Sequence[bool]) -> Tensor:
        """`_feed` for one token per sequence, as a captured step over all slots. Inactive slots are written beyond
        their length, where nothing reads before real tokens overwrite it."""
        starts = [n for sequence in self.sequences for n in sequence.lengths]
        self._reserve(max(starts) + 1)
        fed = [self.ids.pad if token is None else token for token in tokens for _ in range(2)]
        hidden = runner.text(self.cache, fed, starts)
        for sequence, token, pair in zip(self.sequences, tokens, both, strict=True):
            for stream in range(2 if pair else 1) if token is not None else ():
                sequence.lengths[stream] += 1
        self.stats.steps += 1
        return hidden[::2]

    def _reserve(self, tokens: int) -> None:
        if tokens > self.cache.capacity:
            self.cache.grow(_round_up(tokens))

    def _sample_text(self) -> list[int]:
        return self._sample("text", self._text_logits(self.hidden), self.config.text)

    def _text_logits(self, hidden: Tensor) -> Tensor:
        return (self.runner or self.lm).text_logits(hidden)

    def _sample(self, kind: str, logits: Tensor, sampling: Sampling) -> list[int]:
        """One sample per sequence from (requests, V) logits, read by the host; inactive sequences are sampled too."""
        probs = probabilities(logits, sampling)
        if self.trace:
            self.trace(kind, probs)
        uniform = torch.cat([sequence.uniforms.take(sequence.sampled, 1) for sequence in self.sequences])
        return sample(probs, uniform.to(probs.device)).tolist()

    def _count(self, sequence: SequenceState, sampled: int = 1) -> None:
        sequence.sampled += sampled
        self.stats.sampled += sampled

    # -- 4. images -------------------------------------------------------------------------------------------

    def _write_headers(self) -> Iterator[Event]:
        """BOI, the size's digits and IMG. IMG is left for the first step of `_write_codes` to feed."""
        image = [sequence.state == "image" for sequence in self.sequences]
        unsized = [on and sequence.size is None for on, sequence in zip(image, self.sequences, strict=True)]
        sized = [on and not new for on, new in zip(image, unsized, strict=True)]
        if any(unsized):
            self._choose_sizes(unsized)
        if any(sized):
            self._feed(
                [
                    self.ids.header(*sequence.size)[:-1] if on and sequence.size else None
                    for on, sequence in zip(sized, self.sequences, strict=True)
                ],
                both=True,
            )
        for i, sequence in enumerate(self.sequences):
            if not image[i] or sequence.size is None:
                continue
            rows, columns = sequence.size
            if max(sequence.lengths) + 1 + body_length(rows, columns) > self.lm.context:
                yield self._ended(i, sequence, "context")
            else:
                yield Opened(i, sequence.size)
                yield Tokens(i, self.ids.header(rows, columns))

    def _choose_sizes(self, choosing: Sequence[bool]) -> None:
        """Let the model write `h*w` matching [1-9][0-9]*[1-9][0-9], from unguided logits.

        Source: in_image_logits_processor in upstream's logits_processor.py.
        """
        numbers: list[list[int]] = [[] for _ in self.sequences]
        fed: list[tuple[int, ...]] = [(self.ids.boi,)] * len(self.sequences)
        for place in range(4):
            hidden = self._feed([f if on else None for f, on in zip(fed, choosing, strict=True)], both=True)
            logits = self._text_logits(hidden)[:, list(self.ids.digits)]
            if place % 2 == 0:
                logits[:, 0] = -torch.inf  # no leading zero
            chosen = self._sample("digit", logits, self.config.image)
            for i, sequence in enumerate(self.sequences):
                if choosing[i]:
                    self._count(sequence)
                    numbers[i].append(chosen[i])
            star = (self.ids.star,) if place == 1 else ()
            fed = [(self.ids.digits[digit], *star) for digit in chosen]
        self._feed([f if on else None for f, on in zip(fed, choosing, strict=True)], both=True)
        for sequence, digits, on in zip(self.sequences, numbers, choosing, strict=True):
            if on:
                sequence.size = (10 * digits[0] + digits[1], 10 * digits[2] + digits[3])

    def _write_codes(self) -> Iterator[Event]:
        """The rest of every opened image, row by row."""
        grids = [sequence.size if sequence.state == "image" else None for sequence in self.sequences]
        if not any(grids):
            return
        plan = image_schedule.schedule(
            grids, [(sequence.uniforms, sequence.sampled) for sequence in self.sequences], self.ids
        )
        lengths = [n for sequence in self.sequences for n in sequence.lengths]
        longest = max(max(sequence.lengths) + made for sequence, made in zip(self.sequences, plan.lengths, strict=True))
        self._reserve(longest + 1)  # ended sequences are fed too, at their end, where nothing reads
        rows = image_schedule.run(
            self.lm,
            self.cache,
            plan,
            lengths,
            cfg_scale=self.config.cfg_scale,
            sampling=self.config.image,
            trace=self.trace,
            runner=self.runner,
        )
        for row in rows:
            for i, ids in enumerate(row):
                if ids:
                    self._count(self.sequences[i], sum(token >= self.ids.visual for token in ids))
                    yield Tokens(i, ids)
        self.stats.steps += plan.steps
        for sequence, made in zip(self.sequences, plan.lengths, strict=True):
            sequence.lengths = [n + made for n in sequence.lengths]


def _round_up(tokens: int) -> int:
    return -(-tokens // CACHE_STEP) * CACHE_STEP
