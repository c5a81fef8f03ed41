"""Image editing: one to three pictures and an instruction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from scripts.mini.layout import in_ninth, interior, put, put_all
from scripts.mini.spec import BESIDE, REGIONS, SIDED, Relation, Spec, Wanted, stands
from scripts.mini.tasks.sample import Sample, colour, distinct_things, noise_seed, shape, size, texture, unchanged
from scripts.mini.words import ORDINALS, Speaker
from scripts.mini.world import Scene, Thing, fits, touches

OPERATIONS = ("recolour", "reshape", "resize", "add", "remove", "move", "ground", "take", "take two")
WEIGHTS = (4, 2, 2, 5, 3, 5, 3, 4, 2)
FREE_SHARE = 0.25
"""Fraction of references whose things are off the grid, as in pictures from elsewhere."""


@dataclass(frozen=True)
class Edit:
    """The instruction, the edited picture, and its spec."""

    order: str
    after: Scene
    spec: Spec


FIRST = ("recolour", "reshape", "resize", "remove", "ground")
"""Operations after which all positions are determined, so that a second operation may follow."""

Maker = Callable[[Random, Speaker, Scene, bool], Edit | None]


def make(rng: Random, rows: int, columns: int) -> Sample | None:
    """One sample, or None if the layout failed."""
    operation = rng.choices(OPERATIONS, WEIGHTS)[0]
    before = scene(rng, rows, columns, rng.choice((1, 2, 2, 3, 3)) if operation != "move" else rng.choice((2, 3)))
    if before is None:
        return None
    speaker, with_size = Speaker(rng), rng.random() < 0.85
    if operation in ("take", "take two"):
        return _take(rng, speaker, before, operation == "take two")
    edit = MAKERS[operation](rng, speaker, before, with_size)
    if edit is None:
        return None
    order = (
        edit.order
        if rng.random() < 0.7
        else rng.choice(("please {}", "can you {}?", "edit the picture: {}")).format(edit.order)
    )
    return sample_of(rng, order, (before,), edit, operation)


def twice(rng: Random, rows: int, columns: int) -> Sample | None:
    """Two changes in one instruction, or None if the layout failed."""
    before = scene(rng, rows, columns, rng.choice((2, 2, 3)))
    operations = rng.choice(FIRST), rng.choice(tuple(MAKERS))
    if before is None or operations[0] == operations[1]:
        return None
    speaker = Speaker(rng)
    first = MAKERS[operations[0]](rng, speaker, before, True)
    second = first and MAKERS[operations[1]](rng, speaker, first.after, True)
    if not first or not second:
        return None
    new = [t for t in first.after.things if t not in before.things]
    if operations[1] in ("remove", "recolour", "reshape") and not all(t in second.after.things for t in new):
        return None  # the second change would undo the first
    order = first.order + rng.choice((" and ", " and then ", ", then ")) + second.order
    return sample_of(rng, order, (before,), second, " ".join(operations))


def sample_of(rng: Random, order: str, references: tuple[Scene, ...], edit: Edit, operation: str) -> Sample:
    """Build the sample, with random capitalization and final full stop."""
    if rng.random() < 0.6:
        order = order[0].upper() + order[1:]
    if rng.random() < 0.5 and not order.endswith("?"):
        order += "."
    changed = [t for t in edit.after.things if t not in references[0].things]
    key = " ".join(["x2i", operation, *(f"{t.colour} {t.shape}" for t in changed), edit.after.background])
    return Sample("x2i", order, references, (edit.after,), (edit.spec,), key)


def scene(rng: Random, rows: int, columns: int, count: int, *excluded_colours: str) -> Scene | None:
    """A picture of `count` things with distinct shapes and colours at random positions."""
    ground = colour(rng, *excluded_colours)
    step = 1 if rng.random() < FREE_SHARE else 8
    things = put_all(
        rng, distinct_things(rng, count, ground, *excluded_colours), (), interior(columns * 16, rows * 16), step=step
    )
    return (things and Scene(rows, columns, ground, texture(rng), tuple(things), noise_seed(rng))) or None


def name(rng: Random, speaker: Speaker, thing: Thing, others: tuple[Thing, ...]) -> str:
    """ "the red star", or "the star" if it is the only one."""
    lone = all(o.shape != thing.shape for o in others if o is not thing)
    return speaker.the(thing.shape, None if lone and rng.random() < 0.3 else thing.colour)


def _edit(
    rng: Random, order: str, before: Scene, things: list[Thing], changed: Wanted | None = None, **more: object
) -> Edit:
    """An edit that keeps all other things; `changed` describes the last of `things` if it is new."""
    after = replace(before, things=tuple(things), seed=noise_seed(rng))
    wanted = [unchanged(t) for t in (things[:-1] if changed else things)]
    wanted += [changed] if changed else []
    spec = Spec(tuple(wanted), background=before.background, texture=before.texture)
    return Edit(order, after, replace(spec, **more))  # type: ignore[arg-type]


def _others(before: Scene, thing: Thing) -> list[Thing]:
    return [t for t in before.things if t is not thing]


def _recolour(rng: Random, speaker: Speaker, before: Scene, with_size: bool) -> Edit:
    thing = rng.choice(before.things)
    new = replace(thing, colour=colour(rng, before.background, *(t.colour for t in before.things)))
    what, hue = name(rng, speaker, thing, before.things), speaker.colour(new.colour)
    order = rng.choice(
        (
            f"make {what} {hue}",
            f"turn {what} {hue}",
            f"paint {what} {hue}",
            f"change the {speaker.colour_word()} of {what} to {hue}",
            f"recolor {what} {hue}" if speaker.american else f"recolour {what} {hue}",
        )
    )
    return _edit(rng, order, before, [*_others(before, thing), new], unchanged(new))


def _reshape(rng: Random, speaker: Speaker, before: Scene, with_size: bool) -> Edit:
    thing = rng.choice(before.things)
    new = replace(thing, shape=shape(rng, *(t.shape for t in before.things)))
    same = rng.random() < 0.6
    if not same:
        new = replace(new, colour=colour(rng, before.background, *(t.colour for t in _others(before, thing))))
    what = name(rng, speaker, thing, before.things)
    goal = speaker.a(new.shape, None if same and rng.random() < 0.5 else new.colour)
    order = rng.choice((f"replace {what} with {goal}", f"turn {what} into {goal}", f"swap {what} for {goal}"))
    return _edit(rng, order, before, [*_others(before, thing), new], unchanged(new))


def _resize(rng: Random, speaker: Speaker, before: Scene, with_size: bool) -> Edit | None:
    thing = rng.choice(before.things)
    steps = ("small", "medium", "large")
    up = rng.random() < 0.5
    place = steps.index(thing.size) + (1 if up else -1)
    if not 0 <= place < 3:
        return None
    new = replace(thing, size=steps[place])
    if not fits(new, before.width, before.height) or any(touches(new.box, o.box) for o in _others(before, thing)):
        return None
    what = name(rng, speaker, thing, before.things)
    order = rng.choice((f"make {what} {'larger' if up else 'smaller'}", f"make {what} {'bigger' if up else 'smaller'}"))
    return _edit(rng, order, before, [*_others(before, thing), new], unchanged(new))


def _spot(
    rng: Random, speaker: Speaker, thing: Thing, others: list[Thing], before: Scene
) -> tuple[Thing, str, Wanted, tuple[Relation, ...]] | None:
    """A free position for `thing`: (placed, words for the position, spec, relations to others)."""
    width, height = before.width, before.height
    want = Wanted(thing.shape, thing.colour, thing.size)
    if rng.random() < 0.45 or not others:
        region = rng.choice(tuple(REGIONS))
        placed = in_ninth(rng, thing, region, width, height, others)
        return (placed and (placed, speaker.place(region), replace(want, region=region), ())) or None
    anchor = rng.choice(others)
    relation = rng.choice((*SIDED, *SIDED, BESIDE))
    left, top, right, bottom = anchor.box
    reach = thing.side + rng.choice((16, 24, 40, 56))
    areas = {
        "above": (left - thing.side // 2, top - reach, right + thing.side // 2, top),
        "below": (left - thing.side // 2, bottom, right + thing.side // 2, bottom + reach),
        "left of": (left - reach, top - thing.side // 2, left, bottom + thing.side // 2),
        "right of": (right, top - thing.side // 2, right + reach, bottom + thing.side // 2),
    }
    area = areas[rng.choice(("left of", "right of")) if relation == BESIDE else relation]
    edge = interior(width, height)
    clipped = (max(area[0], edge[0]), max(area[1], edge[1]), min(area[2], edge[2]), min(area[3], edge[3]))
    placed = put(rng, thing, others, clipped)
    if placed is None or not stands(relation, [placed], [anchor]):
        return None
    dx, dy = abs(placed.x - anchor.x), abs(placed.y - anchor.y)
    if relation in SIDED and (dx > dy) == (relation in ("above", "below")):
        return None
    words = f"{speaker.relation(relation)} {name(rng, speaker, anchor, before.things)}"
    return placed, words, want, (Relation(relation, (len(others),), (others.index(anchor),)),)


def _add(rng: Random, speaker: Speaker, before: Scene, with_size: bool) -> Edit | None:
    new = Thing(shape(rng), colour(rng, before.background), size(rng), 0, 0)
    if any(t.shape == new.shape and t.colour == new.colour for t in before.things):
        return None
    others = list(before.things)
    tell_size = with_size and (new.size != "medium" or rng.random() < 0.3)
    if not tell_size and new.size != "medium":
        return None  # unless stated, a new thing is medium-sized
    what = speaker.a(new.shape, new.colour, new.size if tell_size else None)
    verb = rng.choice(("add {}", "add {}", "put {}", "draw {}", "place {}"))
    if verb == "add {}" and rng.random() < 0.2:
        placed = put(rng, new, others, interior(before.width, before.height))
        if placed is None:
            return None
        want = Wanted(new.shape, new.colour, new.size)
        return _edit(rng, verb.format(what), before, [*others, placed], want)
    found = _spot(rng, speaker, new, others, before)
    if found is None:
        return None
    placed, words, want, relations = found
    return _edit(rng, f"{verb.format(what)} {words}", before, [*others, placed], want, relations=relations)


def _remove(rng: Random, speaker: Speaker, before: Scene, with_size: bool) -> Edit:
    thing = rng.choice(before.things)
    what = name(rng, speaker, thing, before.things)
    order = rng.choice((f"remove {what}", f"delete {what}", f"take {what} away", f"erase {what}"))
    return _edit(rng, order, before, _others(before, thing))


def _move(rng: Random, speaker: Speaker, before: Scene, with_size: bool) -> Edit | None:
    thing = rng.choice(before.things)
    others = _others(before, thing)
    found = _spot(rng, speaker, thing, others, before)
    if found is None or touches(found[0].box, thing.box, -thing.side // 2):
        return None
    placed, words, want, relations = found
    what = name(rng, speaker, thing, before.things)
    if want.region and rng.random() < 0.7:
        words = words.replace("in the", "to the", 1).replace("at the", "to the", 1).replace("on the", "to the", 1)
    order = f"{rng.choice(('move', 'move', 'put', 'shift'))} {what} {words}"
    return _edit(rng, order, before, [*others, placed], want, relations=relations)


def _ground(rng: Random, speaker: Speaker, before: Scene, with_size: bool) -> Edit:
    new = colour(rng, before.background, *(t.colour for t in before.things))
    pattern = texture(rng)
    phrase, hue = speaker.ground(new, pattern), speaker.colour(new)
    options = [f"change the background to {speaker.a_ground(new, pattern)}", f"use {speaker.a_ground(new, pattern)}"]
    if pattern == "plain":
        options += [f"make the background {hue}", f"turn the background {hue}", f"change the background to {hue}"]
    else:
        options.append(f"make the background {' and '.join(phrase.split()[:-1])}")
    edit = _edit(rng, rng.choice(options), before, list(before.things), background=new, texture=pattern)
    return replace(edit, after=replace(edit.after, background=new, texture=pattern))


MAKERS: dict[str, Maker] = {
    "recolour": _recolour,
    "reshape": _reshape,
    "resize": _resize,
    "add": _add,
    "remove": _remove,
    "move": _move,
    "ground": _ground,
}


def _take(rng: Random, speaker: Speaker, base: Scene, two: bool) -> Sample | None:
    """Copy things from other pictures into the base picture, the first or last reference."""
    count = 3 if two else 2
    givers, taken = [], []
    for _ in range(count - 1):
        giver = scene(rng, base.rows, base.columns, rng.choice((1, 1, 2)))
        if giver is None:
            return None
        thing = rng.choice(giver.things)
        if thing.colour == base.background or any(
            t.shape == thing.shape and t.colour == thing.colour for t in (*base.things, *taken)
        ):
            return None
        givers.append(giver)
        taken.append(thing)
    last = rng.random() < 0.5
    references = (*givers, base) if last else (base, *givers)
    number = {id(picture): ORDINALS[i] for i, picture in enumerate(references)}
    noun = rng.choice(("picture", "picture", "image"))
    into = f"the {number[id(base)]} {noun}"

    things, wanted, relations, phrases = list(base.things), [unchanged(t) for t in base.things], [], []
    for giver, thing in zip(givers, taken, strict=True):
        what = f"{name(rng, speaker, thing, giver.things)} from the {number[id(giver)]} {noun}"
        if two or rng.random() < 0.5:
            placed = put(rng, thing, things, interior(base.width, base.height))
            if placed is None:
                return None
            wanted.append(Wanted(thing.shape, thing.colour, thing.size))
            phrases.append(what)
        else:
            found = _spot(rng, speaker, thing, things, base)
            if found is None:
                return None
            placed, words, want, more = found
            wanted.append(want)
            relations += more
            into += f", {words}"
            phrases.append(what)
        things.append(placed)
    order = f"{rng.choice(('put', 'add', 'place'))} {' and '.join(phrases)} into {into}"
    after = replace(base, things=tuple(things), seed=noise_seed(rng))
    spec = Spec(tuple(wanted), tuple(relations), base.background, base.texture)
    sample = sample_of(rng, order, (base,), Edit(order, after, spec), "take two" if two else "take")
    return replace(sample, references=references)
