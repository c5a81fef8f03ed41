"""Pictures drawn by diagonals in the engine: against both repositories' tokens, against the slow twin, and what holds
for every picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _compare import flashar
from _models import tiny
from _models.flashar import make_flashar

from emu_cog.engine import diagonals as diagonals_module
from emu_cog.engine.diagonals import Diagonals
from emu_cog.engine.engine import Engine, Submission
from emu_cog.engine.sequence import Ended, EngineRequest, GenerationConfig, Opened, Stats, Tokens
from emu_cog.errors import CheckpointError, InputError
from emu_cog.events import Picture, Progress, RunStats
from emu_cog.model.flashar import diagonals
from emu_cog.ops.diagonals import Places
from emu_cog.ops.noise import gumbel_noise
from emu_cog.pipeline import Pipeline
from emu_cog.request import Request, Sampling
from emu_cog.settings import Settings
from tests.conftest import photo
from tests.test_flashar import GOLDEN, twin

GREEDY = Sampling(top_k=1)
Load = Callable[..., Pipeline]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """`load(layout)`: a Pipeline over the checkpoint that the golden vectors were made with."""
    folders: dict[str, tiny.TinyFolders] = {}
    loaded: dict[tuple[str, str], Pipeline] = {}

    def make(layout: str, form: str = "float32") -> Pipeline:
        if layout not in folders:
            folders[layout] = flashar.make_checkpoint(layout, tmp_path_factory.mktemp(layout))
            defaults = {"kind": flashar.KINDS[layout], "image_area": 96 * 96, "aspect_ratio": "1:1"}
            (folders[layout].model / "defaults.json").write_text(json.dumps(defaults))
        if (layout, form) not in loaded:
            made, of = folders[layout], {"quantize": form} if form == "int8" else {"dtype": form}
            loaded[layout, form] = Pipeline.load(made.model, made.vision, device="cpu", max_outputs=6, **of)
        return loaded[layout, form]

    return make


def config_of(size: tuple[int, int], guidance: float, image: Sampling = GREEDY) -> GenerationConfig:
    return GenerationConfig(cfg_scale=guidance, image=image, text=image, size=size, max_new_tokens=0, single_image=True)


def codes_of(engine: Engine, running: Submission, size: tuple[int, int]) -> list[int]:
    """The codes that one output made, in reading order; its grammar is checked."""
    ids, made = engine.ids, []
    for event in running.events():
        made += event.ids if isinstance(event, Tokens) else []
        assert not isinstance(event, Ended) or event.reason == "image"
    header, (rows, columns) = ids.header(*size), size
    assert tuple(made[: len(header)]) == header
    body = made[len(header) :]
    assert len(body) == rows * (columns + 1)
    assert [body[(row + 1) * (columns + 1) - 1] for row in range(rows)] == [ids.eol] * (rows - 1) + [ids.eoi]
    return [token - ids.visual for place, token in enumerate(body) if (place + 1) % (columns + 1)]


def chosen(pictures: Sequence[Picture]) -> list[tuple[tuple[int, ...], ...]]:
    return [picture.codes for picture in pictures]


def drawn(pipeline: Pipeline, request: Request) -> list[Picture]:
    return [event for event in pipeline.stream(request) if isinstance(event, Picture)]


# -- 1. against others --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", flashar.CLONES)
def test_tokens_are_those_of_the_public_code(layout: str, load: Load) -> None:
    """All cases of a layout at once: square, wide and tall, prompts of unequal length, guidance 1 and more."""
    pipeline, golden = load(layout), np.load(GOLDEN)
    cases = flashar.pictures(layout, pipeline.tokenizer)
    running = []
    for case in cases:
        unconditional = case.unconditional or case.conditional
        request = EngineRequest(conditional=tuple(case.conditional), unconditional=tuple(unconditional), seed=1)
        running.append(pipeline.engine.submit([request], config_of(case.size, case.guidance)))
    for name, case, one in zip(flashar.CASES[layout], cases, running, strict=True):
        theirs = golden[f"{layout}/{name}/tokens"].tolist()
        assert codes_of(pipeline.engine, one, case.size) == theirs, name


@pytest.mark.parametrize("size", [(9, 14), (14, 9), (10, 10)])
def test_a_request_draws_the_twins_picture(size: tuple[int, int], tmp_path: Path) -> None:
    """More cells than a page holds, and prompts that fill more than one."""
    shape = {"layers": 3, "vertical_layers": 2, "start": 0, "hidden": 32, "logit_bias": {}}
    made = make_flashar(tmp_path, layout="lxazjk", seed=5, **shape)
    pipeline = Pipeline.load(made.model, made.vision, device="cpu", kind="flash", max_outputs=2)
    request = Request(prompt="a red boat " * 19, size=size, seed=1, image_top_k=1, guidance_scale=2.0)
    prepared = pipeline.prepare(request)
    assert len(prepared.outputs[0].conditional) > 64 > len(prepared.outputs[0].unconditional) > 10
    (picture,) = drawn(pipeline, request)
    expected = twin(
        made.model,
        flashar.Picture(
            conditional=prepared.outputs[0].conditional,
            unconditional=prepared.outputs[0].unconditional,
            size=size,
            guidance=2.0,
        ),
    )
    assert np.array(picture.codes).flatten().tolist() == expected["tokens"].tolist()


def test_every_cell_is_sampled_with_its_own_noise(load: Load) -> None:
    """Of a cell's distribution, the largest of log p + noise by (seed, r * columns + c, code)."""
    pipeline, size, seed, traced = load("lxazjk"), (4, 6), 77, []
    request = Request(prompt="a cup", size=size, seed=seed, image_top_k=20, image_top_p=0.95, guidance_scale=1.0)
    prepared = pipeline.prepare(request)
    running = pipeline.engine.submit(
        prepared.outputs, prepared.config, trace=lambda kind, probs: traced.append((kind, probs.clone()))
    )
    codes = codes_of(pipeline.engine, running, size)
    order = [cell for diagonal in diagonals(*size) for cell in diagonal.cells]
    assert [kind for kind, _ in traced] == ["visual"] * len(order)
    likeliest = [int(probs[0].argmax()) for _, probs in traced]
    assert sum(codes[cell] != code for cell, code in zip(order, likeliest, strict=True)) >= 5
    noise = gumbel_noise(torch.full((24,), seed), torch.arange(24), pipeline.lm.ids.visual_count)
    for cell, (_, probs) in zip(order, traced, strict=True):
        assert probs.shape[0] == 1
        assert 1 <= int((probs > 0).sum()) <= 20
        assert int((probs[0].log() + noise[cell]).argmax()) == codes[cell]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (5, 1), (3, 5), (5, 3), (4, 4)])
