"""The engine against its slow twin, and guarantees that hold whatever the model generates."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from _models import tiny

from emu_cog.engine.engine import Engine
from emu_cog.engine.sequence import Ended, EngineRequest, Event, GenerationConfig, Opened, Stats, Tokens
from emu_cog.pipeline import Pipeline
from emu_cog.prompt.tokens import block_length
from emu_cog.request import Request, Sampling
from tests.conftest import photo
from tests.twin import judge

Pipelines = Callable[[str], Pipeline]
Models = Callable[[str], torch.nn.Module]
TOLERANCE = 2e-5
"""fp32 probabilities: the engine batches two streams over a cache, the twin runs each alone without one."""


def prepare(pipeline: Pipeline, request: Request, **changes: object) -> tuple[EngineRequest, GenerationConfig]:
    prepared = pipeline.prepare(request if request.seed is not None else replace(request, seed=0))
    return prepared.outputs[0], replace(prepared.config, **changes)  # type: ignore[arg-type]


def answers(events: list[Event]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for event in events:
        if isinstance(event, Tokens):
            found.setdefault(event.index, []).extend(event.ids)
    return found


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
    "an EOI within text": ("stray", Request(prompt="a fox", task="story", size=(3, 4), seed=1, max_new_tokens=40)),
    "vla": ("storyteller", Request(prompt="a fox", task="vla", size=(3, 4), seed=15, max_new_tokens=150)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_sampled_distribution_is_the_twins(name: str, pipelines: Pipelines, plain_models: Models) -> None:
    model, request = CASES[name]
    pipeline = pipelines(model)
    output, config = prepare(pipeline, request)
    traced: list[tuple[str, torch.Tensor]] = []
    events = list(
        pipeline.engine.generate([output], config, trace=lambda kind, probs: traced.append((kind, probs.clone())))
    )
    answer = answers(events)[0]
    steps = judge(plain_models(model), pipeline.lm.ids, output.conditional, output.unconditional, answer, config)
    ids = pipeline.lm.ids
    sampled = [step for step in steps if step.kind != "forced"]
    texts = [step.kind for step in sampled].index("visual" if config.size else "digit")
    if config.single_image and texts - 1 == config.max_new_tokens:
        assert sampled.pop(texts - 1).token == ids.boi  # opened at the limit, on the model's behalf
    for step, (kind, probs) in zip(sampled, traced, strict=True):
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
    output, config = prepare(pipeline, request, image=greedy, text=greedy, max_new_tokens=60)
    events = list(pipeline.engine.generate([output], config))
    answer = answers(events)[0]
    steps = judge(plain_models(model), pipeline.lm.ids, output.conditional, output.unconditional, answer, config)
    wrong = [i for i, step in enumerate(steps) if int(step.probs.argmax()) != step.token]
    # Only the BOI that opens the image at the limit need not be the likeliest token.
    assert wrong in ([], [60] if config.single_image else [])
    assert all(steps[i].token == pipeline.lm.ids.boi for i in wrong)


def test_four_outputs_are_four_runs(pipelines: Pipelines) -> None:
    pipeline = pipelines("picture")
    output, config = prepare(pipeline, Request(prompt="a small red boat", size=(5, 6), seed=40))
    seeds = [40, 41, 42, 43]
    outputs = [replace(output, seed=seed) for seed in seeds]
    together = answers(list(pipeline.engine.generate(outputs, config)))
    alone = {i: answers(list(pipeline.engine.generate([single], config)))[0] for i, single in enumerate(outputs)}
    assert together == alone
    assert len({tuple(ids) for ids in together.values()}) == 4


def test_different_prompts_share_a_batch(pipelines: Pipelines) -> None:
    pipeline = pipelines("storyteller")
    made = [
        prepare(pipeline, Request(prompt=prompt, task="story", size=(2, 3), seed=seed, max_new_tokens=120))
        for prompt, seed in (("a fox", 1), ("the long way home over the hills", 2), ("a fox", 3))
    ]
    outputs, config = [output for output, _ in made], made[0][1]
    together = answers(list(pipeline.engine.generate(outputs, config)))
    alone = {i: answers(list(pipeline.engine.generate([output], config)))[0] for i, output in enumerate(outputs)}
    assert together == alone


def test_the_models_own_sizes_may_differ_within_a_batch(pipelines: Pipelines) -> None:
    pipeline = pipelines("picture")
    output, config = prepare(pipeline, Request(prompt="boat", aspect_ratio="model"))
    outputs = [replace(output, seed=seed) for seed in (0, 1, 2)]
    events = list(pipeline.engine.generate(outputs, config))
    alone = {i: answers(list(pipeline.engine.generate([single], config)))[0] for i, single in enumerate(outputs)}
    sizes = {event.size for event in events if isinstance(event, Opened)}
    assert answers(events) == alone
    assert len(sizes) > 1
    assert all(len(ids) == block_length(*event.size) for event, ids in zip(
        (e for e in events if isinstance(e, Opened)), alone.values(), strict=True))  # fmt: skip


def test_first_size_holds_for_later_images(pipelines: Pipelines) -> None:
    pipeline = pipelines("storyteller")
    request = Request(prompt="walk", task="explore", aspect_ratio="model", max_new_tokens=900)
    for seed in range(6):
        output, config = prepare(pipeline, request)
        output = replace(output, seed=seed)
        sizes = [e.size for e in pipeline.engine.generate([output], config) if isinstance(e, Opened)]
        if len(sizes) > 1:
            assert len(set(sizes)) == 1
            return
    pytest.fail("no run with two images")


@pytest.mark.parametrize("model", ["talker", "silent"])
@pytest.mark.parametrize("task", ["t2i", "x2i"])
def test_an_image_is_made_even_if_the_model_never_begins_one(model: str, task: str, pipelines: Pipelines) -> None:
    pipeline = pipelines(model)
    images = (photo(1),) if task == "x2i" else ()
    request = Request(prompt="boat", task=task, images=images, image_area=2304, max_new_tokens=20)
    output, config = prepare(pipeline, request)
    events = list(pipeline.engine.generate([output, output], config))
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
        output, config = prepare(pipeline, request)
        events = list(pipeline.engine.generate([output], config))
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
    output, config = prepare(pipeline, Request(prompt="walk", task="story", max_new_tokens=33))
    events = list(pipeline.engine.generate([output], config))
    assert reasons(events) == ["limit"]
    assert isinstance(events[-1], Stats)
    assert len(answers(events)[0]) == events[-1].sampled == 33


def test_a_full_context_ends_text_but_never_an_image(pipelines: Pipelines, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = pipelines("talker")
    monkeypatch.setattr(pipeline.lm, "context", 400)
    output, config = prepare(pipeline, Request(prompt="walk", task="story", size=(3, 3)), max_new_tokens=None)
    events = list(pipeline.engine.generate([output], config))
    assert reasons(events) == ["context"]
    assert len(output.conditional) + len(answers(events)[0]) == pipeline.lm.context
    events = list(pipeline.engine.generate([output], replace(config, single_image=True)))
    assert reasons(events) == ["image"]
    assert len(output.conditional) + len(answers(events)[0]) <= pipeline.lm.context


def test_a_long_prompt_is_prefilled_in_chunks(
    pipelines: Pipelines, plain_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three chunks, the last two without the shorter unconditional prompt."""
    monkeypatch.setattr("emu_cog.engine.engine.PREFILL_CHUNK", 100)
    pipeline = pipelines("picture")
    output, config = prepare(pipeline, Request(prompt="boat " * 210, size=(2, 2), seed=1))
    assert 300 > len(output.conditional) > 200 > 100 > len(output.unconditional)
    traced: list[torch.Tensor] = []
    events = list(pipeline.engine.generate([output], config, trace=lambda _, probs: traced.append(probs.clone())))
    ids, model = pipeline.lm.ids, plain_models("picture")
    steps = judge(model, ids, output.conditional, output.unconditional, answers(events)[0], config)
    sampled = [step.probs for step in steps if step.kind != "forced"]
    torch.testing.assert_close(traced[0][0], sampled[0][: ids.visual], atol=TOLERANCE, rtol=1e-3)
    torch.testing.assert_close(traced[-1][0], sampled[-1][ids.visual :], atol=TOLERANCE, rtol=1e-3)


