"""Sizes: upstream's presets and resize, custom pixels, areas, clipped ratios."""

from __future__ import annotations

import pytest

from emu_cog.errors import InputError
from emu_cog.prompt import geometry, tasks
from emu_cog.request import ASPECT_RATIOS, Request
from tests.conftest import photo

RATIOS = [ratio for ratio in ASPECT_RATIOS if ":" in ratio]
# Rows*columns, written out from upstream's example_config_t2i.py; the last three are our own.
UPSTREAM = {"4:3": "55*73", "21:9": "41*97", "16:9": "47*85", "3:2": "52*78", "1:1": "64*64", "3:4": "73*55",
            "9:16": "85*47", "2:3": "78*52", "9:21": "97*41", "5:4": "57*71", "4:5": "71*57"}  # fmt: skip


@pytest.mark.parametrize("ratio", RATIOS)
def test_presets_at_1024_are_upstreams(ratio: str) -> None:
    for resolution in ("auto", "1024"):
        plan = tasks.plan(Request(prompt="x", aspect_ratio=ratio, resolution=resolution))
        assert plan.size == tuple(int(n) for n in UPSTREAM[ratio].split("*"))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("resolution", ["512", "720", "1024"])
def test_presets_keep_ratio_and_area(ratio: str, resolution: str) -> None:
    size = tasks.plan(Request(prompt="x", aspect_ratio=ratio, resolution=resolution)).size
    assert size is not None
    rows, columns = size
    wide, high = (int(n) for n in ratio.split(":"))
    assert (columns - rows) * (wide - high) >= 0  # 16:9 is landscape
    assert abs((columns / rows) / (wide / high) - 1) < 0.09
    assert 0.88 < rows * columns * 256 / int(resolution) ** 2 <= 1.0
    assert 10 <= rows <= 99
    assert 10 <= columns <= 99


@pytest.mark.parametrize(("width", "height"), [(160, 160), (1584, 160), (160, 1584), (1584, 1584), (1024, 768)])
def test_custom_gives_exactly_the_pixels(width: int, height: int) -> None:
    request = Request(prompt="x", aspect_ratio="custom", width=width, height=height, resolution="512")
    assert tasks.plan(request).size == (height // 16, width // 16)


def test_auto_takes_the_shape_of_the_first_photo() -> None:
    images = (photo(1, 300, 200), photo(2, 100, 400))
    plan = tasks.plan(Request(prompt="x", task="x2i", images=images))
    assert plan.size == geometry.reference_size((300, 200), 1024 * 1024) == (52, 78)
    assert tasks.plan(Request(prompt="x", task="x2i", images=images, aspect_ratio="model")).size is None
    assert tasks.plan(Request(prompt="x", task="x2i", images=images, aspect_ratio="9:16")).size == (85, 47)


def test_auto_without_a_photo_is_square_for_t2i_and_the_models_choice_for_sequences() -> None:
    """Sequences were square, too; upstream sets no size for them."""
    assert tasks.plan(Request(prompt="x")).size == (64, 64)
    for task in ("howto", "story", "explore", "vla"):
        assert tasks.plan(Request(prompt="x", task=task)).size is None
        assert tasks.plan(Request(prompt="x", task=task, aspect_ratio="1:1")).size == (45, 45)
        assert tasks.plan(Request(prompt="x", task=task, images=(photo(1),))).size is not None


@pytest.mark.parametrize(
    ("ratio", "size", "clipped"),
    [
        ("1:1", (12, 12), False),
        ("5:4", (10, 13), False),
        ("16:9", (10, 16), True),
        ("21:9", (10, 18), True),
        ("9:21", (18, 10), True),
    ],
)
def test_a_ratio_that_small_pictures_cant_have_is_clipped_and_reported(
    ratio: str, size: tuple[int, int], clipped: bool
) -> None:
    """emu-mini's 21:9 became 1.8 without a word."""
    mini = tasks.ModelDefaults(image_area=dict.fromkeys(tasks.TABLE, 192 * 192))
    plan = tasks.plan(Request(prompt="x", aspect_ratio=ratio), mini)
    assert plan.size == size
    assert plan.clipped == (ratio if clipped else None)
    assert (f"aspect_ratio {ratio}" in plan.summary()) == clipped
    assert tasks.plan(Request(prompt="x", aspect_ratio=ratio)).clipped is None


def test_size_and_area_override_ratio_and_resolution() -> None:
    assert tasks.plan(Request(prompt="x", size=(3, 200), aspect_ratio="16:9")).size == (3, 200)
    assert tasks.plan(Request(prompt="x", image_area=192 * 192, resolution="1024")).size == (12, 12)
    assert tasks.plan(Request(prompt="x", image_area=192 * 192, aspect_ratio="16:9")).size == (10, 16)


@pytest.mark.parametrize("size", [(2000, 99), (99, 2000), (100_000, 1)])
def test_long_thin_references_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="20 times"):
        geometry.reference_pixels(size, 1024 * 1024)


def test_the_thinnest_accepted_reference_has_a_row() -> None:
    assert min(geometry.reference_pixels((2000, 100), 32 * 32)) >= 16
    assert min(geometry.reference_pixels((100, 2000), 256)) >= 16