def test_the_device_counts_cells_as_the_host_does(rows: int, columns: int) -> None:
    every, width = list(diagonals(rows, columns)), 8
    numbers = torch.arange(len(every) + 2)
    at = Places.of(numbers, torch.full_like(numbers, rows), torch.full_like(numbers, columns), width)
    for diagonal in every:
        live = at.live[diagonal.number]
        assert live.tolist() == [place < diagonal.count for place in range(width)]
        assert int(at.count[diagonal.number]) == diagonal.count
        assert int(at.drawn[diagonal.number]) == diagonal.drawn == sum(one.count for one in every[: diagonal.number])
        for name in ("cells", "left", "above"):
            assert getattr(at, name.removesuffix("s"))[diagonal.number][live].tolist() == getattr(diagonal, name), name
    assert not at.live[len(every) :].any()
    assert at.drawn[len(every) :].flatten().tolist() == [rows * columns] * 2
    for places in (at.left, at.above):  # what is not live is read without harm, too
        assert int(places.max()) < width


# -- 2. in company ------------------------------------------------------------------------------------------


def traces(pipeline: Pipeline, requests: Sequence[Request]) -> list[list[torch.Tensor]]:
    """The distributions of each request's cells, all of them side by side."""
    found: list[list[torch.Tensor]] = [[] for _ in requests]
    prepared = [pipeline.prepare(request) for request in requests]
    running = [
        pipeline.engine.submit(one.outputs, one.config, trace=lambda _, probs, to=to: to.append(probs.clone()))
        for one, to in zip(prepared, found, strict=True)
    ]
    for one in running:
        list(one.events())
    return found


