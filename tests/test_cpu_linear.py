"""Products with few batch rows on a CPU: the same numbers for every shape, over the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from emu_cog.ops import cpu_linear


@pytest.mark.parametrize("shape", [(1, 24), (2, 1, 24), (8, 24), (9, 24), (2, 5, 24), (3, 1, 2, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_f_linears(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(40, 24).to(dtype)
    out = cpu_linear.linear(x, weight)
    assert out.shape == (*shape[:-1], 40)
    assert out.is_contiguous()  # attention kernels need contiguous rows
    torch.testing.assert_close(out, F.linear(x, weight))


def test_layers_keep_their_weights_and_those_with_a_bias_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Sequential(nn.Linear(3, 2)))
    before = list(model.parameters())
    expected = model(torch.ones(2, 4))
    cpu_linear.replace_linears(model)
    assert isinstance(model[0], cpu_linear.FewRowsLinear)
    assert type(model[1][0]) is nn.Linear
    assert [id(p) for p in model.parameters()] == [id(p) for p in before]
    torch.testing.assert_close(model(torch.ones(2, 4)), expected)
