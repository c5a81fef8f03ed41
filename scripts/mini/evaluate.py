"""Evaluates the miniature on held-out combinations with fixed seeds; a judge checks the pixels.

Runs the package's own pipeline, several requests per batch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from emu_cog.engine.runner import MAX_SEQUENCES
from emu_cog.events import Finished, Picture
from emu_cog.model.quantize import FORMATS
from emu_cog.pipeline import Pipeline
from emu_cog.prompt.segments import Text
from emu_cog.prompt.tasks import TABLE, TABLES
from emu_cog.request import Request
from emu_cog.vision.ibq import IBQ
from emu_cog.vision.images import decode_image, encode_image
from emu_cog.weights.store import MINIATURE
from scripts.mini import handwritten
from scripts.mini.judge import detect
from scripts.mini.pool import SQUARE, workers
from scripts.mini.render import picture
from scripts.mini.rewording import reworded
from scripts.mini.spec import mismatch
from scripts.mini.tasks import MAKERS, sample
from scripts.mini.tasks.sample import Sample
from scripts.mini.verdicts import Answer, Verdict, verdict

Result = TypeVar("Result")
Key = TypeVar("Key")
Grid = Sequence[Sequence[int]]
SEED = 20_260
WORDS = ("grammar", "reworded", "beyond", *handwritten.SHEETS)
MAX_NEW_TOKENS = 1500
"""Limit on sampled tokens per sequence, for answers that do not end by themselves; no sample needs as many."""


def request(made: Sample, seed: int, guidance: float | None, temperature: float | None = None) -> Request:
    return Request(
        prompt=made.question,
        task=made.task,
        images=tuple(picture(scene) for scene in made.references),
        guidance_scale=guidance,
        image_temperature=temperature,
        seed=seed,
        max_new_tokens=MAX_NEW_TOKENS if TABLE[made.task].interleaved else None,
    )


def answers(pipeline: Pipeline, requests: Sequence[Request]) -> list[Answer]:
    """Generate the answers to all requests in one batch."""
    given = [Answer() for _ in requests]
    for i, event in pipeline.stream_batch(requests):
        answer = given[i]
        if isinstance(event, Picture):
            answer.parts.append(np.asarray(event.image))
        elif isinstance(event, Text) and event.kind == "text":
            answer.parts.append(event.text)
        elif isinstance(event, Text):
            answer.reasoned = True
        elif isinstance(event, Finished):
            answer.ended = event.reason != "limit"
    return given


def load(model: Path, vision: Path, *, batch: int, quantize: str | None = None) -> Pipeline:
    """A pipeline for `batch` requests at a time, at most MAX_SEQUENCES: what is beyond waits for its turn."""
    return Pipeline.load(model, vision, max_outputs=min(batch, MAX_SEQUENCES), quantize=quantize)


def answered(
    pipeline: Pipeline, made: Sequence[Sample], ask: Callable[[int], Request], batch: int
) -> Iterator[tuple[int, Answer]]:
    """Yield (i, answer to `ask(i)`) for every sample i of one task, in batches.

    Samples of similar length share a batch, so that none waits long for another.
    """
    order = sorted(range(len(made)), key=lambda i: (len(made[i].references), len(made[i].pictures)))
    for begin in range(0, len(order), batch):
        numbers = order[begin : begin + batch]
        yield from zip(numbers, answers(pipeline, [ask(i) for i in numbers]), strict=True)


@contextmanager
def judge_pool() -> Iterator[Executor]:
    """A process pool for the judge. Enter it before loading the model: CUDA does not survive a fork."""
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers(), mp_context=fork, initializer=_init_judge) as judges:
        judges.submit(int).result()
        yield judges


def _init_judge() -> None:
    """Ignore Ctrl-C in the workers: the main process handles it and may still need their verdicts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def held_out_samples(task: str, count: int, seed: int = SEED, *, beyond: bool = False) -> list[Sample]:
    """The `count` samples of `task` that every evaluation with this `seed` uses."""
    rng = Random(f"{seed} {task}")
    return [sample(rng, task, *SQUARE, unseen=True, beyond=beyond) for _ in range(count)]


def worded_samples(words: str, task: str, count: int, seed: int) -> list[Sample]:
    """`count` samples with questions worded as `words` says, one of WORDS.

    "beyond" asks for more at once and is reworded, too. The few handwritten questions repeat until there are `count`.
    """
    if words in handwritten.SHEETS:
        return list(itertools.islice(itertools.cycle(handwritten.samples(task, *SQUARE, sheet=words)), count))
    made = held_out_samples(task, count, seed, beyond=words == "beyond")
    if words != "grammar":
        return [replace(one, question=reworded(Random(f"{seed} {i}"), one)) for i, one in enumerate(made)]
    return made


