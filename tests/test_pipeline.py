"""Requests in, texts and pictures out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from emu_cog.errors import InputError
from emu_cog.events import Finished, Picture, Progress, RunStats
from emu_cog.pipeline import Pipeline
from emu_cog.prompt.segments import Text
from emu_cog.request import TASKS, Request
from tests.conftest import photo

Pipelines = Callable[[str], Pipeline]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_makes_pictures(task: str, pipelines: Pipelines) -> None:
    pipeline = pipelines("storyteller")
    images = () if task == "t2i" else (photo(1),)
    request = Request(prompt="a fox", task=task, images=images, image_area=64 * 64, seed=3, max_new_tokens=300)
    events = list(pipeline.stream(request))
    pictures = [event for event in events if isinstance(event, Picture)]
    assert pictures
    assert isinstance(events[-2], Finished)
    size = (64, 64) if task == "t2i" else (80, 48)
    assert {picture.image.size for picture in pictures} == {size}
    assert [picture.number for picture in pictures] == list(range(1, len(pictures) + 1))
    if task not in ("t2i", "x2i"):
        assert any(isinstance(event, Text) and event.kind == "text" for event in events)
    stats = events[-1]
    assert isinstance(stats, RunStats)
    assert (stats.seed, stats.size, stats.pictures) == (3, size, len(pictures))
    assert stats.tokens > 9 * len(pictures)
    assert min(stats.prefill_seconds, stats.decode_seconds, stats.vq_seconds, stats.tokens_per_second) > 0


def test_four_pictures_are_those_of_four_seeds(pipelines: Pipelines) -> None:
    pipeline = pipelines("picture")

    def make(seed: int, count: int = 1) -> list[Picture]:
        request = Request(prompt="a boat", size=(4, 5), seed=seed, num_outputs=count)
        return [event for event in pipeline.stream(request) if isinstance(event, Picture)]

    four = make(40, 4)
    alone = [make(40 + i)[0] for i in range(4)]
    assert [p.codes for p in four] == [p.codes for p in alone]
    assert [p.settings["seed"] for p in four] == [40, 41, 42, 43]
    for together, single in zip(four, alone, strict=True):
        np.testing.assert_array_equal(np.asarray(together.image), np.asarray(single.image))


def test_without_a_seed_each_run_differs_and_tells_its_seed(pipelines: Pipelines) -> None:
    pipeline = pipelines("picture")
    first, second = (
        next(e for e in pipeline.stream(Request(prompt="a boat", size=(4, 4))) if isinstance(e, Picture))
        for _ in range(2)
    )
    assert first.settings["seed"] != second.settings["seed"]
    again = Request(prompt="a boat", size=(4, 4), seed=first.settings["seed"])
    assert next(e for e in pipeline.stream(again) if isinstance(e, Picture)).codes == first.codes


def test_settings_tell_what_made_the_picture(pipelines: Pipelines) -> None:
    request = Request(prompt="a boat", size=(2, 3), seed=1, guidance_scale=2.5, image_top_k=7)
    picture = next(e for e in pipelines("picture").stream(request) if isinstance(e, Picture))
    assert picture.settings == {
        "task": "t2i",
        "seed": 1,
        "guidance_scale": 2.5,
        "width": 48,
        "height": 32,
        "image_temperature": 1.0,
        "image_top_k": 7,
        "image_top_p": 1.0,
        "model": "model",
    }


def test_progress_is_told_row_by_row(pipelines: Pipelines) -> None:
    told: list[Progress] = []
    request = Request(prompt="a boat", size=(5, 3), seed=1, num_outputs=3)
    list(pipelines("picture").stream(request, on_progress=told.append))
    assert [(p.number, p.row, p.rows) for p in told] == [(1, row, 5) for row in range(6)]
    assert told[-1].tokens == 15


def test_a_prompt_beyond_the_context_is_refused_before_any_work(
    pipelines: Pipelines, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipelines("picture")
    monkeypatch.setattr(pipeline, "engine", None)  # any use of it would fail otherwise
    with pytest.raises(InputError, match=r"takes \d+ tokens.*holds 4096"):
        next(pipeline.stream(Request(prompt="boat " * 5000, size=(4, 4))))
    images = (photo(1), photo(2), photo(3))
    with pytest.raises(InputError, match="with its 3 reference"):
        next(pipeline.stream(Request(prompt="boat", task="x2i", images=images, resolution="1024")))


def test_a_size_the_model_chose_that_does_not_fit_is_an_error_that_says_so(pipelines: Pipelines) -> None:
    """t2i never ends without a picture in silence: what is left of the context holds 10x10 tokens and little more."""
    pipeline = pipelines("picture")

    def until_one_does_not_fit() -> None:
        for seed in range(8):
            request = Request(prompt="boat " * 3945, aspect_ratio="model", seed=seed, image_temperature=2.0)
            list(pipeline.stream(request))

    with pytest.raises(RuntimeError, match="1 of 1 pictures could not be made"):
        until_one_does_not_fit()
