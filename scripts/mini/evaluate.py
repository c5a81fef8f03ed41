"""Measures the miniature on combinations it never saw: fixed seeds, a judge that looks at the pixels.

Uses the package's own pipeline, several requests to a batch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from tqdm import tqdm

from emu_cog import pictures, prompts, tasks
from emu_cog.config import Request
from emu_cog.jobs import Ended, Job, Rules, Tokens
from emu_cog.pipeline import Pipeline
from emu_cog.segments import ImageCodes, Reader, Text
from scripts.mini import reading
from scripts.mini.judge import look
from scripts.mini.pool import SQUARE, workers
from scripts.mini.render import picture
from scripts.mini.tasks import MAKERS, sample
from scripts.mini.tasks.sample import Sample
from scripts.mini.wish import Seen, Wish, complaint
from scripts.mini.world import Scene, Thing

Result = TypeVar("Result")
SEED = 20_260
DIFFERS = 32
"""Two pixels differ when a channel does by more than this, of 255, after a 3x3 mean."""
AGREE = 0.03
"""Overlapping views agree when at most this share of their common pixels differs."""


@dataclass
class Answer:
    """What the model gave for one sample: texts and pictures in reading order."""

    parts: list[str | NDArray[np.uint8]] = field(default_factory=list)
    reasoned: bool = False
    whole: bool = False

    @property
    def pictures(self) -> list[NDArray[np.uint8]]:
        return [p for p in self.parts if not isinstance(p, str)]

    @property
    def texts(self) -> list[str]:
        return [p for p in self.parts if isinstance(p, str)]

    @property
    def in_steps(self) -> bool:
        """Text, picture, text, picture ... to the end, and ended by the model itself."""
        kinds = [isinstance(p, str) for p in self.parts]
        return self.whole and bool(kinds) and kinds == [True, False] * (len(kinds) // 2)


def request(made: Sample, seed: int, guidance: float | None) -> Request:
    return Request(
        prompt=made.question,
        task=made.task,
        images=tuple(picture(scene) for scene in made.references),
        guidance_scale=guidance,
        seed=seed,
    )


@torch.inference_mode()
def answers(pipeline: Pipeline, requests: Sequence[Request]) -> list[Answer]:
    """All requests of one task and size in one batch, step by step as `Pipeline.stream` takes one."""
    plans = [tasks.plan(r, pipeline.defaults) for r in requests]
    jobs = []
    for r, plan in zip(requests, plans, strict=True):
        codes = [pictures.encode(image, plan.image_area, pipeline.vision) for image in r.images]
        prompt = prompts.build(plan.task, r.prompt, codes, pipeline.tokenizer)
        jobs.append(Job(conditional=prompt.conditional, unconditional=prompt.unconditional, seed=r.seed or 0))
    plan = plans[0]
    rules = Rules(
        guidance=plan.guidance,
        image=plan.image,
        text=plan.text,
        size=plan.size,
        max_new_tokens=plan.max_new_tokens or 1500,
        single_image=not plan.task.interleaved,
    )
    readers = [Reader(pipeline.tokenizer, output=i) for i in range(len(jobs))]
    given = [Answer() for _ in jobs]
    for event in pipeline.engine.generate(jobs, rules):
        if isinstance(event, Ended):
            given[event.job].whole = event.reason != "limit"
            segments = list(readers[event.job].finish())
        elif isinstance(event, Tokens):
            segments = list(readers[event.job].feed(event.ids))
        else:
            continue
        for segment in segments:
            if isinstance(segment, ImageCodes):
                given[event.job].parts.append(np.asarray(pictures.decode(segment.codes, pipeline.vision)))
            elif isinstance(segment, Text) and segment.kind == "text":
                given[event.job].parts.append(segment.text)
            else:
                given[event.job].reasoned = True
    return given


# -- what counts as right, task by task: None, or what is wrong ---------------------------------------------


def judge_last(made: Sample, answer: Answer) -> str | None:
    """t2i, x2i and vla: the last picture fulfils the last wish."""
    if not answer.pictures:
        return "no picture"
    return complaint(look(answer.pictures[-1]), made.wishes[-1])


def judge_steps(made: Sample, answer: Answer) -> str | None:
    """howto and story: every picture shows what its own text says, and together they are what was asked for."""
    if not answer.in_steps:
        return "texts and pictures do not take turns"
    seen = [look(p) for p in answer.pictures]
    wishes: list[Wish] | None
    if made.task == "howto":
        wishes = reading.howto_wishes(answer.texts)
    else:
        read = [reading.story_wish(text) for text in answer.texts]
        wishes = [w for w in read if w] if all(read) else None
    if wishes is None:
        return "a text can't be read"
    for number, (there, wish) in enumerate(zip(seen, wishes, strict=True), 1):
        if wrong := complaint(there, wish):
            return f"step {number}: {wrong}"
    return asked_for(made, seen)


def asked_for(made: Sample, seen: Sequence[Seen]) -> str | None:
    """The steps together against the question."""
    if made.task == "howto":
        goal = made.wishes[-1]
        told = [m.wanted for m in reading.mentions(made.question)]
        return complaint(seen[-1], replace(goal, wanted=tuple(told), relations=()))
    if len(seen) != len(made.wishes):
        return f"{len(seen)} scenes, not {len(made.wishes)}"
    told = [m.wanted for m in reading.mentions(made.question)]
    for there, place in zip(seen, told[1:], strict=False):
        if not any((t.shape, t.colour) == (place.shape, place.colour) for t in there.things):
            return f"the {place.colour} {place.shape} of the question is missing"
    return None


def judge_explore(made: Sample, answer: Answer) -> str | None:
    """Neighbouring views agree where they overlap, and the moves are those asked for."""
    views = [np.asarray(picture(scene)) for scene in made.references] + answer.pictures
    if len(answer.pictures) != len(made.pictures) or not answer.in_steps:
        return f"{len(answer.pictures)} views, not {len(made.pictures)}"
    moves = [m for m in map(reading.move, answer.texts) if m]
    asked = [m for m in (reading.move(word) for word in made.question.replace(",", " ").split()) if m]
    if moves != asked:
        return f"moves {moves}, not {asked}"
    for number, (before, after, move) in enumerate(zip(views, views[1:], moves, strict=False), 1):
        apart = disagreement(before, after, move)
        if apart > AGREE:
            return f"move {number}: {apart:.1%} of the overlap differs"
    return None


def disagreement(before: NDArray[np.uint8], after: NDArray[np.uint8], move: str) -> float:
    """The share of pixels that differ where two views, half a view apart, overlap."""
    height, width = before.shape[0], before.shape[1]
    dx, dy = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}[move]
    sx, sy = dx * (width // 32 * 16), dy * (height // 32 * 16)

    def part(view: NDArray[np.uint8], x: int, y: int) -> NDArray[np.float32]:
        cut = view[max(y, 0) : height + min(y, 0), max(x, 0) : width + min(x, 0)]
        return ndimage.uniform_filter(cut.astype(np.float32), (3, 3, 0))

    return float((np.abs(part(before, sx, sy) - part(after, -sx, -sy)).max(-1) > DIFFERS).mean())


JUDGES = {
    "t2i": judge_last,
    "x2i": judge_last,
    "vla": judge_last,
    "howto": judge_steps,
    "story": judge_steps,
    "explore": judge_explore,
}


def outside_difference(made: Sample, after: NDArray[np.uint8], size: tuple[int, int]) -> float | None:
    """Mean absolute difference, of 255, between base picture and answer where nothing was to change.

    None where all of it was.
    """
    goal = made.pictures[-1]
    base = next(s for s in made.references if _base(s, goal))
    before = np.asarray(picture(base).resize(size, Image.Resampling.BICUBIC)).astype(np.float32)
    keep = np.ones(before.shape[:2], bool)
    if goal.background != base.background or goal.texture != base.texture:
        keep[:] = False
        for thing in base.things:  # the things stay: their insides
            left, top, right, bottom = thing.box
            inner = np.abs(before[top:bottom, left:right] - np.array(_ground(before))).max(-1) > 60
            keep[top:bottom, left:right] = ndimage.binary_erosion(inner, iterations=3)
    else:
        kept = [t for t in base.things if t in goal.things]
        changed = [t for t in base.things if t not in kept]
        found = look(after).things
        changed += [t for t in found if not any(_same_spot(t, k) for k in kept)]
        for thing in changed:
            left, top, right, bottom = thing.box
            keep[max(top - 8, 0) : bottom + 8, max(left - 8, 0) : right + 8] = False
    return float(np.abs(before - after.astype(np.float32))[keep].mean()) if keep.any() else None


def _base(scene: Scene, goal: Scene) -> bool:
    """Whether `scene` is the picture the edit began from: most of its things are in the goal, or its ground is."""
    same_ground = (scene.background, scene.texture) == (goal.background, goal.texture)
    return same_ground or all(t in goal.things for t in scene.things)


def _ground(picture: NDArray[np.float32]) -> list[float]:
    return [float(v) for v in np.median(picture[:4].reshape(-1, 3), axis=0)]


def _same_spot(a: Thing, b: Thing) -> bool:
    return abs(a.x - b.x) <= 12 and abs(a.y - b.y) <= 12


# -- the run ------------------------------------------------------------------------------------------------


def verdict(made: Sample, answer: Answer) -> tuple[str | None, float | None]:
    """(what is wrong or None, for x2i the difference where nothing was to change)."""
    apart = None
    if made.task == "x2i" and answer.pictures:
        last = answer.pictures[-1]
        apart = outside_difference(made, last, (last.shape[1], last.shape[0]))
    return JUDGES[made.task](made, answer), apart


def held_out_samples(task: str, count: int) -> list[Sample]:
    """The `count` samples every evaluation of `task` uses."""
    rng = Random(f"{SEED} {task}")
    return [sample(rng, task, *SQUARE, unseen=True) for _ in range(count)]


def evaluate(
    pipeline: Pipeline,
    task: str,
    *,
    count: int,
    batch: int,
    guidance: float | None = None,
    gallery: Path | None = None,
    judges: Executor | None = None,
) -> dict[str, float | int | str]:
    """Figures of one task over `count` held-out samples; `gallery` gets a sheet of the first answers.

    `judges` judge beside the generation, else it is done in turn.
    """
    made, started = held_out_samples(task, count), time.time()
    # Alike lengths go together, so that no request of a batch waits long for another.
    order = sorted(range(count), key=lambda i: (len(made[i].references), len(made[i].pictures)))
    given: dict[int, Answer] = {}
    found: dict[int, Future[tuple[str | None, float | None]]] = {}
    for begin in tqdm(range(0, count, batch), desc=task, mininterval=10):
        numbers = order[begin : begin + batch]
        asked = [request(made[i], SEED + i, guidance) for i in numbers]
        for i, answer in zip(numbers, answers(pipeline, asked), strict=True):
            given[i] = answer
            found[i] = judges.submit(verdict, made[i], answer) if judges else _now(verdict, made[i], answer)
    results = {i: found[i].result() for i in order}
    apart = [difference for _, difference in results.values() if difference is not None]
    figures: dict[str, float | int | str] = {
        "right": round(sum(wrong is None for wrong, _ in results.values()) / count, 4),
        "prompts": count,
        "reasoned": round(sum(a.reasoned for a in given.values()) / count, 3),
        "seconds": round(time.time() - started, 1),
    }
    if apart:
        figures["outside_difference"] = round(float(np.mean(apart)), 2)
    failed = [i for i in order if results[i][0]]
    for i in failed[:12]:
        print(f"    {made[i].question} -> {results[i][0]}")
    if gallery:
        gallery.mkdir(parents=True, exist_ok=True)
        for name, numbers in ((task, sorted(order)), (f"{task}_wrong", failed)):
            if numbers:
                sheet([(made[i], given[i], results[i][0]) for i in numbers[:24]]).save(
                    gallery / f"{name}.jpg", quality=85
                )
    return figures


def _now(work: Callable[..., Result], *args: object) -> Future[Result]:
    future: Future[Result] = Future()
    future.set_result(work(*args))
    return future


def through_codes(pipeline: Pipeline, count: int) -> dict[str, float | int]:
    """What the vision tokenizer alone costs: PSNR of held-out pictures, noise included, and the judge on them."""
    made = held_out_samples("t2i", count)
    right, ratios = 0, []
    for one in tqdm(made, desc="vision", mininterval=10):
        before = picture(one.pictures[-1])
        codes = pictures.encode(before, before.width * before.height, pipeline.vision)
        after = np.asarray(pictures.decode(codes, pipeline.vision))
        error = np.square(np.asarray(before).astype(np.float32) - after).mean()
        ratios.append(10 * np.log10(255**2 / error))
        right += complaint(look(after), one.wishes[-1]) is None
    return {"psnr_db": round(float(np.mean(ratios)), 2), "right": round(right / count, 4), "pictures": count}


def sheet(shown: Sequence[tuple[Sample, Answer, str | None]]) -> Image.Image:
    """One line a sample: references, then answers, the question and the verdict under them."""
    cell, line = 200, 226
    columns = max(len(m.references) + len(a.pictures) for m, a, _ in shown)
    side_by_side = max(1, 6 // max(columns, 1))
    rows = -(-len(shown) // side_by_side)
    page = Image.new("RGB", (side_by_side * columns * cell, rows * line), "white")
    draw = ImageDraw.Draw(page)
    for n, (made, answer, verdict) in enumerate(shown):
        x, y = n % side_by_side * columns * cell, n // side_by_side * line
        images = [picture(s) for s in made.references] + [Image.fromarray(p) for p in answer.pictures]
        for i, image in enumerate(images):
            image.thumbnail((196, 196))
            page.paste(image, (x + i * cell, y))
        draw.text((x, y + 197), made.question[: 32 * columns], "black")
        draw.text((x, y + 209), (verdict or "right")[: 32 * columns], "red" if verdict else "green")
    return page


def main() -> None:
    here = Path(__file__).resolve().parents[2] / "emu_cog" / "mini"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=here / "model")
    parser.add_argument("--vision", type=Path, default=here / "vision")
    parser.add_argument("--tokenizer", action="store_true", help="measure the vision tokenizer by itself, too")
    parser.add_argument("--tasks", nargs="*", default=list(MAKERS), choices=list(MAKERS))
    parser.add_argument("--prompts", type=int, default=200, help="a task")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--guidance", type=float, help="instead of the checkpoint's default")
    parser.add_argument("--gallery", type=Path, help="folder for sheets of answers")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    fork = multiprocessing.get_context("fork")  # before the model is loaded: CUDA does not outlive a fork
    with ProcessPoolExecutor(workers(), mp_context=fork, initializer=torch.set_num_threads, initargs=(1,)) as judges:
        judges.submit(int).result()
        pipeline = Pipeline.load(args.model, args.vision)
        record: dict[str, object] = {"guidance": args.guidance or "default", "device": str(pipeline.lm.device)}
        if args.tokenizer:
            record["vision"] = through_codes(pipeline, args.prompts)
            print("vision", record["vision"], flush=True)
        for task in args.tasks:
            record[task] = evaluate(
                pipeline,
                task,
                count=args.prompts,
                batch=args.batch,
                guidance=args.guidance,
                gallery=args.gallery,
                judges=judges,
            )
            print(task, record[task], flush=True)
            if args.out:
                args.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
