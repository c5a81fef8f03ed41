"""The sample type of training and evaluation, and random attributes shared by all tasks."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from scripts.mini.spec import Spec, Wanted
from scripts.mini.world import COLOURS, SHAPES, SIDES, Scene, Thing

GLOBAL, THOUGHT, TEXT = "global_reasoning", "image_reasoning", "text"


@dataclass(frozen=True)
class TextPart:
    """A text in the answer; `kind` as in emu_cog.prompt.segments."""

    text: str
    kind: str = TEXT


@dataclass(frozen=True)
class Sample:
    """A question, its reference scenes and the answer in order. `specs` specify the answer's pictures, one each. `key`
    names the combination by which samples are held out."""

    task: str
    question: str
    references: tuple[Scene, ...]
    answer: tuple[TextPart | Scene, ...]
    specs: tuple[Spec, ...]
    key: str

    @property
    def pictures(self) -> tuple[Scene, ...]:
        return tuple(part for part in self.answer if isinstance(part, Scene))


def colour(rng: Random, *but: str) -> str:
    return rng.choice([name for name in COLOURS if name not in but])


def shape(rng: Random, *but: str) -> str:
    return rng.choice([name for name in SHAPES if name not in but])


def size(rng: Random) -> str:
    return rng.choices(tuple(SIDES), (3, 4, 2))[0]


def texture(rng: Random) -> str:
    return rng.choices(("plain", "fading", "striped", "checked"), (16, 1, 1, 1))[0]


def noise_seed(rng: Random) -> int:
    """A random noise seed; one picture in ten has no noise."""
    return 0 if rng.random() < 0.1 else rng.randrange(1, 2**31)


def distinct_things(rng: Random, count: int, ground: str, *excluded_colours: str) -> list[Thing]:
    """`count` things at (0, 0) with distinct shapes and colours, none in the background's colour."""
    colours = rng.sample([name for name in COLOURS if name not in (ground, *excluded_colours)], count)
    shapes = rng.sample(SHAPES, count)
    return [Thing(s, c, size(rng), 0, 0) for s, c in zip(shapes, colours, strict=True)]


def unchanged(thing: Thing) -> Wanted:
    """A spec for this thing, unchanged in place."""
    return Wanted(thing.shape, thing.colour, thing.size, near=(thing.x, thing.y))
