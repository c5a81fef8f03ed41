"""Outlines of all shapes and their antialiased sprites."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from scripts.mini.world import GRIPPER, GRIPPER_SIDE, SHAPES, SIDES

Plane = NDArray[np.float64]
OVERSAMPLING = 8


def inside(shape: str, u: Plane, v: Plane) -> NDArray[np.bool_]:
    """Whether points (u right, v down, box -1..1) lie inside `shape`."""
    match shape:
        case "circle":
            return u**2 + v**2 <= 0.94**2
        case "square":
            return (abs(u) <= 0.85) & (abs(v) <= 0.85)
        case "triangle":
            return (v <= 0.84) & (abs(u) <= (v + 0.92) / 1.76 * 0.96)
        case "star":
            return _star(u, v + 0.06, 1.0, 0.46)
        case "heart":
            x, y = u / 0.80, 0.14 - v / 0.84
            return (x**2 + y**2 - 1 + 0.28) ** 3 - 1.1 * x**2 * y**3 <= 0
        case "cross":
            return ((abs(u) <= 0.3) & (abs(v) <= 0.92)) | ((abs(v) <= 0.3) & (abs(u) <= 0.92))
        case "moon":
            return (u**2 + v**2 <= 0.94**2) & ((u - 0.46) ** 2 + (v + 0.06) ** 2 > 0.74**2)
        case "house":
            roof = (v <= 0.0) & (abs(u) <= (v + 0.94) / 0.94 * 0.94)
            walls = (abs(u) <= 0.7) & (v >= 0.0) & (v <= 0.9)
            door = (abs(u) <= 0.22) & (v >= 0.36)
            return (roof | walls) & ~door
        case "tree":
            crown = (u**2 + (v + 0.44) ** 2 <= 0.5**2) | ((abs(u) - 0.38) ** 2 + (v - 0.0) ** 2 <= 0.44**2)
            trunk = (abs(u) <= 0.17) & (v >= 0.2) & (v <= 0.94)
            return crown | trunk
        case "fish":
            body = ((u + 0.22) / 0.72) ** 2 + (v / 0.58) ** 2 <= 1
            tail = (u >= 0.34) & (u <= 0.94) & (abs(v) <= (u - 0.28) * 0.9)
            eye = (u + 0.56) ** 2 + (v + 0.14) ** 2 <= 0.11**2
            return (body | tail) & ~eye
        case "gripper":
            arm = (abs(u) <= 0.16) & (v <= -0.2)
            bar = (abs(u) <= 0.8) & (v >= -0.3) & (v <= 0.1)
            fingers = (abs(abs(u) - 0.62) <= 0.18) & (v >= 0.0) & (v <= 0.95)
            return arm | bar | fingers
    raise ValueError(f"no shape is called {shape!r}")


def _star(u: Plane, v: Plane, outer: float, inner: float) -> NDArray[np.bool_]:
    """A five-pointed star, tip up: in polar coordinates each tenth of the circle is bounded by one straight edge."""
    tenth = np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + tenth) % (2 * tenth) - tenth)
    x, y = np.hypot(u, v) * np.cos(angle), np.hypot(u, v) * np.sin(angle)
    ix, iy = inner * np.cos(tenth), inner * np.sin(tenth)
    # Left of the edge from the tip (outer, 0) to the notch (ix, iy).
    return (ix - outer) * y - iy * (x - outer) >= 0


@cache
def sprite(shape: str, side: int) -> NDArray[np.uint8]:
    """(side, side) coverage 0..255, averaged over OVERSAMPLING x OVERSAMPLING points per pixel."""
    n = side * OVERSAMPLING
    axis = (np.arange(n) + 0.5) / n * 2 - 1
    v, u = np.meshgrid(axis, axis, indexing="ij")
    covered = inside(shape, u, v).reshape(side, OVERSAMPLING, side, OVERSAMPLING).mean(axis=(1, 3))
    return np.rint(covered * 255).astype(np.uint8)


SPRITES: tuple[tuple[str, int], ...] = (
    *((shape, side) for shape in SHAPES for side in SIDES.values()),
    (GRIPPER, GRIPPER_SIDE),
)
"""(shape, side) of every sprite; the index is the sprite number in rendered batches."""
SPRITE_NUMBER = {key: i for i, key in enumerate(SPRITES)}


@cache
def atlas() -> NDArray[np.uint8]:
    """(sprites, 72, 72) sprites, each in the top left corner of its square."""
    side = max(side for _, side in SPRITES)
    sheet = np.zeros((len(SPRITES), side, side), np.uint8)
    for i, (shape, own) in enumerate(SPRITES):
        sheet[i, :own, :own] = sprite(shape, own)
    return sheet
