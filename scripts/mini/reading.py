"""Parses things, positions, moves and backgrounds from the model's sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from scripts.mini.spec import Relation, Spec, Wanted
from scripts.mini.tasks.explore import MOVES
from scripts.mini.words import NOUNS, NUMBERS, RELATION_WORDS, SIZE_WORDS, TEXTURE_WORDS
from scripts.mini.world import COLOURS

SHAPE = {form: shape for shape, nouns in NOUNS.items() for pair in nouns for form in pair}
COLOUR = {**{name: name for name in COLOURS}, "gray": "grey"}
SIZE = {word: size for size, words in SIZE_WORDS.items() for word in words}
RELATION = {word: name for name, words in RELATION_WORDS.items() for word in words}
TEXTURE = {word: name for name, words in TEXTURE_WORDS.items() for word in words}


def any_of(words: Iterable[str]) -> str:
    """A regex alternation, longest word first."""
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_THING = re.compile(
    rf"\b(?:(?P<number>an?|the|one|two|three|four|[1-4]) )?(?:(?P<size>{any_of(SIZE)}) )?"
    rf"(?:(?P<colour>{any_of(COLOUR)}) )?(?P<shape>{any_of(SHAPE)})\b"
)
_GROUND = re.compile(
    rf"(?:(?P<t1>{any_of(TEXTURE)}) |plain )?(?P<colour>{any_of(COLOUR)}) (?:(?P<t2>{any_of(TEXTURE)}) )?background"
)
_SKY = re.compile(rf"(?:sky|everything around|land) is (?P<colour>{any_of(COLOUR)})")
_PLACE = re.compile(
    r"\b(?:in|at|on) the "
    r"(top[ -]left|top[ -]right|bottom[ -]left|bottom[ -]right|top|bottom|left|right|cent(?:re|er)|middle)\b"
)
_SIDE = re.compile(rf"\b({any_of(RELATION)}) the (?:({any_of(COLOUR)}) )?({any_of(SHAPE)})\b")


@dataclass(frozen=True)
class Mention:
    """`count` things of one description; `definite` if introduced by "the"."""

    count: int
    wanted: Wanted
    definite: bool


def mentions(text: str) -> list[Mention]:
    """All things mentioned in a text, in order."""
    found = []
    for match in _THING.finditer(text.lower()):
        number = match["number"] or ""
        count = int(number) if number.isdigit() else NUMBERS.index(number) if number in NUMBERS else 1
        wanted = Wanted(SHAPE[match["shape"]], COLOUR.get(match["colour"] or ""), SIZE.get(match["size"] or ""))
        found.append(Mention(count, wanted, number == "the"))
    return found


def ground(text: str) -> tuple[str, str] | None:
    """(colour, texture) of the background in a text."""
    match = _GROUND.search(text.lower())
    return (match and (COLOUR[match["colour"]], TEXTURE.get(match["t1"] or match["t2"] or "", "plain"))) or None


def sky(text: str) -> str | None:
    match = _SKY.search(text.lower())
    return (match and COLOUR[match["colour"]]) or None


def place(text: str) -> str | None:
    """The region (ninth of the picture) in a text."""
    match = _PLACE.search(text.lower())
    if not match:
        return None
    name = match[1].replace("-", " ")
    return "centre" if name in ("center", "middle") else name


def move(text: str) -> str | None:
    """The camera's direction in a text."""
    match = re.search(rf"\b({'|'.join(MOVES)})\b", text.lower())
    return (match and match[1]) or None


def howto_specs(texts: list[str]) -> list[Spec] | None:
    """Specs of the picture after each step, from the steps' texts; None if a step cannot be parsed."""
    wanted: list[Wanted] = []
    under: tuple[str, str] | None = None
    specs = []
    for text in texts:
        under = ground(text) or under
        named = [m for m in mentions(text) if not m.definite]
        relations: tuple[Relation, ...] = ()
        if named:
            if len(named) != 1 or named[0].count != 1:
                return None
            region = None
            side = _SIDE.search(text.lower())
            if side:
                anchors = [i for i, w in enumerate(wanted) if w.shape == SHAPE[side[3]]]
                if len(anchors) != 1:
                    return None
                relations = (Relation(RELATION[side[1]], (len(wanted),), (anchors[0],)),)
            else:
                region = place(text)
            wanted.append(replace(named[0].wanted, region=region))
        elif not ground(text):
            return None
        specs.append(Spec(tuple(wanted), relations, *(under or (None, None))))
    return specs


def story_spec(text: str) -> Spec | None:
    """Spec of one scene (hero, place and sky colour) from its text; None if it cannot be parsed."""
    named = mentions(text)
    colour = sky(text)
    if len(named) != 2 or colour is None:
        return None
    return Spec(tuple(m.wanted for m in named), background=colour)
