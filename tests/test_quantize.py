"""8-bit weights: how accurate they are, how they are loaded, how much memory is estimated for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from _models import tiny

from emu_cog.errors import InputError
from emu_cog.memory import plan_memory
from emu_cog.model.headers import read_headers
from emu_cog.model.quantize import FORMATS, check_format, quantizable, quantized
from emu_cog.ops.interface import Weight
from emu_cog.pipeline import Pipeline
from emu_cog.request import Request
from emu_cog.settings import Settings

Checkpoints = Callable[[str], tiny.TinyFolders]
HALF_A_STEP = {"fp8": 2.0**-4, "int8": 0.5 / 127}
"""Largest error: of fp8 relative to the weight (three bits of mantissa), of int8 relative to the row's largest."""


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_comes_back_within_half_a_step(name: str) -> None:
    weight = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 40)[:, None]
    weight[7] = 0.0
    data, scale = quantized(weight, name)
    back = data.float() * scale[:, None]
    largest = weight.abs().amax(1, keepdim=True)
    assert data.dtype.itemsize == 1
    assert torch.equal(back[7], weight[7])
    # Below 2**-6 of its range e4m3 has fixed steps of 2**-9, on a row scaled to 448.
    bound = torch.maximum(HALF_A_STEP["fp8"] * weight.abs(), largest * 2.0**-10 / 448) if name == "fp8" else (
        HALF_A_STEP["int8"] * largest
    )  # fmt: skip
    assert ((back - weight).abs() <= 1.001 * bound).all()


def test_large_weights_are_converted_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 64)
    whole = quantized(weight, "int8")
    monkeypatch.setattr("emu_cog.model.quantize.SLICE", 300)
    sliced = quantized(weight, "int8")
    assert all(torch.equal(a, b) for a, b in zip(whole, sliced, strict=True))


@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_is_quantized_as_it_is_read(name: str, make_checkpoint: Checkpoints) -> None:
    folders = make_checkpoint("picture")
    plain = Pipeline.load(folders.model, folders.vision, device="cpu")
    small = Pipeline.load(folders.model, folders.vision, device="cpu", quantize=name)
    for full, layer in zip(plain.lm.weights.layers, small.lm.weights.layers, strict=True):
        for part in ("qkv", "o", "gate_up", "down"):
            data, scale = quantized(getattr(full, part).data, name)
            assert torch.equal(getattr(layer, part).data.float(), data.float())
            assert torch.equal(getattr(layer, part).scale, scale)
        assert torch.equal(layer.q_norm, full.q_norm)
    assert torch.equal(small.lm.weights.head, plain.lm.weights.head)
    assert len(list(quantizable(read_headers(folders.model)))) == 7 * plain.lm.config.num_hidden_layers
    pictures = [e for e in small.stream(Request(prompt="boat", size=(2, 3), seed=1)) if hasattr(e, "image")]
    assert [p.image.size for p in pictures] == [(48, 32)]


def test_the_budget_counts_8_bit_weights(make_checkpoint: Checkpoints) -> None:
    folders = make_checkpoint("picture")
    headers = read_headers(folders.model)
    layers = [h.shape for key, h in headers.items() if key.endswith("proj.weight")]
    budgets = {
        form: plan_memory(
            folders.model,
            folders.vision,
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
            spread=False,
            area=1,
            quantize=form,
        ).weights
        for form in (None, "int8")
    }
    assert budgets[None] - budgets["int8"] == sum(rows * columns - 4 * rows for rows, columns in layers)


def test_unknown_formats_are_refused(make_checkpoint: Checkpoints) -> None:
    with pytest.raises(InputError, match="EMU_QUANTIZE='int4'.*fp8, int8"):
        check_format("int4", torch.device("cpu"))
    folders = make_checkpoint("picture")
    with pytest.raises(InputError, match="EMU_QUANTIZE='4bit'"):
        Pipeline.load(folders.model, folders.vision, device="cpu", quantize="4bit")


def test_the_environment_chooses() -> None:
    assert Settings.from_env({"EMU_QUANTIZE": "fp8", "EMU_COMPILE": "0"}).quantize == "fp8"
    assert not Settings.from_env({"EMU_COMPILE": "0"}).compile
    assert Settings.from_env({}).compile
    assert Settings.from_env({}).quantize is None
    with pytest.raises(InputError, match="EMU_COMPILE='yes'"):
        Settings.from_env({"EMU_COMPILE": "yes"})


@pytest.mark.parametrize(("form", "narrow"), [("int8", False), ("fp8", False), ("fp8", True)])
def test_fp16_holds_the_sums(form: str, narrow: bool) -> None:
    """They were infinite: 448 times an input, some thousand times."""
    torch.manual_seed(3)
    weight, x = torch.randn(24, 4096), 30 * torch.randn(5, 4096)
    product = Weight(*quantized(weight, form), narrow).product(x.half())
    assert product.dtype == torch.float16
    expected = x @ weight.T
    assert float((product.float() - expected).abs().max() / expected.abs().max()) < (0.08 if form == "fp8" else 0.02)
