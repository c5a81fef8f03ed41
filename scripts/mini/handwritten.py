"""Prompts and edits written by hand, for evaluation on wordings outside the grammar.

handwritten.json and blind.json hold questions with a short specification of the expected picture; the author of
blind.json knew the world but not the grammar. "2 small red star, blue circle" lists things: number, size, colour,
shape, all optional except the shape. `how` is the relation of the first thing to the second, or its position. In an
edit, a thing that must stay has its centre in pixels; a new one has "@top-right" or "^above" (relative to the first
thing).
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from scripts.mini.spec import BETWEEN, REGIONS, Relation, Spec, Wanted
from scripts.mini.tasks.sample import Sample
from scripts.mini.world import COLOURS, SHAPES, SIDES, Scene, Thing

TASKS = ("t2i", "x2i")
SHEETS = ("handwritten", "blind")


def samples(task: str, rows: int, columns: int, *, sheet: str = SHEETS[0]) -> list[Sample]:
    """All samples of `task` (one of TASKS) in `sheet` (one of SHEETS)."""
    makers = {"t2i": _picture, "x2i": partial(_edit, rows=rows, columns=columns)}
    return [makers[task](**line) for line in json.loads(Path(__file__).with_name(f"{sheet}.json").read_text())[task]]


def thing(words: str) -> Wanted:
    """Parse "small red star"; "@top-right" gives a region, "56 48" the centre."""
    size = colour = shape = region = None
    centre: list[int] = []
    for word in words.split():
        if word in SIDES:
            size = word
        elif word in COLOURS:
            colour = word
        elif word in SHAPES:
            shape = word
        elif word.startswith("@"):
            region = word[1:].replace("-", " ")
        elif word.isdigit():
            centre.append(int(word))
        elif not word.startswith("^"):
            raise ValueError(f"{word!r} in {words!r} is no colour, size, shape or position")
    if shape is None or (region and region not in REGIONS):
        raise ValueError(f"{words!r} is no thing: a shape is missing")
    return Wanted(shape, colour, size, near=(centre[0], centre[1]) if centre else None, region=region)


def _picture(prompt: str, things: str, how: str, ground: str) -> Sample:
    wanted: list[Wanted] = []
    groups: list[tuple[int, ...]] = []
    for words in things.split(", "):
        first, _, rest = words.partition(" ")
        count = int(first) if first.isdigit() else 1
        one = thing(rest if first.isdigit() else words)
        groups.append(tuple(range(len(wanted), len(wanted) + count)))
        wanted += [replace(one, region=how if how in REGIONS else None)] * count
    relations = (Relation(how, *groups[: 3 if how == BETWEEN else 2]),) if how and how not in REGIONS else ()
    texture, _, colour = ground.rpartition(" ")
    spec = Spec(tuple(wanted), relations, colour or None, texture or ("plain" if colour else None))
    return Sample("t2i", prompt, (), (), (spec,), prompt)


def _edit(before: str, prompt: str, things: str, ground: str, *, rows: int, columns: int) -> Sample:
    shown, _, old = before.partition("; ")
    base = Scene(rows, columns, old, "plain", tuple(map(_placed, shown.split(", "))), 1)
    goals = things.split(", ")
    goal = replace(base, background=ground, things=tuple(_placed(words) for words in goals if words[-1].isdigit()))
    relations = tuple(
        Relation(words.partition("^")[2].replace("-", " "), (i,), (0,)) for i, words in enumerate(goals) if "^" in words
    )
    spec = Spec(tuple(map(_seen, goals)), relations, ground, "plain")
    return Sample("x2i", prompt, (base,), (goal,), (spec,), prompt)


def _placed(words: str) -> Thing:
    one = thing(words)
    assert one.near
    assert one.colour
    return Thing(one.shape, one.colour, one.size or "medium", *one.near)


def _seen(words: str) -> Wanted:
    """Parse a thing that is kept or moved: medium-sized unless stated."""
    one = thing(words)
    return Wanted(one.shape, one.colour, one.size or ("medium" if one.near else None), one.near, one.region)
