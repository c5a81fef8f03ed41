"""The inner loop: all visual tokens, EOLs and EOI of one image a lane, every lane and both its streams in one pass.

The grammar of an image is known before its first token, so forced tokens, random numbers and lengths are laid out
ahead as tensors and nothing in the loop waits for the device but one look a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emu_cog.config import Sampling
from emu_cog.lm import LanguageModel, SlotCache
from emu_cog.sampling import Uniforms, draw, guide, probabilities
from emu_cog.steps import Steps
from emu_cog.tokens import TokenIds, body_length

Grid = tuple[int, int] | None
"""An image's (rows, columns); None for a lane that sits this one out."""
Trace = Callable[[str, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """All that is known of the images before their first token. Row t of each tensor belongs to step t.

    Step t feeds the token before it (IMG at t = 0) and chooses token t: `forced[t, lane]`, or where that is -1 a
    draw at `uniform[t, lane]`. `advance[t, row]` is 1 where the cache row keeps what step t wrote.
    """

    grids: tuple[Grid, ...]
    forced: Tensor  # (steps, lanes) int64
    uniform: Tensor  # (steps, lanes) float64
    advance: Tensor  # (steps, 2 lanes) int64

    @property
    def steps(self) -> int:
        return self.forced.shape[0]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every lane's image after IMG; 0 for a lane that sits this one out."""
        return [body_length(*grid) if grid else 0 for grid in self.grids]

    @property
    def row(self) -> int:
        """Steps between two looks of the host: a row of the widest image with its EOL."""
        return max(grid[1] + 1 for grid in self.grids if grid)

    def ends_row(self, step: int) -> bool:
        """Whether the host looks in after `step`."""
        return (step + 1) % self.row == 0 or step + 1 == self.steps


def schedule(grids: Sequence[Grid], uniforms: Sequence[tuple[Uniforms, int]], ids: TokenIds) -> Schedule:
    """Lay out `grids`, one a lane; `uniforms` are each lane's random numbers and the index of its next one."""
    lengths = [body_length(*grid) if grid else 0 for grid in grids]
    steps = max(lengths)
    forced = torch.full((steps, len(grids)), ids.pad)
    uniform = torch.zeros((steps, len(grids)), dtype=torch.float64)
    for lane, (grid, length, (numbers, first)) in enumerate(zip(grids, lengths, uniforms, strict=True)):
        if grid is None:
            continue
        rows, columns = grid
        plan = torch.full((rows, columns + 1), -1)
        plan[:, -1] = ids.eol
        plan[-1, -1] = ids.eoi
        forced[:length, lane] = plan.flatten()
        uniform[:length, lane][plan.flatten() < 0] = numbers.take(first, rows * columns)
    advance = torch.arange(steps)[:, None] < torch.tensor(lengths)
    return Schedule(
        grids=tuple(grids), forced=forced, uniform=uniform, advance=advance.long().repeat_interleave(2, dim=1)
    )


def run(
    lm: LanguageModel,
    cache: SlotCache,
    plan: Schedule,
    lengths: Sequence[int],
    *,
    guidance: float,
    sampling: Sampling,
    trace: Trace | None = None,
    steps: Steps | None = None,
) -> Iterator[list[tuple[int, ...]]]:
    """Make the images of `plan`; each yield is one row: the new ids of every lane, in order.

    `lengths` are the tokens in each cache row (conditional and unconditional in turn), the header up to IMG fed
    and IMG itself not. EOI is chosen but not fed. With `steps` they are the recorded ones; a trace sees every
    distribution, which a recording does not keep, and goes through the modules.
    """
    if steps and not trace:
        state, play = steps.image(
            cache,
            forced=plan.forced,
            uniform=plan.uniform,
            advance=plan.advance,
            lengths=lengths,
            guidance=guidance,
            sampling=sampling,
        )
        for t in range(plan.steps):
            play()
            if plan.ends_row(t):
                yield _told(plan, state.out, t // plan.row * plan.row, t + 1)
        return
    device = lm.device
    sampled = (plan.forced < 0).any(dim=1).tolist()
    forced, uniform, advance = (x.to(device) for x in (plan.forced, plan.uniform, plan.advance))
    start = torch.tensor(lengths, device=device)
    token = torch.full((len(lengths), 1), lm.ids.img, device=device)
    out = torch.empty_like(forced)
    filled = max(lengths)
    for t in range(plan.steps):
        hidden = lm.forward(token, start, cache, rows=slice(None), filled=min(filled + t + 1, cache.capacity))
        start = start + advance[t]
        out[t] = forced[t]
        if sampled[t]:
            logits = lm.visual_logits(hidden[:, -1])
            probs = probabilities(guide(logits[0::2], logits[1::2], guidance), sampling)
            if trace:
                trace("visual", probs)
            out[t] = torch.where(forced[t] < 0, lm.ids.visual + draw(probs, uniform[t]), forced[t])
        token = out[t].repeat_interleave(2)[:, None]
        if plan.ends_row(t):
            yield _told(plan, out, t // plan.row * plan.row, t + 1)


def _told(plan: Schedule, out: Tensor, begin: int, end: int) -> list[tuple[int, ...]]:
    """The ids of steps begin..end-1 by lane, less what lies beyond a lane's image. Waits for the device."""
    made = out[begin:end].tolist()
    return [tuple(line[lane] for line in made[: max(length - begin, 0)]) for lane, length in enumerate(plan.lengths)]
