"""How to draw a picture: a sentence and a picture per step, each adding to the one before."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from scripts.mini.layout import interior, put
from scripts.mini.spec import ABOVE, BELOW, LEFT, RIGHT, Relation, Spec, Wanted, in_region, region_of, stands
from scripts.mini.tasks.sample import GLOBAL, Sample, TextPart, colour, distinct_things, noise_seed, texture, unchanged
from scripts.mini.words import Speaker, listing, sentence
from scripts.mini.world import Scene, Thing

QUESTIONS = (
    "how do I draw {}?",
    "how to draw {}",
    "show me step by step how to draw {}",
    "teach me to draw {}",
    "draw {} step by step",
    "explain how to draw {}",
)


def make(rng: Random, rows: int, columns: int, *, reasoning: float = 0.25) -> Sample | None:
    """One sample, or None if the layout failed. `reasoning`: fraction that starts with a plan."""
    ground, pattern, count = colour(rng), texture(rng), rng.choice((2, 3, 3, 4))
    things: list[Thing] = []
    for thing in distinct_things(rng, count, ground):
        if count == 4 and thing.size == "large":
            thing = replace(thing, size="small")
        placed = put(rng, thing, things, interior(columns * 16, rows * 16))
        if placed is None:
            return None
        things.append(placed)
    speaker = Speaker(rng)
    empty = Scene(rows, columns, ground, pattern, (), noise_seed(rng))
    with_size = [rng.random() < (0.8 if t.size != "medium" else 0.3) for t in things]
    phrases = [
        speaker.a(t.shape, t.colour, t.size if sized else None) for t, sized in zip(things, with_size, strict=True)
    ]
    goal = f"{listing(phrases)} on {speaker.a_ground(ground, pattern)}"

    answer: list[TextPart | Scene] = []
    if rng.random() < reasoning:
        answer.append(TextPart(f"There are {len(things)} things to draw: {listing(phrases)}.", GLOBAL))
    specs = []
    start = rng.random() < 0.4
    if start:
        answer += [TextPart(f"Step 1: {sentence(f'start with {speaker.a_ground(ground, pattern)}')}"), empty]
        specs.append(Spec((), (), ground, pattern))
    for i, thing in enumerate(things):
        words, region, relations = _where(rng, speaker, things[: i + 1], empty)
        step = f"Step {len(specs) + 1}: {sentence(f'draw {phrases[i]} {words}')}"
        if not start and i == 0:
            step = f"Step 1: {sentence(f'on {speaker.a_ground(ground, pattern)}, draw {phrases[i]} {words}')}"
        picture = replace(empty, things=tuple(things[: i + 1]), seed=noise_seed(rng))
        wanted = [unchanged(t) for t in things[:i]]
        wanted.append(Wanted(thing.shape, thing.colour, thing.size if with_size[i] else None, region=region))
        answer += [TextPart(step), picture]
        specs.append(Spec(tuple(wanted), relations, ground, pattern))
    question = rng.choice(QUESTIONS).format(goal)
    if rng.random() < 0.6:
        question = question[0].upper() + question[1:]
    key = " ".join(["howto", ground, *(f"{t.colour} {t.shape}" for t in things[:2])])
    return Sample("howto", question, (), tuple(answer), tuple(specs), key)


def _where(
    rng: Random, speaker: Speaker, things: list[Thing], scene: Scene
) -> tuple[str, str | None, tuple[Relation, ...]]:
    """Words for the position of the last thing: its region, or a relation to an earlier thing."""
    *earlier, thing = things
    options = []
    for i, other in enumerate(earlier):
        dx, dy = abs(thing.x - other.x), abs(thing.y - other.y)
        for relation in (ABOVE, BELOW) if dy > dx else (LEFT, RIGHT):
            if stands(relation, [thing], [other]) and max(dx, dy) > 1.5 * min(dx, dy):
                options.append((i, relation))
    if options and rng.random() < 0.55:
        i, relation = rng.choice(options)
        words = f"{speaker.relation(relation)} {speaker.the(earlier[i].shape, earlier[i].colour)}"
        return words, None, (Relation(relation, (len(earlier),), (i,)),)
    region = region_of(thing.x, thing.y, scene.width, scene.height)
    assert in_region(thing, region, scene.width, scene.height)
    return speaker.place(region), region, ()
