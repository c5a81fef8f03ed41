"""Steps: eager ones whatever their company, captured ones against them, and on a GPU the captured graphs themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _models import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from emu_cog.engine.engine import Engine
from emu_cog.engine.runner import MAX_SEQUENCES, MAX_STEPS, ModelRunner, Step, why_eager
from emu_cog.engine.sequence import Draw, EngineRequest, Feed, GenerationConfig, SequenceState, Tokens
from emu_cog.model import torch_settings
from emu_cog.model.kv_cache import PAGE
from emu_cog.model.qwen3 import Chunk, LanguageModel
from emu_cog.ops.interface import Ops, pages_for
from emu_cog.ops.reference import TorchOps
from emu_cog.pipeline import Pipeline
from emu_cog.request import Request, Sampling
from tests.decoder_kit import IDS, TokenwiseOps, logged_steps, random_model, run_uncaptured

Checkpoints = Callable[[str], tiny.TinyFolders]
CASES = {
    "one": ("picture", 1, Request(prompt="a red boat", seed=2, size=(3, 4), guidance_scale=5.0, image_top_k=9)),
    "four": ("picture", 4, Request(prompt="a boat", seed=3, size=(4, 3), image_temperature=0.7)),
    "top-p": ("picture", 2, Request(prompt="boat", seed=3, size=(3, 3), image_top_p=0.6, image_top_k=20)),
    "the model's sizes": ("picture", 3, Request(prompt="boat", seed=0, aspect_ratio="model", image_top_k=20)),
    "story": ("storyteller", 2, Request(prompt="a fox", task="story", size=(3, 4), seed=16, max_new_tokens=170)),
}


def prepared(pipeline: Pipeline, request: Request, count: int) -> tuple[list[EngineRequest], GenerationConfig]:
    """`count` engine requests with consecutive seeds."""
    one = pipeline.prepare(request)
    return [replace(one.outputs[0], seed=one.seed + i) for i in range(count)], one.config


def ids_of(engine: Engine, requests: Sequence[EngineRequest], config: GenerationConfig) -> dict[int, list[int]]:
    """All ids by request."""
    ids: dict[int, list[int]] = {}
    for event in engine.generate(requests, config):
        if isinstance(event, Tokens):
            ids.setdefault(event.index, []).extend(event.ids)
    return ids


def uncaptured(
    lm: LanguageModel,
    ops: Callable[[LanguageModel], Ops],
    monkeypatch: pytest.MonkeyPatch,
    *,
    decoding: str = "sequential",
) -> Engine:
    """An engine over the weights of `lm` whose captured steps are run instead of captured."""
    lm = copy.copy(lm)
    lm.ops = ops(lm)
    run_uncaptured(monkeypatch)
    runner = ModelRunner(lm, slots=4, tokens=4 * lm.context)
    runner.captured = True
    # As if every pass took as long: measuring them would take the interpreter minutes.
    runner._seconds = {(size, width): 1.0 for size in runner.sizes for width in runner.widths(size)}
    return Engine(runner, decoding=decoding)


@pytest.mark.parametrize("decoding", ["sequential", "parallel"])
@pytest.mark.parametrize("name", CASES)
def test_steps_that_read_the_device_give_the_eager_tokens(
    name: str, decoding: str, pipelines: Callable[[str], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, count, request = CASES[name]
    pipeline = pipelines(model)
    requests, config = prepared(pipeline, request, count)
    engine = uncaptured(pipeline.lm, lambda lm: TokenwiseOps(), monkeypatch, decoding=decoding)
    expected = ids_of(pipeline.engine, requests, config)
    assert len(expected) == count
    assert ids_of(engine, requests, config) == expected
    graphs = engine.runner._graphs
    assert max(size for size, _ in graphs) == {1: 1, 2: 2, 3: 4, 4: 4}[count]
    assert {step.nucleus for _, step in graphs} >= {name == "top-p"}
    assert (max(step.width for _, step in graphs) > 1) == (decoding == "parallel")


def sequence(runner: ModelRunner, slot: int, *, length: int = 5, **config: object) -> SequenceState:
    """A sequence whose streams hold `length` tokens and one less, with pages for 40 more."""
    sampling = Sampling(**config)  # type: ignore[arg-type]
    s = SequenceState(
        index=slot,
        request=EngineRequest(conditional=(1,), unconditional=(1,), seed=slot),
        config=GenerationConfig(
            cfg_scale=3.0, image=sampling, text=sampling, size=None, max_new_tokens=None, single_image=False
        ),
        emit=lambda event: None,
    )
    s.slot, s.lengths = slot, [length, length - 1]
    for pages in s.pages:
        pages.extend(runner.cache.take(-(-(length + 40) // PAGE)))
    runner.begin(s)
    runner.place(s)
    return s


def noise(runner: ModelRunner, s: SequenceState) -> None:
    """Keys and values in the pages of `s` that depend on its slot alone."""
    generator = torch.Generator().manual_seed(s.slot)
    for buffer in (*runner.cache.keys, *runner.cache.values):
        for pages in s.pages:
            shape = (buffer.shape[0], len(pages), *buffer.shape[2:])
            buffer[:, pages] = torch.randn(shape, generator=generator).to(buffer)


@torch.inference_mode()
def traces(slots: Sequence[int], form: str | None) -> dict[int, list[torch.Tensor]]:
    """Three eager steps of the sequences in `slots`, even ones in a picture: what each has computed."""
    runner = ModelRunner(random_model(form=form)[0], slots=12, tokens=2000)
    runner.cache.take(len(slots))  # other pages in other company
    order = [sequence(runner, slot, length=3 + 9 * slot, top_k=50) for slot in slots]
    for s in order:
        noise(runner, s)
        s.doing = Feed(7 + s.slot, both=s.slot % 3 == 0, read="text") if s.slot % 2 else Draw((2, 3))
        if isinstance(s.doing, Draw):
            runner.open(s, s.doing)
    found: dict[int, list[torch.Tensor]] = {slot: [] for slot in slots}
    for _ in range(3):
        hidden = runner.step(order)
        text, picture = runner.text_logits(hidden), 0
        for row, s in enumerate(order):
            found[s.slot] += [hidden[row], text[row]]
            drawing = isinstance(s.doing, Draw)
            if drawing:
                found[s.slot].append(runner.scores(picture).clone())
                picture += 1
            s.lengths = [s.lengths[0] + 1, s.lengths[1] + (drawing or s.doing.both)]
            s.made += drawing
    for s in order:
        if s.made:
            found[s.slot].append(torch.tensor(runner.read([(s, 0)])()[0]))
    return found


@pytest.mark.parametrize("form", [None, "int8"])
def test_an_eager_step_does_not_depend_on_its_company(form: str | None) -> None:
    """To the last bit: hidden states, logits, scores and tokens of each sequence, alone and beside up to ten others."""
    together = [traces(slots, form) for slots in ([3, 2], [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0])]
    for slot in (1, 2, 3, 4):
        alone = traces([slot], form)[slot]
        assert len(alone) == (10 if slot % 2 == 0 else 6)
        for found in together:
            assert all(torch.equal(a, b) for a, b in zip(alone, found.get(slot, alone), strict=True)), slot


def test_inside_an_image_the_host_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is read by the host before the image is complete: counted at the dispatcher."""

    class Blind(TokenwiseOps):
        def attend(self, q, keys, values, batch, into):
            return q.flatten(1)  # this reads spans from the device, which kernels need not

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
                Reads.count += 1
            return func(*args, **(kwargs or {}))

    runner = uncaptured(random_model()[0], lambda lm: Blind(), monkeypatch).runner
    with torch.inference_mode():
        three = [sequence(runner, slot, length=3 + slot, top_k=9, top_p=0.9) for slot in range(3)]
        for s in three:
            s.doing = Draw((3, 3))
            runner.open(s, s.doing)
        with Reads():
            for _ in range(12):
                runner.step(three)
            assert Reads.count == 0
        assert runner.state.step.tolist() == [12, 12, 12, 0, 0]
        assert runner.state.position.tolist() == [15, 14, 16, 15, 17, 16, 0, 0, 0, 0]
        assert runner._graphs[4, Step(width=1, nucleus=True)].slots.tensor.tolist() == [0, 1, 2, runner.state.padding]
        for s in three:
            s.made = 12
        for ids in runner.read([(s, 0) for s in three])():
            assert [i for i, token in enumerate(ids) if token < IDS.visual] == [3, 7, 11]


