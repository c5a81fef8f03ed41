"""Pictures drawn by diagonals (FlashAR): one step of the engine is the next diagonal of every picture in progress.

A step samples a diagonal from the states of the one before, and feeds it. The host knows how many cells that are, so it
reads nothing between two looks; the device keeps the counters that the cells follow from. A step of many pictures takes
several passes of up to `pass_rows` rows, two for each cell.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from emu_cog.engine.runner import ModelRunner, Step, _copied, _device_seconds
from emu_cog.engine.sequence import Choice, Draw, Feed, Opened, Reason, SequenceState, Tokens
from emu_cog.model.flashar import Diagonal, FlashModel, draw, image_pages
from emu_cog.ops.diagonals import move
from emu_cog.ops.interface import Batch, DiagonalState, Span

if TYPE_CHECKING:
    from emu_cog.ops.triton_ops import TritonOps

WIDTHS = (8, 16, 24, 32, 40, 48, 56, 64, 128)
"""Cells of a diagonal, rounded up, that steps are captured for."""
MAX_CELLS = WIDTHS[-1]
PASS_ROWS = 512
"""Rows of the largest captured pass: four pictures of 64 x 64 at their longest diagonal. There products take as long as
their arithmetic, so that more pictures at once would gain nothing."""
SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
"""Pictures that a pass is captured for: padding costs arithmetic here."""


@dataclass(frozen=True)
class Diagonals(Draw):
    """Make the (rows, columns) image whose header, IMG included, ends both prompts: diagonal by diagonal."""

    @property
    def total(self) -> int:
        """Diagonals to be made."""
        return sum(self.size) - 1

    @property
    def room(self) -> int:
        return self.size[0] * self.size[1]

    def cells(self, number: int) -> int:
        """Cells of diagonal `number`."""
        return Diagonal(number, *self.size).count

    def forced(self, step: int) -> bool:
        return False

    def tokens(self, made: int) -> int:
        return Diagonal(made, *self.size).drawn

    def complete(self, made: int) -> int:
        """Image rows whose cells are all made."""
        rows, columns = self.size
        return min(max(made - columns + 1, 0), rows)

    def ahead(self, made: int) -> int:
        return self.tokens(made) - self.complete(made) * self.size[1]


class DiagonalRunner(ModelRunner):
    """Runs the passes of a FlashModel."""

    lm: FlashModel
    pass_rows = PASS_ROWS
    step_sizes = SIZES

    def __init__(self, lm: FlashModel, *, slots: int, tokens: int) -> None:
        super().__init__(lm, slots=slots, tokens=tokens)
        state = self.state
        state.scores = state.scores.new_zeros((max(MAX_CELLS, self.pass_rows // 2), lm.ids.visual_count))
        self.grid = DiagonalState.empty(state, cells=MAX_CELLS, hidden=lm.config.hidden_size, dtype=lm.dtype)
        self._beside = torch.cuda.Stream(lm.device) if lm.device.type == "cuda" else None
        self._scores: dict[int, Tensor] = {}

    # -- 1. sequences come and go ----------------------------------------------------------------------------

    def answer(self, s: SequenceState, last: Mapping[int, Tensor]) -> Generator[Feed | Draw, Choice | None, Reason]:
        for stream, hidden in last.items():
            self.grid.h[2 * s.slot + stream, 0], self.grid.v[2 * s.slot + stream, 0] = hidden[0].chunk(2)
        return self._picture(s)

    def _picture(self, s: SequenceState) -> Generator[Feed | Draw, Choice | None, Reason]:
        assert s.config.size, "these models know the size beforehand"
        image = Diagonals(s.config.size)
        if max(s.lengths) + image.room > self.lm.context:
            return "context"
        s.emit(Opened(s.index, image.size))
        s.emit(Tokens(s.index, self.lm.ids.header(*image.size)))
        yield image
        s.images += 1
        return "image"

    def open(self, s: SequenceState, draw: Draw) -> None:
        state, (rows, columns), slot = self.state, draw.size, s.slot
        if rows * columns > state.out.shape[1]:
            self._widen(rows * columns)
        self.grid.rows[slot], state.columns[slot], state.total[slot], state.step[slot] = rows, columns, draw.total, 0
        state.seed[slot], state.sampled[slot] = s.request.seed, s.sampled
        state.position[2 * slot : 2 * slot + 2] = torch.tensor(s.lengths)

    def place(self, s: SequenceState) -> None:
        super().place(s)
        for stream, prompt in enumerate((s.request.conditional, s.request.unconditional)):
            pages = image_pages(len(prompt), s.pages[stream])
            self.grid.image_tables[2 * s.slot + stream, : len(pages)] = torch.tensor(pages, dtype=torch.int32)

    def end(self, s: SequenceState) -> None:
        super().end(s)
        self.grid.image_tables[2 * s.slot : 2 * s.slot + 2] = 0

    # -- 2. one step of all pictures -------------------------------------------------------------------------

    def widths(self, sequences: int) -> list[int]:
        return [1]

    def seconds(self, sequences: int) -> dict[int, float]:
        return {1: 1.0}

    def step(self, sequences: Sequence[SequenceState], width: int = 1) -> Tensor:
        """Draw the next diagonal of each picture. There is no text, so that no hidden states are returned."""
        nucleus = any(s.config.image.top_p < 1.0 for s in sequences)
        self._scores.clear()
        drawn: list[int] = []
        with self._current_device():
            try:
                for places, cells in self._passes(sequences):
                    if self.captured:
                        pictures = [sequences[i] for i in places]
                        feeding = not all(_last(s) for s in pictures)
                        self._replay(pictures, Step(width=cells, feeding=feeding, nucleus=nucleus))
                        self._remember(sequences, places, cells)
                    else:
                        self._eager_pass(sequences, places, nucleus)
                    drawn += places
            except torch.OutOfMemoryError:  # before the pictures of that pass were moved on; the others are
                for i in drawn:
                    sequences[i].move(1)
                raise
        return self.grid.h[:0, 0]

    def read(self, begun: Sequence[tuple[SequenceState, int]]) -> Callable[[], list[tuple[int, ...]]]:
        """As of any runner; the tokens of each picture's rows that have become complete, EOL and EOI included."""
        parts, spans = [], []
        for s, begin in begun:
            assert isinstance(s.doing, Diagonals)
            span = range(s.doing.complete(begin), s.doing.complete(s.made))
            parts.append(self.state.out[s.slot, span.start * s.doing.size[1] : span.stop * s.doing.size[1]])
            spans.append((span, s.doing.size))
        copied, ids = _copied(torch.cat(parts)), self.lm.ids

        def complete() -> list[tuple[int, ...]]:
            tokens, found = iter(copied().tolist()), []
            for span, (rows, columns) in spans:
                row_ids: list[int] = []
                for row in span:
                    row_ids += islice(tokens, columns)
                    row_ids.append(ids.eoi if row == rows - 1 else ids.eol)
                found.append(tuple(row_ids))
            return found

        return complete

    def scores(self, row: int) -> Tensor:
        """What the diagonal of sequence `row` of the last step was sampled from, where it has a trace: (cells, V)."""
        return self._scores[row]

    def _passes(self, sequences: Sequence[SequenceState]) -> Iterator[tuple[list[int], int]]:
        """Places in `sequences` of the pictures that share a pass, and the cells that it has room for in each."""
        counts = [_cells(s) for s in sequences]
        most = self.pass_rows if self.captured else self.eager_rows
        left = sorted(range(len(sequences)), key=lambda i: -counts[i])
        while left:
            cells = counts[left[0]]
            if self.captured:
                cells = next(width for width in WIDTHS if width >= cells)
            several = max(most // (2 * cells), 1)
            if self.captured:
                several = max(size for size in self.sizes if size <= several)
                if cells > WIDTHS[0]:  # of the narrowest there are also passes that feed nothing
                    cells = self._fastest(self._size(min(several, len(left))), cells)
            yield left[:several], cells
            left = left[several:]

    def _fastest(self, size: int, cells: int) -> int:
        """Of the widths that have room for as many cells in each of `size` pictures, the one whose pass is fastest: on
        an H200 4 x 40 cells took 48.6 ms and 4 x 48 45.4, because 384 rows are whole tiles."""
        measured = {width: s for (n, width), s in self._seconds.items() if n == size and width >= cells}
        return min(measured, key=lambda width: measured[width], default=cells)

    def _remember(self, sequences: Sequence[SequenceState], places: Sequence[int], cells: int) -> None:
        """Keep the scores of a pass for the traces of its pictures."""
        for row, i in enumerate(places):
            if sequences[i].trace:
                scores = self.state.scores[row * cells : row * cells + _cells(sequences[i])]
                self._scores[i] = scores.clone()

    # -- 3. on the device ------------------------------------------------------------------------------------

    def _sample(self, slots: Tensor, width: int, nucleus: bool) -> tuple[Batch, Batch]:
        """Sample the cells of the next diagonals, and store them; what feeds them (`Ops.sample_cells`)."""
        ops, state, grid = self.lm.ops, self.state, self.grid
        logits = self.lm.visual_logits(ops.head_input(self.lm.flash.gates, state, grid, slots, width))
        return ops.sample_cells(logits, state, grid, slots, self.lm.ids, width=width, nucleus=nucleus)

    # -- 4. in plain torch -----------------------------------------------------------------------------------

    def _eager_pass(self, sequences: Sequence[SequenceState], places: Sequence[int], nucleus: bool) -> None:
        """Sampling is a picture's own; what is fed shares a pass whose products have a fixed number of rows."""
        fed: list[tuple[Tensor, int]] = []
        batches: list[tuple[Batch, Batch]] = []
        spans: list[tuple[list[Span], list[Span]]] = []
        for i in places:
            s, count = sequences[i], _cells(sequences[i])
            assert isinstance(s.doing, Diagonals)
            slots = torch.tensor([s.slot], device=self.lm.device)
            both = self._sample(slots, count, nucleus)
            self._remember(sequences, [i], count)
            if not _last(s):
                drawn = s.doing.tokens(s.made)
                prompts = len(s.request.conditional), len(s.request.unconditional)
                streams = [2 * s.slot, 2 * s.slot + 1]
                fed.append((slots, count))
                batches.append(both)
                spans.append(
                    (
                        [Span(x, n + drawn, count, open=True) for x, n in zip(streams, prompts, strict=True)],
                        [Span(x, drawn, count, open=True) for x in streams],
                    )
                )
        if fed:
            batch, image = (
                self._joined([both[i] for both in batches], [span for both in spans for span in both[i]])
                for i in (0, 1)
            )
            h, v = draw(self.lm.ops, self.lm.flash, batch, image, self.cache)
            row = 0
            for slots, count in fed:
                self.lm.ops.keep(self.state, self.grid, slots, h[row : row + 2 * count], v[row : row + 2 * count])
                row += 2 * count
        ended = [sequences[i].slot for i in places if _last(sequences[i])]
        move(self.state, torch.tensor(ended, dtype=torch.int64, device=self.lm.device))

    def _joined(self, batches: Sequence[Batch], spans: Sequence[Span]) -> Batch:
        """One pass over several batches, padded like every eager pass."""
        rows = sum(len(batch.tokens) for batch in batches)

        def joined(parts: Sequence[Tensor], padding: int = 0) -> Tensor:
            return F.pad(torch.cat(list(parts)), (0, -rows % self.eager_block), value=padding)

        return Batch(
            tokens=joined([batch.tokens for batch in batches]),
            positions=joined([batch.positions for batch in batches]),
            streams=joined([batch.streams for batch in batches], 2 * self.state.padding),
            tables=batches[0].tables,
            spans=tuple(spans),
            rotary=joined([batch.rotary for batch in batches if batch.rotary is not None]),
        )

    # -- 5. kernels and capture ------------------------------------------------------------------------------

    @torch.inference_mode()
    def warm_up(self, *, several: bool = True) -> None:
        """Capture the passes over diagonals of up to 64 cells, and short prompts; measure what passes take."""
        for size in self.sizes:
            self._graph(size, Step(width=WIDTHS[0], feeding=False))
        self._capture_prompts()
        for width in WIDTHS[:-1]:
            for size in (size for size in self.sizes if 2 * size * width <= self.pass_rows):
                graph = self._graph(size, Step(width=width))
                self._pad_slots(size)
                self._seconds[size, width] = _device_seconds(graph.replay, self.lm.device)
        self._log_passes("cells")

    def _run_once(self, ops: TritonOps) -> None:
        slots = torch.full((1,), self.state.padding, device=self.lm.device)
        for width in {*WIDTHS[:2], WIDTHS[4], *ops.unlike(WIDTHS, self.lm.weights.shape, opened=True)}:
            self._device_step(slots, Step(width=width))

    def _device_step(self, slots: Tensor, step: Step) -> Tensor | None:
        """A step of diagonals that reads everything from the device. It leaves no hidden states."""
        batch, image = self._sample(slots, step.width, step.nucleus)
        if step.feeding:
            h, v = draw(self.lm.ops, self.lm.flash, batch, image, self.cache, self._beside)
            self.lm.ops.keep(self.state, self.grid, slots, h, v)
        else:
            move(self.state, slots)
        return None


def _last(s: SequenceState) -> bool:
    """Whether the next diagonal is the last, from which nothing follows."""
    assert isinstance(s.doing, Diagonals)
    return s.made + 1 >= s.doing.total


def _cells(s: SequenceState) -> int:
    """Cells of the next diagonal."""
    assert isinstance(s.doing, Diagonals)
    return s.doing.cells(s.made)
