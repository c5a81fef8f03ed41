"""Products in plain torch: few rows on a CPU, and the head's, never rounded back to half precision."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from emu_cog.ops import linear
from tests.decoder_kit import IDS, random_model

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("rows", [1, 2, linear.CPU_ROWS, linear.CPU_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_f_linears(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 24).to(dtype), torch.randn(40, 24).to(dtype)
    out = linear.linear(x, weight)
    assert out.is_contiguous()
    torch.testing.assert_close(out, F.linear(x, weight))


@pytest.mark.parametrize("shape", [(640, 384), (384, 960), (24, 40)])
@pytest.mark.parametrize("rows", range(9, linear.CPU_ROWS + 1, 5))
def test_no_row_depends_on_the_others(rows: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(2)
    weight = linear.empty(*shape, dtype=torch.float32, device=torch.device("cpu")).normal_()
    x = torch.randn(rows, shape[1])
    blocks = torch.cat([F.linear(part, weight) for part in x.split(linear.CPU_BLOCK)])
    assert torch.equal(linear.linear(x, weight), blocks)


@pytest.mark.parametrize(("alike", "expected"), [(8, 8), (23, 16), (24, 24), (100, linear.CPU_WIDE)])
def test_products_are_as_wide_as_their_bits_allow(alike: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here those of more than `alike` rows have other bits, and all take as long."""
    product = F.linear
    monkeypatch.setattr(linear, "_seconds", lambda x, w: 1.0)
    monkeypatch.setattr(linear.F, "linear", lambda x, w: product(x, w) + (len(x) > alike))
    monkeypatch.setattr(linear, "_widest", {})
    assert linear.widest(torch.randn(16, 8)) == expected
    assert linear.widest(torch.randn(16, 8).bfloat16()) == linear.CPU_BLOCK


def test_products_are_as_wide_as_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """As 384 x 768 on two cores: 81 us with 16 rows, 605 with 24."""
    monkeypatch.setattr(linear, "_seconds", lambda x, w: 40.0 + 2.0 * len(x) if len(x) <= 16 else 600.0)
    monkeypatch.setattr(linear, "_widest", {})
    assert linear.widest(torch.randn(16, 8)) == 16


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_logits_are_the_sums_themselves(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded ones would be off by more than 2e-3."""
    monkeypatch.setattr(linear, "HEAD_SLICE", 64 * 70)  # five slices, the last one smaller
    torch.manual_seed(1)
    hidden, head = torch.randn(4, 64).to(device, dtype)[::2], torch.randn(300, 64).to(device, dtype)
    exact = hidden.double() @ head.double().T
    got = linear.logits(hidden, head)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, atol=2e-4, rtol=0)
    if dtype in HALVES:
        assert (got.to(dtype).double() - exact).abs().max() > 2e-3


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_the_model_does_not_round_logits(device: str) -> None:
    lm, _ = random_model(torch.bfloat16, device=device)
    hidden = torch.randn(3, 64, device=device).bfloat16()
    exact = hidden.double() @ lm.weights.head.double().T
    got = torch.cat([lm.text_logits(hidden), lm.visual_logits(hidden)], dim=1)
    assert lm.visual_logits(hidden).shape == (3, IDS.visual_count)
    torch.testing.assert_close(got.double(), exact, atol=1e-4 * float(exact.abs().max()), rtol=0)
