"""A camera moves through a world larger than its view by half a view per step, so that successive views overlap."""

from __future__ import annotations

from random import Random

from scripts.mini.layout import put
from scripts.mini.spec import Spec
from scripts.mini.tasks.sample import GLOBAL, Sample, TextPart, colour, distinct_things, noise_seed
from scripts.mini.words import NUMBERS, Speaker, listing, sentence
from scripts.mini.world import GRID, Scene, Thing

MOVES = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
STEP_WORDS = ("the camera moves {}", "the camera goes {}", "we move {}", "we go {}")


def make(rng: Random, rows: int, columns: int, *, reasoning: float = 0.2) -> Sample | None:
    """One sample of 2 to 4 moves. In two thirds the first view is a reference, else it opens the answer."""
    steps = rng.choice((2, 3, 3, 4))
    # Half a view in complete tokens, so that overlapping areas have the same codes, shifted.
    half = (columns // 2 * 16, rows // 2 * 16)
    path, place, places = [], (0, 0), [(0, 0)]
    for _ in range(steps):
        back = {"right": "left", "left": "right", "up": "down", "down": "up"}.get(path[-1] if path else "", "")
        move = rng.choice([m for m in MOVES if m != back])
        place = (place[0] + MOVES[move][0], place[1] + MOVES[move][1])
        path.append(move)
        places.append(place)
    ground = colour(rng)
    kinds = distinct_things(rng, rng.choice((2, 2, 3)), ground)
    things = _world(rng, kinds, places, half, columns * 16, rows * 16)
    views = [_view(rng, things, spot, half, rows, columns, ground) for spot in places]

    speaker = Speaker(rng)
    land = f"{speaker.a_ground(ground).replace('background', rng.choice(('world', 'land')))}"
    seen = listing([speaker.a(k.shape, k.colour, count=2).split(" ", 1)[1] for k in kinds])
    given = rng.random() < 0.67
    route = _route(rng, path)
    question = rng.choice(
        (
            f"explore {land} with {seen}: {route}",
            f"walk through {land} of {seen}: {route}",
            f"{route} through {land} with {seen}",
        )
    )
    if given and rng.random() < 0.5:
        question = rng.choice((f"explore this world: {route}", route, f"from here, {route}"))
    if rng.random() < 0.6:
        question = question[0].upper() + question[1:]
    answer: list[TextPart | Scene] = []
    if rng.random() < reasoning:
        answer.append(TextPart(f"The path has {NUMBERS[steps]} moves: {listing(path)}.", GLOBAL))
    if not given:
        answer += [TextPart(sentence(rng.choice(("we start here", "the walk begins here")))), views[0]]
    words = rng.choice(STEP_WORDS)
    for move, view in zip(path, views[1:], strict=True):
        answer += [TextPart(sentence(words.format(move))), view]
    pictures = views[1:] if given else views
    specs = tuple(Spec((), background=ground) for _ in pictures)
    key = " ".join(["explore", ground, *(f"{k.colour} {k.shape}" for k in kinds[:1]), path[0]])
    return Sample("explore", question, (views[0],) if given else (), tuple(answer), specs, key)


def _route(rng: Random, path: list[str]) -> str:
    verb = rng.choice(("go", "move", "walk"))
    return f"{verb} {rng.choice((', then ', ', ', ' and then ')).join(path)}"


def _world(
    rng: Random, kinds: list[Thing], places: list[tuple[int, int]], half: tuple[int, int], width: int, height: int
) -> list[Thing]:
    """Things all over the area that the views cover, about three to five per view."""
    left, top = min(p[0] for p in places) * half[0], min(p[1] for p in places) * half[1]
    right = max(p[0] for p in places) * half[0] + width
    bottom = max(p[1] for p in places) * half[1] + height
    count = (right - left) * (bottom - top) * rng.choice((3, 4, 5)) // (width * height)
    things: list[Thing] = []
    area = (left // GRID * GRID - 16, top // GRID * GRID - 16, right + 16, bottom + 16)
    for _ in range(count):
        spot = put(rng, rng.choice(kinds), things, area, gap=16)
        if spot:
            things.append(spot)
    return things


def _view(
    rng: Random,
    things: list[Thing],
    place: tuple[int, int],
    half: tuple[int, int],
    rows: int,
    columns: int,
    ground: str,
) -> Scene:
    x, y = place[0] * half[0], place[1] * half[1]
    moved = [t.at(t.x - x, t.y - y) for t in things]
    shown = [t for t in moved if t.box[2] > 0 and t.box[3] > 0 and t.box[0] < columns * 16 and t.box[1] < rows * 16]
    return Scene(rows, columns, ground, "plain", tuple(shown), noise_seed(rng))
