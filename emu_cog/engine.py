"""Tokens out of prompts: slots, prefill and the decode loop. Knows tensors and the image grammar, never text or files.

Every output is a pair of slots that step together: row 2i of the cache is output i's conditional stream, row 2i+1
its unconditional one. The unconditional stream sees its own prompt and every image block made so far, nothing of
the text between. The loop has two states: text (one stream, the host reads every token) and image (both streams,
the grammar is known ahead, the host looks in once a row).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from emu_cog import image_loop
from emu_cog.config import Sampling
from emu_cog.image_loop import Trace
from emu_cog.jobs import Ended, Event, Job, Opened, Reason, Rules, Stats, Tokens
from emu_cog.lm import LanguageModel, SlotCache
from emu_cog.prefill import prefill
from emu_cog.sampling import Uniforms, draw, probabilities
from emu_cog.steps import Steps
from emu_cog.tokens import block_length, body_length

CACHE_STEP = 256
"""The cache grows in steps of this many tokens where its size was not known ahead."""


@dataclass
class Lane:
    """One job in the making. `lengths` are the tokens in its two cache rows."""

    uniforms: Uniforms
    lengths: list[int]
    size: tuple[int, int] | None
    state: Literal["text", "image", "ended"] = "text"
    sampled: int = 0
    images: int = 0


class Engine:
    """Generates for a list of jobs in one batch. Not re-entrant: one `generate` at a time."""

    def __init__(self, lm: LanguageModel, steps: Steps | None = None) -> None:
        self.lm, self.ids, self.steps = lm, lm.ids, steps
        self.stats = Stats()
        self._cache: SlotCache | None = None

    @torch.inference_mode()
    def generate(self, jobs: Sequence[Job], rules: Rules, *, trace: Trace | None = None) -> Iterator[Event]:
        """Yield the jobs' events as they come about. `trace(kind, probs)` sees each sampled distribution:
        kind "text", "digit" or "visual", probs (N, V) over the legal half (or the ten digits)."""
        run = _Run(self, jobs, rules, trace)
        self.stats = run.stats
        started = time.perf_counter()
        for event in run.events():
            # What the consumer does between two events (files, pixels) is not decoding time.
            run.stats.decode_seconds += time.perf_counter() - started
            yield event
            started = time.perf_counter()
        run.stats.decode_seconds -= run.stats.prefill_seconds

    def cache(self, *, rows: int, capacity: int) -> SlotCache:
        """The engine's cache, made anew only when what is there is too small or of another width."""
        if self._cache is None or self._cache.rows != rows or self._cache.capacity < capacity:
            self._cache = None  # free the old one first
            self._cache = self.lm.new_cache(rows=rows, capacity=capacity)
        return self._cache

    def free(self) -> None:
        """Give the cache's memory back; the next `generate` makes a new one."""
        self._cache = None


