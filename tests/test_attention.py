"""The flash-attn branch by an emulation on the CPU: same calls, same tokens."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from emu_cog.events import RunStats
from emu_cog.model.qwen3 import choose_attention
from emu_cog.pipeline import Pipeline
from emu_cog.request import Request

Pipelines = Callable[[str], Pipeline]


def kvcache_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, softmax_scale: float, causal: bool
) -> Tensor:
    """What flash-attn documents for `flash_attn_with_kvcache`: (N, T, heads, D) queries, (N, L, kv_heads, D) caches;
    the mask is aligned to the bottom right of each row's `cache_seqlens`."""
    assert causal
    assert cache_seqlens.dtype == torch.int32
    assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == 1
    n, length, heads, _ = q.shape
    out = torch.empty_like(q)
    for row in range(n):
        filled = int(cache_seqlens[row])
        assert filled <= k_cache.shape[1]
        for head in range(heads):
            kv = head * k_cache.shape[2] // heads
            scores = q[row, :, head] @ k_cache[row, :filled, kv].T * softmax_scale
            allowed = torch.arange(filled) <= torch.arange(filled - length, filled)[:, None]
            out[row, :, head] = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v_cache[row, :filled, kv]
    return out


@pytest.fixture
def flash_module(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A module `flash_attn` that holds the emulation; returns the list of query shapes it was called with."""
    calls: list[tuple[int, ...]] = []

    def counted(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        calls.append(tuple(q.shape))
        return kvcache_attention(q, k, v, **options)  # type: ignore[arg-type]

    module = types.ModuleType("flash_attn")
    module.__spec__ = types.SimpleNamespace(name="flash_attn")  # type: ignore[assignment]
    module.flash_attn_with_kvcache = counted  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


REQUESTS = [
    Request(prompt="a small boat", size=(3, 4), seed=3, num_outputs=2),
    Request(prompt="a fox", task="story", size=(2, 3), seed=16, max_new_tokens=60),
]


def content(pipeline: Pipeline, request: Request) -> list[object]:
    """The events without pixels and seconds."""
    events = pipeline.stream(request)
    return [getattr(event, "codes", event) for event in events if not isinstance(event, RunStats)]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: r.task)
def test_flash_branch_gives_the_same_pictures(
    request_: Request, pipelines: Pipelines, flash_module: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipelines("picture" if request_.task == "t2i" else "storyteller")
    plain = content(pipeline, request_)
    assert flash_module == []
    monkeypatch.setattr(pipeline.lm.config, "_attn_implementation", "emu_flash")
    flash = content(pipeline, request_)
    assert flash == plain
    assert {shape[1] for shape in flash_module} > {1}  # prefill and single steps both went through it


def test_flash_is_chosen_on_cuda_in_half_precision_only(
    flash_module: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose_attention(cuda, torch.bfloat16) == "emu_flash"
    assert choose_attention(cuda, torch.float32) == "emu_sdpa"
    assert choose_attention(cpu, torch.bfloat16) == "emu_sdpa"
    monkeypatch.delitem(sys.modules, "flash_attn")
    with caplog.at_level(logging.INFO, logger="emu_cog"):
        assert choose_attention(cuda, torch.bfloat16) == "emu_sdpa"
    assert "flash-attn is not installed" in caplog.text
