"""Learning from judged answers: the likelihoods are the engine's own, and what was right becomes likelier."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from emu_cog.config import Sampling
from emu_cog.jobs import Job
from emu_cog.pipeline import Pipeline
from emu_cog.weights import MINIATURE
from scripts.mini import reinforce
from scripts.mini.attempts import Attempt, attempt, log_likelihoods
from scripts.mini.evaluate import answers, jobs_of, request
from scripts.mini.language_model import LanguageModel, Shape
from scripts.mini.pool import SQUARE
from scripts.mini.reinforce import Course, Reinforcement, advantages, packs, rate_at
from scripts.mini.render import picture
from scripts.mini.sequences import Mix
from scripts.mini.tasks import sample
from scripts.mini.tasks.sample import TEXT, Said
from scripts.mini.train_language import read_weights
from scripts.mini.verdicts import Answer, Verdict
from scripts.mini.world import Scene

pytestmark = pytest.mark.skipif(not (MINIATURE / "model").is_dir(), reason="this package holds no trained miniature")


class _Now:
    """An executor that does the work at once."""

    def submit(self, work: Any, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*args))
        return future


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline.load(MINIATURE / "model", MINIATURE / "vision", device="cpu")


@pytest.fixture
def model() -> LanguageModel:
    found = LanguageModel(Shape.read(MINIATURE / "model"), dtype=torch.float32)
    found.load_released(read_weights(MINIATURE / "model"))
    return found


@pytest.mark.parametrize("task", ["t2i", "explore"])
def test_likelihoods_are_those_of_the_engines_own_draws(task: str, pipeline: Pipeline, model: LanguageModel) -> None:
    """With text between the pictures and references: every draw of two jobs side by side."""
    rng = Random(5)
    made = [sample(rng, task, *SQUARE) for _ in range(20)]
    made = [m for m in made if len(m.references) == len(made[0].references)]
    made = sorted(made, key=lambda m: len(m.pictures))[:2]  # the shortest, for time's sake
    jobs, rules = jobs_of(pipeline, [request(m, 3 + i, None) for i, m in enumerate(made)])
    seen: list[list[Tensor]] = [[], []]
    engine = pipeline.engine

    class Traced:
        lm = engine.lm

        def generate(self, jobs: Any, rules: Any) -> Iterator[Any]:
            return engine.generate(jobs, rules, trace=self.trace)

        def trace(self, kind: str, probs: Tensor) -> None:
            if kind == "visual":
                for i in range(2):
                    seen[i].append(probs[i].clone())

    pipeline.engine = Traced()  # type: ignore[assignment]
    given = answers(pipeline, jobs, rules)
    tried = [
        attempt(job, answer.ids, pipeline.tokenizer.ids, guidance=rules.guidance, sampling=rules.image)
        for job, answer in zip(jobs, given, strict=True)
    ]
    assert all(len(t.drawn) == 144 * len(g.pictures) for t, g in zip(tried, given, strict=True))
    visual = pipeline.tokenizer.ids.visual
    with torch.no_grad():
        found = log_likelihoods(model, tried, visual)
    for one, logs, probs in zip(tried, found, seen, strict=True):
        # A job that is through earlier than the other is traced on, with numbers that mean nothing.
        codes = torch.tensor(one.drawn)[:, None] - visual
        expected = torch.stack(probs[: len(codes)]).gather(1, codes)[:, 0]
        torch.testing.assert_close(logs.exp(), expected.float(), atol=1e-3, rtol=1e-3)


def test_sampling_that_cuts_tokens_off_is_refused(pipeline: Pipeline) -> None:
    job = Job(conditional=(1,), unconditional=(1,), seed=0)
    for cut in (Sampling(top_k=9), Sampling(top_p=0.9)):
        with pytest.raises(ValueError, match="cuts some of the 2048"):
            attempt(job, [], pipeline.tokenizer.ids, guidance=1.0, sampling=cut)


def test_an_answer_is_measured_against_the_others_to_its_prompt() -> None:
    def single(worths: list[float], group: int) -> list[float]:
        return [each for (each,) in advantages([(worth,) for worth in worths], group)]

    assert single([1, 1, 1, 1, 0, 0, 0, 0], 4) == [0.0] * 8
    assert single([1, 0, 0, 0], 4) == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    assert np.sum(single([1, 0, 0, 1, 1, 0], 3)) == pytest.approx(0)
    # Picture by picture; one that is missing counts as wrong, and has no tokens to teach.
    assert advantages([(1, 0), (1, 1), (1,)], 3) == [[0, -0.5], [0, 1], [0]]


def test_passes_hold_all_attempts_and_keep_to_their_room() -> None:
    made = [Attempt((0,) * n, (0,) * 5, (), (), (), 1.0, 1.0) for n in (30, 10, 20, 7, 100)]
    groups = list(packs(made, 90))
    assert sorted(i for group in groups for i in group) == [0, 1, 2, 3, 4]
    assert groups == [[3, 1, 2][:2], [2], [0], [4]]
    for group in groups:
        assert len(group) == 1 or 2 * len(group) * max(len(made[i].conditional) for i in group) <= 90


def test_the_rate_climbs_stays_and_falls() -> None:
    rates = [rate_at(n / 100, n, 1.0) for n in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[5] == rates[50] == 1.0
    assert rates[100] == pytest.approx(0.1)


def training(model: LanguageModel, pipeline: Pipeline, out: Path, **options: Any) -> Reinforcement:
    settings = {"prompts": {"t2i": 2}, "group": 2, "batch": 4, "tokens": 2048, "rate": 1e-4, "seed": 1, "mix": Mix()}
    return Reinforcement(model, pipeline, out, _Now(), **(settings | options))  # type: ignore[arg-type]


def test_what_was_right_becomes_likelier_and_the_pipeline_learns_it(
    model: LanguageModel, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge's word is replaced: the first answer to each prompt is right, the second is not."""
    turn = iter(range(100))
    monkeypatch.setattr(reinforce, "worth", lambda made, answer: (float(next(turn) % 2 == 0),))
    learner = training(model, pipeline, tmp_path)
    attempts, worths = learner.draw("t2i", 2)
    assert worths == [(1,), (0,), (1,), (0,)]
    assert len({a.drawn for a in attempts}) == 4
    visual = pipeline.tokenizer.ids.visual

    def sums() -> list[float]:
        with torch.no_grad():
            return [float(each.sum()) for each in log_likelihoods(model, attempts, visual)]

    before = sums()
    for _ in range(2):
        assert learner.learn(attempts, advantages(worths, 2), 0.0) > 0
    after = sums()
    assert after[0] + after[2] > before[0] + before[2] + 1
    assert after[1] + after[3] < before[1] + before[3] - 1
    held = pipeline.lm.model.lm_head.weight
    torch.testing.assert_close(held, model.head.detach().bfloat16().to(held.dtype), atol=0, rtol=0)


