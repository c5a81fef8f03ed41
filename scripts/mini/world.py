"""The miniature's world: shapes, colours, sizes and backgrounds, and scenes composed of them.

A scene is plain data. `render.py` draws it, `words.py` describes it, `judge.py` detects its things in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

TOKEN = 16
"""Side of the square of pixels that a visual token covers."""
GRID = 8
"""Centres lie on multiples of this many pixels, so that a shape has only four alignments to the token grid."""
GAP = 8
"""Minimum distance in pixels between the boxes of two things."""
MARGIN = 4
"""Minimum distance in pixels between a box and the picture's edge."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (244, 132, 32),
    "yellow": (252, 211, 45),
    "green": (46, 160, 67),
    "blue": (38, 93, 214),
    "purple": (126, 58, 178),
    "pink": (246, 150, 196),
    "brown": (121, 76, 42),
    "black": (28, 28, 32),
    "white": (246, 246, 244),
    "grey": (142, 145, 150),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "moon", "house", "tree", "fish")
SIDES: dict[str, int] = {"small": 32, "medium": 48, "large": 72}
"""Side in pixels of a thing's square box, by size."""
TEXTURES = ("plain", "fading", "striped", "checked")
GRIPPER = "gripper"
GRIPPER_SIDE = 40


@dataclass(frozen=True)
class Thing:
    """One object, its box of `side` pixels centred on pixel (x, y)."""

    shape: str
    colour: str
    size: str
    x: int
    y: int

    @property
    def side(self) -> int:
        return GRIPPER_SIDE if self.shape == GRIPPER else SIDES[self.size]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom), the last two exclusive."""
        left, top = self.x - self.side // 2, self.y - self.side // 2
        return left, top, left + self.side, top + self.side

    def at(self, x: int, y: int) -> Thing:
        return replace(self, x=x, y=y)


@dataclass(frozen=True)
class Scene:
    """A picture of `rows` x `columns` tokens. Things are drawn in order; `seed` determines only the noise."""

    rows: int
    columns: int
    background: str
    texture: str
    things: tuple[Thing, ...]
    seed: int

    @property
    def width(self) -> int:
        return self.columns * TOKEN

    @property
    def height(self) -> int:
        return self.rows * TOKEN

    def with_things(self, *things: Thing) -> Scene:
        return replace(self, things=tuple(things))


def touches(a: tuple[int, int, int, int], b: tuple[int, int, int, int], gap: int = GAP) -> bool:
    """Whether two boxes are closer than `gap` pixels."""
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def fits(thing: Thing, width: int, height: int) -> bool:
    """Whether the box lies inside the picture with its margin."""
    left, top, right, bottom = thing.box
    return left >= MARGIN and top >= MARGIN and right <= width - MARGIN and bottom <= height - MARGIN
