"""Pictures drawn by our FlashAR model, a pass for a diagonal of each, as the comparison and the tests need them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from emu_cog.model.flashar import Cells, Diagonal, FlashModel, diagonals, rotary_positions
from emu_cog.model.kv_cache import KVCache
from emu_cog.model.qwen3 import Chunk
from emu_cog.ops.diagonals import corner_share, share
from emu_cog.ops.interface import pages_for
from emu_cog.ops.sampling import guide


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture to draw at top-k 1; without guidance where `unconditional` is None or `guidance` at most 1, as in
    their `_generate_with_kv_cache`."""

    conditional: Sequence[int]
    unconditional: Sequence[int] | None
    size: tuple[int, int]
    guidance: float

    @property
    def prompts(self) -> list[Sequence[int]]:
        """By stream."""
        alone = self.unconditional is None or self.guidance <= 1
        return [self.conditional] if alone or self.unconditional is None else [self.conditional, self.unconditional]


def run_native(
    model: FlashModel, wanted: Sequence[Picture], *, chunk: int = 10**6, follow: Sequence[np.ndarray] | None = None
) -> list[dict[str, np.ndarray]]:
    """The arrays of reference_flashar.py for each of `wanted`, drawn side by side: every pass has a diagonal of each
    that is not finished. Prompts are read `chunk` tokens at a time. `follow` are the codes (cells,) that are fed
    instead of the likeliest ones."""
    return [drawing.arrays for drawing in _draw(model, wanted, chunk, follow)]


class _Drawing:
    """A picture in the making."""

    def __init__(self, picture: Picture, hidden: int, visual: int) -> None:
        self.picture = picture
        (rows, columns), streams = picture.size, len(picture.prompts)
        self.diagonals = list(diagonals(rows, columns))
        self.longest = max(map(len, picture.prompts))
        self.pages: list[list[int]] = []
        self.states: list[tuple[Tensor, Tensor]] = []
        """h and v of the diagonal before, by stream."""
        self.arrays = {
            "h": np.zeros((streams, 1 + rows * columns, hidden), np.float32),
            "v": np.zeros((streams, 1 + rows * columns, hidden), np.float32),
            "gate": np.full((streams, rows, columns), np.nan, np.float32),
            "logits": np.zeros((rows * columns, visual), np.float32),
            "tokens": np.zeros(rows * columns, np.int64),
        }

    def keep(self, states: Sequence[tuple[Tensor, Tensor]], places: Sequence[int]) -> None:
        """Remember h and v by stream, at `places` of the arrays."""
        self.states = list(states)
        for stream, (h, v) in enumerate(states):
            self.arrays["h"][stream, places] = h.float().numpy(force=True)
            self.arrays["v"][stream, places] = v.float().numpy(force=True)

    def choose(self, model: FlashModel, diagonal: Diagonal, follow: np.ndarray | None) -> list[int]:
        """The diagonal's codes."""
        logits = [model.logits(h, v, diagonal) for h, v in self.states]
        guided = logits[0] if len(logits) == 1 else guide(*logits, self.picture.guidance)
        self.arrays["logits"][diagonal.cells] = guided.numpy(force=True)
        self.arrays["tokens"][diagonal.cells] = guided.argmax(dim=-1).numpy(force=True)
        for stream, (h, v) in enumerate(self.states):
            _, columns = self.picture.size
            if diagonal.number == 0:
                self.arrays["gate"][stream, 0, 0] = float(corner_share(model.flash.gates, h))
            for cell, left, above in zip(diagonal.cells, diagonal.left, diagonal.above, strict=True):
                if diagonal.number and left >= 0 and above >= 0:
                    gate = share(model.flash.gates, h[left : left + 1], v[above : above + 1])
                    self.arrays["gate"][stream, cell // columns, cell % columns] = float(gate)
        codes: list[int] = (self.arrays["tokens"] if follow is None else follow)[diagonal.cells].tolist()
        return codes


@torch.inference_mode()
def _draw(
    model: FlashModel, wanted: Sequence[Picture], chunk: int, follow: Sequence[np.ndarray] | None
) -> list[_Drawing]:
    made = [_Drawing(picture, model.config.hidden_size, model.ids.visual_count) for picture in wanted]
    cells = [math.prod(picture.size) for picture in wanted]
    needed = sum(
        pages_for(len(prompt) + count)
        for picture, count in zip(wanted, cells, strict=True)
        for prompt in picture.prompts
    )
    cache = KVCache(model.config, pages=1 + needed, dtype=model.dtype, devices=model.devices)
    for one, count in zip(made, cells, strict=True):
        for prompt in one.picture.prompts:
            one.pages.append(cache.take(pages_for(len(prompt) + count))[::-1])  # in no order

    # 1. prompts, each stream's by itself
    for one in made:
        last = []
        for prompt, pages in zip(one.picture.prompts, one.pages, strict=True):
            for begin in range(0, len(prompt), chunk):
                hidden = model.feed(cache, [Chunk(prompt[begin : begin + chunk], begin, pages)])
            h, v = hidden[-1:].chunk(2, dim=-1)
            last.append((h, v))
        one.keep(last, [0])

    # 2. a diagonal of each picture per pass
    for number in range(max(len(one.diagonals) for one in made)):
        drawing = [(at, one, one.diagonals[number]) for at, one in enumerate(made) if number < len(one.diagonals)]
        streams = []
        for at, one, diagonal in drawing:
            codes = one.choose(model, diagonal, None if follow is None else follow[at])
            streams += [
                Cells(
                    tokens=[model.ids.visual + code for code in codes],
                    rotary=rotary_positions(diagonal, one.longest),
                    prompt=len(prompt),
                    drawn=diagonal.drawn,
                    pages=pages,
                )
                for prompt, pages in zip(one.picture.prompts, one.pages, strict=True)
            ]
        counts = [len(cells.tokens) for cells in streams]
        h, v = (states.split(counts) for states in model.draw(cache, streams))
        states = iter(zip(h, v, strict=True))
        for _, one, diagonal in drawing:
            one.keep([next(states) for _ in one.picture.prompts], [1 + cell for cell in diagonal.cells])
    return made
