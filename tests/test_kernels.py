"""Triton's kernels against plain torch: on a GPU, or anywhere by Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

import pytest
import torch

from emu_cog.engine.runner import ModelRunner
from emu_cog.model.decode import forward, image_step, merge
from emu_cog.model.quantize import quantize, quantized
from emu_cog.model.qwen3 import LanguageModel
from emu_cog.ops.interface import DecodeWeights, ImageState, Weight
from emu_cog.ops.reference import TorchOps
from emu_cog.ops.sampling import keep_top_k
from emu_cog.pipeline import Pipeline
from emu_cog.request import Sampling
from tests.test_runner import CASES, Checkpoints, copies, run_both, small_model

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]


def fast_ops(weights: DecodeWeights, dtype: torch.dtype):
    from emu_cog.ops.autotune import choose_plan
    from emu_cog.ops.triton_ops import TritonOps

    return TritonOps(choose_plan(weights, torch.device(DEVICE)), dtype)


def merged(lm: LanguageModel) -> DecodeWeights:
    return merge(lm.model, visual=100, vocabulary=200, context=256)


@torch.inference_mode()
@pytest.mark.parametrize("form", [None, "fp8", "int8"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)], ids=str
)
def test_a_step_is_the_twins(dtype: torch.dtype, tolerance: float, form: str | None) -> None:
    """Relative to the largest hidden state; 8-bit products take their inputs in fp16 whatever the model's dtype."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies no bfloat16")
    lm = small_model(dtype, device=DEVICE)
    if form:
        quantize(lm.model, form)
        tolerance = max(tolerance, 3e-3)
    weights = merged(lm)
    twin, ours = copies(lm, 4, 64, 2)
    tokens, positions = (torch.tensor(x, device=DEVICE) for x in ([3, 150, 7, 199], [5, 40, 63, 0]))
    expected = forward(TorchOps(64), weights, tokens, positions, twin.keys, twin.values).float()
    got = forward(fast_ops(weights, dtype), weights, tokens, positions, ours.keys, ours.values).float()
    scale = expected.abs().max()
    assert (got - expected).abs().max() <= tolerance * scale
    for a, b in zip(twin.keys + twin.values, ours.keys + ours.values, strict=True):
        assert (a - b).float().abs().max() <= tolerance * a.float().abs().max()


@torch.inference_mode()
def test_logits_of_every_other_row_are_those_rows() -> None:
    """The engine asks for the conditional streams' logits: rows 0, 2, ... of a step's hidden states."""
    lm = small_model(torch.float32, device=DEVICE)
    weights = merged(lm)
    hidden = torch.randn(6, 64, device=DEVICE)
    got = fast_ops(weights, torch.float32).logits(hidden[::2], weights.text_head)
    torch.testing.assert_close(got, TorchOps(0).logits(hidden[::2], weights.text_head), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="one after the other"):
        fast_ops(weights, torch.float32).linear(hidden[::2], Weight(weights.text_head))


def state(lanes: int, steps: int, vocabulary: int, *, top_k: int, seed: int) -> ImageState:
    made = ImageState.empty(lanes, steps, vocabulary, torch.device(DEVICE))
    made.forced.fill_(-1)
    made.advance.fill_(1)
    generator = torch.Generator().manual_seed(seed)
    made.uniform.copy_(torch.rand(made.uniform.shape, dtype=torch.float64, generator=generator))
    made.knobs.copy_(torch.tensor([3.0, 0.8]))
    made.top_k.fill_(top_k)
    return made


@torch.inference_mode()
@pytest.mark.parametrize("top_k", [1, 7, 500, 1000])
def test_the_draw_is_the_twins_ties_and_all(top_k: int) -> None:
    lm = small_model(torch.float32, device=DEVICE)
    weights = merged(lm)
    logits = 3 * torch.randn(6, 1000, device=DEVICE)
    logits[:, ::3] = logits[:, 1:2]  # a third of each row is one and the same number
    fast, slow = (state(3, 8, 1000, top_k=top_k, seed=5) for _ in range(2))
    fast.forced[4, 1] = slow.forced[4, 1] = 77
    ops = fast_ops(weights, torch.float32)
    for _ in range(8):
        ops.choose(logits, fast, 50, Sampling())
        TorchOps(0).choose(logits, slow, 50, Sampling())
    assert fast.out.tolist() == slow.out.tolist()
    assert fast.out[4, 1] == 77
    for name in ("token", "position", "step"):
        assert torch.equal(getattr(fast, name), getattr(slow, name)), name
    torch.testing.assert_close(fast.scores, slow.scores)
    kept = torch.isfinite(keep_top_k(fast.scores, top_k))
    drawn = fast.out.clone()
    drawn[4, 1] = fast.out[0, 1]
    assert kept.gather(1, (drawn - 50).T).all()


