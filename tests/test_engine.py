"""The engine against its slow twin, and the promises that hold whatever the model says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from emu_cog.engine.sequence import Ended, EngineRequest, Event, GenerationConfig, Opened, Stats, Tokens
from emu_cog.pipeline import Pipeline
from emu_cog.prompt.tokens import block_length
from emu_cog.request import Request, Sampling
from tests.conftest import photo
from tests.twin import judge

Pipelines = Callable[[str], Pipeline]
Models = Callable[[str], torch.nn.Module]
TOLERANCE = 2e-5
"""fp32 probabilities: the engine batches two streams over a cache, the twin runs each alone and whole."""


def job_and_rules(pipeline: Pipeline, request: Request, **changes: object) -> tuple[EngineRequest, GenerationConfig]:
    prepared = pipeline.prepare(request if request.seed is not None else replace(request, seed=0))
    return prepared.outputs[0], replace(prepared.config, **changes)  # type: ignore[arg-type]


def answers(events: list[Event]) -> dict[int, list[int]]:
    told: dict[int, list[int]] = {}
    for event in events:
        if isinstance(event, Tokens):
            told.setdefault(event.index, []).extend(event.ids)
    return told


def reasons(events: list[Event]) -> list[str]:
    return [event.reason for event in events if isinstance(event, Ended)]


CASES = {
    "t2i": ("wild", Request(prompt="a red boat", seed=1, size=(4, 5), max_new_tokens=40)),
    "t2i, plain": ("picture", Request(prompt="a red boat", seed=2, size=(3, 4), guidance_scale=5.0, image_top_k=9)),
    "t2i, top-p": ("picture", Request(prompt="boat", seed=3, size=(3, 3), image_top_p=0.6, image_temperature=0.7)),
    "t2i, the model's size": ("picture", Request(prompt="boat", seed=4, aspect_ratio="model", image_top_k=20)),
    "t2i, guidance 1": ("picture", Request(prompt="boat", seed=5, size=(3, 3), guidance_scale=1.0)),
    "x2i, 1 reference": ("picture", Request(prompt="red", task="x2i", images=(photo(1),), image_area=64 * 64)),
    "x2i, 2 references": (
        "wild",
        Request(
            prompt="red",
            task="x2i",
            images=(photo(1), photo(2, 90, 200)),
            size=(3, 5),
            image_area=4096,
            seed=8,
            max_new_tokens=150,
        ),
    ),
    "x2i, 3 references": (
        "picture",
        Request(prompt="r", task="x2i", images=(photo(1), photo(2), photo(3, 80, 80)), image_area=2304, seed=9),
    ),
    "story": ("storyteller", Request(prompt="a fox", task="story", size=(3, 4), seed=16, max_new_tokens=170)),
    "howto with a reference": (
        "storyteller",
        Request(prompt="a fox", task="howto", images=(photo(4),), image_area=2304, seed=5, max_new_tokens=150),
    ),
    "an EOI amid text": ("stray", Request(prompt="a fox", task="story", size=(3, 4), seed=1, max_new_tokens=40)),
    "vla": ("storyteller", Request(prompt="a fox", task="vla", size=(3, 4), seed=15, max_new_tokens=150)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_sampled_distribution_is_the_twins(name: str, pipelines: Pipelines, plain_models: Models) -> None:
    model, request = CASES[name]
    pipeline = pipelines(model)
    job, rules = job_and_rules(pipeline, request)
    traced: list[tuple[str, torch.Tensor]] = []
    events = list(
        pipeline.engine.generate([job], rules, trace=lambda kind, probs: traced.append((kind, probs.clone())))
    )
    answer = answers(events)[0]
    steps = judge(plain_models(model), pipeline.lm.ids, job.conditional, job.unconditional, answer, rules)
    ids = pipeline.lm.ids
    drawn = [step for step in steps if step.kind != "forced"]
    texts = [step.kind for step in drawn].index("visual" if rules.size else "digit")
    if rules.single_image and texts - 1 == rules.max_new_tokens:
        assert drawn.pop(texts - 1).token == ids.boi  # opened at the limit, in the model's stead
    for step, (kind, probs) in zip(drawn, traced, strict=True):
        assert kind == step.kind
        offset = ids.visual if kind == "visual" else 0
        full = torch.zeros_like(step.probs)
        if kind == "digit":
            full[list(ids.digits)] = probs[0]
        else:
            full[offset : offset + probs.shape[1]] = probs[0]
        torch.testing.assert_close(full, step.probs, atol=TOLERANCE, rtol=1e-3)
        assert step.probs[step.token] > 0
    for step in steps:
        if step.kind == "forced":
            assert step.probs[step.token] == 1.0
    assert sum(step.kind == "visual" for step in steps) >= 9


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_the_twins(name: str, pipelines: Pipelines, plain_models: Models) -> None:
    model, request = CASES[name]
    pipeline = pipelines(model)
    greedy = Sampling(top_k=1)
    job, rules = job_and_rules(pipeline, request, image=greedy, text=greedy, max_new_tokens=60)
    events = list(pipeline.engine.generate([job], rules))
    answer = answers(events)[0]
    steps = judge(plain_models(model), pipeline.lm.ids, job.conditional, job.unconditional, answer, rules)
    wrong = [i for i, step in enumerate(steps) if int(step.probs.argmax()) != step.token]
    # The one token that need not be the likeliest is the BOI that opens the image at the limit.
    assert wrong in ([], [60] if rules.single_image else [])
    assert all(steps[i].token == pipeline.lm.ids.boi for i in wrong)


def test_four_outputs_are_four_runs(pipelines: Pipelines) -> None:
    pipeline = pipelines("picture")
    job, rules = job_and_rules(pipeline, Request(prompt="a small red boat", size=(5, 6), seed=40))
    seeds = [40, 41, 42, 43]
    jobs = [EngineRequest(conditional=job.conditional, unconditional=job.unconditional, seed=seed) for seed in seeds]
    together = answers(list(pipeline.engine.generate(jobs, rules)))
    alone = {i: answers(list(pipeline.engine.generate([single], rules)))[0] for i, single in enumerate(jobs)}
    assert together == alone
    assert len({tuple(ids) for ids in together.values()}) == 4


def test_different_prompts_share_a_batch(pipelines: Pipelines) -> None:
    pipeline = pipelines("storyteller")
    made = [
        job_and_rules(pipeline, Request(prompt=prompt, task="story", size=(2, 3), seed=seed, max_new_tokens=120))
        for prompt, seed in (("a fox", 1), ("the long way home over the hills", 2), ("a fox", 3))
    ]
    jobs, rules = [job for job, _ in made], made[0][1]
    together = answers(list(pipeline.engine.generate(jobs, rules)))
    alone = {i: answers(list(pipeline.engine.generate([job], rules)))[0] for i, job in enumerate(jobs)}
    assert together == alone


def test_the_models_own_sizes_may_differ_within_a_batch(pipelines: Pipelines) -> None:
    pipeline = pipelines("picture")
    job, rules = job_and_rules(pipeline, Request(prompt="boat", aspect_ratio="model"))
    jobs = [
        EngineRequest(conditional=job.conditional, unconditional=job.unconditional, seed=seed) for seed in (0, 1, 2)
    ]
    events = list(pipeline.engine.generate(jobs, rules))
    alone = {i: answers(list(pipeline.engine.generate([single], rules)))[0] for i, single in enumerate(jobs)}
    sizes = {event.size for event in events if isinstance(event, Opened)}
    assert answers(events) == alone
    assert len(sizes) > 1
    assert all(len(ids) == block_length(*event.size) for event, ids in zip(
        (e for e in events if isinstance(e, Opened)), alone.values(), strict=True))  # fmt: skip


def test_first_size_holds_for_later_images(pipelines: Pipelines) -> None:
    pipeline = pipelines("storyteller")
    request = Request(prompt="walk", task="explore", aspect_ratio="model", max_new_tokens=900)
    for seed in range(6):
        job, rules = job_and_rules(pipeline, request)
        job = EngineRequest(conditional=job.conditional, unconditional=job.unconditional, seed=seed)
        sizes = [e.size for e in pipeline.engine.generate([job], rules) if isinstance(e, Opened)]
        if len(sizes) > 1:
            assert len(set(sizes)) == 1
            return
    pytest.fail("no run with two images")


@pytest.mark.parametrize("model", ["talker", "silent"])
@pytest.mark.parametrize("task", ["t2i", "x2i"])
def test_a_picture_comes_even_if_the_model_never_asks(model: str, task: str, pipelines: Pipelines) -> None:
    pipeline = pipelines(model)
    images = (photo(1),) if task == "x2i" else ()
    request = Request(prompt="boat", task=task, images=images, image_area=2304, max_new_tokens=20)
    job, rules = job_and_rules(pipeline, request)
    events = list(pipeline.engine.generate([job, job], rules))
    assert reasons(events) == ["image", "image"]
    assert sum(isinstance(event, Opened) for event in events) == 2
    for ids in answers(events).values():
        assert ids[-1] == pipeline.lm.ids.eoi
        text = ids[: ids.index(pipeline.lm.ids.boi)]
        assert len(text) == (20 if model == "talker" else 0)


def test_an_image_begun_below_the_limit_is_finished_beyond_it(pipelines: Pipelines) -> None:
    pipeline = pipelines("storyteller")
    for limit in range(6, 90, 3):
        request = Request(prompt="walk", task="story", size=(6, 6), seed=2, max_new_tokens=limit)
        job, rules = job_and_rules(pipeline, request)
        events = list(pipeline.engine.generate([job], rules))
        ids = answers(events)[0]
        assert ids.count(pipeline.lm.ids.boi) == ids.count(pipeline.lm.ids.eoi)
        if pipeline.lm.ids.boi in ids:
            assert reasons(events)[0] in ("limit", "eos")
            assert isinstance(events[-1], Stats)
            assert events[-1].sampled > limit
            return
    pytest.fail("no image was begun")


def test_text_alone_ends_at_the_limit(pipelines: Pipelines) -> None:
    pipeline = pipelines("talker")
    job, rules = job_and_rules(pipeline, Request(prompt="walk", task="story", max_new_tokens=33))
    events = list(pipeline.engine.generate([job], rules))
    assert reasons(events) == ["limit"]
    assert isinstance(events[-1], Stats)
    assert len(answers(events)[0]) == events[-1].sampled == 33


def test_a_full_context_ends_text_but_never_an_image(pipelines: Pipelines) -> None:
    pipeline = pipelines("talker")
    job, rules = job_and_rules(pipeline, Request(prompt="walk", task="story", size=(3, 3)), max_new_tokens=None)
    events = list(pipeline.engine.generate([job], rules))
    assert reasons(events) == ["context"]
    assert len(job.conditional) + len(answers(events)[0]) == pipeline.lm.context
    single = GenerationConfig(**{**vars(rules), "single_image": True})
    events = list(pipeline.engine.generate([job], single))
    assert reasons(events) == ["image"]
    assert len(job.conditional) + len(answers(events)[0]) <= pipeline.lm.context


def test_a_long_prompt_is_prefilled_in_chunks(pipelines: Pipelines, plain_models: Models) -> None:
    """2100 tokens: three chunks, the last two without the short unconditional prompt."""
    pipeline = pipelines("picture")
    job, rules = job_and_rules(pipeline, Request(prompt="boat " * 2100, size=(2, 2), seed=1))
    assert len(job.conditional) > 2048 > 1024 > len(job.unconditional)
    traced: list[torch.Tensor] = []
    events = list(pipeline.engine.generate([job], rules, trace=lambda _, probs: traced.append(probs.clone())))
    steps = judge(
        plain_models("picture"), pipeline.lm.ids, job.conditional, job.unconditional, answers(events)[0], rules
    )
    drawn = [step.probs for step in steps if step.kind != "forced"]
    torch.testing.assert_close(traced[0][0], drawn[0][: pipeline.lm.ids.visual], atol=TOLERANCE, rtol=1e-3)
    torch.testing.assert_close(traced[-1][0], drawn[-1][pipeline.lm.ids.visual :], atol=TOLERANCE, rtol=1e-3)


def test_the_cache_is_reused_and_leaks_nothing(pipelines: Pipelines) -> None:
    """A run must not see what an earlier, longer one left in the cache."""
    pipeline = pipelines("picture")
    short, rules = job_and_rules(pipeline, Request(prompt="boat", size=(3, 3), seed=5))
    long, _ = job_and_rules(pipeline, Request(prompt="street " * 300, size=(3, 3), seed=6))
    first = answers(list(pipeline.engine.generate([short], rules)))
    list(pipeline.engine.generate([long], rules))
    cache = pipeline.engine._cache
    assert cache is not None
    with torch.inference_mode():
        for buffer in (*cache.keys, *cache.values):
            buffer.fill_(1e4)
    assert answers(list(pipeline.engine.generate([short], rules))) == first


def test_stopping_early_leaves_the_engine_usable(pipelines: Pipelines) -> None:
    pipeline = pipelines("picture")
    job, rules = job_and_rules(pipeline, Request(prompt="boat", size=(8, 8), seed=5))
    expected = answers(list(pipeline.engine.generate([job], rules)))
    run = pipeline.engine.generate([job], rules)
    for _ in range(4):
        next(run)
    run.close()
    assert answers(list(pipeline.engine.generate([job], rules))) == expected
