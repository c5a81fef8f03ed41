"""The inner loop: all visual tokens, EOLs and the EOI of one image per sequence. Each pass steps both streams of every
sequence.

An image's grammar is known before its first token. So forced tokens, random numbers and lengths are prepared as
tensors, and the loop synchronizes with the GPU only once per image row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emu_cog.engine.runner import ModelRunner
from emu_cog.model.kv_cache import KVCache
from emu_cog.model.qwen3 import LanguageModel
from emu_cog.ops.sampling import Uniforms, guide, probabilities, sample
from emu_cog.prompt.tokens import TokenIds, body_length
from emu_cog.request import Sampling

Grid = tuple[int, int] | None
"""An image's (rows, columns); None for an inactive sequence."""
Trace = Callable[[str, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Everything about the images that is known before their first token. Row t of each tensor belongs to step t.

    Step t feeds the token before it (IMG at t = 0) and selects token t: `forced[t, sequence]`, or where that is -1 a
    sample at `uniform[t, sequence]`. `advance[t, slot]` is 1 where the cache slot keeps what step t wrote.
    """

    grids: tuple[Grid, ...]
    forced: Tensor  # (steps, sequences) int64
    uniform: Tensor  # (steps, sequences) float64
    advance: Tensor  # (steps, 2 sequences) int64

    @property
    def steps(self) -> int:
        return self.forced.shape[0]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sequence's image after IMG; 0 for an inactive sequence."""
        return [body_length(*grid) if grid else 0 for grid in self.grids]

    @property
    def stride(self) -> int:
        """Steps between two synchronizations with the host: a row of the widest image and its EOL."""
        return max(grid[1] + 1 for grid in self.grids if grid)

    def synchronizes(self, step: int) -> bool:
        """Whether the host reads the tokens after `step`."""
        return (step + 1) % self.stride == 0 or step + 1 == self.steps


def schedule(grids: Sequence[Grid], uniforms: Sequence[tuple[Uniforms, int]], ids: TokenIds) -> Schedule:
    """The schedule of `grids`, one per sequence; `uniforms` are each sequence's random numbers and its next index."""
    lengths = [body_length(*grid) if grid else 0 for grid in grids]
    steps = max(lengths)
    forced = torch.full((steps, len(grids)), ids.pad)
    uniform = torch.zeros((steps, len(grids)), dtype=torch.float64)
    for sequence, (grid, length, (numbers, first)) in enumerate(zip(grids, lengths, uniforms, strict=True)):
        if grid is None:
            continue
        rows, columns = grid
        plan = torch.full((rows, columns + 1), -1)
        plan[:, -1] = ids.eol
        plan[-1, -1] = ids.eoi
        forced[:length, sequence] = plan.flatten()
        uniform[:length, sequence][plan.flatten() < 0] = numbers.take(first, rows * columns)
    advance = torch.arange(steps)[:, None] < torch.tensor(lengths)
    return Schedule(
        grids=tuple(grids), forced=forced, uniform=uniform, advance=advance.long().repeat_interleave(2, dim=1)
    )


def run(
    lm: LanguageModel,
    cache: KVCache,
    plan: Schedule,
    lengths: Sequence[int],
    *,
    cfg_scale: float,
    sampling: Sampling,
    trace: Trace | None = None,
    runner: ModelRunner | None = None,
) -> Iterator[list[tuple[int, ...]]]:
    """Generate the images of `plan`. Yields the new ids of every sequence, in order, once per image row.

    `lengths` are the tokens in each cache slot (conditional and unconditional in turn): everything before IMG has been
    fed, IMG has not. EOI is selected but not fed. With a `runner` the steps are captured graphs, unless there is a
    `trace`: it needs every distribution, which a captured step does not keep, so it goes through the modules.
    """
    if runner and not trace:
        state, replay = runner.image(
            cache,
            forced=plan.forced,
            uniform=plan.uniform,
            advance=plan.advance,
            lengths=lengths,
            cfg_scale=cfg_scale,
            sampling=sampling,
        )
        for t in range(plan.steps):
            replay()
            if plan.synchronizes(t):
                yield _read(plan, state.out, t // plan.stride * plan.stride, t + 1)
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
            probs = probabilities(guide(logits[0::2], logits[1::2], cfg_scale), sampling)
            if trace:
                trace("visual", probs)
            out[t] = torch.where(forced[t] < 0, lm.ids.visual + sample(probs, uniform[t]), forced[t])
        token = out[t].repeat_interleave(2)[:, None]
        if plan.synchronizes(t):
            yield _read(plan, out, t // plan.stride * plan.stride, t + 1)


def _read(plan: Schedule, out: Tensor, begin: int, end: int) -> list[tuple[int, ...]]:
    """The ids of steps begin..end-1 by sequence, without what lies beyond its image. Synchronizes with the device."""
    steps = out[begin:end].tolist()
    return [
        tuple(step[sequence] for step in steps[: max(length - begin, 0)])
        for sequence, length in enumerate(plan.lengths)
    ]
