"""Makes a trained language model do what it is asked more often: it draws, the judge looks, and what was right becomes
likelier, what was wrong less likely.

Every prompt is answered several times. A picture counts by how much better it did than those of its prompt's other
answers, so that prompts whose answers were all right, or all wrong, teach nothing (REINFORCE with a group's mean as
its baseline: Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!", 2019). Likelihoods are those of the
guided distribution the tokens were drawn from. Only combinations that training may see are asked for.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from emu_cog.config import Request
from emu_cog.pipeline import Pipeline
from emu_cog.weights import MINIATURE
from scripts.mini.attempts import Attempt, attempt, log_likelihoods
from scripts.mini.encode import shares
from scripts.mini.evaluate import answered, judging, load, request
from scripts.mini.language_model import LanguageModel, Shape
from scripts.mini.pool import SQUARE
from scripts.mini.runs import device_name, keep, part, stop_when_told, tell
from scripts.mini.sequences import MANY, Mix, draw_sample
from scripts.mini.tasks.sample import Sample
from scripts.mini.train_language import read_weights
from scripts.mini.verdicts import AGREE, Answer, Walk, astray, verdict

OUTSIDE = 6.0
"""An edit is not right that changes the rest by more, a mean absolute difference of 255."""
STATE = "reinforcement.pt"
LOG = "reinforce.log"
"""A JSON line for every start that came to its end, with the share of right answers update by update."""
PROMPTS = {"t2i": 64, "x2i": 32, "explore": 16}
"""A batch, of each task."""


@dataclass
class Course:
    """How far it has come, over all its starts. `right`: each update's share of right answers, task by task."""

    updates: int = 0
    seconds: float = 0.0
    right: list[dict[str, float]] = field(default_factory=list)


Worths = tuple[float, ...]
"""What an answer's pictures are worth, one by one: 1 for one that is right, else 0."""


def worth(made: Sample, answer: Answer) -> Worths:
    """explore's views by themselves, each by whether it agrees with the one before; others are right together."""
    count = len(answer.pictures)
    if made.task == "explore":
        walk = Walk.of(made, answer)
        if astray(made, answer, walk):
            return (0.0,) * count
        views = [float(apart <= AGREE) for apart in walk.apart]
        return tuple(views if made.references else [1.0, *views])
    found = verdict(made, answer)
    return (float(found.wrong is None and (found.outside is None or found.outside < OUTSIDE)),) * count


def advantages(worths: Sequence[Worths], group: int) -> list[list[float]]:
    """How much better each answer's pictures did than the others' to its prompt, picture by picture; answers to a
    prompt stand side by side. A picture that is missing is worth nothing."""
    longest = max(map(len, worths))
    padded = [[*each, *[0.0] * (longest - len(each))] for each in worths]
    table = np.asarray(padded, float).reshape(-1, group, longest)
    others = (table.sum(axis=1, keepdims=True) - table) / (group - 1)
    better = (table - others).reshape(-1, longest).tolist()
    return [line[: len(each)] for line, each in zip(better, worths, strict=True)]


