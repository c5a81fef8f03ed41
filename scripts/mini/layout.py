"""Random placement of things on the grid, without overlap and in given relations."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from scripts.mini.spec import REGIONS
from scripts.mini.world import GAP, GRID, MARGIN, Thing, fits, touches

Area = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels."""
TRIES = 30


def put(
    rng: Random, thing: Thing, others: Sequence[Thing], area: Area, *, step: int = GRID, gap: int = GAP
) -> Thing | None:
    """`thing` at a random position inside `area`, clear of `others`; None if none was found."""
    half = thing.side // 2
    low_x, high_x = -(-(area[0] + half) // step), (area[2] - half) // step
    low_y, high_y = -(-(area[1] + half) // step), (area[3] - half) // step
    if low_x > high_x or low_y > high_y:
        return None
    for _ in range(TRIES):
        placed = thing.at(rng.randint(low_x, high_x) * step, rng.randint(low_y, high_y) * step)
        if not any(touches(placed.box, other.box, gap) for other in others):
            return placed
    return None


def put_all(
    rng: Random, things: Sequence[Thing], others: Sequence[Thing], area: Area, *, step: int = GRID
) -> list[Thing] | None:
    """All of `things` in a row or scattered, clear of each other and of `others`; None if that fails."""
    if len(things) > 1 and rng.random() < 0.6:
        row = _in_a_row(rng, things, area)
        if row and not any(touches(a.box, b.box) for a in row for b in others):
            return row
    placed: list[Thing] = []
    for thing in things:
        spot = put(rng, thing, [*others, *placed], area, step=step)
        if spot is None:
            return None
        placed.append(spot)
    return placed


def _in_a_row(rng: Random, things: Sequence[Thing], area: Area) -> list[Thing] | None:
    """Side by side at one height, evenly spaced."""
    widths = sum(t.side for t in things)
    room = area[2] - area[0] - widths
    gap = rng.choice([g for g in (8, 16, 24) if g * (len(things) - 1) <= room] or [0])
    if not gap:
        return None
    half = max(t.side for t in things) // 2
    low_y, high_y = -(-(area[1] + half) // GRID), (area[3] - half) // GRID
    slack = (room - gap * (len(things) - 1)) // GRID
    if low_y > high_y or slack < 0:
        return None
    y = rng.randint(low_y, high_y) * GRID
    x = area[0] + rng.randint(0, slack) * GRID
    row = []
    for thing in things:
        centre = -(-(x + thing.side // 2) // GRID) * GRID
        row.append(thing.at(centre, y))
        x = centre + thing.side // 2 + gap
    return row if all(t.box[2] <= area[2] for t in row) else None


def interior(width: int, height: int) -> Area:
    """The picture without its margin."""
    return MARGIN, MARGIN, width - MARGIN, height - MARGIN


def halves(rng: Random, width: int, height: int, first: int, second: int, *, upright: bool) -> tuple[Area, Area] | None:
    """The picture split into (top, bottom) or (left, right), at least `first` and `second` pixels deep."""
    length = height if upright else width
    low, high = -(-(MARGIN + first) // GRID), (length - MARGIN - second) // GRID
    if low > high:
        return None
    cut = rng.randint(low, high) * GRID
    if upright:
        return (MARGIN, MARGIN, width - MARGIN, cut), (MARGIN, cut + GAP // 2, width - MARGIN, height - MARGIN)
    return (MARGIN, MARGIN, cut, height - MARGIN), (cut + GAP // 2, MARGIN, width - MARGIN, height - MARGIN)


def in_ninth(rng: Random, thing: Thing, region: str, width: int, height: int, others: Sequence[Thing]) -> Thing | None:
    """`thing` with its centre in that ninth of the picture; None if there is no room."""
    column, row = REGIONS[region]
    for _ in range(TRIES):
        x = round((column + rng.uniform(0.1, 0.9)) * width / 3 / GRID) * GRID
        y = round((row + rng.uniform(0.1, 0.9)) * height / 3 / GRID) * GRID
        half = thing.side // 2 + MARGIN + GRID - 1
        x = min(max(x, half // GRID * GRID), (width - half) // GRID * GRID)
        y = min(max(y, half // GRID * GRID), (height - half) // GRID * GRID)
        placed = thing.at(x, y)
        inside = column * width / 3 <= x <= (column + 1) * width / 3 and row * height / 3 <= y <= (row + 1) * height / 3
        if inside and fits(placed, width, height) and not any(touches(placed.box, o.box) for o in others):
            return placed
    return None
