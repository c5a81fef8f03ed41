"""Text to image."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from scripts.mini.layout import halves, in_ninth, interior, put, put_all
from scripts.mini.spec import ABOVE, BELOW, BESIDE, BETWEEN, REGIONS, SIDED, Relation, Spec, Wanted, region_of, stands
from scripts.mini.tasks.sample import THOUGHT, Sample, TextPart, colour, noise_seed, shape, size, texture
from scripts.mini.words import Speaker, listing, sentence
from scripts.mini.world import GRID, Scene, Thing

KINDS = ("single", "place", "several", "sided", "beside", "between", "listed")
WEIGHTS = (3, 3, 4, 8, 2, 3, 4)
OPENINGS = ("", "", "", "", "", "a picture of ", "an image of ", "draw ", "show me ", "please draw ", "I want ")


@dataclass(frozen=True)
class Group:
    """`count` identical things."""

    count: int
    shape: str
    colour: str
    size: str

    def things(self) -> list[Thing]:
        return [Thing(self.shape, self.colour, self.size, 0, 0)] * self.count

    def differs(self, others: list[Group]) -> bool:
        """Whether shape or colour differs from each of `others`."""
        return all((g.shape, g.colour) != (self.shape, self.colour) for g in others)


def make(rng: Random, rows: int, columns: int, *, thought: float = 0.12, kind: str = "") -> Sample | None:
    """One sample, or None if the layout failed. `thought`: fraction that reasons before drawing. `kind`: one of KINDS,
    or "crowd": three to five things in two or three groups."""
    kind = kind or rng.choices(KINDS, WEIGHTS)[0]
    ground, pattern = colour(rng), texture(rng)
    groups = _groups(rng, kind, ground)
    relation = {"beside": BESIDE, "between": BETWEEN}.get(kind, rng.choice(SIDED) if kind == "sided" else "")
    region = rng.choice(tuple(REGIONS)) if kind == "place" else None
    width, height = columns * 16, rows * 16
    placed = _layout(rng, groups, relation, region, width, height)
    if placed is None:
        return None

    speaker = Speaker(rng)
    with_size = [rng.random() < (0.85 if g.size != "medium" else 0.3) for g in groups]
    phrases = [
        speaker.a(g.shape, g.colour, g.size if sized else None, g.count)
        for g, sized in zip(groups, with_size, strict=True)
    ]
    tell_ground = pattern != "plain" or rng.random() < 0.75
    question = question_of(rng, speaker, phrases, relation, region, (ground, pattern) if tell_ground else None)

    numbers, wanted = [], []
    for group, sized in zip(groups, with_size, strict=True):
        numbers.append(tuple(range(len(wanted), len(wanted) + group.count)))
        wanted += [Wanted(group.shape, group.colour, group.size if sized else None, region=region)] * group.count
    relations = (Relation(relation, *numbers),) if relation else ()
    spec = Spec(tuple(wanted), relations, ground if tell_ground else None, pattern if tell_ground else None)

    things = [thing for line in placed for thing in line]
    scene = Scene(rows, columns, ground, pattern, tuple(things), noise_seed(rng))
    answer: tuple[TextPart | Scene, ...] = (scene,)
    if rng.random() < thought:
        answer = (TextPart(_plan(speaker, placed, width, height), THOUGHT), scene)
    key = " ".join([kind, relation, region or "", *(f"{g.count} {g.colour} {g.shape}" for g in groups)])
    return Sample("t2i", question, (), answer, (spec,), key)


def _groups(rng: Random, kind: str, ground: str) -> list[Group]:
    """Groups that differ in shape or colour, mostly in both."""
    if kind == "crowd":
        return _crowd(rng, ground)
    count = {
        "single": 1,
        "place": 1,
        "several": 1,
        "sided": 2,
        "beside": 2,
        "between": 3,
        "listed": rng.choice((2, 2, 3)),
    }
    groups: list[Group] = []
    while len(groups) < count[kind]:
        number = 1
        if kind == "several":
            number = rng.choice((2, 3, 4))
        elif kind in ("sided", "listed") and count[kind] == 2 and rng.random() < 0.35:
            number = rng.choice((2, 2, 3))
        group = Group(number, shape(rng), colour(rng, ground), size(rng))
        if number > 2 and group.size == "large":
            continue
        if group.differs(groups):
            groups.append(group)
    return groups


def _crowd(rng: Random, ground: str) -> list[Group]:
    numbers = rng.choice(((2, 1), (1, 2), (2, 2), (3, 1), (1, 3), (2, 3), (3, 2), (1, 1, 2), (2, 1, 1), (1, 2, 1)))
    groups: list[Group] = []
    while len(groups) < len(numbers):
        group = Group(numbers[len(groups)], shape(rng), colour(rng, ground), rng.choice(("small", "small", "medium")))
        if group.differs(groups):
            groups.append(group)
    return groups


def _layout(
    rng: Random, groups: list[Group], relation: str, region: str | None, width: int, height: int
) -> list[list[Thing]] | None:
    if region:
        spot = in_ninth(rng, groups[0].things()[0], region, width, height, ())
        return [[spot]] if spot else None
    if relation in SIDED:
        return _sided(rng, groups, relation, width, height)
    if relation == BETWEEN:
        return _between(rng, groups, width, height)
    placed: list[list[Thing]] = []
    for group in groups:
        line = put_all(rng, group.things(), [t for line in placed for t in line], interior(width, height))
        if line is None:
            return None
        placed.append(line)
    if relation == BESIDE:
        first, second = placed[0][0], placed[1][0]
        reach = (first.side + second.side) // 2 + rng.choice((8, 16, 24, 32))
        x = -(-(first.x + rng.choice((-1, 1)) * reach) // GRID) * GRID
        moved = second.at(x, first.y + rng.choice((-8, 0, 0, 8)))
        spot = put(rng, second, [first], (*moved.box[:2], *moved.box[2:]))
        low, high = interior(width, height)[:2], interior(width, height)[2:]
        if (
            spot is None
            or spot.box[0] < low[0]
            or spot.box[1] < low[1]
            or spot.box[2] > high[0]
            or spot.box[3] > high[1]
        ):
            return None
        placed[1] = [spot]
        return placed if stands(BESIDE, placed[0], placed[1]) else None
    return placed


def _sided(rng: Random, groups: list[Group], relation: str, width: int, height: int) -> list[list[Thing]] | None:
    """The groups in two halves of the picture; single things are clearly above or beside each other."""
    upright = relation in (ABOVE, BELOW)
    order = groups if relation in (ABOVE, "left of") else groups[::-1]
    depth = [g.things()[0].side + 4 for g in order]
    areas = halves(rng, width, height, depth[0], depth[1], upright=upright)
    if areas is None:
        return None
    lines: list[list[Thing]] = []
    for group, area in zip(order, areas, strict=True):
        line = put_all(rng, group.things(), [t for line in lines for t in line], area)
        if line is None:
            return None
        lines.append(line)
    dx = abs(sum(t.x for t in lines[0]) / len(lines[0]) - sum(t.x for t in lines[1]) / len(lines[1]))
    dy = abs(sum(t.y for t in lines[0]) / len(lines[0]) - sum(t.y for t in lines[1]) / len(lines[1]))
    if (dx > dy) == upright or not stands(ABOVE if upright else "left of", *lines):
        return None
    return lines if order is groups else lines[::-1]


def _between(rng: Random, groups: list[Group], width: int, height: int) -> list[list[Thing]] | None:
    """Three things in a row or column, the first group in the middle."""
    upright = rng.random() < 0.35
    things = [groups[i].things()[0] for i in ((1, 0, 2) if rng.random() < 0.5 else (2, 0, 1))]
    length, depth = (height, width) if upright else (width, height)
    room = length - 8 - sum(t.side for t in things)
    if room < 32:
        return None
    gaps = rng.choice([g for g in (16, 24, 32, 40) if 2 * g <= room])
    line = rng.randint(
        (max(t.side for t in things) // 2 + 11) // GRID, (depth - max(t.side for t in things) // 2 - 11) // GRID
    )
    position = 4 + rng.randint(0, (room - 2 * gaps) // GRID) * GRID
    placed = []
    for thing in things:
        centre = -(-(position + thing.side // 2) // GRID) * GRID
        cross = (line + rng.choice((-1, 0, 0, 1))) * GRID
        placed.append(thing.at(cross, centre) if upright else thing.at(centre, cross))
        position = centre + thing.side // 2 + gaps
    edge = placed[-1].box[3 if upright else 2]
    if edge > length - 4:
        return None
    middle, ends = placed[1], [placed[0], placed[2]]
    if ends[0].shape != groups[1].shape or ends[0].colour != groups[1].colour:
        ends.reverse()
    return [[middle], [ends[0]], [ends[1]]]


def question_of(
    rng: Random, speaker: Speaker, phrases: list[str], relation: str, region: str | None, ground: tuple[str, str] | None
) -> str:
    """The question: things as named by `phrases`, their positions, and the background (colour, texture)."""
    if relation == BETWEEN:
        body = f"{phrases[0]} between {phrases[1]} and {phrases[2]}"
    elif relation:
        body = f"{phrases[0]} {speaker.relation(relation)} {phrases[1]}"
    else:
        body = listing(phrases)
    if region:
        body += f" {speaker.place(region)}"
    ending = ""
    if ground:
        ending = rng.choice((" on {}", " on {}", " on {}", " against {}", " with {}")).format(speaker.a_ground(*ground))
        if rng.random() < 0.12:
            ending = f". The background is {' and '.join(speaker.ground(*ground).split(' background')[0].split())}"
    text = rng.choice(OPENINGS) + body + ending
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.4 else "")


def _plan(speaker: Speaker, placed: list[list[Thing]], width: int, height: int) -> str:
    """A plan that names the position of each thing."""
    lines = [
        sentence(f"{speaker.a(t.shape, t.colour, t.size)} {speaker.place(region_of(t.x, t.y, width, height))}")
        for line in placed
        for t in line
    ]
    return " ".join(lines)
