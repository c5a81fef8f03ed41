"""Aspect ratios, pixels, token rows and columns: the only place that orders height and width.

Sizes in tokens are always (rows, columns), sizes in pixels always (width, height) as in Pillow.
"""

from __future__ import annotations

from emu_cog.errors import InputError
from emu_cog.request import MAX_SIDE, MIN_SIDE, PIXELS_PER_TOKEN

UPSTREAM_AREA = 1024 * 1024
# (rows, columns) at 1024x1024 pixels: `aspect_ratios` in upstream's example_config_t2i.py. Ours are 9:21, which is 21:9
# turned, and 5:4 and 4:5, made like the others: the square root of area times ratio, rounded down to whole tokens.
PRESETS_1024: dict[str, tuple[int, int]] = {
    "1:1": (64, 64),
    "4:3": (55, 73),
    "3:4": (73, 55),
    "5:4": (57, 71),
    "4:5": (71, 57),
    "3:2": (52, 78),
    "2:3": (78, 52),
    "16:9": (47, 85),
    "9:16": (85, 47),
    "21:9": (41, 97),
    "9:21": (97, 41),
}
MIN_TOKENS, MAX_TOKENS = MIN_SIDE // PIXELS_PER_TOKEN, MAX_SIDE // PIXELS_PER_TOKEN
MAX_RATIO = 20
"""A reference more than 20 times as long as wide is refused: at the smallest area it would have no row left."""


def preset_size(aspect_ratio: str, area: int) -> tuple[int, int]:
    """(rows, columns) of a preset ratio such as "16:9" (width:height) at `area` pixels."""
    if area == UPSTREAM_AREA:
        return PRESETS_1024[aspect_ratio]
    rows, columns = _exact_size(aspect_ratio, area)
    # The model was trained on two digits per side; areas too small for that are left as they are.
    low = MIN_TOKENS if area >= MIN_SIDE**2 else 1
    # Where that clips the short side, the long one keeps its length. emu-mini draws 10x18 (its 21:9, 9:5 in fact) right
    # in 27 of 36 tries, but 10x20 and 8x18, which it never saw, in none.
    return min(max(rows, low), MAX_TOKENS), min(max(columns, low), MAX_TOKENS)


def is_clipped(aspect_ratio: str, area: int) -> bool:
    """Whether pictures of `area` pixels can't have a preset ratio, because a side would be too short or too long."""
    return area != UPSTREAM_AREA and preset_size(aspect_ratio, area) != _exact_size(aspect_ratio, area)


def _exact_size(aspect_ratio: str, area: int) -> tuple[int, int]:
    """(rows, columns) of a preset ratio, rounded down, however short a side becomes."""
    wide, high = (int(n) for n in aspect_ratio.split(":"))
    rows = int((area * high / wide) ** 0.5 / PIXELS_PER_TOKEN + 1e-9)
    columns = int((area * wide / high) ** 0.5 / PIXELS_PER_TOKEN + 1e-9)
    return rows, columns


def custom_size(width: int, height: int) -> tuple[int, int]:
    """(rows, columns) of exactly `width` x `height` pixels; both are multiples of 16."""
    return height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN


def reference_pixels(size: tuple[int, int], area: int) -> tuple[int, int]:
    """The (width, height) in pixels to which a reference of `size` (width, height) is resized.

    The area is kept near `area` at the picture's own ratio, each side a multiple of 16, at least 16.
    The truncations are upstream's (`smart_resize` in input_utils.py) and decide which size comes out.
    Raises InputError when one side is more than MAX_RATIO times the other.
    """
    width, height = size
    if max(size) > MAX_RATIO * min(size):
        raise InputError(
            f"a reference image of {width}x{height} pixels is too long and thin: "
            f"one side may be at most {MAX_RATIO} times the other; crop it"
        )
    ratio = width / height
    new_height = int((area / ratio) ** 0.5)
    new_width = int(new_height * ratio)
    return _to_multiple(new_width), _to_multiple(new_height)


def reference_size(size: tuple[int, int], area: int) -> tuple[int, int]:
    """(rows, columns) of a reference of `size` (width, height) pixels after its resize to `area`."""
    width, height = reference_pixels(size, area)
    return height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN


def _to_multiple(side: int) -> int:
    return max((side + PIXELS_PER_TOKEN // 2) // PIXELS_PER_TOKEN, 1) * PIXELS_PER_TOKEN