@torch.inference_mode()
@pytest.mark.parametrize(
    "spans",
    [[(0, 50), (0, 7)], [(0, 1)], [(70, 33), (0, 16)], [(127, 1), (64, 100)], [(0, 250)], [(0, 300), (0, 4)]],
    ids=str,
)
def test_captured_prompts_are_the_eager_ones(spans: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of unequal length, one alone, rests of long ones, and one that is too long to be captured: the last
    hidden states, and what the cache holds."""
    lm, found = random_model()[0], []
    for captured, ops in ((False, TorchOps), (True, TokenwiseOps)):
        torch.manual_seed(3)
        runner = uncaptured(lm, lambda lm, ops=ops: ops(), monkeypatch).runner
        runner.captured = captured
        for buffer in (*runner.cache.keys, *runner.cache.values):
            buffer.copy_(torch.randn(buffer.shape))
        chunks = [
            Chunk(
                torch.randint(0, lm.config.vocab_size, (count,)).tolist(),
                start,
                runner.cache.take(pages_for(start + count)),
            )
            for start, count in spans
        ]
        last = runner.feed(chunks)
        assert [x.shape for x in last] == [(1, lm.config.hidden_size)] * len(spans)
        pages = [page for chunk in chunks for page in chunk.pages]
        found.append([*last, *(x[:, pages] for x in (*runner.cache.keys, *runner.cache.values))])
        assert bool(runner.prompts._replays) == (captured and spans[0][1] < 300)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_a_look_that_had_to_wait_is_shown_at_once(
    pipelines: Callable[[str], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many tokens a pass of several has kept only the device knows: the host waits for it anyway."""
    pipeline = pipelines("picture")
    requests, config = prepared(pipeline, Request(prompt="a boat", seed=3, size=(12, 12), image_top_k=9), 1)
    engine = uncaptured(pipeline.lm, lambda lm: TokenwiseOps(), monkeypatch, decoding="parallel")
    log = logged_steps(engine.runner, monkeypatch)
    assert ids_of(engine, requests, config)
    shown = [entry for entry in log if entry != "step"]
    assert len(shown) > 1
    assert set(shown) == {"0 later"}


@torch.inference_mode()
def test_one_graph_steps_any_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = uncaptured(random_model()[0], lambda lm: TokenwiseOps(), monkeypatch).runner
    one, two, three = (sequence(runner, slot) for slot in range(3))
    for s in (one, two, three):
        s.doing = Draw((1, 9))
        runner.open(s, s.doing)
    for company in ([one], [two], [two, three], [three, one], [three, one]):
        runner.step(company)
    assert runner.state.step[:3].tolist() == [3, 2, 3]
    assert len(runner._graphs) == 2


def test_larger_images_than_the_model_can_choose_replace_what_was_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What had been written to the graphs of old was kept by their addresses: a new one at such an address stepped the
    padding for ever."""
    runner = uncaptured(random_model()[0], lambda lm: TokenwiseOps(), monkeypatch).runner
    s = sequence(runner, 1)
    s.doing = Draw((1, 2))
    with torch.inference_mode():
        runner.open(s, s.doing)
        runner.step([s])
        assert runner.state.out.shape[1] == MAX_STEPS
        runner.state.out[0, 3] = 7
        s.doing = Draw((1, MAX_STEPS))
        runner.open(s, s.doing)
        assert runner.state.out.shape[1] == MAX_STEPS + 1
        assert runner.state.out[0, 3] == 7
        assert not runner._graphs
        runner.step([s])
    assert runner.state.step[1] == 1


def test_an_ended_sequence_writes_to_nobodys_page() -> None:
    runner = ModelRunner(random_model()[0], slots=2, tokens=300)
    s = sequence(runner, 1, length=70)
    assert runner.state.tables[2:4, :2].all()
    runner.end(s)
    assert not runner.state.tables.any()
    assert not runner.state.position.any()
    assert not runner.state.total.any()


@pytest.mark.parametrize("slots", [1, 2, 3, 8, 32])
def test_any_number_of_sequences_has_a_captured_size(slots: int) -> None:
    sizes = ModelRunner(random_model()[0], slots=slots, tokens=64).sizes
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == slots <= MAX_SEQUENCES


def test_the_log_says_why_steps_are_not_captured(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = random_model()[0]
    assert why_eager(lm, compile=False) == "EMU_COMPILE=0"
    assert why_eager(lm, compile=True) == "the device is cpu"
    with caplog.at_level("INFO", logger="emu_cog"):
        assert not ModelRunner.best(lm, slots=1, tokens=128, compile=False).captured
    assert "plain PyTorch: EMU_COMPILE=0" in caplog.text
    assert isinstance(lm.ops, TorchOps)

    def gpu(*devices: int, dim: int = 128) -> str | None:
        places = [torch.device("cuda", i) for i in devices]
        lm = SimpleNamespace(device=places[0], devices=places, config=SimpleNamespace(head_dim=dim))
        return why_eager(lm, compile=True)  # type: ignore[arg-type]

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert gpu(0, 0) is None
    assert gpu(0, 1) == "the layers are spread over several devices"
    assert gpu(0, dim=96) == "heads of 96 channels: the kernels need a power of two from 16"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert gpu(0) == "triton is not installed"


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@contextmanager
def no_synchronizing() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(folders: tiny.TinyFolders, **settings: object) -> Pipeline:
    return Pipeline.load(folders.model, folders.vision, **({"device": "cuda", "max_outputs": 8} | settings))  # type: ignore[arg-type]


@pytest.fixture
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager steps without TF32, whose ten bits of mantissa would be the largest difference to the kernels."""
    monkeypatch.setattr(torch_settings, "apply", lambda device: torch_settings.exact())


@pytest.mark.gpu
@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.parametrize("name", CASES)
def test_captured_steps_give_the_eager_tokens(name: str, device: str, make_checkpoint: Checkpoints) -> None:
    """Also on a device that is not the current one, where each kernel and stream has to be told its own."""
    if device == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model, count, request = CASES[name]
    found = []
    for compile in (False, True):
        pipeline = on_gpu(make_checkpoint(model), device=device, dtype="float32", compile=compile)
        assert pipeline.runner.captured == compile
        requests, config = prepared(pipeline, request, count)
        found.append(ids_of(pipeline.engine, requests, config))
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.usefixtures("no_tf32")
def test_layers_on_two_gpus_give_the_same_tokens(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folders = tiny.make_tiny(tmp_path, layers=8, logit_bias=tiny.STORYTELLER, defaults=tiny.small_defaults())
    _, count, request = CASES["story"]
    found = []
    for device_map in (None, "auto"):
        pipeline = on_gpu(folders, dtype="float32", device_map=device_map, compile=False)
        assert len(set(pipeline.lm.devices)) == (2 if device_map else 1)
        requests, config = prepared(pipeline, request, count)
        found.append(ids_of(pipeline.engine, requests, config))
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["one", "top-p"])
def test_captured_pictures_replay_one_graph_without_synchronizing(name: str, make_checkpoint: Checkpoints) -> None:
    """Whatever the guidance, filters and positions: only the first step of a company writes its slots."""
    pipeline = on_gpu(make_checkpoint("picture"), dtype="bfloat16")
    runner, graphs = pipeline.runner, []

    def steps() -> None:
        for guidance, top_k, length in ((3.0, 9, 5), (1.0, 0, 7)):
            s = sequence(runner, 0, length=length, top_k=top_k, top_p=0.5 if name == "top-p" else 1.0)
            s.config = replace(s.config, cfg_scale=guidance)
            runner.begin(s)
            s.doing = Draw((3, 3))
            runner.open(s, s.doing)
            runner.step([s])
            with no_synchronizing():
                for _ in range(11):
                    runner.step([s])
            s.made = 12
            assert len(runner.read([(s, 0)])()[0]) == runner.state.step[0] == 12
            graphs.append(dict(runner._graphs))
            runner.end(s)

    with torch.inference_mode():
        steps()
    assert graphs[0].keys() == graphs[1].keys() == {(1, Step(width=1, nucleus=name == "top-p"))}
    assert all(graphs[0][key] is graphs[1][key] for key in graphs[0])


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_outputs_are_the_same_in_any_company(quantize: str | None, compile: bool, make_checkpoint: Checkpoints) -> None:
    """In bfloat16, where another order of sums would show; eight sequences are 16 rows, 32 with text beside them."""
    for model, request in (
        ("picture", Request(prompt="a red boat", seed=40, size=(12, 16), image_top_p=0.9)),
        ("storyteller", Request(prompt="a fox", task="story", size=(3, 4), seed=40, max_new_tokens=120)),
    ):
        pipeline = on_gpu(make_checkpoint(model), dtype="bfloat16", quantize=quantize, compile=compile, max_outputs=20)
        requests, config = prepared(pipeline, request, 20)
        together = ids_of(pipeline.engine, requests, config)
        alone = {i: ids_of(pipeline.engine, [requests[i]], config)[0] for i in (0, 7, 19)}
        assert {i: together[i] for i in alone} == alone
        assert len({tuple(ids) for ids in alone.values()}) == 3