@pytest.mark.parametrize("form", ["float32", "int8", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_picture_does_not_depend_on_its_company(form: str, load: Load) -> None:
    """To the last bit, in passes of other sizes and beside pictures that come and go; the last one has diagonals of
    more rows than a pass, alone or not."""
    pipeline = load("u0", form)
    requests = [
        Request(prompt="a cup", size=(3, 5), seed=3),
        Request(prompt="a long red boat on the shore", size=(11, 9), seed=4, guidance_scale=1.0),
        Request(prompt="two", task="x2i", images=(photo(1),), size=(6, 2), seed=5, image_area=64 * 64),
        Request(prompt="a wide field", size=(34, 36), seed=6, image_top_p=0.8),
    ]
    together = traces(pipeline, [*requests, *(replace(requests[1], seed=seed) for seed in (90, 91, 92))])
    for request, company in zip(requests, together, strict=False):
        (alone,) = traces(pipeline, [request])
        rows, columns = request.size or (0, 0)
        assert len(alone) == len(company) == rows * columns
        assert all(torch.equal(a, b) for a, b in zip(alone, company, strict=True)), request.prompt


def test_outputs_have_consecutive_seeds(load: Load) -> None:
    """They share the pages that their prompt fills, in which no cell is kept."""
    pipeline = load("lxazjk")
    request = Request(prompt="a red boat " * 19, size=(5, 4), seed=8, num_outputs=3)
    assert len(pipeline.prepare(request).outputs[0].conditional) > 64
    together = drawn(pipeline, request)
    assert [picture.settings["seed"] for picture in together] == [8, 9, 10]
    alone = [drawn(pipeline, replace(request, seed=seed, num_outputs=1))[0] for seed in (8, 9, 10)]
    assert chosen(together) == chosen(alone)
    assert len(set(chosen(alone))) == 3


def test_one_that_is_cancelled_leaves_the_others_alone_and_its_pages_free(load: Load) -> None:
    pipeline = load("lxazjk")
    free = pipeline.runner.cache.free
    stays = Request(prompt="a cup", size=(12, 12), seed=2)
    (expected,) = drawn(pipeline, stays)
    goes = pipeline.submit(replace(stays, size=(60, 60), seed=3))
    kept = pipeline.submit(stays)
    events = iter(kept)
    goes.cancel()
    pictures = [event for event in events if isinstance(event, Picture)]
    assert chosen(pictures) == chosen([expected])
    assert not [event for event in goes if isinstance(event, Picture | RunStats)]
    pipeline.engine.call(lambda: None)
    assert pipeline.runner.cache.free == free
    assert not pipeline.runner.state.tables.any()
    assert not pipeline.runner.grid.image_tables.any()  # type: ignore[attr-defined]


def test_memory_that_runs_out_within_a_step_costs_one_submission(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures of the step's other passes are a diagonal further by then."""
    pipeline, real, failed = load("lxazjk"), diagonals_module.draw, list[int]()
    large, small = Request(prompt="a field", size=(34, 36), seed=6), Request(prompt="a cup", size=(60, 3), seed=7)
    (expected,) = drawn(pipeline, large)

    def draw(ops, w, batch, image, cache):
        if len(batch.tokens) <= 8 and pipeline.runner.state.step.max() > 33 and not failed:
            failed.append(len(batch.tokens))
            raise torch.OutOfMemoryError("full")
        return real(ops, w, batch, image, cache)

    monkeypatch.setattr(diagonals_module, "draw", draw)
    running = [pipeline.submit(large), pipeline.submit(small)]
    pictures = [event for event in running[0] if isinstance(event, Picture)]
    with pytest.raises(RuntimeError, match="memory ran out while 2 outputs were generated side by side"):
        list(running[1])
    assert failed == [8]
    assert chosen(pictures) == chosen([expected])


# -- 3. what a request gets ---------------------------------------------------------------------------------


def test_events_progress_and_counts(load: Load) -> None:
    """A picture needs H + W - 1 passes. Progress counts cells, also those whose row is not complete."""
    pipeline, shares = load("lxazjk"), list[float]()
    request = Request(prompt="a cup", size=(20, 30), seed=8, max_new_tokens=5)
    prepared = pipeline.prepare(request)
    events = list(pipeline.engine.generate(prepared.outputs, prepared.config))
    assert [event.size for event in events if isinstance(event, Opened)] == [(20, 30)]
    looks = [event for event in events if isinstance(event, Tokens)]
    assert looks[0].ids[-1] == pipeline.lm.ids.img
    assert not looks[1].ids
    assert looks[1].ahead == sum(diagonal.count for diagonal in list(diagonals(20, 30))[:8])
    assert looks[-1].ahead == 0
    stats = events[-1]
    assert isinstance(stats, Stats)
    assert (stats.steps, stats.passes, stats.sampled) == (49, 49, 600)

    def report(progress: Progress) -> None:
        shares.append(progress.done)

    (*_, last) = pipeline.stream(request, on_progress=report)
    assert isinstance(last, RunStats)
    assert last.tokens == 600
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len({share for share in shares if 0.02 < share < 0.6}) >= 3


def test_metadata_and_defaults_are_the_kinds(load: Load) -> None:
    (picture,) = drawn(load("lxazjk"), Request(prompt="a cup", seed=8))
    assert picture.image.size == (96, 96)
    assert picture.settings["guidance_scale"] == 5.0
    assert picture.settings["image_top_k"] == 5120
    with pytest.raises(InputError, match="task_type story can't be done by flash models"):
        load("lxazjk").prepare(Request(prompt="a fox", task="story"))


def test_what_does_not_fit_is_refused_before_any_work(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load("lxazjk")
    monkeypatch.setattr(pipeline.lm, "context", 10**6)
    with pytest.raises(InputError, match=r"size=\(130, 129\) .* at most 128 tokens"):
        pipeline.prepare(Request(prompt="a cup", size=(130, 129)))
    monkeypatch.setattr(pipeline.lm, "context", 400)
    with pytest.raises(InputError, match="the model's context holds 400"):
        pipeline.prepare(Request(prompt="a cup", size=(20, 20)))


def test_where_memory_is_short_several_gpus_are_no_advice(load: Load, tmp_path: Path) -> None:
    made = make_flashar(tmp_path, layout="lxazjk", hidden=32, logit_bias={})
    with pytest.raises(InputError, match="not enough memory: .*fp8 or int8.*smaller EMU_MAX_CONTEXT") as caught:
        Pipeline.load(made.model, made.vision, device="cpu", kind="flash", max_outputs=10**9)
    assert "EMU_DEVICE_MAP" not in str(caught.value)


def test_the_longest_that_fits_is_drawn(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """EOL and EOI take no place in the cache, but the check counts them."""
    pipeline = load("lxazjk")
    request = Request(prompt="a cup", size=(18, 9), seed=1)
    plan = pipeline.prepare(request)
    monkeypatch.setattr(pipeline.lm, "context", len(plan.outputs[0].conditional) + 18 * 10 + 1)
    assert len(drawn(pipeline, request)) == 1


def test_layers_on_several_devices_are_refused(load: Load, tmp_path: Path) -> None:
    says = "EMU_DEVICE_MAP=auto can't be used with flash models, whose layers must be on one device: leave it empty"
    settings = Settings(checkpoint="flash", weights_dir=tmp_path / "w", device="cpu", device_map="auto")
    with pytest.raises(InputError, match=says):
        Pipeline.from_settings(settings)
    assert not (tmp_path / "w").exists()
    made = make_flashar(tmp_path / "made", layout="lxazjk", hidden=32, logit_bias={})
    with pytest.raises(InputError, match=says):
        Pipeline.load(made.model, made.vision, device="cpu", device_map="auto", kind="flash")
    with pytest.raises(CheckpointError, match=r"holds FlashAR weights .*: its kind is flash or u0-flash"):
        Pipeline.load(made.model, made.vision, device="cpu", kind="image")


def test_cells_and_rows_of_a_picture_in_the_making() -> None:
    image = Diagonals((3, 5))
    assert (image.total, image.room) == (7, 15)
    assert [image.tokens(made) for made in range(8)] == [0, 1, 3, 6, 9, 12, 14, 15]
    assert [image.complete(made) for made in range(8)] == [0, 0, 0, 0, 0, 1, 2, 3]
    assert [image.ahead(made) for made in range(8)] == [0, 1, 3, 6, 9, 7, 4, 0]
