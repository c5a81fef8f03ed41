"""The decoder against transformers' own, and the bookkeeping of its cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from emu_cog.model.kv_cache import PAGE, KVCache
from emu_cog.model.qwen3 import Chunk, LanguageModel
from emu_cog.pipeline import Pipeline
from tests.decoder_kit import random_model

Pipelines = Callable[[str], Pipeline]
Models = Callable[[str], torch.nn.Module]
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 500, pytest.param(4000, marks=pytest.mark.slow)]
TOLERANCE = 1e-4


def noisy_cache(lm: LanguageModel, tokens: int) -> KVCache:
    cache = lm.new_cache(tokens)
    for buffer in (*cache.keys, *cache.values):
        buffer.fill_(1e4)
    return cache


def tokens_of(length: int, vocabulary: int) -> list[int]:
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def logits(lm: LanguageModel, hidden: Tensor) -> Tensor:
    return torch.cat([lm.text_logits(hidden), lm.visual_logits(hidden)], dim=-1)


@torch.inference_mode()
def expected(model: torch.nn.Module, tokens: Sequence[int]) -> Tensor:
    return model(input_ids=torch.tensor([tokens])).logits[0]


def fed(lm: LanguageModel, cache: KVCache, tokens: Sequence[int], parts: Sequence[int]) -> Tensor:
    """Logits of all tokens, fed in passes that end at `parts`, over pages in no order."""
    pages = cache.take(-(-len(tokens) // PAGE))[::-1]
    ends = [end for end in parts if 0 < end < len(tokens)] + [len(tokens)]
    hidden = [
        lm.feed(cache, [Chunk(tokens[begin:end], begin, pages)])
        for begin, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    return logits(lm, torch.cat(hidden))


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_are_transformers_own(length: int, pipelines: Pipelines, plain_models: Models) -> None:
    """The prompt at once and in chunks, whatever lies in the cache beyond it."""
    lm = pipelines("wild").lm
    tokens = tokens_of(length, lm.ids.vocab_size)
    plain = expected(plain_models("wild"), tokens)
    for parts in ([], [1, 2, 17, 64, 70, 449], [length - 1]):
        got = fed(lm, noisy_cache(lm, length), tokens, parts)
        torch.testing.assert_close(got, plain, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (6, 1), (8, 8)])
@pytest.mark.parametrize("tied", [False, True])
def test_any_grouping_of_heads_agrees(heads: int, kv_heads: int, tied: bool) -> None:
    """Also with one matrix for embeddings and head. Relative to the largest logit, about 100 for these weights."""
    lm, plain = random_model(num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    assert (lm.weights.head is lm.weights.embed) == tied
    tokens = tokens_of(70, 200)
    theirs = expected(plain, tokens)
    ours = fed(lm, noisy_cache(lm, 70), tokens, [33])
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_streams_of_one_pass_do_not_see_each_other() -> None:
    """Two prompts that share their first page, and a third stream in the middle of its own."""
    lm, plain = random_model()
    cache = noisy_cache(lm, 600)
    common, *tails, other = (tokens_of(n, 200) for n in (PAGE, 30, 7, 90))
    first = cache.take(2)
    second = [first[0], *cache.take(1)]
    third = cache.take(2)
    lm.feed(cache, [Chunk(other[:50], 0, third)])
    chunks = [
        Chunk(common + tails[0], 0, first),
        Chunk(tails[1], PAGE, second),
        Chunk(other[50:], 50, third),
    ]
    got = logits(lm, lm.feed(cache, chunks)).split([len(chunk.tokens) for chunk in chunks])
    for ours, prompt in zip(got, (common + tails[0], common + tails[1], other), strict=True):
        theirs = expected(plain, prompt)[-len(ours) :]
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.gpu
def test_a_chunk_is_queued_without_waiting_for_the_device() -> None:
    """The host waited for the chunk before: its indices were copied from pageable memory."""
    lm, _ = random_model(torch.bfloat16, device="cuda", head_dim=64)
    cache = lm.new_cache(600)
    chunks = [Chunk(tokens_of(70, 200), 90, cache.take(3)), Chunk(tokens_of(50, 200), 0, cache.take(1))]
    before = lm.feed(cache, chunks)
    torch.cuda.set_sync_debug_mode("error")
    try:
        after = lm.feed(cache, chunks)
        cache.copy([1, 2], [5, 6])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(before, after)


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_8_bit_weights_come_near_the_full_ones(form: str) -> None:
    tokens = tokens_of(20, 200)
    hidden = []
    for quantize in (None, form):
        lm, _ = random_model(form=quantize)
        hidden.append(lm.feed(noisy_cache(lm, 64), [Chunk(tokens, 0, [1])]))
    error = (hidden[1] - hidden[0]).norm() / hidden[0].norm()
    assert 1e-4 < error < {"fp8": 0.1, "int8": 0.05}[form]


def test_pages_are_counted() -> None:
    lm, _ = random_model(num_hidden_layers=1)
    cache = lm.new_cache(5 * PAGE)
    assert (cache.pages, cache.free) == (6, 5)
    one, two = cache.take(3), cache.take(2)
    assert sorted(one + two) == [1, 2, 3, 4, 5], "page 0 is nobody's"
    with pytest.raises(AssertionError):
        cache.take(1)
    cache.share(one[:2])
    cache.release(one)
    assert cache.free == 1
    cache.release(one[:2])
    assert cache.free == 3
    assert sorted(cache.take(3)) == sorted(one)


def test_pages_are_copied_whole() -> None:
    lm, _ = random_model()
    cache = lm.new_cache(4 * PAGE)
    for buffer in (*cache.keys, *cache.values):
        buffer.normal_()
    before = [buffer.clone() for buffer in (*cache.keys, *cache.values)]
    cache.copy([], [])
    cache.copy([1, 2], [3, 4])
    for buffer, old in zip((*cache.keys, *cache.values), before, strict=True):
        assert torch.equal(buffer[:, 3:], old[:, 1:3])
        assert torch.equal(buffer[:, :3], old[:, :3])
