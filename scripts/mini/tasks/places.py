"""Pictures with more in one sentence than `t2i.make` gives: longer lists and several positions."""

from __future__ import annotations

from random import Random

from scripts.mini.layout import in_ninth, interior, put
from scripts.mini.spec import ABOVE, BELOW, BESIDE, REGIONS, SIDED, Relation, Spec, Wanted, stands
from scripts.mini.tasks import t2i
from scripts.mini.tasks.sample import Sample, colour, distinct_things, noise_seed
from scripts.mini.words import Speaker
from scripts.mini.world import Scene, Thing

Drawn = tuple[list[Thing], list[str | None], list[tuple[str, int, int]]]
"""Things, the stated region of each, and relations between their indices: (name, first, second)."""


def more(rng: Random, rows: int, columns: int) -> Sample | None:
    """Longer lists, a position for each of several things, or things positioned relative to an earlier one."""
    kind = rng.choice(("crowd", "spread", *["chained"] * 3))  # four of five chained layouts fail for lack of room
    if kind == "crowd":
        return t2i.make(rng, rows, columns, kind=kind)
    ground = colour(rng)
    drawn = (_spread if kind == "spread" else _chained)(rng, ground, columns * 16, rows * 16)
    return drawn and _sample(rng, kind, ground, rows, columns, drawn)


def _spread(rng: Random, ground: str, width: int, height: int) -> Drawn | None:
    """Two or three things, each in its own region."""
    count = rng.choice((2, 2, 3))
    regions = rng.sample(tuple(REGIONS), count)
    things: list[Thing] = []
    for thing, region in zip(distinct_things(rng, count, ground), regions, strict=True):
        placed = in_ninth(rng, thing, region, width, height, things)
        if placed is None:
            return None
        things.append(placed)
    return things, [*regions], []


def _chained(rng: Random, ground: str, width: int, height: int) -> Drawn | None:
    """A thing, often with a stated position, and one or two placed relative to an earlier one."""
    first, *others = distinct_things(rng, rng.choice((2, 3, 3)), ground)
    region = rng.choice(tuple(REGIONS)) if rng.random() < 0.6 else None
    placed = in_ninth(rng, first, region, width, height, ()) if region else put(rng, first, (), interior(width, height))
    if placed is None:
        return None
    things, relations = [placed], list[tuple[str, int, int]]()
    for thing in others:
        name, anchor = rng.choice((*SIDED, BESIDE)), rng.randrange(len(things)) if rng.random() < 0.4 else 0
        spot = _stood(rng, thing, name, anchor, things, width, height)
        if spot is None:
            return None
        relations.append((name, len(things), anchor))
        things.append(spot)
    if len(things) == 2 and not region:
        return None  # covered by t2i.make
    return things, [region] + [None] * len(others), relations


def _stood(
    rng: Random, thing: Thing, name: str, anchor: int, things: list[Thing], width: int, height: int
) -> Thing | None:
    """`thing` clearly in the relation to one of `things`, clear of all; None if there is no room."""
    for _ in range(12):
        spot = put(rng, thing, things, interior(width, height))
        if spot is None or not stands(name, [spot], [things[anchor]]):
            continue
        upright = abs(spot.y - things[anchor].y) > abs(spot.x - things[anchor].x)
        if name == BESIDE or upright == (name in (ABOVE, BELOW)):
            return spot
    return None


def _sample(rng: Random, kind: str, ground: str, rows: int, columns: int, drawn: Drawn) -> Sample:
    things, regions, relations = drawn
    speaker, sized = Speaker(rng), [rng.random() < (0.7 if t.size != "medium" else 0.2) for t in things]
    phrases = [
        speaker.a(t.shape, t.colour, t.size if has_size else None) for t, has_size in zip(things, sized, strict=True)
    ]
    for i, region in enumerate(regions):
        phrases[i] += f" {speaker.place(region)}" if region else ""
    for name, one, other in relations:
        anchor = speaker.the(things[other].shape, things[other].colour if rng.random() < 0.4 else None)
        phrases[one] += f" {speaker.relation(name)} {anchor}"
    tell_ground = rng.random() < 0.75
    question = t2i.question_of(rng, speaker, phrases, "", None, (ground, "plain") if tell_ground else None)
    spec = Spec(
        tuple(
            Wanted(t.shape, t.colour, t.size if has_size else None, region=region)
            for t, has_size, region in zip(things, sized, regions, strict=True)
        ),
        tuple(Relation(name, (one,), (other,)) for name, one, other in relations),
        ground if tell_ground else None,
        "plain" if tell_ground else None,
    )
    scene = Scene(rows, columns, ground, "plain", tuple(things), noise_seed(rng))
    key = " ".join([kind, *(f"{t.colour} {t.shape}" for t in things)])
    return Sample("t2i", question, (), (scene,), (spec,), key)
