"""Specifications of what a picture must show, and their comparison with detected things."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.mini.world import Thing

ABOVE, BELOW, LEFT, RIGHT, BESIDE, BETWEEN = "above", "below", "left of", "right of", "next to", "between"
SIDED = (ABOVE, BELOW, LEFT, RIGHT)
REGIONS = {
    "top left": (0, 0),
    "top": (1, 0),
    "top right": (2, 0),
    "left": (0, 1),
    "centre": (1, 1),
    "right": (2, 1),
    "bottom left": (0, 2),
    "bottom": (1, 2),
    "bottom right": (2, 2),
}
"""Ninths of the picture: (column, row)."""


@dataclass(frozen=True)
class Wanted:
    """One required thing. None leaves an attribute open; `near` is the required centre."""

    shape: str
    colour: str | None = None
    size: str | None = None
    near: tuple[int, int] | None = None
    region: str | None = None


@dataclass(frozen=True)
class Relation:
    """Relation `name` between the wanted things with indices `first`, `second` (and `third` for BETWEEN)."""

    name: str
    first: tuple[int, ...]
    second: tuple[int, ...]
    third: tuple[int, ...] = ()


@dataclass(frozen=True)
class Spec:
    """Exactly the things in `wanted`, in these `relations`, on this background (None: any)."""

    wanted: tuple[Wanted, ...]
    relations: tuple[Relation, ...] = ()
    background: str | None = None
    texture: str | None = None


@dataclass(frozen=True)
class Seen:
    """What the judge detected in a picture of `width` x `height` pixels."""

    width: int
    height: int
    background: str
    texture: str
    things: tuple[Thing, ...]


def held_out(*words: object) -> bool:
    """Whether this combination is held out from training: one in ten, by a fixed hash."""
    return zlib.crc32(" ".join(map(str, words)).encode()) % 10 == 0


def stands(name: str, first: Sequence[Thing], second: Sequence[Thing], third: Sequence[Thing] = ()) -> bool:
    """Whether the relation clearly holds between the centres of every pair."""
    if name == BETWEEN:
        return all(_between(a, b, c) for a in first for b in second for c in third)
    return all(_pair(name, a, b) for a in first for b in second)


def _pair(name: str, a: Thing, b: Thing) -> bool:
    dx, dy = a.x - b.x, a.y - b.y
    clear = 12
    match name:
        case "above":
            return dy <= -clear
        case "below":
            return dy >= clear
        case "left of":
            return dx <= -clear
        case "right of":
            return dx >= clear
        case "next to":
            reach = (a.side + b.side) // 2
            return abs(dy) <= 32 and reach - 8 <= abs(dx) <= reach + 56
    raise ValueError(f"no relation is called {name!r}")


def _between(a: Thing, b: Thing, c: Thing) -> bool:
    across, along = (b.x, a.x, c.x), (b.y, a.y, c.y)
    if abs(b.x - c.x) < abs(b.y - c.y):
        across, along = along, across
    low, high = min(across[0], across[2]), max(across[0], across[2])
    return (
        low + 12 <= across[1] <= high - 12 and min(along[0], along[2]) - 40 <= along[1] <= max(along[0], along[2]) + 40
    )


def in_region(thing: Thing, region: str, width: int, height: int, *, slack: float = 0.06) -> bool:
    """Whether the centre lies in that ninth, enlarged by `slack` (fraction of the picture's side)."""
    column, row = REGIONS[region]
    x, y = thing.x / width, thing.y / height
    return column / 3 - slack <= x <= (column + 1) / 3 + slack and row / 3 - slack <= y <= (row + 1) / 3 + slack


def region_of(x: float, y: float, width: int, height: int) -> str:
    """The name of the ninth that contains the point."""
    cell = (min(int(3 * x / width), 2), min(int(3 * y / height), 2))
    return next(name for name, at in REGIONS.items() if at == cell)


def mismatch(seen: Seen, spec: Spec, *, near: int = 12) -> str | None:
    """None if the picture matches the spec, else the first mismatch in a few words."""
    if spec.background and seen.background != spec.background:
        return f"background is {seen.background}, not {spec.background}"
    if spec.texture and seen.texture != spec.texture:
        return f"background is {seen.texture}, not {spec.texture}"
    if len(seen.things) != len(spec.wanted):
        return f"{len(seen.things)} things, not {len(spec.wanted)}"
    options = [[i for i, thing in enumerate(seen.things) if _matches(thing, want, seen, near)] for want in spec.wanted]
    for want, fitting in zip(spec.wanted, options, strict=True):
        if not fitting:
            return f"no {want}"
    if not _assign(seen, spec, options, []):
        return "the things are there but their number or places are wrong"
    return None


def _matches(thing: Thing, want: Wanted, seen: Seen, near: int) -> bool:
    return (
        thing.shape == want.shape
        and want.colour in (None, thing.colour)
        and want.size in (None, thing.size)
        and (want.near is None or max(abs(thing.x - want.near[0]), abs(thing.y - want.near[1])) <= near)
        and (want.region is None or in_region(thing, want.region, seen.width, seen.height))
    )


def _assign(seen: Seen, spec: Spec, options: list[list[int]], chosen: list[int]) -> bool:
    """Whether things can be assigned to the wanted ones, one each, such that all relations hold."""
    if len(chosen) == len(options):

        def pick(numbers: tuple[int, ...]) -> list[Thing]:
            return [seen.things[chosen[n]] for n in numbers]

        return all(stands(r.name, pick(r.first), pick(r.second), pick(r.third)) for r in spec.relations)
    return any(_assign(seen, spec, options, [*chosen, i]) for i in options[len(chosen)] if i not in chosen)
