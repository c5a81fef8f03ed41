"""Detects the world's things in pixels by classical vision: colour distance, connected regions, outline matching.

Nothing here is learned or shared with the model, so that it can judge the model.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from scripts.mini.render import FADING_DEPTH, textures
from scripts.mini.shapes import SPRITES, sprite
from scripts.mini.spec import Seen
from scripts.mini.world import COLOURS, GRIPPER, SIDES, TEXTURES, Thing

Picture = NDArray[np.uint8]
Mask = NDArray[np.bool_]

UNKNOWN = "unknown"
RING = 5
"""Width in pixels of the border whose most common colour is taken as the background."""
FAR = 34.0
"""Minimum RGB distance from the background, after removing its texture, for a pixel to belong to a thing."""
SPECK = 70
"""Smaller regions, in pixels, are ignored; the smallest sprite covers about 290."""
LIKENESS = 0.62
"""Minimum intersection over union with an outline for a region to count as that shape."""
_NAMES = tuple(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), np.float32)
_SIZE_OF = {side: name for name, side in SIDES.items()}


def detect(picture: Picture) -> Seen:
    """Detect all things in an (H, W, 3) uint8 picture."""
    height, width = picture.shape[:2]
    smooth = ndimage.uniform_filter(picture.astype(np.float32), (3, 3, 0))
    background = _background(smooth)
    shift, distance = _off_ground(smooth, background)
    there = distance > FAR
    things = []
    for region in _regions(there):
        things += _things(region, picture, smooth, background)
    texture = _texture(shift, ~ndimage.binary_dilation(there, iterations=3), background)
    return Seen(width, height, background, texture, tuple(things))


def _nearest(colours: NDArray[np.float32], *but: str) -> NDArray[np.intp]:
    """Index of the nearest palette colour for each of (..., 3) `colours`."""
    distance = ((colours[..., None, :] - _PALETTE) ** 2).sum(-1)
    for name in but:
        distance[..., _NAMES.index(name)] = np.inf
    return distance.argmin(-1)


def _background(smooth: NDArray[np.float32]) -> str:
    ring = np.concatenate(
        [
            strip.reshape(-1, 3)
            for strip in (smooth[:RING], smooth[-RING:], smooth[RING:-RING, :RING], smooth[RING:-RING, -RING:])
        ]
    )
    return _NAMES[int(np.bincount(_nearest(ring), minlength=len(_NAMES)).argmax())]


def _toward(background: str) -> int:
    r, g, b = COLOURS[background]
    return -1 if (299 * r + 587 * g + 114 * b) // 1000 > 128 else 1


def _off_ground(smooth: NDArray[np.float32], background: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(H, W) shift of each pixel along the axis on which textures vary, and its distance from that axis."""
    off = smooth - np.array(COLOURS[background], np.float32)
    shift = (off.mean(-1) * _toward(background)).clip(-4, FADING_DEPTH + 4)
    return shift, np.linalg.norm(off - (shift * _toward(background))[..., None], axis=-1)


def _regions(mask: Mask) -> list[Mask]:
    numbered, count = ndimage.label(mask, np.ones((3, 3)))
    areas = np.bincount(numbered.ravel(), minlength=count + 1)
    return [numbered == i for i in range(1, count + 1) if areas[i] >= SPECK]


def _things(region: Mask, picture: Picture, smooth: NDArray[np.float32], background: str) -> list[Thing]:
    """The things in one region: one, or several touching ones of different colours."""
    inner = _core(region)
    labels = np.where(region, _nearest(smooth, background), -1)
    counts = np.bincount(labels[inner], minlength=len(_NAMES))
    if counts.max() >= 0.85 * counts.sum():
        return [_name(ndimage.binary_dilation(region, iterations=2), inner, picture, background)]
    things = []
    for colour in np.flatnonzero(counts >= 30):
        for part in _regions(ndimage.binary_opening(labels == colour, np.ones((3, 3)))):
            if ndimage.binary_erosion(part, iterations=2, border_value=1).sum() >= 12:
                others = ndimage.binary_opening((labels != colour) & (labels >= 0), np.ones((3, 3)))
                around = ndimage.binary_dilation(part, iterations=2) & ~others
                things.append(_name(around, _core(part), picture, background))
    return things or [_name(region, inner, picture, background)]


