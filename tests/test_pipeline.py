"""Requests in, texts and pictures out."""

from __future__ import annotations

import io
import itertools
import re
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _models.tiny import TinyFolders

from emu_cog import pipeline as pipeline_module
from emu_cog.engine import engine as engine_module
from emu_cog.engine.sequence import Ended
from emu_cog.errors import InputError
from emu_cog.events import Finished, Picture, Progress, RunStats
from emu_cog.log import log
from emu_cog.pipeline import Pipeline
from emu_cog.prompt.segments import Text
from emu_cog.request import TASKS, Request
from emu_cog.service import Service
from tests.conftest import photo

Pipelines = Callable[[str], Pipeline]
Checkpoints = Callable[[str], TinyFolders]


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


def test_pictures_come_in_the_order_of_their_seeds(pipelines: Pipelines) -> None:
    """The first to be finished came first, whatever its seed: here the sizes differ, for the model chooses them."""
    pipeline = pipelines("picture")
    request = Request(prompt="a boat", aspect_ratio="model", seed=0, num_outputs=4)
    pictures = [event for event in pipeline.stream(request) if isinstance(event, Picture)]
    assert [picture.settings["seed"] for picture in pictures] == [0, 1, 2, 3]
    lengths = [len(picture.codes) * (len(picture.codes[0]) + 1) for picture in pictures]
    assert lengths != sorted(lengths)  # else the first to be finished would be the first anyway


def test_without_a_seed_each_run_differs_and_reports_its_seed(pipelines: Pipelines) -> None:
    pipeline = pipelines("picture")
    first, second = (
        next(e for e in pipeline.stream(Request(prompt="a boat", size=(4, 4))) if isinstance(e, Picture))
        for _ in range(2)
    )
    assert first.settings["seed"] != second.settings["seed"]
    again = Request(prompt="a boat", size=(4, 4), seed=first.settings["seed"])
    assert next(e for e in pipeline.stream(again) if isinstance(e, Picture)).codes == first.codes


def test_settings_are_those_that_made_the_picture(pipelines: Pipelines) -> None:
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


def test_with_one_slot_outputs_follow_one_another(make_checkpoint: Checkpoints) -> None:
    """When the only running output ended with the last step of a round, those that waited got RuntimeError ("a sequence
    waits for memory that nobody uses") instead of the slot. Sizes around a round's 8 steps: one of them ends so."""
    folders = make_checkpoint("picture")
    narrow = Pipeline.load(folders.model, folders.vision, device="cpu", max_outputs=1)
    for columns in range(1, 10):
        prepared = narrow.prepare(Request(prompt="a boat", size=(2, columns), seed=3, num_outputs=2))
        events = list(narrow.engine.generate(prepared.outputs, prepared.config))
        assert [event.index for event in events if isinstance(event, Ended)] == [0, 1]
    assert narrow.runner.cache.free == narrow.runner.cache.pages - 1


def progress(pipeline: Pipeline, request: Request) -> list[float]:
    reported: list[Progress] = []
    list(pipeline.stream(request, on_progress=reported.append))
    return [progress.done for progress in reported]


def test_progress_of_a_picture_grows_row_by_row(pipelines: Pipelines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "ROUND", 1)
    done = progress(pipelines("picture"), Request(prompt="a boat", size=(5, 3), seed=1))
    assert done == sorted(set(done))
    assert (done[0], done[-1]) == (0, 1)
    rows = [0.02, 0.216, 0.412, 0.608, 0.804]
    assert [found for found in done if any(found == pytest.approx(row) for row in rows)] == pytest.approx(rows)


