"""Steps by diagonals that read everything from the device, as CUDA graphs do: against the eager ones, and what they
must not read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _compare import flashar
from torch.utils._python_dispatch import TorchDispatchMode

from emu_cog.engine import diagonals
from emu_cog.engine.diagonals import DiagonalRunner, Diagonals
from emu_cog.engine.engine import Engine
from emu_cog.engine.runner import Step
from emu_cog.engine.sequence import EngineRequest, GenerationConfig, SequenceState
from emu_cog.events import Picture
from emu_cog.model import torch_settings
from emu_cog.model.flashar import FlashModel
from emu_cog.ops.interface import Batch, Ops, Span, Weight, pages_for
from emu_cog.ops.reference import TorchOps
from emu_cog.pipeline import Pipeline
from emu_cog.request import Request, Sampling
from tests.decoder_kit import logged_steps, run_uncaptured, tokenwise
from tests.flashar_kit import load
from tests.test_diagonals import codes_of, config_of

PROMPTS = (tuple(range(40, 111)), tuple(range(50, 61)))
CASES: dict[str, tuple[tuple[int, int], Sampling]] = {
    "square": ((9, 9), Sampling(top_k=9)),
    "wide, top-p": ((5, 23), Sampling(top_k=20, top_p=0.7, temperature=1.4)),
    "tall, more cells than the kernels' rows": ((24, 20), Sampling(top_k=9)),
    "one row": ((1, 5), Sampling(top_k=9)),
}


class LastOps(TorchOps):
    """TorchOps that read from the device how far a token reads, as kernels do: each token for itself."""

    def attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, into: Weight
    ) -> torch.Tensor:
        if batch.last is None:
            return super().attend(q, keys, values, batch if batch.spans else tokenwise(batch), into)
        assert len(batch.tokens) % batch.width == 0
        window = batch.last.view(-1, batch.width)
        assert ((window == window[:, :1]) | (window == 0)).all()  # what the kernel relies on
        pairs = zip(batch.streams.tolist(), batch.last.tolist(), strict=True)
        spans = tuple(Span(stream, last, 1) for stream, last in pairs)
        return super().attend(q, keys, values, replace(batch, positions=batch.last, spans=spans), into)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FlashModel:
    return load(flashar.make_checkpoint("u0", tmp_path_factory.mktemp("u0")).model)


def uncaptured(model: FlashModel, ops: Callable[[], Ops], monkeypatch: pytest.MonkeyPatch) -> DiagonalRunner:
    """A runner over the weights of `model` whose captured steps are run instead of captured."""
    lm = copy.copy(model)
    lm.ops = ops()
    run_uncaptured(monkeypatch)
    runner = DiagonalRunner(lm, slots=6, tokens=6 * 4096)
    runner.captured = True
    return runner


def drawn(
    runner: DiagonalRunner, cases: Sequence[tuple[tuple[int, int], Sampling]], *, traced: bool = False
) -> list[tuple[list[int], list[torch.Tensor]]]:
    """Codes, and with `traced` distributions, of pictures that are drawn side by side."""
    engine, running, found = Engine(runner), [], []
    for seed, (size, image) in enumerate(cases):
        header = runner.lm.ids.header(*size)
        conditional, unconditional = ((*prompt, *header) for prompt in PROMPTS)
        request = EngineRequest(conditional=conditional, unconditional=unconditional, seed=seed)
        probs: list[torch.Tensor] = []
        keep = (lambda _, one, to=probs: to.append(one.clone())) if traced else None
        running.append(engine.submit([request], config_of(size, 3.0, image), trace=keep))
        found.append(probs)
    codes = [codes_of(engine, one, size) for one, (size, _) in zip(running, cases, strict=True)]
    return list(zip(codes, found, strict=True))


def test_steps_that_read_the_device_give_the_eager_tokens(model: FlashModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone and side by side, with distributions that differ by rounding alone. With fewer rows than the kernels have,
    so that small pictures need all widths, too."""
    monkeypatch.setattr(diagonals, "WIDTHS", (4, 8, 16, 32))
    cases = list(CASES.values())
    expected = drawn(DiagonalRunner(model, slots=6, tokens=6 * 4096), cases, traced=True)
    runner = uncaptured(model, LastOps, monkeypatch)
    runner.pass_rows = 32
    for (size, _), (codes, probs), (other, others) in zip(
        cases, expected, drawn(runner, cases, traced=True), strict=True
    ):
        assert other == codes, size
        assert len(probs) == len(others) == size[0] * size[1]
        torch.testing.assert_close(torch.cat(others), torch.cat(probs), atol=2e-5, rtol=1e-3)
    used = {(size, step.width) for size, step in runner._graphs}
    assert {width for _, width in used} == {4, 8, 16, 32}
    assert max(size for size, _ in used) > 1
    assert all(size * width <= 16 or size == 1 for size, width in used)
    for case in cases[:3]:
        ((codes, _),) = drawn(uncaptured(model, LastOps, monkeypatch), [case])
        assert codes == drawn(DiagonalRunner(model, slots=6, tokens=4096), [case])[0][0]


