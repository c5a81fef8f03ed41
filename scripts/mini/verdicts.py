"""Verdicts per task, from what the judge detects in the pictures and what the texts say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from scripts.mini import reading
from scripts.mini.judge import detect
from scripts.mini.render import picture
from scripts.mini.spec import Seen, Spec, mismatch
from scripts.mini.tasks.sample import Sample
from scripts.mini.world import Scene, Thing

DIFFERS = 32
"""Two pixels differ if a channel does by more than this, of 255, after a 3x3 mean."""
AGREE = 0.03
"""Overlapping views agree if at most this fraction of their common pixels differs."""


@dataclass
class Answer:
    """The model's answer to one sample: texts and pictures in order. `ended`: ended by the model, not by the token
    limit."""

    parts: list[str | NDArray[np.uint8]] = field(default_factory=list)
    reasoned: bool = False
    ended: bool = False

    @property
    def pictures(self) -> list[NDArray[np.uint8]]:
        return [p for p in self.parts if not isinstance(p, str)]

    @property
    def texts(self) -> list[str]:
        return [p for p in self.parts if isinstance(p, str)]

    @property
    def in_steps(self) -> bool:
        """Whether texts and pictures alternate, starting with a text, and the model ended the answer itself."""
        kinds = [isinstance(p, str) for p in self.parts]
        return self.ended and bool(kinds) and kinds == [True, False] * (len(kinds) // 2)


def judge_last(made: Sample, answer: Answer) -> str | None:
    """t2i, x2i and vla: the last picture matches the last spec."""
    if not answer.pictures:
        return "no picture"
    return mismatch(detect(answer.pictures[-1]), made.specs[-1])


def judge_steps(made: Sample, answer: Answer) -> str | None:
    """howto and story: every picture shows what its text says, and together they answer the question."""
    if not answer.in_steps:
        return "texts and pictures do not alternate"
    seen = [detect(p) for p in answer.pictures]
    specs: list[Spec] | None
    if made.task == "howto":
        specs = reading.howto_specs(answer.texts)
    else:
        read = [reading.story_spec(text) for text in answer.texts]
        specs = [w for w in read if w] if all(read) else None
    if specs is None:
        return "a text can't be parsed"
    for number, (scene, spec) in enumerate(zip(seen, specs, strict=True), 1):
        if wrong := mismatch(scene, spec):
            return f"step {number}: {wrong}"
    return asked_for(made, seen)


def asked_for(made: Sample, seen: Sequence[Seen]) -> str | None:
    """Check all steps together against the question."""
    if made.task == "howto":
        goal = made.specs[-1]
        requested = [m.wanted for m in reading.mentions(made.question)]
        return mismatch(seen[-1], replace(goal, wanted=tuple(requested), relations=()))
    if len(seen) != len(made.specs):
        return f"{len(seen)} scenes, not {len(made.specs)}"
    requested = [m.wanted for m in reading.mentions(made.question)]
    for scene, place in zip(seen, requested[1:], strict=False):
        if not any((t.shape, t.colour) == (place.shape, place.colour) for t in scene.things):
            return f"the {place.colour} {place.shape} of the question is missing"
    return None


def judge_explore(made: Sample, answer: Answer) -> str | None:
    """Neighbouring views agree where they overlap, and the moves are those asked for."""
    return walk_error(made, answer, Walk.of(made, answer))


@dataclass(frozen=True)
class Walk:
    """The moves stated in the answer, those asked for, and per move the fraction of differing pixels in the overlap of
    the views before and after it."""

    stated: list[str]
    asked: list[str]
    differences: list[float]

    @classmethod
    def of(cls, made: Sample, answer: Answer) -> Walk:
        views = [np.asarray(picture(scene)) for scene in made.references] + answer.pictures
        stated = [m for m in map(reading.move, answer.texts) if m]
        asked = [m for m in (reading.move(word) for word in made.question.replace(",", " ").split()) if m]
        differences = [disagreement(*views[i : i + 2], move) for i, move in enumerate(stated[: len(views) - 1])]
        return cls(stated, asked, differences)

    @property
    def right(self) -> tuple[int, int]:
        """(requested moves made with agreeing views, requested moves)."""
        steps = zip(self.stated, self.asked, self.differences, strict=False)
        return sum(stated == asked and difference <= AGREE for stated, asked, difference in steps), len(self.asked)


def course_error(made: Sample, answer: Answer, walk: Walk) -> str | None:
    """What is wrong with the sequence of moves, regardless of the views."""
    if len(answer.pictures) != len(made.pictures) or not answer.in_steps:
        return f"{len(answer.pictures)} views, not {len(made.pictures)}"
    if walk.stated != walk.asked:
        return f"moves {walk.stated}, not {walk.asked}"
    return None


def walk_error(made: Sample, answer: Answer, walk: Walk) -> str | None:
    """The first error of a walk."""
    if wrong := course_error(made, answer, walk):
        return wrong
    for number, difference in enumerate(walk.differences, 1):
        if difference > AGREE:
            return f"move {number}: {difference:.1%} of the overlap differs"
    return None


def disagreement(before: NDArray[np.uint8], after: NDArray[np.uint8], move: str) -> float:
    """Fraction of differing pixels in the overlap of two views half a view apart."""
    height, width = before.shape[0], before.shape[1]
    dx, dy = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}[move]
    sx, sy = dx * (width // 32 * 16), dy * (height // 32 * 16)

    def part(view: NDArray[np.uint8], x: int, y: int) -> NDArray[np.float32]:
        cut = view[max(y, 0) : height + min(y, 0), max(x, 0) : width + min(x, 0)]
        return ndimage.uniform_filter(cut.astype(np.float32), (3, 3, 0))

    return float((np.abs(part(before, sx, sy) - part(after, -sx, -sy)).max(-1) > DIFFERS).mean())


JUDGES = {
    "t2i": judge_last,
    "x2i": judge_last,
    "vla": judge_last,
    "howto": judge_steps,
    "story": judge_steps,
    "explore": judge_explore,
}


def outside_difference(made: Sample, after: NDArray[np.uint8], size: tuple[int, int]) -> float | None:
    """Mean absolute difference, of 255, between base picture and answer outside the edited region; None if nothing is
    outside."""
    goal = made.pictures[-1]
    base = max(made.references, key=lambda scene: _alike(scene, goal))
    before = np.asarray(picture(base).resize(size, Image.Resampling.BICUBIC)).astype(np.float32)
    keep = np.ones(before.shape[:2], bool)
    if goal.background != base.background or goal.texture != base.texture:
        keep[:] = False
        for thing in (t for t in base.things if t in goal.things):  # the interior of unchanged things
            left, top, right, bottom = thing.box
            inner = np.abs(before[top:bottom, left:right] - np.array(_ground(before))).max(-1) > 60
            keep[top:bottom, left:right] = ndimage.binary_erosion(inner, iterations=3)
    else:
        kept = [t for t in base.things if t in goal.things]
        changed = [t for t in base.things if t not in kept]
        found = detect(after).things
        changed += [t for t in found if not any(_same_spot(t, k) for k in kept)]
        for thing in changed:
            left, top, right, bottom = thing.box
            keep[max(top - 8, 0) : bottom + 8, max(left - 8, 0) : right + 8] = False
    return float(np.abs(before - after.astype(np.float32))[keep].mean()) if keep.any() else None


def _alike(scene: Scene, goal: Scene) -> tuple[int, bool]:
    """Sort key to find the edited picture among the references: unchanged things first, then the background."""
    kept = sum(thing in goal.things for thing in scene.things)
    return kept, (scene.background, scene.texture) == (goal.background, goal.texture)


def _ground(picture: NDArray[np.float32]) -> list[float]:
    return [float(v) for v in np.median(picture[:4].reshape(-1, 3), axis=0)]


def _same_spot(a: Thing, b: Thing) -> bool:
    return abs(a.x - b.x) <= 12 and abs(a.y - b.y) <= 12


@dataclass(frozen=True)
class Verdict:
    """`wrong`: the error, or None. `outside` (x2i): difference outside the edit. `moves` (explore): (with agreeing
    views, all)."""

    wrong: str | None
    outside: float | None = None
    moves: tuple[int, int] = (0, 0)


def verdict(made: Sample, answer: Answer) -> Verdict:
    if made.task == "explore":
        walk = Walk.of(made, answer)
        return Verdict(walk_error(made, answer, walk), moves=walk.right)
    outside = None
    if made.task == "x2i" and answer.pictures:
        last = answer.pictures[-1]
        outside = outside_difference(made, last, (last.shape[1], last.shape[0]))
    return Verdict(JUDGES[made.task](made, answer), outside)
