"""The head's product: fp32 sums of half-precision inputs, never rounded back to half precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from _models import tiny
from torch import Tensor

from emu_cog.model.qwen3 import LanguageModel
from emu_cog.ops import head
from emu_cog.pipeline import Pipeline

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
HALVES = [torch.bfloat16, torch.float16]


def operands(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Rows 0 and 2 of four, as those of conditional sequences, and a head of 300 rows."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(4, 64), torch.randn(300, 64)
    return hidden.to(device, dtype)[::2], weight.to(device, dtype)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_logits_are_the_sums_themselves(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "SLICE", 64 * 70)  # five slices, the last one smaller
    hidden, weight = operands(dtype, device)
    exact = hidden.double() @ weight.double().T
    got = head.logits(hidden, weight)
    assert got.dtype == torch.float32
    assert got.shape == (2, 300)
    torch.testing.assert_close(got.double(), exact, atol=2e-4 if dtype != torch.float32 else 2e-2, rtol=0)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounded_logits_would_exceed_the_bound(dtype: torch.dtype) -> None:
    """The bound above detects rounding, whose error would be at least 10 times as large."""
    hidden, weight = operands(dtype, "cpu")
    exact = hidden.double() @ weight.double().T
    assert (head.logits(hidden, weight).to(dtype).double() - exact).abs().max() > 2e-3


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_the_model_does_not_round_logits(device: str, make_checkpoint: Callable[[str], tiny.TinyFolders]) -> None:
    folders = make_checkpoint("picture")
    lm: LanguageModel = Pipeline.load(folders.model, folders.vision, device=device, dtype="bfloat16").lm
    hidden = torch.randn(3, lm.config.hidden_size, device=device).bfloat16()
    for logits, weight in (
        (lm.text_logits(hidden), lm.model.lm_head.weight[: lm.ids.visual]),
        (lm.visual_logits(hidden), lm.model.lm_head.weight[lm.ids.visual : lm.ids.vocab_size]),
    ):
        exact = hidden.double() @ weight.detach().double().T
        torch.testing.assert_close(logits.double(), exact, atol=1e-4 * float(exact.abs().max()), rtol=0)