def _core(mask: Mask) -> Mask:
    """The mask eroded by two pixels, unless fewer than 12 pixels remain."""
    inner = ndimage.binary_erosion(mask, iterations=2, border_value=1)
    return inner if inner.sum() >= 12 else mask


def _name(around: Mask, inner: Mask, picture: Picture, background: str) -> Thing:
    """The best-matching outline for the thing inside `around`, coloured as its `inner` part."""
    hue = np.median(picture[inner], axis=0).astype(np.float32)
    colour = _NAMES[int(_nearest(hue, background))]
    rows, columns = np.nonzero(around)
    top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    cover = _coverage(picture[top:bottom, left:right], hue, background) * around[top:bottom, left:right]
    area = max(float(cover.sum()), 1.0)
    y = float((cover.sum(1) * np.arange(bottom - top)).sum() / area + top)
    x = float((cover.sum(0) * np.arange(right - left)).sum() / area + left)
    best = (0.0, UNKNOWN, 0, round(x), round(y))
    for shape, side, outline, (oy, ox), own_area in _outlines():
        if not 0.6 < own_area / area < 1.7 or (shape == GRIPPER and colour != "black"):
            continue
        at_y, at_x = round(y - oy) - top, round(x - ox) - left
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                common = _overlap(cover, outline, at_y + dy, at_x + dx)
                likeness = common / (area + own_area - common)
                if likeness > best[0]:
                    half = side // 2
                    best = (likeness, shape, side, left + at_x + dx + half, top + at_y + dy + half)
    likeness, shape, side, cx, cy = best
    if likeness < LIKENESS:
        return Thing(UNKNOWN, colour, "medium", round(x), round(y))
    return Thing(shape, colour, _SIZE_OF.get(side, "small"), cx, cy)


def _coverage(picture: Picture, hue: NDArray[np.float32], background: str) -> NDArray[np.float32]:
    """Blend factor of each pixel between the background colour (0) and `hue` (1)."""
    ground = np.array(COLOURS[background], np.float32)
    way = hue - ground
    return ((picture - ground) @ way / max(float(way @ way), 1.0)).clip(0, 1)


@cache
def _outlines() -> list[tuple[str, int, NDArray[np.float32], tuple[float, float], float]]:
    """(shape, side, coverage 0..1, centre of mass (y, x), area) of every sprite."""
    found = []
    for shape, side in SPRITES:
        cover = sprite(shape, side).astype(np.float32) / 255
        area = float(cover.sum())
        centre = [float((cover.sum(axis) * np.arange(side)).sum() / area) for axis in (1, 0)]
        found.append((shape, side, cover, (centre[0], centre[1]), area))
    return found


def _overlap(cover: NDArray[np.float32], outline: NDArray[np.float32], top: int, left: int) -> float:
    """Intersection area, with the outline's corner at (top, left)."""
    height, width = cover.shape
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + outline.shape[0], height), min(left + outline.shape[1], width)
    if y0 >= y1 or x0 >= x1:
        return 0.0
    return float(np.minimum(cover[y0:y1, x0:x1], outline[y0 - top : y1 - top, x0 - left : x1 - left]).sum())


def _texture(shift: NDArray[np.float32], clear: Mask, background: str) -> str:
    """The texture that correlates with the background's shifts; "plain" if none does."""
    height, width = shift.shape
    values = shift[clear]
    if len(values) < 200:
        return "plain"
    patterns = textures(torch.arange(height)[:, None], torch.arange(width)[None, :], height).float().numpy()
    best = (0.6, "plain")
    for name, pattern in zip(TEXTURES[1:], patterns[1:], strict=True):
        there = ndimage.uniform_filter(pattern, 3)[clear]
        spread = there.std()
        if spread < 1e-3:
            continue
        covariance = ((there - there.mean()) * (values - values.mean())).mean()
        likeness = covariance / (spread * max(values.std(), 1e-3))
        if covariance / spread**2 > 0.4:  # at least 0.4 of the texture's nominal depth
            best = max(best, (float(likeness), name))
    return best[1]
