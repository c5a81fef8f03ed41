"""Short prompts as captured passes: queueing the kernels of a pass one by one takes the host longer than running them
takes the device (bf16 on an H200: 40 to 70 ms instead of 18 for 60 tokens; with fp8 inputs 75 to 100 ms)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from emu_cog.model.kv_cache import KVCache
from emu_cog.model.qwen3 import Chunk, LanguageModel
from emu_cog.ops.interface import Batch, ceil_div, pages_for

WINDOW = 16
"""Tokens of a chunk that attention takes together; chunks are padded to a multiple."""
SIZES = (64, 128, 192, 256, 384, 512)
"""Rows of the captured passes, padding included. Beyond, the device takes longer than the host."""
STREAMS = 2
"""Chunks of a pass: a part of each of a request's two prompts."""


class CapturedPrompts:
    """Reads chunks of prompts, up to `SIZES[-1]` rows. `record(work, name)` captures `work` and returns its replay."""

    def __init__(
        self, lm: LanguageModel, cache: KVCache, record: Callable[[Callable[[], None], str], Callable[[], None]]
    ) -> None:
        self.lm, self.cache, self._record = lm, cache, record
        rows, device = SIZES[-1], lm.device
        self._tokens, self._positions, self._streams = torch.zeros((3, rows), dtype=torch.int64, device=device)
        # The last one is the padding's: its only page is nobody's.
        self._tables = torch.zeros((STREAMS + 1, pages_for(lm.context) + 1), dtype=torch.int32, device=device)
        self._hidden: dict[int, Tensor] = {}
        self._replays: dict[int, Callable[[], None]] = {}

    def fit(self, chunks: Sequence[Chunk]) -> bool:
        return len(chunks) <= STREAMS and sum(_padded(chunk) for chunk in chunks) <= SIZES[-1]

    def read(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Store the tokens; the hidden states (1, hidden) of each chunk's last. Waits for no device."""
        size = next(size for size in SIZES if size >= sum(_padded(chunk) for chunk in chunks))
        ends = self._write(chunks, size)
        if size not in self._replays:
            self.capture(size)
        self._replays[size]()
        return [self._hidden[size][end : end + 1].clone() for end in ends]

    def capture(self, size: int) -> None:
        """Capture the pass of `size` rows, over what was written last."""

        def work() -> None:
            hidden = self.run(size)
            if size not in self._hidden:
                self._hidden[size] = torch.empty_like(hidden)
            self._hidden[size].copy_(hidden)

        self._replays[size] = self._record(work, f"prompts of {size} tokens")

    def run(self, size: int) -> Tensor:
        """The pass of `size` rows that reads everything from the device: (size, hidden)."""
        batch = Batch(
            tokens=self._tokens[:size],
            positions=self._positions[:size],
            streams=self._streams[:size],
            tables=self._tables,
            width=WINDOW,
        )
        return self.lm.forward(batch, self.cache, self.lm.ops.for_prompt())

    def clear(self) -> None:
        """Let the next passes read and store nothing but padding."""
        self._write((), SIZES[-1])

    def _write(self, chunks: Sequence[Chunk], size: int) -> list[int]:
        """Write what a pass of `size` rows reads; returns the row of each chunk's last token."""
        tables = torch.zeros(self._tables.shape, dtype=torch.int32)
        rows = torch.zeros((3, size), dtype=torch.int64)
        rows[2] = STREAMS
        ends, at = [], 0
        for stream, chunk in enumerate(chunks):
            count = len(chunk.tokens)
            tables[stream, : len(chunk.pages)] = torch.tensor(chunk.pages, dtype=torch.int32)
            rows[0, at : at + count] = torch.tensor(chunk.tokens)
            rows[1, at : at + count] = torch.arange(chunk.start, chunk.start + count)
            rows[2, at : at + count] = stream
            ends.append(at + count - 1)
            at += _padded(chunk)
        own = (self._tokens, self._positions, self._streams)
        for to, given in (*((to[:size], row) for to, row in zip(own, rows, strict=True)), (self._tables, tables)):
            to.copy_(given.pin_memory() if to.is_cuda else given, non_blocking=True)
        return ends


def _padded(chunk: Chunk) -> int:
    return ceil_div(len(chunk.tokens), WINDOW) * WINDOW
