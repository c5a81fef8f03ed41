"""The six tasks' examples."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from scripts.mini.tasks import alike, explore, howto, places, story, t2i, vla, x2i
from scripts.mini.tasks.sample import Sample
from scripts.mini.wish import held_out

MAKERS: dict[str, Callable[[Random, int, int], Sample | None]] = {
    "t2i": t2i.make,
    "x2i": x2i.make,
    "howto": howto.make,
    "story": story.make,
    "explore": explore.make,
    "vla": vla.make,
}

BEYOND: dict[str, Callable[[Random, int, int], Sample | None]] = {"t2i": places.more, "x2i": alike.more}
"""More in one question than the others ask for."""


def sample(rng: Random, task: str, rows: int, columns: int, *, unseen: bool = False, beyond: bool = False) -> Sample:
    """One example of `task` whose pictures have `rows` x `columns` tokens.

    `unseen` gives a combination that training leaves out; otherwise one that it may see. `beyond`: by BEYOND.
    """
    make = BEYOND[task] if beyond else MAKERS[task]
    while True:
        made = make(rng, rows, columns)
        if made is not None and held_out(made.key) == unseen:
            return made
