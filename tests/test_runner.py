"""Captured steps: the same steps in plain torch against the modules, and on a GPU the captured graphs themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from _models import tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from emu_cog.engine.engine import Engine
from emu_cog.engine.runner import MAX_STEPS, ModelRunner, build, why_eager
from emu_cog.engine.sequence import EngineRequest, GenerationConfig, Tokens
from emu_cog.model import torch_settings
from emu_cog.model.decode import forward, merge
from emu_cog.model.quantize import FORMATS, quantize
from emu_cog.model.qwen3 import LanguageModel, choose_attention
from emu_cog.ops.interface import ImageState
from emu_cog.ops.reference import TorchOps
from emu_cog.pipeline import Pipeline
from emu_cog.request import Request, Sampling

Checkpoints = Callable[[str], tiny.TinyFolders]


class Ids:
    visual, vocab_size, visual_count = 100, 200, 100


def small_model(dtype: torch.dtype, *, seed: int = 0, device: str = "cpu", layers: int = 3) -> LanguageModel:
    """Six query heads over two kv heads; norms that differ from one."""
    config = Qwen3Config(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "emu_sdpa"
    choose_attention(torch.device("cpu"), dtype)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        weight.data = 1 + 0.3 * torch.randn_like(weight) if "norm" in name else 3 * weight.data
    return LanguageModel(model.to(device, dtype), Ids)  # type: ignore[arg-type]


def copies(lm: LanguageModel, rows: int, capacity: int, count: int) -> list:
    """`count` equal caches full of noise."""
    made = [lm.new_cache(rows=rows, capacity=capacity) for _ in range(count)]
    for buffers in zip(*[(*cache.keys, *cache.values) for cache in made], strict=True):
        buffers[0].normal_()
        for other in buffers[1:]:
            other.copy_(buffers[0])
    return made


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_the_modules_own(dtype: torch.dtype) -> None:
    """Bit by bit in bfloat16; in fp32 on a CPU the modules sum in another order (cpu_linear.py)."""
    apart = 0.0 if dtype == torch.bfloat16 else 1e-5
    lm = small_model(dtype)
    plain, ours = copies(lm, 4, 64, 2)
    tokens, positions = torch.tensor([3, 150, 7, 199]), torch.tensor([5, 40, 63, 0])
    expected = lm.forward(tokens[:, None], positions, plain, rows=slice(None), filled=64)[:, 0]
    weights = merge(lm.model, visual=100, vocabulary=200, context=256)
    got = forward(TorchOps(64), weights, tokens, positions, ours.keys, ours.values)
    torch.testing.assert_close(got, expected, rtol=apart, atol=apart)
    for a, b in zip(plain.keys + plain.values, ours.keys + ours.values, strict=True):
        torch.testing.assert_close(a, b, rtol=apart, atol=apart)


@torch.inference_mode()
def test_merged_weights_are_the_modules_own_memory() -> None:
    lm = small_model(torch.float32)
    before = {name: weight.clone() for name, weight in lm.model.named_parameters()}
    weights = merge(lm.model, visual=100, vocabulary=200, context=256)
    for name, weight in lm.model.named_parameters():
        assert torch.equal(weight, before[name]), name
    attention, mlp, layer = lm.model.model.layers[1].self_attn, lm.model.model.layers[1].mlp, weights.layers[1]
    for whole, parts in (
        (layer.qkv, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (layer.gate_up, (mlp.gate_proj, mlp.up_proj)),
    ):
        assert {p.weight.untyped_storage().data_ptr() for p in parts} == {whole.data.untyped_storage().data_ptr()}
        assert sum(p.weight.shape[0] for p in parts) == whole.data.shape[0]
    linear = sum(w.numel() for name, w in before.items() if "proj" in name)
    assert weights.bytes_read == 4 * (linear + 100 * 64)


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


def run_both(pipeline: Pipeline, runner: ModelRunner, count: int, request: Request) -> tuple[dict, dict]:
    """The ids through the modules and through the runner."""
    requests, config = prepared(pipeline, request, count)
    return ids_of(Engine(pipeline.lm), requests, config), ids_of(Engine(pipeline.lm, runner), requests, config)


@pytest.mark.parametrize("name", CASES)
def test_steps_give_the_modules_tokens(name: str, make_checkpoint: Checkpoints) -> None:
    model, count, request = CASES[name]
    folders = make_checkpoint(model)
    pipeline = Pipeline.load(folders.model, folders.vision, device="cpu")
    slow, fast = run_both(pipeline, ModelRunner(pipeline.lm, twin=True), count, request)
    assert fast == slow
    assert len(slow) == count


def test_inside_an_image_the_host_reads_nothing(make_checkpoint: Checkpoints) -> None:
    """No tensor is read by the host between two image rows: counted at the dispatcher."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
                Reads.count += 1
            return func(*args, **(kwargs or {}))

    folders = make_checkpoint("picture")
    pipeline = Pipeline.load(folders.model, folders.vision, device="cpu")
    steps = ModelRunner(pipeline.lm, twin=True)
    forced = torch.full((12, 2), -1)
    state, replay = steps.image(
        pipeline.lm.new_cache(rows=4, capacity=32),
        forced=forced,
        uniform=torch.rand(12, 2, dtype=torch.float64),
        advance=torch.ones(12, 4, dtype=torch.long),
        lengths=[3, 2, 5, 2],
        cfg_scale=3.0,
        sampling=Sampling(top_k=9),
    )
    with torch.inference_mode(), Reads():
        for _ in range(12):
            replay()
        assert Reads.count == 0
        assert state.step.tolist() == [12, 12]
    assert state.position.tolist() == [15, 14, 17, 14]
    assert (state.out[:12] >= pipeline.lm.ids.visual).all()


