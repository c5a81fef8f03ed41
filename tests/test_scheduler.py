"""Who is admitted and who grows: the scheduler over a real cache of few pages, without a model."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import Qwen3Config

from emu_cog.engine.scheduler import Prompt, Scheduler
from emu_cog.engine.sequence import EngineRequest, GenerationConfig, SequenceState
from emu_cog.model.kv_cache import KVCache
from emu_cog.ops.interface import PAGE
from emu_cog.prompt.tokens import block_length
from emu_cog.request import Sampling

CONFIG = Qwen3Config(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=4)


def scheduler(pages: int, *, slots: int = 8, context: int = 10_000) -> Scheduler:
    cache = KVCache(CONFIG, pages=pages + 1, dtype=torch.float32, devices=[torch.device("cpu")])
    return Scheduler(cache, slots=slots, context=context)


def output(
    prompt: int = 10, *, size: tuple[int, int] = (8, 8), text: int = 0, single: bool = True, index: int = 0
) -> tuple[SequenceState, Prompt]:
    request = EngineRequest(conditional=tuple(range(prompt)), unconditional=tuple(range(5, prompt + 5)), seed=0)
    config = GenerationConfig(
        cfg_scale=1.0, image=Sampling(), text=Sampling(), size=size, max_new_tokens=text, single_image=single
    )
    state = SequenceState(index=index, request=request, config=config, emit=lambda event: None)
    return state, Prompt(request.conditional, request.unconditional, chunk=64)


def admitted(one: Scheduler) -> list[int]:
    return [s.index for s, _ in one.admit()]


def test_a_picture_is_admitted_when_one_after_another_can_end() -> None:
    """Each needs two pages of each stream, and its prompt's page of each while that is read."""
    assert PAGE < block_length(8, 8) + 10 <= 2 * PAGE
    first, second = output(index=0), output(index=1)
    one = scheduler(9)
    for entry in (first, second):
        one.add(*entry)
    assert admitted(one) == [0]  # the second would leave one page, and the first needs two more
    one.prompts.popleft()
    first[1].begin(one.cache, first[0])
    assert one.cache.free == 7
    assert admitted(one) == [1]
    assert one.grow(first[0], block_length(8, 8))
    assert not one.grow(second[0], block_length(8, 8))
    one.remove(*first)
    assert one.grow(second[0], block_length(8, 8))


def test_outputs_of_one_request_share_their_prompt() -> None:
    one = scheduler(100)
    first, prompt = output(3 * PAGE + 5, index=0)
    second, _ = output(3 * PAGE + 5, index=1)
    for s in (first, second):
        one.add(s, prompt)
    assert admitted(one) == [0, 1]
    assert first.pages[0][:3] == second.pages[0][:3] == prompt.pages[0][:3]
    assert first.pages[0][3] != second.pages[0][3]
    assert one.cache.free == 100 - 2 * 4 - 4  # the prompts' pages, and each output's own last ones
    for s in (first, second):
        prompt.begin(one.cache, s)
    assert one.cache.free == 100 - 2 * 3 - 4
    one.remove(first, prompt)
    assert one.cache.free == 100 - 2 * 3 - 2
    one.remove(second, prompt)
    assert one.cache.free == 100


def test_prompts_that_begin_alike_share_whole_pages() -> None:
    alike = tuple(range(2 * PAGE + 30))
    prompt = Prompt((*alike, 7, 8), (*alike, 9), chunk=100)
    assert prompt.common == 2
    read = [(stream, at) for chunk in prompt.chunks for stream, begin, end in chunk for at in range(begin, end)]
    assert read == [(0, at) for at in range(2 * PAGE + 32)] + [(1, at) for at in range(2 * PAGE, 2 * PAGE + 31)]
    assert [sum(end - begin for _, begin, end in chunk) for chunk in prompt.chunks] == [100, 91]
    cache = scheduler(20).cache
    prompt.take(cache)
    assert prompt.pages[0][:2] == prompt.pages[1][:2]
    assert cache.free == 20 - prompt.needed == 20 - 4


def test_of_equal_prompts_the_last_token_is_read_by_both() -> None:
    same = tuple(range(2 * PAGE))
    assert Prompt(same, same, chunk=1000).chunks == [[(0, 0, 2 * PAGE), (1, PAGE, 2 * PAGE)]]


def test_those_behind_a_big_request_wait_their_turn() -> None:
    one = scheduler(40)
    big = output(10, text=30 * PAGE // 2, size=(8, 8), single=False, index=1)
    entries = [output(index=0), big, output(index=2)]
    for entry in entries:
        one.add(*entry)
    running = admitted(one)
    assert running == [0, 1, 2]  # the story's worst case is needed only once
    for i in running:
        entries[i][1].begin(one.cache, entries[i][0])
    late = output(25 * PAGE, index=3)
    one.add(*late)
    one.add(*output(index=4))
    assert admitted(one) == []  # 3 does not fit, and 4 does not overtake it


def test_two_stories_never_hold_what_the_other_needs() -> None:
    """Each may need almost everything. Taking pages as they came, both would end up waiting for ever."""
    one = scheduler(40)
    entries = [output(10, text=17 * PAGE, size=(8, 8), single=False, index=i) for i in range(2)]
    for entry in entries:
        one.add(*entry)
    assert admitted(one) == [0]
    entries[0][1].begin(one.cache, entries[0][0])
    assert one.grow(entries[0][0], 17 * PAGE)
    assert admitted(one) == []


def test_whoever_runs_and_waits_for_pages_goes_before_the_queue() -> None:
    one = scheduler(30)
    story, picture = output(10, text=11 * PAGE, single=False, index=0), output(index=1)
    for entry in (story, picture):
        one.add(*entry)
    assert admitted(one) == [0, 1]
    for entry in (story, picture):
        entry[1].begin(one.cache, entry[0])
    assert one.grow(picture[0], 80)
    assert not one.grow(story[0], 13 * PAGE)
    one.add(*output(index=2))
    assert admitted(one) == []
    one.remove(*picture)
    one.round()
    assert one.grow(story[0], 13 * PAGE)


@pytest.mark.parametrize("seed", range(20))
def test_everybody_ends_whatever_is_asked(seed: int) -> None:
    """Random sequences that grow at random to at most what they may need: none waits for ever, no page is lost."""
    rng = random.Random(seed)
    pages = rng.randint(20, 60)
    one = scheduler(pages, slots=rng.randint(1, 8), context=(pages // 2 - 2) * PAGE)
    entries = {}
    for index in range(30):
        entry = output(rng.randint(1, 200), text=rng.choice([0, 50, 2000]), single=rng.random() < 0.6, index=index)
        entries[index] = entry
        one.add(*entry)
    running: dict[int, list[int]] = {}
    for _ in range(10_000):
        one.round()
        for s, prompt in one.admit():
            prompt.begin(one.cache, s)
            longest = s.config.longest(len(s.request.conditional), one.context)
            running[s.index] = [max(rng.randint(s.lengths[0], max(longest, s.lengths[0])), s.lengths[1])]
        moved = False
        for index in rng.sample(sorted(running), len(running)):
            s, prompt = entries[index]
            room = min(rng.randint(1, 150), running[index][0] - s.lengths[0])
            if room <= 0 or rng.random() < 0.02:
                one.remove(s, prompt)
                del running[index]
                moved = True
            elif one.grow(s, room):
                s.lengths = [s.lengths[0] + room, min(s.lengths[1] + room, running[index][0])]
                moved = True
        if not running and not one.waiting:
            break
        assert moved
    assert not one.waiting
    assert one.cache.free == pages