def evaluate(
    pipeline: Pipeline,
    task: str,
    *,
    count: int,
    batch: int,
    guidance: float | None = None,
    temperature: float | None = None,
    gallery: Path | None = None,
    judges: Executor | None = None,
    seed: int = SEED,
    words: str = "grammar",
) -> dict[str, float | int | str]:
    """Results of one task over `count` held-out samples, questions worded as in `worded_samples`.

    `gallery`: folder for a contact sheet of the first answers. `judges`: pool to judge in parallel with generation.
    """
    made, started = worded_samples(words, task, count, seed), time.time()
    given: dict[int, Answer] = {}
    verdicts: dict[int, Future[Verdict]] = {}
    stream = answered(pipeline, made, lambda i: request(made[i], seed + i, guidance, temperature), batch)
    for i, answer in tqdm(stream, total=count, desc=task, mininterval=10):
        given[i] = answer
        verdicts[i] = judges.submit(verdict, made[i], answer) if judges else _completed(verdict, made[i], answer)
    results = {i: verdicts[i].result() for i in given}
    outside = [r.outside for r in results.values() if r.outside is not None]
    moves = [sum(r.moves[i] for r in results.values()) for i in range(2)]
    figures: dict[str, float | int | str] = {
        "right": round(sum(r.wrong is None for r in results.values()) / count, 4),
        "prompts": count,
        "reasoned": round(sum(a.reasoned for a in given.values()) / count, 3),
        "seconds": round(time.time() - started, 1),
    }
    if outside:
        figures["outside_difference"] = round(float(np.mean(outside)), 2)
    if moves[1]:
        figures |= {"moves_right": round(moves[0] / moves[1], 4), "moves": moves[1]}
    failed = [i for i in given if results[i].wrong]
    for i in failed[:12]:
        print(f"    {made[i].question} -> {results[i].wrong}")
    if gallery:
        gallery.mkdir(parents=True, exist_ok=True)
        for name, numbers in ((task, sorted(given)), (f"{task}_wrong", failed)):
            if numbers:
                sheet([(made[i], given[i], results[i].wrong) for i in numbers[:24]]).save(
                    gallery / f"{name}.jpg", quality=85
                )
    return figures


def _completed(work: Callable[..., Result], *args: object) -> Future[Result]:
    future: Future[Result] = Future()
    future.set_result(work(*args))
    return future


def reconstruction_quality(vision: IBQ, count: int) -> dict[str, float | int]:
    """Reconstruction quality of the vision tokenizer: PSNR on held-out pictures with noise, and the judge's
    accuracy.
    """
    made = held_out_samples("t2i", count)
    right, ratios = 0, []
    for one in tqdm(made, desc="vision", mininterval=10):
        before = picture(one.pictures[-1])
        codes = encode_image(before, before.width * before.height, vision)
        after = np.asarray(decode_image(codes, vision))
        error = np.square(np.asarray(before).astype(np.float32) - after).mean()
        ratios.append(10 * np.log10(255**2 / error))
        right += mismatch(detect(after), one.specs[-1]) is None
    return {"psnr_db": round(float(np.mean(ratios)), 2), "right": round(right / count, 4), "pictures": count}


def sheet(shown: Sequence[tuple[Sample, Answer, str | None]]) -> Image.Image:
    """A contact sheet, one row per sample: references, answers, and below them the question and the verdict."""
    cell, line = 200, 226
    columns = max(len(m.references) + len(a.pictures) for m, a, _ in shown)
    side_by_side = max(1, 6 // max(columns, 1))
    rows = -(-len(shown) // side_by_side)
    page = Image.new("RGB", (side_by_side * columns * cell, rows * line), "white")
    draw = ImageDraw.Draw(page)
    for n, (made, answer, wrong) in enumerate(shown):
        x, y = n % side_by_side * columns * cell, n // side_by_side * line
        images = [picture(s) for s in made.references] + [Image.fromarray(p) for p in answer.pictures]
        for i, image in enumerate(images):
            image.thumbnail((196, 196))
            page.paste(image, (x + i * cell, y))
        draw.text((x, y + 197), made.question[: 32 * columns], "black")
        draw.text((x, y + 209), (wrong or "right")[: 32 * columns], "red" if wrong else "green")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MINIATURE / "model")
    parser.add_argument("--vision", type=Path, default=MINIATURE / "vision")
    parser.add_argument("--tokenizer", action="store_true", help="also evaluate the vision tokenizer alone")
    parser.add_argument("--tasks", nargs="*", choices=list(MAKERS), help="default: all that the model does")
    parser.add_argument("--prompts", type=int, default=200, help="prompts per task")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the prompts; use other values for development")
    parser.add_argument(
        "--words",
        choices=WORDS,
        default=WORDS[0],
        help="by the grammar, paraphrased (rewording.py), paraphrased with more requirements at once (beyond), or "
        "handwritten (the JSON files here); all but the first two only for t2i and x2i",
    )
    parser.add_argument("--guidance", type=float, help="guidance scale, instead of the checkpoint's default")
    parser.add_argument("--temperature", type=float, help="image temperature, instead of the checkpoint's default")
    parser.add_argument("--quantize", choices=FORMATS, help="quantize the layers' weights to 8 bits")
    parser.add_argument("--gallery", type=Path, help="folder for contact sheets of the answers")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    asked = args.tasks or list(MAKERS)
    if args.words not in WORDS[:2] and not set(asked) <= set(handwritten.TASKS):
        parser.error(f"--words {args.words} supports --tasks {' '.join(handwritten.TASKS)}, not {' '.join(asked)}")
    with judge_pool() as judges:
        pipeline = load(args.model, args.vision, batch=args.batch, quantize=args.quantize)
        record: dict[str, object] = {
            "guidance": args.guidance or "default",
            "temperature": args.temperature or "default",
            "quantize": args.quantize or "off",
            "device": str(pipeline.lm.device),
            "seed": args.seed,
            "words": args.words,
        }
        if args.tokenizer:
            record["vision"] = reconstruction_quality(pipeline.vision, args.prompts)
            print("vision", record["vision"], flush=True)
        for task in args.tasks or [task for task in MAKERS if task in TABLES[pipeline.defaults.kind]]:
            record[task] = evaluate(
                pipeline,
                task,
                count=args.prompts,
                batch=args.batch,
                guidance=args.guidance,
                temperature=args.temperature,
                gallery=args.gallery,
                judges=judges,
                seed=args.seed,
                words=args.words,
            )
            print(task, record[task], flush=True)
            if args.out:
                args.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
