"""Triton's kernels against plain torch: on a GPU, or else under Triton's interpreter (conftest.py).

The interpreter takes 0.3 s per layer, so it gets smaller cases.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import time
from dataclasses import replace

import pytest
import torch

from emu_cog.engine.runner import ModelRunner, build
from emu_cog.model import torch_settings
from emu_cog.model.decode import forward, image_step, merge
from emu_cog.model.quantize import quantize, quantized
from emu_cog.model.qwen3 import LanguageModel
from emu_cog.ops.autotune import Card, KernelBuildError, LinearConfig, default_config, shape
from emu_cog.ops.interface import DecodeWeights, ImageState, Weight
from emu_cog.ops.reference import TorchOps
from emu_cog.ops.sampling import keep_top_k
from emu_cog.pipeline import Pipeline
from emu_cog.request import Request, Sampling
from tests.test_runner import CASES, Checkpoints, copies, run_both, small_model

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
LAYERS, STEPS, ROWS = (1, 3, 2) if INTERPRETED else (3, 12, 4)
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
FORMS = [None, "fp8", "int8"]


def kernels(weights: DecodeWeights, dtype: torch.dtype):
    from emu_cog.ops.triton_ops import TritonOps

    return TritonOps(default_config(weights, Card.of(DEVICE)), dtype)


def merged(lm: LanguageModel) -> DecodeWeights:
    return merge(lm.model, visual=100, vocabulary=200, context=256)


def tensors(*values: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(value, device=DEVICE) for value in values]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("dtype", "form", "tolerance"),
    [
        (torch.float32, None, 1e-5),
        (torch.float16, None, 5e-3),
        *((torch.float32, form, 3e-3) for form in ("fp8", "int8")),
        *((torch.float16, form, 5e-3) for form in ("fp8", "int8")),
        *((torch.bfloat16, form, 3e-2) for form in FORMS),
    ],
    ids=str,
)
def test_a_step_is_the_references(dtype: torch.dtype, form: str | None, tolerance: float) -> None:
    """Relative to the largest hidden state; 8-bit products take their inputs in fp16 whatever the model's dtype."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies no bfloat16")
    lm = small_model(dtype, device=str(DEVICE), layers=2 if INTERPRETED else 3)
    if form:
        quantize(lm.model, form)
    weights = merged(lm)
    reference, ours = copies(lm, ROWS, 64, 2)
    tokens, positions = tensors([3, 150, 7, 199][-ROWS:], [5, 40, 63, 0][-ROWS:])
    expected = forward(TorchOps(64), weights, tokens, positions, reference.keys, reference.values).float()
    got = forward(kernels(weights, dtype), weights, tokens, positions, ours.keys, ours.values).float()
    scale = expected.abs().max()
    assert (got - expected).abs().max() <= tolerance * scale
    for a, b in zip(reference.keys + reference.values, ours.keys + ours.values, strict=True):
        assert (a - b).float().abs().max() <= tolerance * a.float().abs().max()


@torch.inference_mode()
def test_logits_of_every_other_row_are_those_rows() -> None:
    """The engine asks for the conditional sequences' logits: rows 0, 2, ... of a step's hidden states."""
    lm = small_model(torch.float32, device=str(DEVICE), layers=1)
    weights = merged(lm)
    hidden = torch.randn(6, 64, device=DEVICE)
    got = kernels(weights, torch.float32).logits(hidden[::2], weights.text_head)
    torch.testing.assert_close(got, TorchOps(0).logits(hidden[::2], weights.text_head), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="contiguous rows"):
        kernels(weights, torch.float32).linear(hidden[::2], Weight(weights.text_head))


def state(images: int, steps: int, vocabulary: int, *, top_k: int, seed: int) -> ImageState:
    made = ImageState.empty(images, steps, vocabulary, DEVICE)
    made.forced.fill_(-1)
    made.advance.fill_(1)
    generator = torch.Generator().manual_seed(seed)
    made.uniform.copy_(torch.rand(made.uniform.shape, dtype=torch.float64, generator=generator))
    made.cfg_scale.fill_(3.0)
    made.temperature.fill_(0.8)
    made.top_k.fill_(top_k)
    return made


