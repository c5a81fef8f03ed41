"""The kernels' default configurations, and what autotuning may change about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from emu_cog.ops.autotune import (
    CHUNK,
    ROWS,
    Card,
    KernelBuildError,
    LinearConfig,
    autotune,
    candidates,
    default_config,
    kind,
)
from emu_cog.ops.interface import MAX_ROWS, Weight
from tests.kernels_kit import released

CARD = Card(name="a card")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_defaults_divide_every_weight_evenly_and_sum_alike_for_all_rows(dtype: torch.dtype) -> None:
    """A row's sums are the same beside 1 and beside 63 others: only the stages may follow the number of rows."""
    weights = released(dtype)
    linear, layer = default_config(weights, CARD).linear, weights.layers[0]
    assert ROWS[-1] == MAX_ROWS
    for weight in (layer.qkv, layer.o, layer.gate_up, layer.down, Weight(weights.visual_head)):
        configs = [linear[rows, *kind(weight)] for rows in ROWS]
        assert {replace(config, stages=1) for config in configs} == {replace(configs[0], stages=1)}
        k = weight.data.shape[1] // (4 if weight.scale is not None else 1)
        assert k % (configs[0].splits * configs[0].block_k) == 0
        assert weight.data.shape[0] % configs[0].block_n == 0
    heads = Weight(weights.text_head), Weight(weights.visual_head)
    splits = {"qkv": 2, "o": 4, "down": 5, "gate_up": 1} | dict.fromkeys(heads, 1)
    for name, count in splits.items():
        weight = getattr(layer, name) if isinstance(name, str) else name
        assert {linear[rows, *kind(weight)].splits for rows in ROWS} == {count}


@pytest.mark.parametrize(("narrow", "down"), [(False, 6), (True, 3)])
def test_with_a_copy_engine_sums_are_divided_by_three(narrow: bool, down: int) -> None:
    """Whatever is tried: all begin their splits at the same inputs, and no tile reads across one."""
    weights = released(torch.float8_e4m3fn, narrow=True) if narrow else released()
    linear = default_config(weights, Card(name="a card", hopper=True)).linear
    layer = weights.layers[0]
    for weight, splits in ((layer.qkv, 3), (layer.o, 3), (layer.gate_up, 1), (layer.down, down)):
        for rows in ROWS:
            for config in candidates(linear[rows, *kind(weight)], rows, narrow=narrow):
                assert config.splits == splits
                assert config.tma or (narrow and splits == 1)
                assert CHUNK % config.block_k == 0


def test_autotuning_takes_the_fastest_and_never_changes_the_order_of_a_sum() -> None:
    weights = released(layers=3)
    first = default_config(weights, CARD)
    asked: dict[tuple[int, ...], set[tuple[int, bool]]] = {}

    def seconds(some: Sequence[Weight], config: LinearConfig, rows: int, swiglu: bool) -> float:
        asked.setdefault((rows, *kind(some[0])), set()).add((len(some), swiglu))
        if config.block_n == 128:
            raise KernelBuildError("out of resource: shared memory")
        return 1.0 if config.stages == (4 if rows >= 64 else 2) else 2.0

    tuned, found = autotune(first, weights, seconds, CARD)
    assert len(found) == 5
    line = "gate_up 64x128, 2 stages, 4 warps: 0.00 TB/s | 64x128, 2 stages, 4 warps: 0.00 TB/s | 64x128, 4 stages"
    assert line in found[2]
    for at, config in tuned.linear.items():
        assert replace(config, stages=1, warps=4) == replace(
            first.linear[at], stages=1, warps=4
        )  # block_k is the default's
        if at[1] == 151854:  # the text head is not timed
            assert config == first.linear[at]
        else:
            assert config.stages == (4 if at[0] >= 64 else 2)
            assert asked[at] == {(1 if at[1] == 131072 else 3, at[1] == 51200)}


def test_where_nothing_can_be_built_the_error_names_weight_card_and_reason() -> None:
    """It was `min() arg is an empty sequence`."""
    weights, built = released(), []

    def seconds(some: Sequence[Weight], config: LinearConfig, rows: int, swiglu: bool) -> float:
        if swiglu and rows == 32:
            raise KernelBuildError(f"PassManager::run failed, {config.warps} warps")
        built.append(config)
        return 1.0

    says = r"the gate_up product \(51200x5120\) can be built on a card: PassManager::run failed, 8 warps"
    with pytest.raises(KernelBuildError, match=says):
        autotune(default_config(weights, CARD), weights, seconds, CARD)
    assert built


@pytest.mark.parametrize("rows", ROWS)
def test_candidates_are_different_and_sum_alike(rows: int) -> None:
    first = LinearConfig(block_n=64, block_k=128, stages=4, splits=5)
    others = candidates(first, rows)
    assert others[0] == first
    assert len(set(others)) == len(others) >= 3
    assert {replace(config, block_n=64, block_k=128, stages=4, warps=4) for config in others} == {first}
    assert {config.block_k for config in others} <= {128, 64}
    assert min(config.block_n for config in others) == 64


def test_other_devices_than_cuda_get_the_least_shared_memory() -> None:
    assert Card.of(torch.device("cpu")) == Card(name="cpu", shared=99 * 1024, hopper=False)