def sequence(runner: DiagonalRunner, slot: int, size: tuple[int, int], **sampling: object) -> SequenceState:
    """A picture about to be drawn after prompts of unequal length."""
    image = Sampling(**sampling)  # type: ignore[arg-type]
    s = SequenceState(
        index=slot,
        request=EngineRequest(conditional=PROMPTS[0][slot:], unconditional=PROMPTS[1], seed=slot),
        config=GenerationConfig(cfg_scale=3.0, image=image, text=image, size=size, max_new_tokens=0, single_image=True),
        emit=lambda event: None,
    )
    s.slot, s.lengths = slot, [len(PROMPTS[0]) - slot, len(PROMPTS[1])]
    for length, pages in zip(s.lengths, s.pages, strict=True):
        pages.extend(runner.cache.take(pages_for(length + size[0] * size[1])))
    runner.begin(s)
    runner.place(s)
    state = torch.randn((2, 2 * runner.lm.config.hidden_size), generator=torch.Generator().manual_seed(slot))
    state = state.to(runner.lm.device, runner.lm.dtype)
    next(runner.answer(s, dict(enumerate(state.split(1)))))
    s.doing = Diagonals(size)
    runner.open(s, s.doing)
    return s


@torch.inference_mode()
def test_between_two_looks_the_host_reads_nothing(model: FlashModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the dispatcher; and a picture that is complete stays as it is, whatever steps follow."""

    class Blind(TorchOps):
        def attend(self, q, keys, values, batch, into):
            return q.flatten(1)  # TorchOps read spans, which kernels need not

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
                Reads.count += 1
            return func(*args, **(kwargs or {}))

    runner = uncaptured(model, Blind, monkeypatch)
    three = [sequence(runner, slot, (3 + slot, 4), top_k=9, top_p=0.9) for slot in range(3)]
    runner.step(three)  # makes the graphs
    for s in three:
        s.move(1)
    with Reads():
        for _ in range(5):
            runner.step(three)
            for s in three:
                s.move(1)
        assert Reads.count == 0
    assert runner.state.step.tolist() == [6, 6, 6, 0, 0, 0, 0]
    assert [s.made for s in three] == [6, 6, 6]
    assert three[0].lengths == [71 + 12, 11 + 12]
    assert runner.made(three) == [6, 6, 6]
    before = runner.read([(three[0], 0)])()
    for s in three[1:]:
        runner.step([three[0], s])
    assert runner.state.step.tolist() == [6, 7, 7, 0, 0, 0, 0]
    assert runner.read([(three[0], 0)])() == before


@torch.inference_mode()
def test_only_a_pictures_own_cells_are_written(model: FlashModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places of a pass without a cell, whole slots of padding and complete pictures write to nobody's page."""
    runner = uncaptured(model, LastOps, monkeypatch)
    one, other = sequence(runner, 0, (2, 3), top_k=3), sequence(runner, 1, (30, 2), top_k=3)
    for buffer in (*runner.cache.keys, *runner.cache.values):
        buffer.fill_(7.0)
    for _ in range(4):
        runner.step([one, other])
        one.move(1)
        other.move(1)
    runner.step([one])  # complete: its next diagonal has no cell
    layers = len(runner.lm.weights.layers)
    for layer, buffer in enumerate(runner.cache.keys):
        written = {
            (int(page), int(place))
            for page, place in (buffer != 7.0).any(dim=-1).any(dim=0).nonzero().tolist()
            if page  # nobody's
        }
        expected = set()
        for s, cells in ((one, 6), (other, 7)):
            for length, pages in zip((s.lengths[0] - cells, s.lengths[1] - cells), s.pages, strict=True):
                first = length if layer < layers else 0
                own = pages if layer < layers else pages[length // 64 :]
                expected |= {(own[at // 64], at % 64) for at in range(first, first + cells)}
        assert written == expected, layer


def test_the_device_has_steps_to_take_while_the_host_reads(model: FlashModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a look finds is shown after the next one has been queued; never more than ROUND steps are on their way, and
    what is complete is shown at once."""
    expected = [codes for codes, _ in drawn(DiagonalRunner(model, slots=2, tokens=2 * 4096), [CASES["square"]] * 2)]
    runner = uncaptured(model, LastOps, monkeypatch)
    log = logged_steps(runner, monkeypatch)
    assert [codes for codes, _ in drawn(runner, [CASES["square"]])] == expected[:1]
    shown = [entry for entry in log if entry != "step"]
    assert log.count("step") == 17
    assert shown == ["4 later"] * 3 + ["1 later", "0 later"]


@torch.inference_mode()
def test_a_wider_pass_serves_where_it_is_faster(model: FlashModel, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = uncaptured(model, LastOps, monkeypatch)
    runner._seconds = {(2, 16): 3.0, (2, 24): 2.0, (2, 32): 2.5, (1, 16): 1.0, (1, 24): 1.5, (3, 24): 1.0}
    every = [sequence(runner, slot, (12, 12), top_k=9) for slot in range(2)]
    for made, company, width in ((0, every, 8), (8, every, 24), (8, every[:1], 16)):
        for s in company:
            s.made = made
        runner.step(company)
        assert (len(company), Step(width=width)) in runner._graphs
    assert len(runner._graphs) == 3


@torch.inference_mode()
def test_one_graph_draws_any_pictures(model: FlashModel, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = uncaptured(model, LastOps, monkeypatch)
    every = [sequence(runner, slot, (3, 3 + slot), top_k=3 + slot) for slot in range(3)]
    for company in ([0], [1], [1, 2], [2, 0], [2, 0]):
        runner.step([every[i] for i in company])
        for i in company:
            every[i].move(1)
    assert runner.state.step[:3].tolist() == [3, 2, 3]
    assert set(runner._graphs) == {(1, Step(width=8)), (2, Step(width=8))}


def test_the_log_says_why_steps_are_not_captured(model: FlashModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="emu_cog"):
        assert not DiagonalRunner.best(model, slots=1, tokens=4096, compile=True).captured
    assert "plain PyTorch: the device is cpu" in caplog.text


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def on_gpu(folder: Path, **settings: object) -> Pipeline:
    made = flashar.make_checkpoint("u0", folder)
    return Pipeline.load(made.model, made.vision, kind="u0-flash", **({"device": "cuda", "max_outputs": 8} | settings))  # type: ignore[arg-type]


def codes_at_once(pipeline: Pipeline, requests: Sequence[Request]) -> list[tuple[tuple[int, ...], ...]]:
    running = [pipeline.submit(request) for request in requests]
    return [event.codes for one in running for event in one if isinstance(event, Picture)]


REQUESTS = [
    Request(prompt="a red boat", seed=seed, size=size, image_top_k=9, image_top_p=top_p)
    for seed, (size, top_p) in enumerate([((12, 16), 0.9), ((30, 20), 1.0), ((3, 5), 1.0), ((50, 40), 0.8)])
]


@pytest.mark.gpu
def test_captured_diagonals_give_the_eager_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_settings, "apply", lambda device: torch_settings.exact())  # TF32 would be the noise
    found = []
    for compile in (False, True):
        pipeline = on_gpu(tmp_path / str(compile), dtype="float32", compile=compile)
        assert pipeline.runner.captured == compile
        found.append(codes_at_once(pipeline, REQUESTS))
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("quantize", [None, "int8", "fp8"])
def test_pictures_are_the_same_in_any_company(quantize: str | None, compile: bool, tmp_path: Path) -> None:
    """In bfloat16, where another order of sums would show."""
    pipeline = on_gpu(tmp_path, dtype="bfloat16", quantize=quantize, compile=compile)
    together = codes_at_once(pipeline, REQUESTS)
    assert together == [codes_at_once(pipeline, [request])[0] for request in REQUESTS]


@pytest.mark.gpu
def test_captured_diagonals_do_not_synchronize(tmp_path: Path) -> None:
    """While the pictures stay the same, whatever room their diagonals need; the first two have its steps captured."""
    runner = on_gpu(tmp_path, dtype="bfloat16").runner
    assert isinstance(runner, DiagonalRunner)
    with torch.inference_mode():
        for mode in ("default", "error"):
            two = [sequence(runner, slot, (12, 12), top_k=9) for slot in range(2)]
            runner.step(two)
            torch.cuda.set_sync_debug_mode(mode)
            try:
                for _ in range(22):
                    for s in two:
                        s.move(1)
                    runner.step(two)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert runner.made(two) == [23, 23]