@torch.inference_mode()
def test_steps_follow_each_other_as_the_twins_do() -> None:
    lm = small_model(torch.float32, device=DEVICE)
    weights = merged(lm)
    told = []
    twin, ours = copies(lm, 4, 64, 2)
    for ops, cache in ((TorchOps(64), twin), (fast_ops(weights, torch.float32), ours)):
        s = state(2, 12, 100, top_k=20, seed=1)
        s.position.copy_(torch.tensor([1, 2, 3, 4]))
        s.token.copy_(torch.tensor([3, 150, 7, 199]))
        for _ in range(12):
            image_step(ops, weights, s, cache.keys, cache.values, Sampling())
        told.append(s.out.tolist())
    assert told[0] == told[1]


@torch.inference_mode()
@pytest.mark.parametrize("rows", [2, 5, 16])
@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize(("n", "k"), [(128, 2048), (50, 96)])
def test_8_bit_products_are_exact_in_the_stored_weights(n: int, k: int, form: str, rows: int) -> None:
    """Against fp64: what is left is fp16's rounding of the inputs and fp32's of the sum."""
    from emu_cog.ops.autotune import shape
    from emu_cog.ops.kernels.layers import INPUT_SCALE

    lm = small_model(torch.float32, device=DEVICE)
    ops = fast_ops(merged(lm), torch.float32)
    weight = Weight(*quantized(torch.randn(n, k, device=DEVICE), form))
    x = torch.randn(rows, k, device=DEVICE)
    spread = (x / INPUT_SCALE.value).half().view(rows, k // 4, 4).transpose(1, 2).contiguous().view(rows, k)
    for splits in (1, 2):
        from emu_cog.ops.autotune import Tiles

        ops.plan = type(ops.plan)(
            tiles={shape(weight): Tiles(block_n=64, block_k=64, stages=2, splits=splits)}, key_splits=4
        )
        got = ops.linear(spread, weight).sum(0)
        expected = x.double() @ (weight.data.double() * weight.scale[:, None]).T
        assert (got - expected).norm() / expected.norm() < 1e-3


@torch.inference_mode()
@pytest.mark.parametrize("form", [None, "int8"])
def test_tiles_by_the_clock_change_no_number(form: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from emu_cog.ops import triton_ops

    if INTERPRETED:  # no graphs there; any clock does

        def wall(work):
            started = time.perf_counter()
            work()
            return time.perf_counter() - started

        monkeypatch.setattr(triton_ops, "_replay_seconds", wall)
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    lm = small_model(dtype, device=DEVICE)
    if form:
        quantize(lm.model, form)
    weights = merged(lm)
    timed, told = triton_ops.TritonOps.tuned(weights, torch.device(DEVICE))
    assert [line.split()[0] for line in told] == ["qkv", "o", "gate_up", "down", "head"]
    one, two = copies(lm, 4, 64, 2)
    tokens, positions = (torch.tensor(x, device=DEVICE) for x in ([3, 150, 7, 199], [5, 40, 63, 0]))
    first = forward(fast_ops(weights, dtype), weights, tokens, positions, one.keys, one.values)
    other = forward(timed, weights, tokens, positions, two.keys, two.values)
    assert torch.equal(first, other)


def test_the_engine_writes_the_same_with_the_kernels(
    make_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several outputs with texts of their own; without recordings, so that it runs interpreted, too (a minute)."""
    model, count, request = CASES["story"]
    folders = make_checkpoint(model)
    pipeline = Pipeline.load(folders.model, folders.vision, device=DEVICE, dtype="float32")
    steps = ModelRunner(pipeline.lm, twin=True)
    ops = fast_ops(steps.weights, torch.float32)
    monkeypatch.setattr(steps, "_operations", lambda cache=None: ops)
    slow, fast = run_both(pipeline, steps, count, replace(request, max_new_tokens=24))
    assert fast == slow