@torch.inference_mode()
@pytest.mark.parametrize("top_k", [1, 7, 500, 1000])
def test_samples_are_the_references_ties_and_all(top_k: int) -> None:
    weights = merged(small_model(torch.float32, device=str(DEVICE), layers=1))
    logits = 3 * torch.randn(6, 1000, device=DEVICE)
    logits[:, ::3] = logits[:, 1:2]  # a third of each row is one and the same number
    fast, slow = (state(3, STEPS, 1000, top_k=top_k, seed=5) for _ in range(2))
    fast.forced[2, 1] = slow.forced[2, 1] = 77
    ops = kernels(weights, torch.float32)
    for _ in range(STEPS):
        ops.sample(logits, fast, 50, Sampling())
        TorchOps(0).sample(logits, slow, 50, Sampling())
    assert fast.out.tolist() == slow.out.tolist()
    assert fast.out[2, 1] == 77
    for name in ("token", "position", "step"):
        assert torch.equal(getattr(fast, name), getattr(slow, name)), name
    torch.testing.assert_close(fast.scores, slow.scores)
    kept = torch.isfinite(keep_top_k(fast.scores, top_k))
    sampled = fast.out.clone()
    sampled[2, 1] = fast.out[0, 1]
    assert kept.gather(1, (sampled - 50).T).all()