class _Run:
    """The state of one `generate` call."""

    def __init__(self, engine: Engine, jobs: Sequence[Job], rules: Rules, trace: Trace | None) -> None:
        self.lm, self.ids = engine.lm, engine.lm.ids
        self.jobs, self.rules, self.trace = jobs, rules, trace
        self.steps = engine.steps if 2 * len(jobs) <= Steps.MAX_ROWS else None
        self.stats = Stats()
        self.lanes = [
            Lane(Uniforms(job.seed), [len(job.conditional), len(job.unconditional)], rules.size) for job in jobs
        ]
        longest = max(max(lane.lengths) for lane in self.lanes)
        capacity = longest + self._block(rules.size) + CACHE_STEP
        if self.steps:
            # A recording holds the cache's address: make room for the longest answer at once.
            capacity = max(capacity, rules.longest(longest, self.lm.context))
        self.cache = engine.cache(rows=2 * len(jobs), capacity=_round_up(capacity))

    # -- 1. the order of things ------------------------------------------------------------------------------

    def events(self) -> Iterator[Event]:
        started = time.perf_counter()
        self.hidden = prefill(self.lm, self.cache, self.jobs)
        if self.lm.device.type == "cuda":
            torch.cuda.synchronize(self.lm.device)
        self.stats.prefill_seconds = time.perf_counter() - started
        while any(lane.state != "ended" for lane in self.lanes):
            yield from self._write_text()
            if any(lane.state == "image" for lane in self.lanes):
                yield from self._make_images()

    def _write_text(self) -> Iterator[Event]:
        """Sample text for every lane in text mode until each has opened an image or ended."""
        while True:
            for i, lane in enumerate(self.lanes):
                if lane.state == "text" and (reason := self._exhausted(lane)):
                    yield from self._finish_or_force(i, lane, reason)
            if not any(lane.state == "text" for lane in self.lanes):
                return
            chosen = self._sample_text()
            chunks: list[tuple[int, ...] | None] = [None] * len(self.lanes)
            for i, lane in enumerate(self.lanes):
                if lane.state != "text":
                    continue
                self._count(lane)
                if chosen[i] == self.ids.eos:
                    yield from self._finish_or_force(i, lane, "eos")
                elif chosen[i] == self.ids.boi:
                    yield from self._open(i, lane)
                else:
                    yield Tokens(i, (chosen[i],))
                    chunks[i] = (chosen[i],)
            if any(chunks):
                # Upstream's processor shows the unconditional stream every EOI, also one that stands amid text.
                self.hidden = self._feed(chunks, both=[chunk == (self.ids.eoi,) for chunk in chunks])

    def _make_images(self) -> Iterator[Event]:
        """Make one image for every lane in image mode; all of them step together."""
        yield from self._write_headers()
        yield from self._write_codes()
        chunks: list[tuple[int, ...] | None] = [None] * len(self.lanes)
        for i, lane in enumerate(self.lanes):
            if lane.state != "image":
                continue
            lane.images += 1
            if self.rules.single_image:
                lane.state = "ended"
                yield Ended(i, "image")
            else:
                lane.state = "text"
                chunks[i] = (self.ids.eoi,)
        if any(chunks):
            self.hidden = self._feed(chunks, both=True)

    # -- 2. stop conditions ----------------------------------------------------------------------------------

    def _exhausted(self, lane: Lane) -> Reason | None:
        """Why `lane` may not sample another text token, if it may not."""
        limit = self.rules.max_new_tokens
        if limit is not None and lane.sampled >= limit:
            return "limit"
        owed = self._block(lane.size) if self._owes_image(lane) else 0
        return "context" if lane.lengths[0] + 1 + owed > self.lm.context else None

    def _owes_image(self, lane: Lane) -> bool:
        return self.rules.single_image and lane.images == 0

    def _finish_or_force(self, i: int, lane: Lane, reason: Reason) -> Iterator[Event]:
        """End `lane`, unless it owes an image: then open the image in the model's stead."""
        if self._owes_image(lane):
            yield from self._open(i, lane)
            return
        lane.state = "ended"
        if reason == "eos":
            yield Tokens(i, (self.ids.eos,))
        yield Ended(i, reason)

    def _open(self, i: int, lane: Lane) -> Iterator[Event]:
        """Put `lane` in image mode if the whole block fits the context: an image begun is always finished."""
        if max(lane.lengths) + self._block(lane.size) > self.lm.context:
            lane.state = "ended"
            yield Ended(i, "context")
        else:
            lane.state = "image"

    def _block(self, size: tuple[int, int] | None) -> int:
        """Tokens of an image block of `size`; of the smallest the model can choose where it is not known yet."""
        return block_length(*(size or (10, 10)))

    # -- 3. steps led by the host ----------------------------------------------------------------------------

    def _feed(self, chunks: Sequence[tuple[int, ...] | None], *, both: bool | Sequence[bool]) -> Tensor:
        """Feed each lane its chunk (all of one length; None: the lane stays where it is), to both streams or to the
        conditional one. Returns the conditional hidden states after the last token, (jobs, hidden).

        What is written beyond a row's length, for lanes or streams that sit this one out, is never read.
        """
        length = next(len(chunk) for chunk in chunks if chunk)
        both = [both] * len(chunks) if isinstance(both, bool) else both
        if self.steps:
            # One by one: the modules' products would depend on how many lanes there are, if ever so little.
            for place in range(length):
                hidden = self._feed_one(self.steps, [chunk[place] if chunk else None for chunk in chunks], both)
            return hidden
        stride = 1 if any(both) else 2
        lines = [list(chunk or (self.ids.pad,) * length) for chunk in chunks for _ in range(2 // stride)]
        starts = [n for lane in self.lanes for n in lane.lengths[: 2 // stride]]
        self._reserve(max(starts) + length)
        hidden = self.lm.forward(
            torch.tensor(lines, device=self.lm.device),
            torch.tensor(starts, device=self.lm.device),
            self.cache,
            rows=slice(0, None, stride),
            filled=max(starts) + length,
        )
        for lane, chunk, pair in zip(self.lanes, chunks, both, strict=True):
            for stream in range(1 + pair) if chunk else ():
                lane.lengths[stream] += length
        self.stats.steps += 1
        return hidden[:: 2 // stride, -1]

    def _feed_one(self, steps: Steps, tokens: Sequence[int | None], both: Sequence[bool]) -> Tensor:
        """`_feed` for one token a lane, by a recorded step: it feeds all rows, and those that sit this one out are
        written beyond their length, where nothing reads before real tokens overwrite them."""
        starts = [n for lane in self.lanes for n in lane.lengths]
        self._reserve(max(starts) + 1)
        fed = [self.ids.pad if token is None else token for token in tokens for _ in range(2)]
        hidden = steps.text(self.cache, fed, starts)
        for lane, token, pair in zip(self.lanes, tokens, both, strict=True):
            for stream in range(2 if pair else 1) if token is not None else ():
                lane.lengths[stream] += 1
        self.stats.steps += 1
        return hidden[::2]

    def _reserve(self, tokens: int) -> None:
        if tokens > self.cache.capacity:
            self.cache.grow(_round_up(tokens))

    def _sample_text(self) -> list[int]:
        return self._sample("text", self._text_logits(self.hidden), self.rules.text)

    def _text_logits(self, hidden: Tensor) -> Tensor:
        return (self.steps or self.lm).text_logits(hidden)

    def _sample(self, kind: str, logits: Tensor, sampling: Sampling) -> list[int]:
        """One draw a lane from (jobs, V) logits, read by the host. Lanes that sit this one out give a number too."""
        probs = probabilities(logits, sampling)
        if self.trace:
            self.trace(kind, probs)
        uniform = torch.cat([lane.uniforms.take(lane.sampled, 1) for lane in self.lanes])
        return draw(probs, uniform.to(probs.device)).tolist()

    def _count(self, lane: Lane, sampled: int = 1) -> None:
        lane.sampled += sampled
        self.stats.sampled += sampled

    # -- 4. images -------------------------------------------------------------------------------------------

    def _write_headers(self) -> Iterator[Event]:
        """BOI, the size's digits and IMG. IMG is left for the first step of `_write_codes` to feed."""
        image = [lane.state == "image" for lane in self.lanes]
        unsized = [on and lane.size is None for on, lane in zip(image, self.lanes, strict=True)]
        sized = [on and not new for on, new in zip(image, unsized, strict=True)]
        if any(unsized):
            self._choose_sizes(unsized)
        if any(sized):
            self._feed(
                [
                    self.ids.header(*lane.size)[:-1] if on and lane.size else None
                    for on, lane in zip(sized, self.lanes, strict=True)
                ],
                both=True,
            )
        for i, lane in enumerate(self.lanes):
            if not image[i] or lane.size is None:
                continue
            rows, columns = lane.size
            if max(lane.lengths) + 1 + body_length(rows, columns) > self.lm.context:
                lane.state = "ended"
                yield Ended(i, "context")
            else:
                yield Opened(i, lane.size)
                yield Tokens(i, self.ids.header(rows, columns))

    def _choose_sizes(self, choosing: Sequence[bool]) -> None:
        """Let the model write `h*w` under the pattern [1-9][0-9]*[1-9][0-9], from unguided logits.

        Source: in_image_logits_processor in upstream's logits_processor.py.
        """
        numbers: list[list[int]] = [[] for _ in self.lanes]
        fed: list[tuple[int, ...]] = [(self.ids.boi,)] * len(self.lanes)
        for place in range(4):
            hidden = self._feed([f if on else None for f, on in zip(fed, choosing, strict=True)], both=True)
            logits = self._text_logits(hidden)[:, list(self.ids.digits)]
            if place % 2 == 0:
                logits[:, 0] = -torch.inf  # no leading zero
            chosen = self._sample("digit", logits, self.rules.image)
            for i, lane in enumerate(self.lanes):
                if choosing[i]:
                    self._count(lane)
                    numbers[i].append(chosen[i])
            star = (self.ids.star,) if place == 1 else ()
            fed = [(self.ids.digits[digit], *star) for digit in chosen]
        self._feed([f if on else None for f, on in zip(fed, choosing, strict=True)], both=True)
        for lane, digits, on in zip(self.lanes, numbers, choosing, strict=True):
            if on:
                lane.size = (10 * digits[0] + digits[1], 10 * digits[2] + digits[3])

    def _write_codes(self) -> Iterator[Event]:
        """The rest of every opened image, row by row."""
        grids = [lane.size if lane.state == "image" else None for lane in self.lanes]
        if not any(grids):
            return
        plan = image_loop.schedule(grids, [(lane.uniforms, lane.sampled) for lane in self.lanes], self.ids)
        lengths = [n for lane in self.lanes for n in lane.lengths]
        longest = max(max(lane.lengths) + made for lane, made in zip(self.lanes, plan.lengths, strict=True))
        self._reserve(longest + 1)  # a lane that has ended is fed at its end, where nothing reads
        told = image_loop.run(
            self.lm,
            self.cache,
            plan,
            lengths,
            guidance=self.rules.guidance,
            sampling=self.rules.image,
            trace=self.trace,
            steps=self.steps,
        )
        for row in told:
            for i, ids in enumerate(row):
                if ids:
                    self._count(self.lanes[i], sum(token >= self.ids.visual for token in ids))
                    yield Tokens(i, ids)
        self.stats.steps += plan.steps
        for lane, made in zip(self.lanes, plan.lengths, strict=True):
            lane.lengths = [n + made for n in lane.lengths]


def _round_up(tokens: int) -> int:
    return -(-tokens // CACHE_STEP) * CACHE_STEP
