"""The kernels' first choice, and what the clock may change about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from emu_cog.ops.autotune import Tiles, alternatives, autotune, choose_plan, shape
from emu_cog.ops.interface import DecodeWeights, Layer, Shape, Weight


def released(form: torch.dtype = torch.bfloat16, layers: int = 2) -> DecodeWeights:
    """The released model's shapes, without its numbers."""

    def weight(n: int, k: int) -> Weight:
        scale = torch.empty(n, device="meta") if form.itemsize == 1 else None
        return Weight(torch.empty((n, k), dtype=form, device="meta"), scale)

    norm = torch.empty(0)
    layer = Layer(
        qkv=weight(10240, 5120),
        o=weight(5120, 8192),
        gate_up=weight(51200, 5120),
        down=weight(5120, 25600),
        input_norm=norm,
        post_norm=norm,
        q_norm=norm,
        k_norm=norm,
    )
    head = torch.empty((282926, 5120), dtype=torch.bfloat16, device="meta")
    return DecodeWeights(
        embed=head,
        layers=(layer,) * layers,
        norm=norm,
        visual_head=head[151854:],
        text_head=head[:151854],
        visual=151854,
        rope=norm,
        shape=Shape(heads=64, kv_heads=8, head_dim=128, eps=1e-6),
    )


@pytest.mark.parametrize("form", [torch.bfloat16, torch.int8])
def test_the_first_choice_cuts_every_weight_evenly(form: torch.dtype) -> None:
    weights = released(form)
    plan = choose_plan(weights, torch.device("cpu"))
    layer = weights.layers[0]
    for weight in (layer.qkv, layer.o, layer.gate_up, layer.down, Weight(weights.visual_head)):
        tiles = plan.tiles[shape(weight)]
        k = weight.data.shape[1] // (4 if weight.scale is not None else 1)
        assert k % (tiles.splits * tiles.block_k) == 0
        assert weight.data.shape[0] % tiles.block_n == 0
    assert plan.tiles[shape(layer.gate_up)].splits == plan.tiles[shape(Weight(weights.text_head))].splits == 1
    assert [plan.tiles[shape(w)].splits for w in (layer.qkv, layer.o, layer.down)] == [2, 4, 5]


def test_the_clock_decides_and_never_changes_the_order_of_a_sum() -> None:
    weights = released(layers=3)
    first = choose_plan(weights, torch.device("cpu"))
    asked: list[tuple[tuple[int, int], Tiles, int, bool]] = []

    def seconds(some: Sequence[Weight], tiles: Tiles, swiglu: bool) -> float | None:
        asked.append((shape(some[0]), tiles, len(some), swiglu))
        if tiles.block_n == 128:
            return None  # as where shared memory is short
        return 1.0 if tiles.stages == 3 else 2.0

    plan, told = autotune(first, weights, seconds)
    assert len(told) == 5
    assert "gate_up 64x128, 3 stages, 4 warps: 0.00 TB/s" in told[2]
    for at, tiles in plan.tiles.items():
        before = first.tiles[at]
        assert (tiles.splits, tiles.block_k) == (before.splits, before.block_k)
        assert tiles.stages == 3 or at == (151854, 5120)  # the text head is not timed
    assert {swiglu for at, _, _, swiglu in asked if at == (51200, 5120)} == {True}
    assert {count for at, _, count, _ in asked if at != (131072, 5120)} == {3}


def test_alternatives_are_different_and_sum_alike() -> None:
    first = Tiles(block_n=64, block_k=128, stages=4, splits=5)
    others = alternatives(first)
    assert others[0] == first
    assert len(set(others)) == len(others) > 3
    assert {replace(tiles, block_n=64, stages=4, warps=4) for tiles in others} == {first}
