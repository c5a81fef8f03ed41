"""Triton's kernels against plain torch: on a GPU, or else under Triton's interpreter (conftest.py).

The interpreter takes 0.1 s per token and layer, so it gets smaller cases.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import time
from dataclasses import fields, replace
from functools import partial

import pytest
import torch

from emu_cog.engine.runner import ModelRunner
from emu_cog.model import torch_settings
from emu_cog.model.quantize import FORMATS, quantized
from emu_cog.model.qwen3 import LanguageModel, forward
from emu_cog.ops.autotune import ROWS, Card, KernelBuildError, LinearConfig, default_config, kind
from emu_cog.ops.interface import MAX_ROWS, SlotState, Weight
from emu_cog.ops.reference import TorchOps
from emu_cog.ops.sampling import keep_top_k
from emu_cog.pipeline import Pipeline
from emu_cog.request import Request
from tests.decoder_kit import IDS, paged, random_model
from tests.test_runner import CASES, Checkpoints, ids_of, prepared, uncaptured

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]


def small_model(dtype: torch.dtype = torch.float32, form: str | None = None, **config: object) -> LanguageModel:
    return random_model(dtype, device=str(DEVICE), form=form, **({"num_hidden_layers": 1} | config))[0]


def kernels(lm: LanguageModel, **changes: object):
    from emu_cog.ops.triton_ops import TritonOps

    return TritonOps(replace(default_config(lm.weights, Card.of(DEVICE)), **changes), lm.dtype)


def differences(lm: LanguageModel, spans: list[tuple[int, int]], padding: int = 0) -> float:
    """The largest between kernels and torch, of hidden states and of the cache, relative to the largest number."""
    (batch, reference), (_, ours) = (paged(lm, spans, padding=padding) for _ in range(2))
    count = len(batch.tokens) - padding
    expected = forward(TorchOps(), lm.weights, batch, reference)[:count]
    got = forward(kernels(lm), lm.weights, batch, ours)[:count]
    pairs = [(expected, got)]
    for a, b in zip(reference.keys + reference.values, ours.keys + ours.values, strict=True):
        pairs.append((a[:, 1:], b[:, 1:]))
    return max(float((a - b).float().abs().max() / a.float().abs().max()) for a, b in pairs)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("dtype", "form", "tolerance"),
    [
        (torch.float32, None, 1e-5),
        (torch.float16, None, 5e-3),
        *((torch.float32, form, 3e-3) for form in FORMATS),
        *((torch.float16, form, 5e-3) for form in FORMATS),
        *((torch.bfloat16, form, 3e-2) for form in (None, *FORMATS)),
    ],
    ids=str,
)
def test_a_pass_is_the_references(dtype: torch.dtype, form: str | None, tolerance: float) -> None:
    """8-bit products take their inputs in fp16 whatever the model's dtype."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies no bfloat16")
    lm = small_model(dtype, form, num_hidden_layers=2 if dtype == torch.float32 else 1)
    assert differences(lm, [(5, 1), (150, 1)]) <= tolerance


SPANS = [
    pytest.param([(0, 1)], 0, id="one token"),
    pytest.param([(63, 1), (64, 1), (127, 1)], 3, id="a full page, one that begins, padding"),
    pytest.param([(60, 9), (0, 3), (200, 5)], 0, id="several of one stream"),
    pytest.param([(i * 7, 1) for i in range(17)], 1, id="32 rows"),
    pytest.param([(i * 7, 1) for i in range(33)], 0, id="64 rows", marks=pytest.mark.slow),
    pytest.param([(300, MAX_ROWS - 20), (0, 20)], 0, id="all rows", marks=pytest.mark.slow),
]


