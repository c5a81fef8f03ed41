"""The kernels' default configurations, and what autotuning may change about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from emu_cog.ops.autotune import Card, KernelBuildError, LinearConfig, autotune, candidates, default_config, shape
from emu_cog.ops.interface import Weight
from tests.kernels_kit import released

CARD = Card(name="a card")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_defaults_divide_every_weight_evenly(dtype: torch.dtype) -> None:
    weights = released(dtype)
    config = default_config(weights, CARD)
    layer = weights.layers[0]
    for weight in (layer.qkv, layer.o, layer.gate_up, layer.down, Weight(weights.visual_head)):
        linear = config.linear[shape(weight)]
        k = weight.data.shape[1] // (4 if weight.scale is not None else 1)
        assert k % (linear.splits * linear.block_k) == 0
        assert weight.data.shape[0] % linear.block_n == 0
    assert config.linear[shape(layer.gate_up)].splits == config.linear[shape(Weight(weights.text_head))].splits == 1
    assert [config.linear[shape(w)].splits for w in (layer.qkv, layer.o, layer.down)] == [2, 4, 5]


def test_autotuning_takes_the_fastest_and_never_changes_the_order_of_a_sum() -> None:
    weights = released(layers=3)
    first = default_config(weights, CARD)
    asked: list[tuple[tuple[int, int], LinearConfig, int, bool]] = []

    def seconds(some: Sequence[Weight], config: LinearConfig, swiglu: bool) -> float:
        asked.append((shape(some[0]), config, len(some), swiglu))
        if config.block_n == 128:
            raise KernelBuildError("out of resource: shared memory")
        return 1.0 if config.stages == 3 else 2.0

    tuned, found = autotune(first, weights, seconds, CARD)
    assert len(found) == 5
    assert "gate_up 64x128, 3 stages, 4 warps: 0.00 TB/s" in found[2]
    for at, config in tuned.linear.items():
        before = first.linear[at]
        assert (config.splits, config.block_k) == (before.splits, before.block_k)
        assert config.stages == 3 or at == (151854, 5120)  # the text head is not timed
    assert {swiglu for at, _, _, swiglu in asked if at == (51200, 5120)} == {True}
    assert {count for at, _, count, _ in asked if at != (131072, 5120)} == {3}


def test_where_nothing_can_be_built_the_error_names_weight_card_and_reason() -> None:
    """It was `min() arg is an empty sequence`."""
    weights, built = released(), []

    def seconds(some: Sequence[Weight], config: LinearConfig, swiglu: bool) -> float:
        if swiglu:
            raise KernelBuildError(f"PassManager::run failed, {config.stages} stages")
        built.append(config)
        return 1.0

    says = r"the gate_up product \(51200x5120\) can be built on a card: PassManager::run failed, 4 stages"
    with pytest.raises(KernelBuildError, match=says):
        autotune(default_config(weights, CARD), weights, seconds, CARD)
    assert built


def test_candidates_are_different_and_sum_alike() -> None:
    first = LinearConfig(block_n=64, block_k=128, stages=4, splits=5)
    others = candidates(first)
    assert others[0] == first
    assert len(set(others)) == len(others) > 3
    assert {replace(config, block_n=64, stages=4, warps=4) for config in others} == {first}


def test_other_devices_than_cuda_get_the_least_shared_memory() -> None:
    assert Card.of(torch.device("cpu")) == Card(name="cpu", shared=99 * 1024, pdl=False)