def test_the_device_never_waits_for_a_prompts_next_chunk(pipelines: Pipelines, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waited for each chunk to end before it prepared the next, and the device meanwhile for the host."""
    pipeline = pipelines("picture")
    happened: list[str] = []

    class Timer:
        def __init__(self, device: torch.device) -> None:
            self.number = sum("read" in what for what in happened)
            happened.append(f"read {self.number}")

        def stop(self) -> None: ...

        def wait(self) -> None:
            happened.append(f"wait {self.number}")

        def seconds(self) -> float:
            happened.append(f"time {self.number}")
            return 0.5

    monkeypatch.setattr("emu_cog.engine.engine.PREFILL_CHUNK", 100)
    monkeypatch.setattr("emu_cog.engine.engine.DeviceTimer", Timer)
    output, config = prepare(pipeline, Request(prompt="boat " * 300, size=(2, 2), seed=1))
    *_, stats = pipeline.engine.generate([output], config)
    assert happened[:6] == ["read 0", "read 1", "wait 0", "read 2", "wait 1", "read 3"]
    chunks = sum("read" in what for what in happened)
    assert happened[-chunks:] == [f"time {number}" for number in range(chunks)]
    assert isinstance(stats, Stats)
    assert stats.prefill_seconds == 0.5 * chunks


def test_a_reused_cache_leaks_nothing(pipelines: Pipelines) -> None:
    """A run must not read what an earlier, longer one left in the cache."""
    pipeline = pipelines("picture")
    short, config = prepare(pipeline, Request(prompt="boat", size=(3, 3), seed=5))
    long, _ = prepare(pipeline, Request(prompt="street " * 300, size=(3, 3), seed=6))
    first = answers(list(pipeline.engine.generate([short], config)))
    list(pipeline.engine.generate([long], config))
    cache = pipeline.runner.cache
    with torch.inference_mode():
        for buffer in (*cache.keys, *cache.values):
            buffer.fill_(1e4)
    assert answers(list(pipeline.engine.generate([short], config))) == first


def test_stopping_early_leaves_the_engine_usable(pipelines: Pipelines) -> None:
    pipeline = pipelines("picture")
    output, config = prepare(pipeline, Request(prompt="boat", size=(8, 8), seed=5))
    expected = answers(list(pipeline.engine.generate([output], config)))
    run = pipeline.engine.generate([output], config)
    for _ in range(4):
        next(run)
    run.close()
    assert answers(list(pipeline.engine.generate([output], config))) == expected


# -- several at once -------------------------------------------------------------------------------------------


COMPANY = [
    ("picture", Request(prompt="a red boat", seed=1, size=(4, 5))),
    ("picture", Request(prompt="boat", seed=2, size=(7, 3), guidance_scale=2.0, image_top_k=20, num_outputs=3)),
    ("picture", Request(prompt="boat " * 80, seed=3, size=(3, 3), image_top_p=0.6, image_temperature=0.7)),
    ("picture", Request(prompt="boat", seed=4, aspect_ratio="model", image_top_k=20)),
    ("picture", Request(prompt="red", seed=5, task="x2i", images=(photo(1),), image_area=64 * 64)),
    ("picture", Request(prompt="a fox", task="story", size=(3, 4), seed=16, max_new_tokens=60)),
    ("picture", Request(prompt="a red boat", seed=7, size=(2, 9), guidance_scale=1.0)),
]


def alone(pipeline: Pipeline, request: Request) -> dict[int, list[int]]:
    prepared = pipeline.prepare(request)
    return answers(list(pipeline.engine.generate(prepared.outputs, prepared.config)))


@pytest.mark.parametrize("seed", range(4))
def test_no_answer_depends_on_the_company(seed: int, pipelines: Pipelines) -> None:
    """Requests join at random moments, some are cancelled at random moments; the others' tokens stay the same."""
    pipeline = pipelines("picture")
    rng = random.Random(seed)
    expected = [alone(pipeline, request) for _, request in COMPANY]
    order = [i % len(COMPANY) for i in range(16)]
    rng.shuffle(order)
    submissions = []
    for i in order:
        prepared = pipeline.prepare(COMPANY[i][1])
        submissions.append(pipeline.engine.submit(prepared.outputs, prepared.config))
        time.sleep(rng.random() * 0.03)
        if rng.random() < 0.2:
            submissions[-1].cancel()
    for i, submission in zip(order, submissions, strict=True):
        if not submission.cancelled:
            assert answers(list(submission.events())) == expected[i]
    pipeline.engine.call(lambda: None)  # a round later everything cancelled is gone, too
    assert pipeline.runner.cache.free == pipeline.runner.cache.pages - 1


def test_few_pages_only_make_it_slower(make_checkpoint: Callable[[str], tiny.TinyFolders]) -> None:
    """A cache of two pictures for twelve of them, and for stories that may each fill it."""
    folders = make_checkpoint("picture")
    pipeline = Pipeline.load(folders.model, folders.vision, device="cpu", max_outputs=2, max_context=600)
    assert pipeline.runner.slots == 2
    prepared = [pipeline.prepare(COMPANY[i % len(COMPANY)][1]) for i in range(12)]
    expected = [answers(list(pipeline.engine.generate(one.outputs, one.config))) for one in prepared]
    submissions = [pipeline.engine.submit(one.outputs, one.config) for one in prepared]
    assert [answers(list(submission.events())) for submission in submissions] == expected


def test_a_cancelled_submission_frees_its_pages(pipelines: Pipelines) -> None:
    pipeline = pipelines("talker")
    output, config = prepare(pipeline, Request(prompt="walk", task="story", max_new_tokens=30_000))
    submission = pipeline.engine.submit([output], config)
    next(submission.events())  # leaving closes it
    deadline = time.monotonic() + 20
    while pipeline.runner.cache.free < pipeline.runner.cache.pages - 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_fails_fails_alone(pipelines: Pipelines) -> None:
    pipeline = pipelines("picture")
    output, config = prepare(pipeline, COMPANY[0][1])
    expected = answers(list(pipeline.engine.generate([output], config)))

    def fail(kind: str, probs: torch.Tensor) -> None:
        raise ValueError("no more")

    first = pipeline.engine.submit([output], config)
    bad = pipeline.engine.submit([output], config, trace=fail)
    with pytest.raises(ZeroDivisionError):
        pipeline.engine.call(lambda: 1 // 0)
    with pytest.raises(ValueError, match="no more"):
        list(bad.events())
    assert answers(list(first.events())) == expected


@pytest.mark.parametrize("where", ["prompt", "step"])
def test_out_of_memory_costs_one_request(where: str, pipelines: Pipelines, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = pipelines("picture")
    output, config = prepare(pipeline, COMPANY[0][1])
    expected = answers(list(pipeline.engine.generate([output], config)))
    owner, name = (pipeline.lm, "feed") if where == "prompt" else (pipeline.runner, "step")
    whole, calls = getattr(owner, name), iter(range(10_000))

    def short(*args: object) -> object:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return whole(*args)

    monkeypatch.setattr(owner, name, short)
    submissions = [pipeline.engine.submit([output], config) for _ in range(4)]
    ended: list[object] = []
    for submission in submissions:
        try:
            ended.append(answers(list(submission.events())))
        except RuntimeError as error:
            ended.append(str(error)[:20])
    assert ended.count("memory ran out while") == 1
    assert ended.count(expected) == 3


def test_an_unexpected_error_reaches_everyone_and_the_engine_goes_on(
    pipelines: Pipelines, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipelines("picture")
    output, config = prepare(pipeline, COMPANY[0][1])
    expected = answers(list(pipeline.engine.generate([output], config)))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.runner, "step", lambda sequences, width: 1 / 0)
        submissions = [pipeline.engine.submit([output], config) for _ in range(3)]
        for submission in submissions:
            with pytest.raises(ZeroDivisionError):
                list(submission.events())
    assert answers(list(pipeline.engine.generate([output], config))) == expected


def test_an_engine_that_nobody_keeps_answers(make_checkpoint: Callable[[str], tiny.TinyFolders]) -> None:
    """Its thread ended before it looked, and whoever read the events waited forever."""
    folders = make_checkpoint("picture")
    pipeline = Pipeline.load(folders.model, folders.vision, device="cpu")
    output, config = prepare(pipeline, Request(prompt="boat", size=(2, 2), seed=5))
    expected = answers(list(pipeline.engine.generate([output], config)))
    events = Engine(pipeline.runner).generate([output], config)
    gc.collect()
    assert answers(list(events)) == expected


def test_a_device_that_is_lost_is_told_to_all(
    make_checkpoint: Callable[[str], tiny.TinyFolders], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where even what clears up failed, the engine's thread died, and all requests waited forever."""
    folders = make_checkpoint("picture")
    pipeline = Pipeline.load(folders.model, folders.vision, device="cpu")
    output, config = prepare(pipeline, Request(prompt="boat", size=(2, 2), seed=5))

    def lost(*args: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(pipeline.runner, "step", lost)
    monkeypatch.setattr(pipeline.runner, "end", lost)
    running = [pipeline.engine.submit([output], config) for _ in range(2)]
    for one in running:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            list(one.events())
    with pytest.raises(RuntimeError, match="closed: an error that it can't recover from .*: start the program again"):
        pipeline.engine.submit([output], config)
    with pytest.raises(RuntimeError, match="start the program again"):
        pipeline.engine.call(int)


def test_one_thread_serves_all_requests_and_ends_with_the_engine(
    make_checkpoint: Callable[[str], tiny.TinyFolders],
) -> None:
    """Each request after a pause had a thread of its own, and with it none of cuDNN's plans."""
    folders = make_checkpoint("picture")
    pipeline = Pipeline.load(folders.model, folders.vision, device="cpu")
    output, config = prepare(pipeline, Request(prompt="boat", size=(2, 2), seed=5))
    threads = []
    for _ in range(2):
        list(pipeline.engine.generate([output], config))
        threads.append(pipeline.engine.call(threading.current_thread))
        time.sleep(0.05)  # the thread finds nothing to do
    assert threads[0] is threads[1]
    engine = weakref.ref(pipeline.engine)
    del pipeline
    gc.collect()
    assert engine() is None
    threads[0].join(20)
    assert not threads[0].is_alive()


def test_a_closed_engine_says_so(make_checkpoint: Callable[[str], tiny.TinyFolders]) -> None:
    folders = make_checkpoint("talker")
    pipeline = Pipeline.load(folders.model, folders.vision, device="cpu")
    output, config = prepare(pipeline, Request(prompt="walk", task="story", max_new_tokens=30_000))
    submission = pipeline.engine.submit([output], config)
    pipeline.engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(submission.events())
    with pytest.raises(RuntimeError, match="closed"):
        pipeline.engine.submit([output], config)


def test_prompts_that_begin_alike_are_computed_once(pipelines: Pipelines, plain_models: Models) -> None:
    pipeline = pipelines("picture")
    output, config = prepare(pipeline, Request(prompt="boat " * 120, size=(2, 3), seed=3))
    alike = output.conditional[:200]
    output = replace(output, unconditional=(*alike, *output.unconditional))
    traced: list[torch.Tensor] = []
    events = list(pipeline.engine.generate([output], config, trace=lambda _, probs: traced.append(probs.clone())))
    ids = pipeline.lm.ids
    steps = judge(plain_models("picture"), ids, output.conditional, output.unconditional, answers(events)[0], config)
    sampled = [step.probs for step in steps if step.kind == "visual"]
    visual = [probs[0] for probs in traced if probs.shape[1] == ids.visual_count]
    torch.testing.assert_close(torch.stack(visual), torch.stack(sampled)[:, ids.visual :], atol=TOLERANCE, rtol=1e-3)
