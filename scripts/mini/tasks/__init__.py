"""Sample generators of the six tasks."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from scripts.mini.spec import held_out
from scripts.mini.tasks import alike, explore, howto, places, story, t2i, vla, x2i
from scripts.mini.tasks.sample import Sample

MAKERS: dict[str, Callable[[Random, int, int], Sample | None]] = {
    "t2i": t2i.make,
    "x2i": x2i.make,
    "howto": howto.make,
    "story": story.make,
    "explore": explore.make,
    "vla": vla.make,
}

BEYOND: dict[str, Callable[[Random, int, int], Sample | None]] = {"t2i": places.more, "x2i": alike.more}
"""Generators of questions that combine more than those in MAKERS."""


def sample(rng: Random, task: str, rows: int, columns: int, *, unseen: bool = False, beyond: bool = False) -> Sample:
    """A random sample of `task` with pictures of `rows` x `columns` tokens.

    `unseen`: a combination held out from training, else one that is not. `beyond`: from BEYOND.
    """
    make = BEYOND[task] if beyond else MAKERS[task]
    while True:
        made = make(rng, rows, columns)
        if made is not None and held_out(made.key) == unseen:
            return made