def test_a_cache_whose_growth_failed_half_way_counts_as_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some buffers have moved by then: what was captured over the old ones must not be replayed."""
    cache = small_model(torch.float32).new_cache(rows=2, capacity=16)
    before, allocate, calls = cache.version, torch.Tensor.new_zeros, []

    def fails(self: torch.Tensor, *shape: object) -> torch.Tensor:
        calls.append(shape)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("full")
        return allocate(self, *shape)

    monkeypatch.setattr(torch.Tensor, "new_zeros", fails)
    with pytest.raises(torch.OutOfMemoryError):
        cache.grow(32)
    assert cache.version is not before
    assert cache.capacity == 16


def image_tables(steps: ModelRunner, count: int, **sampling: float) -> ImageState:
    return steps.image(
        steps.lm.new_cache(rows=2, capacity=32),
        forced=torch.full((count, 1), 5),
        uniform=torch.zeros((count, 1), dtype=torch.float64),
        advance=torch.ones((count, 2), dtype=torch.long),
        lengths=[1, 1],
        cfg_scale=3.0,
        sampling=Sampling(**sampling),  # type: ignore[arg-type]
    )[0]


def test_tables_grow_for_images_beyond_the_largest_that_the_model_can_ask_for(
    make_checkpoint: Checkpoints,
) -> None:
    folders = make_checkpoint("picture")
    steps = ModelRunner(Pipeline.load(folders.model, folders.vision, device="cpu").lm, twin=True)
    small = image_tables(steps, 12)
    assert len(small.forced) == MAX_STEPS
    assert image_tables(steps, MAX_STEPS) is small
    steps._replays = {"image": print, "image, top-k 3, top-p 0.5": print, "text": print}
    assert (image_tables(steps, MAX_STEPS + 700).forced[: MAX_STEPS + 700] == 5).all()
    assert list(steps._replays) == ["text"], "what was captured over the replaced tables"


def test_one_capture_is_kept_of_filters_that_users_choose(make_checkpoint: Checkpoints) -> None:
    folders = make_checkpoint("picture")
    steps = ModelRunner(Pipeline.load(folders.model, folders.vision, device="cpu").lm, twin=True)
    image_tables(steps, 12)
    steps._replays = {"image": print, "image, top-k 3, top-p 0.5": print, "text": print}
    image_tables(steps, 12, top_k=3, top_p=0.5)
    assert len(steps._replays) == 3
    image_tables(steps, 12, top_k=4, top_p=0.5)
    assert list(steps._replays) == ["image", "text"]


def test_the_log_says_why_steps_are_not_captured(caplog: pytest.LogCaptureFixture) -> None:
    lm = small_model(torch.float32)
    assert why_eager(lm, compile=False) == "EMU_COMPILE=0"
    assert why_eager(lm, compile=True) == "the device is cpu"
    with caplog.at_level("INFO", logger="emu_cog"):
        assert build(lm, compile=False) is None
    assert "step by step: EMU_COMPILE=0" in caplog.text


@torch.inference_mode()
@pytest.mark.parametrize("name", FORMATS)
def test_quantized_steps_are_the_quantized_modules(name: str) -> None:
    lm = small_model(torch.float32)
    quantize(lm.model, name)
    plain, ours = copies(lm, 2, 16, 2)
    tokens, positions = torch.tensor([3, 150]), torch.tensor([5, 9])
    expected = lm.forward(tokens[:, None], positions, plain, rows=slice(None), filled=16)[:, 0]
    weights = merge(lm.model, visual=100, vocabulary=200, context=256)
    again = lm.forward(tokens[:, None], positions, plain, rows=slice(None), filled=16)[:, 0]
    got = forward(TorchOps(16), weights, tokens, positions, ours.keys, ours.values)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(again, expected)


@contextmanager
def no_synchronizing() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The modules without TF32, whose ten bits of mantissa would be the largest difference to the kernels."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch_settings, "apply", lambda device: torch_settings.exact())
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.gpu
@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize("name", CASES)
def test_captured_steps_give_the_modules_tokens(name: str, make_checkpoint: Checkpoints) -> None:
    model, count, request = CASES[name]
    folders = make_checkpoint(model)
    pipeline = Pipeline.load(folders.model, folders.vision, device="cuda", dtype="float32")
    assert pipeline.engine.runner
    slow, fast = run_both(pipeline, pipeline.engine.runner, count, request)
    assert fast == slow


@pytest.mark.gpu
def test_a_second_request_replays_the_same_graph_without_synchronizing(make_checkpoint: Checkpoints) -> None:
    folders = make_checkpoint("picture")
    lm = Pipeline.load(folders.model, folders.vision, device="cuda", dtype="float32").lm
    steps, cache = ModelRunner(lm), lm.new_cache(rows=2, capacity=64)
    replays = []
    with torch.inference_mode():
        for guidance, top_k, length in ((3.0, 9, 5), (1.0, 0, 7)):
            _, replay = steps.image(
                cache,
                forced=torch.full((12, 1), -1),
                uniform=torch.rand(12, 1, dtype=torch.float64),
                advance=torch.ones(12, 2, dtype=torch.long),
                lengths=[length, 2],
                cfg_scale=guidance,
                sampling=Sampling(top_k=top_k, temperature=0.9),
            )
            replays.append(replay)
            with no_synchronizing():
                for _ in range(12):
                    replay()
    assert replays[0] == replays[1]


@pytest.mark.gpu
def test_four_outputs_are_four_runs_bit_by_bit(make_checkpoint: Checkpoints) -> None:
    """In bfloat16, where another order of sums would show: no sum depends on the number of batch rows."""
    for model, request in (
        ("picture", Request(prompt="a red boat", seed=40, size=(12, 16))),
        ("storyteller", Request(prompt="a fox", task="story", size=(3, 4), seed=40, max_new_tokens=120)),
    ):
        folders = make_checkpoint(model)
        pipeline = Pipeline.load(folders.model, folders.vision, device="cuda", dtype="bfloat16")
        requests, config = prepared(pipeline, request, 4)
        together = ids_of(pipeline.engine, requests, config)
        alone = {i: ids_of(pipeline.engine, [single], config)[0] for i, single in enumerate(requests)}
        assert together == alone
        assert len({tuple(ids) for ids in alone.values()}) == 4


def test_a_batch_too_large_for_the_kernels_goes_through_the_modules(
    make_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emu_cog.ops.autotune import MAX_ROWS

    assert ModelRunner.MAX_ROWS == MAX_ROWS
    folders = make_checkpoint("picture")
    pipeline = Pipeline.load(folders.model, folders.vision, device="cpu")
    steps = ModelRunner(pipeline.lm, twin=True)
    monkeypatch.setattr(steps, "image", None)
    monkeypatch.setattr(steps, "text", None)
    slow, fast = run_both(pipeline, steps, 9, Request(prompt="a boat", seed=3, size=(2, 2)))
    assert fast == slow
    assert len(fast) == 9