@pytest.mark.parametrize("side_by_side", [3, 1])
def test_progress_covers_all_outputs(
    side_by_side: int, make_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It began anew for every batch where memory holds only some of the outputs at a time."""
    monkeypatch.setattr(engine_module, "ROUND", 1)
    folders = make_checkpoint("picture")
    pipeline = Pipeline.load(folders.model, folders.vision, device="cpu", max_outputs=side_by_side)
    done = progress(pipeline, Request(prompt="a boat", size=(5, 3), seed=1, num_outputs=3))
    assert done == sorted(set(done))
    assert (done[0], done[-1]) == (0, 1)
    assert len(done) >= 3 * 5


@pytest.mark.parametrize("limit", [100, None])
def test_progress_of_a_sequence_is_its_tokens_out_of_the_most_it_may_have(
    limit: int | None, pipelines: Pipelines
) -> None:
    pipeline = pipelines("storyteller")
    request = Request(prompt="a fox", task="story", size=(3, 4), seed=16, max_new_tokens=limit)
    done = progress(pipeline, request)
    assert done == sorted(set(done))
    assert (done[0], done[-1]) == (0, 1)
    most = limit or pipeline.lm.context
    assert done[2] - done[1] < 5 / most  # one token of text


def capture(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> io.StringIO:
    """Let `stream` be stderr, where a Service made from now on writes its log."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)
    return stream


# How replicate-javascript (lib/util.js) and replicate-python (prediction.py) read progress from the log.
CLIENTS = re.compile(r"^\s*(\d+)%\s*\|.+?\|\s*(\d+)\/(\d+)")


def fields(**changes: Any) -> dict[str, Any]:
    return {"prompt": "a fox", "output_format": "png", "output_quality": 90, "seed": 16} | changes


@pytest.mark.parametrize(
    ("name", "side_by_side", "inputs"),
    [
        ("picture", 3, {"task": "t2i", "size": (20, 4), "num_outputs": 3}),
        ("picture", 1, {"task": "t2i", "size": (20, 4), "num_outputs": 3}),
        ("picture", 1, {"task": "x2i", "size": (60, 2)}),
        ("storyteller", 1, {"task": "story", "size": (4, 4), "max_new_tokens": 512}),
    ],
)
def test_replicates_clients_read_the_progress_of_the_whole_prediction(
    name: str,
    side_by_side: int,
    inputs: dict[str, Any],
    make_checkpoint: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lines began with "picture 1:", ended in a carriage return and started anew with every picture."""
    folders = make_checkpoint(name)
    # One token a pass: of how many the bar has to tell must not depend on this machine's pace.
    pipeline = Pipeline.load(
        folders.model, folders.vision, device="cpu", max_outputs=side_by_side, decoding="sequential"
    )
    stderr = capture(monkeypatch, io.StringIO())
    photo(1).save(tmp_path / "photo.png")
    references = {"reference_image": tmp_path / "photo.png" if inputs["task"] == "x2i" else None}
    files = list(
        Service(pipeline, root=tmp_path / "out").run(
            references=references, record_metric=lambda name, value: None, **fields(**inputs)
        )
    )
    assert files
    lines = stderr.getvalue().split("\n")
    found = [tuple(map(int, match.groups())) for line in lines if (match := CLIENTS.match(line))]
    percents = [percent for percent, _, _ in found]
    assert percents == sorted(set(percents))
    assert (percents[0], percents[-1]) == (0, 100)
    assert 10 <= len(percents) <= 51
    assert all((done, total) == (percent, 100) for percent, done, total in found)
    assert "\r" not in stderr.getvalue()


def test_on_a_terminal_progress_is_one_moving_bar(
    pipelines: Pipelines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = capture(monkeypatch, Terminal())
    run = Service(pipelines("picture"), root=tmp_path / "out").run(
        references={}, record_metric=lambda name, value: None, **fields(size=(30, 4))
    )
    assert len(list(run)) == 1
    bar = terminal.getvalue()
    assert "100%|" in bar
    assert bar.count("\r") > 2
    assert len(re.findall(r"%\|[^\r]*\n", bar)) == 1  # the bar stays on one line until the end


def test_an_error_in_the_middle_keeps_what_was_made_and_spoils_nothing_after_it(
    pipelines: Pipelines, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipelines("storyteller")
    request = Request(prompt="a fox", task="story", size=(3, 4), seed=16, max_new_tokens=170)
    whole = list(pipeline.stream(request))
    pictures = [i for i, event in enumerate(whole) if isinstance(event, Picture)]
    assert len(pictures) > 1
    decode, calls = pipeline_module.decode_image, iter([True, False])

    def fails_the_second_time(codes: Any, vision: Any) -> Any:
        if next(calls):
            return decode(codes, vision)
        raise RuntimeError("the device is gone")

    made: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_module, "decode_image", fails_the_second_time)
        with pytest.raises(RuntimeError, match="the device is gone"):
            made.extend(pipeline.stream(request))
    assert len(made) == pictures[1]
    again = list(pipeline.stream(request))
    assert [getattr(e, "codes", e) for e in again[:-1]] == [getattr(e, "codes", e) for e in whole[:-1]]


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


def test_a_size_that_the_model_chose_and_does_not_fit_is_an_error(pipelines: Pipelines) -> None:
    """t2i never ends silently without a picture. The rest of the context holds little more than 10x10 tokens."""
    pipeline = pipelines("picture")

    def until_one_does_not_fit() -> None:
        for seed in range(8):
            request = Request(prompt="boat " * 3945, aspect_ratio="model", seed=seed, image_temperature=2.0)
            list(pipeline.stream(request))

    with pytest.raises(RuntimeError, match="1 of 1 pictures could not be made"):
        until_one_does_not_fit()


def pictures_of(events: Iterable[Any]) -> list[Any]:
    return [event.codes for event in events if isinstance(event, Picture)]


def test_a_cancel_ends_the_iteration(pipelines: Pipelines) -> None:
    """Whoever iterated over a request that another thread cancelled waited for ever."""
    pipeline, events = pipelines("picture"), list[Any]()
    run = pipeline.submit(Request(prompt="a boat", size=(60, 60), seed=1))
    reader = threading.Thread(target=lambda: events.extend(run), daemon=True)
    reader.start()
    run.cancel()
    reader.join(20)
    assert not reader.is_alive()
    assert events == []
    pipeline.engine.call(lambda: None)
    assert pipeline.runner.cache.free == pipeline.runner.cache.pages - 1


def test_requests_from_several_threads_are_those_made_alone(pipelines: Pipelines) -> None:
    pipeline = pipelines("picture")
    requests = [Request(prompt="boat " * (1 + i % 3), size=(3 + i, 5), seed=i, num_outputs=1 + i % 2) for i in range(6)]
    alone = [pictures_of(pipeline.stream(request)) for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: pictures_of(pipeline.stream(request)), requests))
    assert together == alone


def test_a_batch_is_yielded_request_by_request(pipelines: Pipelines) -> None:
    pipeline = pipelines("picture")
    requests = [Request(prompt="a boat", size=(rows, 5), seed=1) for rows in (6, 3, 4)]
    events = list(pipeline.stream_batch(requests))
    assert [index for index, _ in events] == sorted(index for index, _ in events)
    for i, request in enumerate(requests):
        assert pictures_of(event for index, event in events if index == i) == pictures_of(pipeline.stream(request))
    with pytest.raises(InputError, match="takes .* tokens"):
        next(pipeline.stream_batch([requests[0], Request(prompt="boat " * 5000)]))


def test_a_submitted_request_runs_beside_others_before_it_is_read(pipelines: Pipelines) -> None:
    pipeline = pipelines("picture")
    first, second = (pipeline.submit(Request(prompt="a boat", size=(4, 4), seed=seed)) for seed in (1, 2))
    made = pictures_of(second), pictures_of(first)
    assert made == tuple(
        pictures_of(pipeline.stream(Request(prompt="a boat", size=(4, 4), seed=seed))) for seed in (2, 1)
    )


@pytest.mark.parametrize("after", [0, 1, 4, 9])
def test_a_trace_that_raises_ends_its_own_request_alone(after: int, pipelines: Pipelines) -> None:
    """One that raised at a visual token ended every request in progress, with its error. At the first tokens it fails
    with the other output of its request in the same step."""
    pipeline, calls = pipelines("picture"), itertools.count()

    def trace(kind: str, probs: Any) -> None:
        if next(calls) >= after:
            raise KeyError("the trace's")

    other = pipeline.submit(Request(prompt="a boat", size=(8, 8), seed=1))
    traced = pipeline.submit(Request(prompt="a ship", size=(8, 8), seed=1, num_outputs=2), trace=trace)
    with pytest.raises(KeyError, match="the trace's"):
        list(traced)
    assert len(pictures_of(other)) == 1
    assert pipeline.runner.cache.free == pipeline.runner.cache.pages - 1


def test_an_output_that_ends_at_once_does_not_hide_the_next(pipelines: Pipelines) -> None:
    """Of equal prompts, one that ended with its first token was removed from the list of outputs under a loop over it,
    and the next never began."""
    pipeline = pipelines("silent")
    prepared = pipeline.prepare(Request(prompt="walk", task="story", seed=1))
    outputs = [replace(prepared.outputs[0], seed=seed) for seed in range(4)]
    events, reader = list[Any](), pipeline.engine.submit(outputs, prepared.config)
    timer = threading.Timer(20, reader.cancel)
    timer.start()
    events.extend(reader.events())
    timer.cancel()
    assert sorted(event.index for event in events if isinstance(event, Ended)) == [0, 1, 2, 3]
