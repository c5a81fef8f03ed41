"""A step over diagonals (FlashAR) around its pass, in plain torch: what the heads read, where cells are stored, what is
kept. `ops/kernels/diagonals.py` computes the same in four kernels.

Source of the gates: lxazjk/Emu3.5-FlashAR at 2d4a74e, flashar/model/modeling_emu_flashar.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from emu_cog.ops.interface import Batch, DiagonalState, Gates, SlotState, pairs
from emu_cog.prompt.tokens import TokenIds


@dataclass(frozen=True, kw_only=True)
class Places:
    """A diagonal of each of n pictures on the device, as `model.flashar.Diagonal` has it for the host: (n, width) int64
    each, where `live`; all other places hold what can be read or written without harm."""

    live: Tensor  # bool
    cell: Tensor  # r * columns + c, or 0
    left: Tensor
    above: Tensor
    count: Tensor  # (n, 1), not positive beyond the last diagonal
    drawn: Tensor  # (n, 1)

    @classmethod
    def of(cls, number: Tensor, rows: Tensor, columns: Tensor, width: int) -> Places:
        """Up to `width` cells of the diagonals `number` (n,) of grids of `rows` x `columns` (n,)."""
        number, rows, columns = number[:, None], rows[:, None], columns[:, None]
        top, before = (number - columns + 1).clamp(min=0), (number - columns).clamp(min=0)
        count = torch.minimum(rows - 1, number) - top + 1
        row = top + torch.arange(width, device=number.device)
        live = row < top + count
        whole, below, beside, both = (
            n.clamp(min=0) * (n.clamp(min=0) + 1) // 2
            for n in (number, number - rows, number - columns, number - rows - columns)
        )
        return cls(
            live=live,
            cell=torch.where(live, row * (columns - 1) + number, 0),
            left=torch.where(live & (row < number), row - before, -1),
            above=torch.where(live & (row > 0), row - 1 - before, -1),
            count=count,
            drawn=whole - below - beside + both,
        )

    @classmethod
    def next(cls, state: SlotState, grid: DiagonalState, slots: Tensor, width: int) -> Places:
        """The diagonal that each picture draws next; a complete one has none."""
        return cls.of(state.step[slots], grid.rows[slots], state.columns[slots], width)


def share(gates: Gates, h: Tensor, v: Tensor) -> Tensor:
    """The horizontal head's share (M, 1) fp32 in cells with their left neighbour's h and upper neighbour's v."""
    pair = torch.cat([h, v], dim=-1).float()
    return torch.sigmoid(F.linear(F.silu(F.linear(pair, gates.pair_in)), gates.pair_out, gates.pair_bias))


def corner_share(gates: Gates, h: Tensor) -> Tensor:
    """The same (M, 1) in the first cell, which has the prompt's h (M, hidden) for a left neighbour."""
    return torch.sigmoid(F.linear(h.float(), gates.corner, gates.corner_bias))


def weighed(gates: Gates, h: Tensor, v: Tensor, leftmost: Tensor, top: Tensor) -> Tensor:
    """What the heads read for cells with their left neighbour's h and upper neighbour's v (M, hidden): (M, 2 hidden).
    Which have none says `leftmost` and `top` (M, 1); the first cell has neither, and the prompt's h and v.

    Heads are linear, so the gate weighs their input: one product with both heads side by side is g H(h) + (1 - g) V(v).
    """
    gate = share(gates, h, v).masked_fill(leftmost, 0.0).masked_fill(top, 1.0)
    gate = torch.where(leftmost & top, corner_share(gates, h), gate)
    return torch.cat([gate * h, (1 - gate) * v], dim=-1).to(h.dtype)


def head_input(gates: Gates, state: SlotState, grid: DiagonalState, slots: Tensor, width: int) -> Tensor:
    """`Ops.head_input`."""
    at, streams = Places.next(state, grid, slots, width), pairs(slots)[:, :, None]
    h = grid.h[streams, at.left.clamp(min=0)[:, None]].flatten(0, 2)
    v = grid.v[streams, at.above.clamp(min=0)[:, None]].flatten(0, 2)
    leftmost, top = ((x < 0)[:, None].expand(-1, 2, -1).reshape(-1, 1) for x in (at.left, at.above))
    return weighed(gates, h, v, leftmost, top)


def stored(
    codes: Tensor, state: SlotState, grid: DiagonalState, slots: Tensor, at: Places, ids: TokenIds
) -> tuple[Batch, Batch]:
    """Store the codes (n, width) of the next diagonals; what their pass feeds, as `Ops.sample_cells` returns it."""
    pair, (n, width) = pairs(slots), at.cell.shape
    tokens = torch.where(at.live, ids.visual + codes, 0)
    state.out[torch.where(at.live, slots[:, None], state.padding), at.cell] = tokens
    live, prompt = at.live[:, None], state.position[pair][:, :, None]  # (n, 1, width), (n, 2, 1)
    drawn = (at.drawn + torch.arange(width, device=slots.device))[:, None]
    last = (at.drawn + at.count - 1)[:, None]

    def flat(x: Tensor, padding: int = 0) -> Tensor:
        return torch.where(live, x, padding).expand(n, 2, width).flatten()

    batch = Batch(
        tokens=flat(tokens[:, None]),
        positions=flat(prompt + drawn),
        streams=flat(pair[:, :, None], 2 * state.padding),
        tables=state.tables,
        width=width,
        rotary=flat(prompt.amax(dim=1, keepdim=True) + at.cell[:, None]),
        last=flat(prompt + last),
    )
    return batch, replace(batch, positions=flat(drawn), tables=grid.image_tables, last=flat(last))


def keep(state: SlotState, grid: DiagonalState, slots: Tensor, h: Tensor, v: Tensor) -> None:
    """`Ops.keep`."""
    streams = pairs(slots).flatten()
    for kept, x in ((grid.h, h), (grid.v, v)):
        made = x.view(len(streams), -1, x.shape[1])
        kept[streams, : made.shape[1]] = made
    move(state, slots)


def move(state: SlotState, slots: Tensor) -> None:
    """Let the next diagonal be the one after, or none."""
    state.step[slots] = torch.minimum(state.step[slots] + 1, state.total[slots])