class Reinforcement:
    """Updates until `updates` or `seconds` are up. State and weights are written every `KEEP` seconds and at the end:
    one that was cut off goes on from there."""

    KEEP = 60.0

    def __init__(
        self,
        model: LanguageModel,
        pipeline: Pipeline,
        out: Path,
        judges: Executor,
        *,
        prompts: Mapping[str, int],
        group: int,
        batch: int,
        tokens: int,
        rate: float,
        seed: int,
        mix: Mix,
    ) -> None:
        self.model, self.pipeline, self.out, self.judges = model, pipeline, out, judges
        self.prompts, self.group, self.batch, self.tokens = prompts, group, batch, tokens
        self.rate, self.seed, self.mix = rate, seed, mix
        self.optim = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), eps=1e-10, weight_decay=0.0)
        self.course = Course()
        self.stopped = False
        out.mkdir(parents=True, exist_ok=True)
        if (out / STATE).exists():
            state = torch.load(out / STATE, map_location=model.embed.device, weights_only=True)
            model.load_state_dict(state["model"])
            self.optim.load_state_dict(state["optimizer"])
            self.course = Course(**state["course"])
            print(f"goes on after update {self.course.updates}", flush=True)
        self._hand_over()

    def stop(self, *_: object) -> None:
        """End after the present update, to be gone on with later."""
        self.stopped = True

    def run(self, *, updates: int, seconds: float) -> dict[str, Any]:
        course, earlier, begun = self.course, self.course.seconds, time.time()
        kept = begun
        bar = tqdm(total=updates, initial=course.updates)
        while not self.stopped and course.updates < updates and course.seconds < seconds:
            progress = max(course.updates / updates, course.seconds / seconds)
            right, length = self.update(progress)
            course.right.append(right)
            course.updates += 1
            course.seconds = earlier + time.time() - begun
            bar.update()
            bar.set_postfix({task: f"{share:.2f}" for task, share in right.items()}, norm=f"{length:.3f}")
            if time.time() - kept > self.KEEP:
                self.save()
                kept = time.time()
        bar.close()
        self.save()
        return {"finished": course.updates >= updates or course.seconds >= seconds, **asdict(course)}

    def update(self, progress: float) -> tuple[dict[str, float], float]:
        """Draw, judge, learn: the shares of right answers by task, and the gradient's length."""
        made: list[Attempt] = []
        weights: list[list[float]] = []
        right = {}
        for task, count in self.prompts.items():
            attempts, worths = self.draw(task, count)
            right[task] = sum(bool(each) and all(each) for each in worths) / len(worths)
            for one, weight in zip(attempts, advantages(worths, self.group), strict=True):
                if any(weight) and one.drawn:
                    made.append(one)
                    weights.append(weight)
        length = self.learn(made, weights, progress) if made else 0.0
        return right, length

    def draw(self, task: str, count: int) -> tuple[list[Attempt], list[Worths]]:
        """`count` prompts of `task`, each answered `group` times, and what the answers are worth."""
        rng = Random(f"{self.seed} {self.course.updates} {task}")
        made: list[Sample] = []
        asked: list[Request] = []
        for _ in range(count):
            one, seed = draw_sample(rng, task, SQUARE, self.mix), rng.randrange(2**31)
            first = request(one, seed, None)
            made += [one] * self.group
            asked += [replace(first, seed=seed + i) for i in range(self.group)]
        attempts: dict[int, Attempt] = {}
        worths = {}
        ids = self.pipeline.tokenizer.ids
        for i, job, rules, answer in answered(self.pipeline, made, asked.__getitem__, self.batch):
            worths[i] = self.judges.submit(worth, made[i], answer)
            attempts[i] = attempt(job, answer.ids, ids, guidance=rules.guidance, sampling=rules.image)
        return [attempts[i] for i in range(len(made))], [worths[i].result() for i in range(len(made))]

    def learn(self, made: Sequence[Attempt], weights: Sequence[Sequence[float]], progress: float) -> float:
        """One step uphill along the weighted log-likelihood of a token; the gradient's length before it is cut."""
        visual = self.pipeline.tokenizer.ids.visual
        total = sum(len(a.drawn) for a in made)
        self.optim.zero_grad()
        for numbers in packs(made, self.tokens):
            found = log_likelihoods(self.model, [made[i] for i in numbers], visual)
            gains = [
                (each * each.new_tensor([weights[i][n] for n in made[i].numbers])).sum()
                for i, each in zip(numbers, found, strict=True)
            ]
            loss: Tensor = -torch.stack(gains).sum() / total
            loss.backward()
        length = float(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0))
        for group in self.optim.param_groups:
            group["lr"] = rate_at(progress, self.course.updates, self.rate)
        self.optim.step()
        self._hand_over()
        return length

    @torch.no_grad()
    def _hand_over(self) -> None:
        """Give the weights to the pipeline in place, where its recordings read them."""
        self.pipeline.lm.model.load_state_dict(self.model.released_state())

    def save(self) -> None:
        self.model.save(self.out)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optim.state_dict(),
            "course": asdict(self.course),
        }
        keep(state, self.out / STATE)


def packs(made: Sequence[Attempt], tokens: int) -> Iterator[list[int]]:
    """The attempts' numbers, alike lengths together, in passes of at most `tokens` tokens with their padding."""
    group: list[int] = []
    for i in sorted(range(len(made)), key=lambda i: _length(made[i])):
        if group and 2 * _length(made[i]) * (len(group) + 1) > tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _length(made: Attempt) -> int:
    return max(len(made.conditional), len(made.unconditional))


def rate_at(progress: float, update: int, rate: float) -> float:
    """A climb of five updates, a plateau for half of the way, then a straight fall to a tenth."""
    return rate * min(1.0, (update + 1) / 5) * min(1.0, 0.1 + 1.8 * (1 - progress))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, default=MINIATURE / "model", help="folder of the whole model to begin with"
    )
    parser.add_argument("--vision", type=Path, default=MINIATURE / "vision", help="folder of the vision tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights, the state and the log")
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="over all starts, setup left out")
    parser.add_argument(
        "--prompts", type=shares, default=PROMPTS, help=f"a batch, by task, as JSON; default {json.dumps(PROMPTS)}"
    )
    parser.add_argument(
        "--many", type=part, default=0.0, help=f"which part of t2i, 0 to 1, is to ask for {MANY} things or more"
    )
    parser.add_argument(
        "--reworded", type=part, default=0.0, help="which part of the questions, 0 to 1, is put in other words"
    )
    parser.add_argument("--group", type=int, default=4, help="answers to a prompt, at least 2")
    parser.add_argument("--batch", type=int, default=32, help="answers drawn side by side")
    parser.add_argument("--tokens", type=int, default=8192, help="of one pass with gradients")
    parser.add_argument("--rate", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.group < 2:
        parser.error("--group must be at least 2: an answer is measured against the others to its prompt")
    started = time.time()
    with judging() as judges:
        pipeline = load(args.model, args.vision, batch=args.batch)
        device = pipeline.lm.device
        model = LanguageModel(Shape.read(args.model), dtype=pipeline.lm.dtype).to(device)
        model.load_released(read_weights(args.model))
        training = Reinforcement(
            model,
            pipeline,
            args.out,
            judges,
            prompts={task: count for task, count in args.prompts.items() if count},
            group=args.group,
            batch=args.batch,
            tokens=args.tokens,
            rate=args.rate,
            seed=args.seed,
            mix=Mix(many=args.many, reworded=args.reworded),
        )
        stop_when_told(training.stop)
        record = training.run(updates=args.updates, seconds=args.seconds)
    record |= {
        "wall_seconds": round(time.time() - started, 1),
        "answers": record["updates"] * args.group * sum(args.prompts.values()),
        "device": device_name(device),
        "rate": args.rate,
        "seed": args.seed,
        "prompts": args.prompts,
        "group": args.group,
        "many": args.many,
        "reworded": args.reworded,
    }
    tell(record, args.out / LOG)


if __name__ == "__main__":
    main()