@torch.inference_mode()
@pytest.mark.parametrize(("spans", "padding"), SPANS)
def test_any_streams_may_be_in_a_pass(spans: list[tuple[int, int]], padding: int) -> None:
    """In fp32: pages in no order, streams of different lengths, with padding beside them."""
    lm = small_model(num_attention_heads=2, num_key_value_heads=1)
    assert differences(lm, spans, padding) <= 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("form", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_a_window_is_its_tokens_one_by_one(form: str | None) -> None:
    """To the last bit, also where the keys' division changes within it, behind a page's end, and beside padding."""
    lm = small_model(form=form, num_attention_heads=6, num_key_value_heads=2)
    found = []
    for width in (1, 4):
        batch, cache = paged(lm, [(62, 4), (253, 4), (0, 3)], padding=1)
        ops = kernels(lm, key_splits=2)
        hidden = forward(ops, lm.weights, replace(batch, width=width), cache)[:11]
        found.append((hidden, cache.keys[0][:, 1:], cache.values[0][:, 1:]))
    for alone, window in zip(*found, strict=True):
        assert torch.equal(alone, window)


@torch.inference_mode()
def test_a_pass_beyond_the_kernels_is_the_references() -> None:
    """Longer prompts read through PyTorch's products, and norms that write for them, not for the 8-bit kernels."""
    lm = small_model(form="int8", num_attention_heads=2, num_key_value_heads=1)
    assert differences(lm, [(0, MAX_ROWS + 1)]) <= 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("form", [None, "int8"])
def test_no_result_depends_on_the_rows_beside_it(form: str | None) -> None:
    """To the last bit, whichever of ROWS the kernels run for: hidden states, both halves' logits and the cache."""
    lm = small_model(form=form, num_attention_heads=2, num_key_value_heads=1)
    ops, found = kernels(lm, key_splits=2), {}
    spans = [(70, 1), (5, 1)] + [(3 * i, 1) for i in range(2, ROWS[-1])]
    for count in (2, 16, 17, *([] if INTERPRETED else [33, 64])):
        batch, cache = paged(lm, spans)
        some = {name: getattr(batch, name)[:count] for name in ("tokens", "positions", "streams")}
        hidden = forward(ops, lm.weights, replace(batch, **some), cache)
        text, visual = (ops.logits(hidden, head)[:2] for head in (lm.weights.text_head, lm.weights.visual_head))
        pages = batch.tables[:2].unique().long()
        found[count] = (hidden[:2], text, visual, cache.keys[0][:, pages], cache.values[0][:, pages])
    for count, results in found.items():
        assert all(torch.equal(a, b) for a, b in zip(results, found[2], strict=True)), count


@torch.inference_mode()
def test_logits_of_any_rows_are_those_rows() -> None:
    """Every other row of a step's hidden states, and more rows than one launch takes."""
    lm = small_model()
    hidden, head = torch.randn(2 * MAX_ROWS + 6, 64, device=DEVICE), lm.weights.text_head
    ops = kernels(lm)
    got = ops.logits(hidden[::2], head)
    torch.testing.assert_close(got, TorchOps().logits(hidden[::2], head), atol=1e-4, rtol=1e-4)
    assert torch.equal(got[-1:], ops.logits(hidden[-2:-1], head))
    with pytest.raises(ValueError, match="contiguous rows"):
        ops.linear(hidden[:6:2], Weight(head))


def pictures(vocabulary: int = 1000) -> SlotState:
    """Slots 0 to 4 with parameters of their own; 3 has finished its picture, 4 has none."""
    state = SlotState.empty(5, pages=2, steps=20, vocabulary=vocabulary, device=DEVICE)
    generator = torch.Generator().manual_seed(5)
    state.out.copy_(torch.randint(IDS.visual, IDS.visual + 2, state.out.shape, generator=generator))
    for name, values in {
        "columns": [2, 1, 4, 2, 1],
        "total": [6, 4, 15, 6, 0],
        "step": [0, 0, 3, 6, 0],
        "cfg_scale": [3.0, 1.0, 0.4, 2.0, 1.0],
        "temperature": [0.8, 1.0, 1.5, 1.0, 1.0],
        "top_k": [7, vocabulary, 500, 5, 1],
        "top_p": [1.0, 0.7, 1.0, 0.5, 1.0],
        "seed": [0, 1, 2**63 - 1, 3, 4],
        "sampled": [0, 7, 2**20, 0, 0],
    }.items():
        tensor = getattr(state, name)
        tensor[:5] = torch.tensor(values, dtype=tensor.dtype)
    state.position.copy_(torch.arange(12))
    state.token.fill_(-7)
    return state


@torch.inference_mode()
@pytest.mark.parametrize(("nucleus", "width"), [(False, 1), (True, 2), pytest.param(False, 4, marks=pytest.mark.slow)])
def test_samples_are_the_references_ties_and_all(nucleus: bool, width: int) -> None:
    """Slots in any order, each with its own filters; EOL and EOI are forced, the finished and the padding stay."""
    slow, fast = pictures(), pictures()
    if not nucleus:
        slow.top_p.fill_(1.0)
        fast.top_p.fill_(1.0)
    before = pictures()
    slots = torch.tensor([2, 0, 3, 1, slow.padding, slow.padding], device=DEVICE)
    ops = kernels(small_model())
    generator = torch.Generator().manual_seed(2)
    moves = set()
    for turn in range(7):
        logits = 3 * torch.randn(12 * width, 1000, generator=generator).to(DEVICE)
        logits[:, ::3] = logits[:, 1:2]  # a third of each row is one and the same number
        if turn % 2:
            logits[:, 1] += 20  # the code of many drafts
        steps = fast.step.clone()
        ops.sample(logits, fast, slots, IDS, width=width, nucleus=nucleus)
        TorchOps().sample(logits, slow, slots, IDS, width=width, nucleus=nucleus)
        moves |= set((fast.step - steps).tolist())
        kept = torch.isfinite(keep_top_k(fast.scores[width : width + 1], 7))[0]
        if fast.step[0] < 6 and fast.step[0] != 3:
            code = int(fast.token[0]) - IDS.visual
            assert code < 0 or width > 1 or kept[code]
        for field in fields(SlotState):
            torch.testing.assert_close(getattr(fast, field.name), getattr(slow, field.name), msg=field.name)
    assert moves >= ({0, 1} if width == 1 else {0, 1, 2})
    assert fast.step.tolist() == ([6, 4, 10, 6, 0, 0] if width == 1 else [6, 4, int(fast.step[2]), 6, 0, 0])
    assert [int(fast.out[0, i]) for i in (2, 5)] == [int(fast.out[1, i]) for i in (1, 3)] == [IDS.eol, IDS.eoi]
    assert (fast.out[0, [0, 1, 3, 4]] >= IDS.visual).all()
    for name, per_slot in (("out", 1), ("step", 1), ("token", 2), ("position", 2)):
        idle = [slot * per_slot + i for slot in (3, 4, 5) for i in range(per_slot)]
        assert torch.equal(getattr(fast, name)[idle], getattr(before, name)[idle]), name


@torch.inference_mode()
def test_the_kernels_noise_is_the_references() -> None:
    """All scores equal: the code is the place of the largest noise, for any seed and place."""
    slow, fast = pictures(), pictures()
    slots = torch.tensor([0, 1, 2], device=DEVICE)
    for state in (slow, fast):
        state.top_k.fill_(1000)
        state.top_p.fill_(1.0)
        state.total.fill_(20)
        state.step.zero_()
        state.columns.fill_(19)
    ops = kernels(small_model())
    for _ in range(3):
        logits = torch.zeros((3 * 2 * 4, 1000), device=DEVICE)
        ops.sample(logits, fast, slots, IDS, width=4, nucleus=False)
        TorchOps().sample(logits, slow, slots, IDS, width=4, nucleus=False)
    assert torch.equal(slow.out, fast.out)
    assert len(fast.out[:3, :12].unique()) > 20


@torch.inference_mode()
@pytest.mark.parametrize("rows", [2, 5, 33])
@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize(("n", "k"), [(128, 2048), (50, 96)])
def test_8_bit_products_are_exact_in_the_stored_weights(n: int, k: int, form: str, rows: int) -> None:
    """Against fp64: what is left is fp16's rounding of the inputs and fp32's of the sum."""
    from emu_cog.ops.kernels.layers import INPUT_SCALE

    ops = kernels(small_model())
    weight = Weight(*quantized(torch.randn(n, k, device=DEVICE), form))
    x = torch.randn(rows, k, device=DEVICE)
    interleaved = (x / INPUT_SCALE.value).half().view(rows, k // 4, 4).transpose(1, 2).contiguous().view(rows, k)
    for splits in (1, 2):
        got = ops.product(interleaved, weight, LinearConfig(block_n=64, block_k=64, stages=2, splits=splits)).sum(0)
        expected = x.double() @ (weight.data.double() * weight.scale[:, None]).T
        assert (got - expected).norm() / expected.norm() < 1e-3


@torch.inference_mode()
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(("n", "k"), [(128, 640), (50, 96)])
def test_tiles_loaded_by_the_copy_engine_are_those_loaded_by_threads(n: int, k: int, swiglu: bool) -> None:
    """To the last bit, also where outputs, inputs and rows end within a tile."""
    ops = kernels(small_model())
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    weight, x = (torch.randn(count, k, device=DEVICE).to(dtype) for count in (2 * n if swiglu else n, 19))
    ops.torch_dtype = dtype
    found = [
        ops.product(x, Weight(weight), LinearConfig(block_n=64, block_k=64, stages=2, tma=tma), swiglu=swiglu)
        for tma in (False, True)
    ]
    assert torch.equal(*found)


@torch.inference_mode()
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(("narrow", "swiglu"), [(False, True), (True, False)])
def test_tiles_of_two_blocks_give_the_bits_of_one(narrow: bool, swiglu: bool, tma: bool) -> None:
    """Two tiles of 32 and 16 rows, the second not full, against tiles of 64."""
    ops, dtype = kernels(small_model()), torch.float16 if INTERPRETED else torch.bfloat16
    ops.torch_dtype = dtype
    weight, x = (torch.randn(count, 256, device=DEVICE).to(dtype) for count in (256, 89))
    own = Weight(*quantized(weight, "fp8"), narrow=True) if narrow else Weight(weight)
    config, found = LinearConfig(block_n=64, block_k=64, stages=2, tma=tma), []
    for rows in (48, 64):
        ops.config = replace(ops.config, linear={(rows, *kind(own)): config})
        assert ops.config.rows(len(x), own) == rows
        found.append(ops.product(x, own, config, swiglu=swiglu))
    assert torch.equal(*found)


@torch.inference_mode()
@pytest.mark.parametrize("narrow", [False, True])
def test_uneven_splits_by_the_copy_engine(narrow: bool) -> None:
    """Of 1280 inputs 512, 512 and 256, whatever a tile reads at a time; fp8 rows with their scale behind them."""
    ops, dtype = kernels(small_model()), torch.float16 if INTERPRETED else torch.bfloat16
    weight, x = (torch.randn(count, 1280, device=DEVICE).to(dtype) for count in (128, 19))
    own, expected = Weight(weight), x.float() @ weight.float().T
    if narrow:
        own = Weight(*quantized(weight, "fp8"), narrow=True)
        expected = own.product(x).float()
    found = [
        ops.product(x, own, LinearConfig(block_n=64, block_k=block, stages=2, splits=3, tma=True))
        for block in (64, 256)
    ]
    assert [len(product) for product in found] == [3, 3]
    tolerance = 3e-2 if narrow else 1e-2
    for product in found:
        torch.testing.assert_close(product.sum(0), expected, atol=tolerance * float(expected.abs().max()), rtol=0.0)


def no_graph(work) -> float:
    """`_replay_seconds` without CUDA."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.inference_mode()
@pytest.mark.parametrize("form", [pytest.param(None, marks=pytest.mark.slow), "int8"])
def test_autotuning_changes_no_number(form: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from emu_cog.ops import triton_ops

    if INTERPRETED:
        monkeypatch.setattr(triton_ops, "_replay_seconds", no_graph)
    lm = small_model(torch.float16 if INTERPRETED else torch.bfloat16, form, intermediate_size=64)
    tuned, found = triton_ops.TritonOps.autotuned(lm.weights, DEVICE)
    assert [line.split()[0] for line in found] == ["qkv", "o", "gate_up", "down", "head"]
    (batch, one), (_, two) = (paged(lm, [(5, 1), (40, 1)]) for _ in range(2))
    assert torch.equal(forward(kernels(lm), lm.weights, batch, one), forward(tuned, lm.weights, batch, two))


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
        if len(calls) % 3:  # the third that is tried for each product and number of rows can be built
            raise failure
        return 1.0

    monkeypatch.setattr(triton_ops, "_replay_seconds", seconds)
    lm = small_model()
    ops, found = triton_ops.TritonOps.autotuned(lm.weights, DEVICE)
    assert len(found) == 5
    assert len(calls) == 5 * 3 * len(ROWS)  # in fp32 the first that can be built is taken
    assert ops.config.linear.keys() == kernels(lm).config.linear.keys()


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
    weights = small_model().weights
    with pytest.raises(type(failure), match=str(failure)):
        triton_ops.TritonOps.autotuned(weights, DEVICE)
    with pytest.raises(RuntimeError, match="CUDA error: misaligned"), triton_ops.build_errors(DEVICE):
        raise RuntimeError("CUDA error: misaligned address")


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ModelRunner take the kernels on any device, every configuration equally fast."""
    monkeypatch.setattr("emu_cog.engine.runner.why_eager", lambda lm, *, compile: None)
    monkeypatch.setattr("emu_cog.ops.triton_ops._replay_seconds", lambda work: 1.0)


@pytest.mark.usefixtures("anywhere")
def test_without_any_configuration_setup_goes_on_in_plain_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a B300 under Triton 3.4 setup ended in `min() arg is an empty sequence`."""

    def seconds(work):
        raise RuntimeError("'sm_103a' is not a recognized\nprocessor for this target")

    monkeypatch.setattr("emu_cog.ops.triton_ops._replay_seconds", seconds)
    lm = small_model()
    with pytest.raises(KernelBuildError, match=r"no configuration of the qkv product \(320x64\) can be built on"):
        ModelRunner(lm, slots=1, tokens=128).build_kernels()
    with caplog.at_level("WARNING", logger="emu_cog"):
        assert not ModelRunner.best(lm, slots=1, tokens=128, compile=True).captured
    for part in ("plain PyTorch", "qkv product (320x64)", Card.of(DEVICE).name, "'sm_103a' is not a recognized"):
        assert part in caplog.text
    assert isinstance(lm.ops, TorchOps)


@pytest.mark.usefixtures("anywhere")
def test_all_kernels_are_built_during_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that failed was found by the first request."""
    from emu_cog.ops.kernels import layers, sampling
    from emu_cog.ops.triton_ops import TritonOps

    lm, launched = small_model(), []

    class Recorded:
        def __init__(self, name: str, kernel) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    names = {name: module for module in (layers, sampling) for name in vars(module) if name.endswith("_kernel")}
    names = {name: module for name, module in names.items() if "narrow" not in name}  # FlashAR's in fp8
    for name, module in names.items():
        monkeypatch.setattr(module, name, Recorded(name, getattr(module, name)))
    monkeypatch.setattr("emu_cog.engine.prefill.SIZES", (16,))  # the interpreter is slow
    assert ModelRunner.best(lm, slots=1, tokens=128, compile=True).captured
    assert isinstance(lm.ops, TritonOps)
    assert set(launched) == names.keys()
    assert len(names) == 10
    monkeypatch.setattr(sampling, "pick_kernel", None)
    with pytest.raises(TypeError):
        ModelRunner.best(lm, slots=1, tokens=128, compile=True)
    assert isinstance(lm.ops, TorchOps), "nothing runs through kernels that failed"


SMALL = {
    "story": ("storyteller", 2, replace(CASES["story"][2], max_new_tokens=3)),
    "picture": ("picture", 1, Request(prompt="a boat", seed=3, size=(1, 2), image_top_p=0.9)),
}


@pytest.mark.parametrize("name", ["picture", pytest.param("story", marks=pytest.mark.slow)] if INTERPRETED else CASES)
def test_the_engine_writes_the_same_with_the_kernels(
    name: str, make_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of captured graphs, but not captured, so that they run interpreted, too."""
    model, count, request = (SMALL if INTERPRETED else CASES)[name]
    folders = make_checkpoint(model)
    pipeline = Pipeline.load(folders.model, folders.vision, device=str(DEVICE), dtype="float32", compile=False)
    torch_settings.exact()  # without TF32, which Pipeline.load turns on for a GPU
    requests, config = prepared(pipeline, request, count)
    expected = ids_of(pipeline.engine, requests, config)
    engine = uncaptured(pipeline.lm, partial(kernels, key_splits=2), monkeypatch)
    if INTERPRETED:
        engine.lm = pipeline.lm  # reads the prompts, in plain torch
    assert ids_of(engine, requests, config) == expected