def test_one_that_was_cut_off_goes_on(
    model: LanguageModel, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = iter(range(100))
    monkeypatch.setattr(reinforce, "worth", lambda made, answer: (float(next(turn) % 2 == 0),))
    first = training(model, pipeline, tmp_path, prompts={"t2i": 1})
    first.run(updates=1, seconds=1000)
    learnt = {name: value.clone() for name, value in model.state_dict().items()}
    fresh = LanguageModel(model.shape, dtype=torch.float32)
    second = training(fresh, pipeline, tmp_path, prompts={"t2i": 1})
    assert second.course == Course(1, first.course.seconds, [{"t2i": 0.5}])
    assert all(torch.equal(value, learnt[name]) for name, value in fresh.state_dict().items())
    second.stop()
    assert second.run(updates=9, seconds=1000)["finished"] is False
    assert second.course.updates == 1


def test_an_edit_that_changes_the_rest_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    made = sample(Random(1), "x2i", *SQUARE)
    answer = Answer(parts=[np.zeros((192, 192, 3), np.uint8)])
    for wrong, outside, expected in ((None, 2.0, 1.0), (None, 7.0, 0.0), ("no", 1.0, 0.0), (None, None, 1.0)):
        found = Verdict(wrong, outside)
        monkeypatch.setattr(reinforce, "verdict", lambda *_, found=found: found)
        assert reinforce.worth(made, answer) == (expected,)
        assert reinforce.worth(made, Answer()) == ()


@pytest.mark.parametrize("given", [True, False])
def test_a_walk_is_worth_its_views_one_by_one(given: bool) -> None:
    """Drawn truth agrees; a view in inverted colours agrees with neither neighbour; wrong moves are worth nothing."""
    rng = Random(4)
    made = sample(rng, "explore", *SQUARE)
    while bool(made.references) != given or len(made.pictures) != 3 + (not given):
        made = sample(rng, "explore", *SQUARE)

    def answer() -> Answer:
        parts = [np.asarray(picture(p)) if isinstance(p, Scene) else p.text for p in made.answer if _kept(p)]
        return Answer(parts=parts, whole=True)

    truth = answer()
    count = len(truth.pictures)
    assert reinforce.worth(made, truth) == (1.0,) * count
    middle = [i for i, part in enumerate(truth.parts) if not isinstance(part, str)][count - 2]
    truth.parts[middle] = 255 - truth.parts[middle]  # type: ignore[operator]
    assert reinforce.worth(made, truth) == (*(1.0,) * (count - 2), 0.0, 0.0)
    assert reinforce.worth(made, Answer(parts=answer().parts[:-2], whole=True)) == (0.0,) * (count - 1)
    told = answer()
    told.parts[-2] = "We go up." if "up" not in str(told.parts[-2]) else "We go down."
    assert reinforce.worth(made, told) == (0.0,) * count


def _kept(part: Said | Scene) -> bool:
    return isinstance(part, Scene) or part.kind == TEXT