@torch.inference_mode()
def test_steps_follow_each_other_as_the_references_do() -> None:
    lm = small_model(torch.float32, device=str(DEVICE), layers=LAYERS)
    weights = merged(lm)
    out = []
    reference, ours = copies(lm, ROWS, 64, 2)
    for ops, cache in ((TorchOps(64), reference), (kernels(weights, torch.float32), ours)):
        s = state(ROWS // 2, STEPS, 100, top_k=20, seed=1)
        s.position.copy_(torch.tensor([1, 2, 3, 4][:ROWS]))
        s.token.copy_(torch.tensor([3, 150, 7, 199][:ROWS]))
        for _ in range(STEPS):
            image_step(ops, weights, s, cache.keys, cache.values, Sampling())
        out.append(s.out.tolist())
    assert out[0] == out[1]


@torch.inference_mode()
@pytest.mark.parametrize("rows", [2, 5, 16])
@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize(("n", "k"), [(128, 2048), (50, 96)])
def test_8_bit_products_are_exact_in_the_stored_weights(n: int, k: int, form: str, rows: int) -> None:
    """Against fp64: what is left is fp16's rounding of the inputs and fp32's of the sum."""
    from emu_cog.ops.kernels.layers import INPUT_SCALE

    ops = kernels(merged(small_model(torch.float32, device=str(DEVICE), layers=1)), torch.float32)
    weight = Weight(*quantized(torch.randn(n, k, device=DEVICE), form))
    x = torch.randn(rows, k, device=DEVICE)
    interleaved = (x / INPUT_SCALE.value).half().view(rows, k // 4, 4).transpose(1, 2).contiguous().view(rows, k)
    for splits in (1, 2):
        config = LinearConfig(block_n=64, block_k=64, stages=2, splits=splits)
        ops.config = replace(ops.config, linear={shape(weight): config})
        got = ops.linear(interleaved, weight).sum(0)
        expected = x.double() @ (weight.data.double() * weight.scale[:, None]).T
        assert (got - expected).norm() / expected.norm() < 1e-3


@pytest.fixture
def any_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are timed without a CUDA graph where there is no CUDA."""

    def seconds(work):
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    if INTERPRETED:
        monkeypatch.setattr("emu_cog.ops.triton_ops._replay_seconds", seconds)


@torch.inference_mode()
@pytest.mark.usefixtures("any_clock")
@pytest.mark.parametrize("form", [None, "int8"])
def test_autotuning_changes_no_number(form: str | None) -> None:
    from emu_cog.ops.triton_ops import TritonOps

    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    lm = small_model(dtype, device=str(DEVICE), layers=LAYERS)
    if form:
        quantize(lm.model, form)
    weights = merged(lm)
    tuned, found = TritonOps.autotuned(weights, DEVICE)
    assert [line.split()[0] for line in found] == ["qkv", "o", "gate_up", "down", "head"]
    one, two = copies(lm, ROWS, 64, 2)
    tokens, positions = tensors([3, 150, 7, 199][-ROWS:], [5, 40, 63, 0][-ROWS:])
    first = forward(kernels(weights, dtype), weights, tokens, positions, one.keys, one.values)
    other = forward(tuned, weights, tokens, positions, two.keys, two.values)
    assert torch.equal(first, other)


FAILURES = [
    RuntimeError("PassManager::run failed"),
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    FileNotFoundError(2, "No such file or directory", "ptxas"),
    subprocess.CalledProcessError(255, "ptxas"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_a_configuration_that_cannot_be_built_is_skipped(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only Triton's own errors were caught once: any other failure of a compiler ended setup."""
    from emu_cog.ops import triton_ops

    calls = []

    def seconds(work):
        calls.append(work)
        if len(calls) % 8 != 3:  # one of the eight candidates for each product
            raise failure
        return 1.0

    monkeypatch.setattr(triton_ops, "_replay_seconds", seconds)
    weights = merged(small_model(torch.float32, device=str(DEVICE), layers=1))
    ops, found = triton_ops.TritonOps.autotuned(weights, DEVICE)
    assert len(found) == 5
    assert len(calls) >= 5 * 7
    assert ops.config.linear.keys() == kernels(weights, torch.float32).config.linear.keys()


@pytest.mark.parametrize(
    "failure",
    [torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), torch.OutOfMemoryError("full")],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_cuda_are_not_skipped(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    from emu_cog.ops import triton_ops

    def seconds(work):
        raise failure

    monkeypatch.setattr(triton_ops, "_replay_seconds", seconds)
    weights = merged(small_model(torch.float32, device=str(DEVICE), layers=1))
    with pytest.raises(type(failure), match=str(failure)):
        triton_ops.TritonOps.autotuned(weights, DEVICE)
    with pytest.raises(RuntimeError, match="CUDA error: misaligned"), triton_ops.build_errors(DEVICE):
        raise RuntimeError("CUDA error: misaligned address")


def test_without_any_configuration_setup_goes_on_through_the_modules(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a B300 under Triton 3.4 setup ended in `min() arg is an empty sequence`."""
    from emu_cog.ops import triton_ops

    def seconds(work):
        raise RuntimeError("'sm_103a' is not a recognized\nprocessor for this target")

    monkeypatch.setattr(triton_ops, "_replay_seconds", seconds)
    monkeypatch.setattr("emu_cog.engine.runner.why_eager", lambda lm, *, compile: None)
    lm = small_model(torch.float32, device=str(DEVICE), layers=1)
    with pytest.raises(KernelBuildError, match=r"no configuration of the qkv product \(320x64\) can be built on"):
        ModelRunner(lm).build_kernels()
    with caplog.at_level("WARNING", logger="emu_cog"):
        assert build(lm, compile=True) is None
    for part in ("through the modules", "qkv product (320x64)", Card.of(DEVICE).name, "'sm_103a' is not a recognized"):
        assert part in caplog.text
    cache = lm.new_cache(rows=1, capacity=16)  # the modules, whose weights are views of the merged ones by now
    tokens, start = tensors([[3, 150]], [0])
    with torch.inference_mode():
        hidden = lm.forward(tokens, start, cache, rows=slice(None), filled=2)
    assert hidden.isfinite().all()


@pytest.mark.usefixtures("any_clock")
def test_other_kernels_are_built_during_setup_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that failed was found by the first request."""
    from emu_cog.ops.kernels import layers, sampling

    lm = small_model(torch.float32, device=str(DEVICE), layers=1)
    monkeypatch.setattr("emu_cog.engine.runner.why_eager", lambda lm, *, compile: None)
    launched: set[str] = set()
    for module, name in [
        (layers, "add_norm_kernel"),
        (layers, "rope_store_kernel"),
        (layers, "attend_kernel"),
        (layers, "combine_kernel"),
        (sampling, "guide_kernel"),
        (sampling, "count_kernel"),
        (sampling, "mass_kernel"),
        (sampling, "sample_kernel"),
    ]:
        monkeypatch.setattr(module, name, _Recorded(getattr(module, name), name, launched))
    assert build(lm, compile=True)
    assert len(launched) == 8
    monkeypatch.setattr(sampling, "sample_kernel", None)
    with pytest.raises(TypeError):
        build(lm, compile=True)


class _Recorded:
    """A kernel whose launches are noted."""

    def __init__(self, kernel, name: str, launched: set[str]) -> None:
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid):
        self.launched.add(self.name)
        return self.kernel[grid]


INTERPRETED_REQUESTS = {
    "text": ("storyteller", 2, replace(CASES["story"][2], max_new_tokens=3)),
    "image": ("picture", 1, Request(prompt="a boat", seed=3, size=(1, 2))),
}
REQUESTS = INTERPRETED_REQUESTS if INTERPRETED else {"story": CASES["story"], "image": CASES["four"]}


@pytest.mark.parametrize("name", REQUESTS)
def test_the_engine_writes_the_same_with_the_kernels(
    name: str, make_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without captured graphs, so that it runs interpreted, too."""
    model, count, request = REQUESTS[name]
    folders = make_checkpoint(model)
    pipeline = Pipeline.load(folders.model, folders.vision, device=str(DEVICE), dtype="float32", compile=False)
    torch_settings.exact()  # without TF32, which Pipeline.load turns on for a GPU
    runner = ModelRunner(pipeline.lm, twin=True)
    ops = kernels(runner.weights, torch.float32)
    monkeypatch.setattr(runner, "_operations", lambda cache=None: ops)
    slow, fast = run_both(pipeline, runner, count, request)
    assert fast == slow
