"""Who is served: sequences wait in one queue and are admitted, first come first served, when their pages fit.

Sequences take pages as they grow. None is ever preempted and none ever waits for pages in vain: every grant leaves an
order in which all sequences can still reach their longest possible end, one after another (the banker's algorithm). So
a long story does not keep its worst case from others, and two stories cannot block each other half way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from torch import Tensor

from emu_cog.engine.sequence import SequenceState
from emu_cog.model.device import DeviceTimer
from emu_cog.model.kv_cache import KVCache
from emu_cog.ops.interface import PAGE, pages_for


class Prompt:
    """The two prompts of one or several outputs: in the cache once, read by all of them.

    `chunks` are the passes that read them, each a list of (stream, begin, end). They follow from the prompts alone.
    """

    def __init__(self, conditional: tuple[int, ...], unconditional: tuple[int, ...], *, chunk: int) -> None:
        self.streams = (conditional, unconditional)
        self.pages: tuple[list[int], list[int]] = ([], [])
        self.waiting: list[SequenceState] = []
        """Outputs that have not begun."""
        alike = 0
        for a, b in zip(conditional, unconditional, strict=False):
            if a != b:
                break
            alike += 1
        # Of two prompts that begin alike, whole pages are computed once. The last token is always the stream's own.
        self.common = min(alike, len(conditional) - 1, len(unconditional) - 1) // PAGE
        self.chunks: list[list[tuple[int, int, int]]] = []
        # Passes of about equal length, in whole tiles: the launches of a short one take longer than its work.
        total = len(conditional) + len(unconditional) - self.common * PAGE
        chunk = min(chunk, _round_up(-(-total // -(-total // chunk)), 128))
        room = 0
        for stream, begin in ((0, 0), (1, self.common * PAGE)):
            while begin < len(self.streams[stream]):
                if room == 0:
                    self.chunks.append([])
                    room = chunk
                end = min(begin + room, len(self.streams[stream]))
                self.chunks[-1].append((stream, begin, end))
                room -= end - begin
                begin = end
        self.read = 0
        """Chunks that have been read, or that the device is about to read."""
        self.timers: list[DeviceTimer] = []
        """Of the chunks that have been read, until an output counts their seconds."""
        self.last: dict[int, Tensor] = {}
        """By stream, the prompt's last hidden state (1, hidden), once it is read."""

    @property
    def unread(self) -> bool:
        return self.read < len(self.chunks)

    @property
    def needed(self) -> int:
        """Pages of both streams."""
        return sum(pages_for(len(stream)) for stream in self.streams) - self.common

    def take(self, cache: KVCache) -> None:
        """Take the prompts' pages."""
        self.pages[0].extend(cache.take(pages_for(len(self.streams[0]))))
        common = self.pages[0][: self.common]
        cache.share(common)
        self.pages[1].extend(common + cache.take(pages_for(len(self.streams[1])) - self.common))

    def attach(self, cache: KVCache, s: SequenceState) -> None:
        """Give `s` the prompts' pages: whole ones are shared; the last ones, where it writes on, are its own."""
        for stream, tokens in enumerate(self.streams):
            whole = self.pages[stream][: len(tokens) // PAGE]
            cache.share(whole)
            s.pages[stream].extend(whole + cache.take(len(tokens) % PAGE > 0))
            s.lengths[stream] = len(tokens)
            s.shared += len(whole)

    def begin(self, cache: KVCache, s: SequenceState) -> None:
        """The prompts are read: copy their last pages to those of `s`."""
        split = [stream for stream, tokens in enumerate(self.streams) if len(tokens) % PAGE]
        cache.copy([self.pages[stream][-1] for stream in split], [s.pages[stream][-1] for stream in split])
        self.leave(cache, s)

    def leave(self, cache: KVCache, s: SequenceState) -> None:
        """`s` needs the prompts no more, or never will."""
        self.waiting.remove(s)
        if not self.waiting:
            for pages in self.pages:
                cache.release(pages)
                pages.clear()


class Scheduler:
    """Admits sequences and grants pages. `slots` is the most sequences in progress."""

    def __init__(self, cache: KVCache, *, slots: int, context: int) -> None:
        self.cache, self.context = cache, context
        self.waiting: deque[tuple[SequenceState, Prompt]] = deque()
        self.prompts: deque[Prompt] = deque()
        """Prompts of admitted sequences that are not completely read, in order."""
        self.running: list[SequenceState] = []
        """Admitted sequences, in order."""
        self._slots = list(range(slots - 1, -1, -1))
        self._refused = False

    def add(self, s: SequenceState, prompt: Prompt) -> None:
        prompt.waiting.append(s)
        self.waiting.append((s, prompt))

    def admit(self) -> list[tuple[SequenceState, Prompt]]:
        """Move sequences from the queue to those in progress, in order, while slots and pages last. One that is running
        and waits for pages goes before all in the queue."""
        admitted = []
        while self.waiting and self._slots and not self._refused:
            s, prompt = self.waiting[0]
            fresh = not prompt.pages[0]
            own = self._first_pages(s)
            spent = own + (prompt.needed if fresh else 0)
            if not self._safe(self.cache.free - spent, [*self._claims(), (own, self._claim(s))]):
                break
            self.waiting.popleft()
            if fresh:
                prompt.take(self.cache)
                self.prompts.append(prompt)
            prompt.attach(self.cache, s)
            s.slot = self._slots.pop()
            self.running.append(s)
            admitted.append((s, prompt))
        return admitted

    def grow(self, s: SequenceState, room: int) -> bool:
        """Whether `s` has pages for `room` more tokens in both streams, after taking what it lacks. False: not yet."""
        lacking = [
            max(pages_for(length + room) - len(pages), 0) for length, pages in zip(s.lengths, s.pages, strict=True)
        ]
        if not any(lacking):
            return True
        more = sum(lacking)
        claims = [(self._held(r) + (more if r is s else 0), self._claim(r)) for r in self.running]
        if not self._safe(self.cache.free - more, claims):
            self._refused = True
            return False
        for count, pages in zip(lacking, s.pages, strict=True):
            pages.extend(self.cache.take(count))
        return True

    def round(self) -> None:
        """Begin a round of steps: sequences that had to wait for pages may ask again."""
        self._refused = False

    def remove(self, s: SequenceState, prompt: Prompt) -> None:
        """Forget `s`, waiting or running, and free what it holds."""
        if s in prompt.waiting:
            prompt.leave(self.cache, s)
            if not prompt.waiting and prompt in self.prompts:
                self.prompts.remove(prompt)
        if s in self.running:
            self.running.remove(s)
            self._slots.append(s.slot)
            for pages in s.pages:
                self.cache.release(pages)
        else:
            self.waiting = deque(entry for entry in self.waiting if entry[0] is not s)

    def _claims(self) -> list[tuple[int, int]]:
        return [(self._held(s), self._claim(s)) for s in self.running]

    def _held(self, s: SequenceState) -> int:
        """Pages that `s` alone uses, and gives back at its end."""
        return sum(map(len, s.pages)) - s.shared

    def _first_pages(self, s: SequenceState) -> int:
        return sum(len(prompt) % PAGE > 0 for prompt in (s.request.conditional, s.request.unconditional))

    def _claim(self, s: SequenceState) -> int:
        """The most pages of its own that `s` can ever need."""
        return sum(
            pages_for(s.config.longest(len(prompt), self.context)) - len(prompt) // PAGE
            for prompt in (s.request.conditional, s.request.unconditional)
        )

    @staticmethod
    def _safe(free: int, claims: Iterable[tuple[int, int]]) -> bool:
        """Whether sequences that hold `held` pages and may need up to `claim` can all end, one after another, with
        `free` pages left."""
        if free < 0:
            return False
        for need, held in sorted((claim - held, held) for held, claim in claims):
            if need > free:
                return False
            free += held
        return True


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step
