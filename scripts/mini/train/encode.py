"""Writes the language model's examples: words and scenes made by many processes, pictures drawn and encoded here.

Parts of the data are whole files as soon as they are there, so that training can begin with the first.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from emu_cog.vision.ibq import IBQ, load_vision_tokenizer
from scripts.mini.pool import SQUARE, begin, workers
from scripts.mini.render import Batch, grained, paint, paints, places, render, resize
from scripts.mini.train.fused import fuse
from scripts.mini.train.runs import device_name, fraction, log_record
from scripts.mini.train.sequences import BLANK, MANY, SHARES, Chunk, Mix, chunk, tokenizer

LENGTHS = (180, 210, 240, 360, 420, 560, 720, 840, 1008, 1260)
"""Sequences are filled up to one of these."""
SAMPLES_A_CHUNK = 10_000
"""Many, so that the rarer sizes of pictures fill their batches too."""
CHUNKS_A_PART = 2
HELD_OUT_SAMPLES = 4000
HELD_OUT = "held-out.npz"
PARTS = "part-*-?????.npz"
"""What `part_name` gives, any seed's and whole."""
LOG = "encode.log"
"""A JSON line for every start that came to its end."""
Rows = dict[int, list[tuple[NDArray[np.int32], NDArray[np.uint8]]]]


class Encoder:
    """Pictures to codes in bulk: on a GPU in half precision with fused norms, the commonest size drawn by compiled
    code."""

    COUNT, FEW = 256, 128
    """Pictures a batch, of the commonest and of other sizes: always as many, since each new shape is set up anew."""
    CPU_COUNT = 8
    """On a CPU: larger batches spend their time on getting memory."""
    MOST = 10
    """Things in a picture that compiled code draws; the rare fuller ones are drawn step by step."""

    def __init__(self, vision: IBQ, device: torch.device, *, compiled: bool) -> None:
        self.vision, self.device = copy.deepcopy(vision), device
        if device.type == "cuda":
            self.vision = fuse(self.vision.half())
        self.dtype = self.vision.dtype
        self.paints = paints(device)
        self.place = places(SQUARE[0] * 16, SQUARE[1] * 16, device)
        self._draw = torch.compile(draw_square, dynamic=False) if compiled and device.type == "cuda" else None

    @torch.inference_mode()
    def codes(self, batch: Batch, final: tuple[int, int], again: bool) -> NDArray[np.int64]:
        """(N, rows * columns) codes of a batch's pictures, resized to `final` rows and columns; with `again`, of
        the pictures that come back from their codes."""
        found = []
        step = self.COUNT if (batch.rows, batch.columns) == SQUARE else self.FEW
        step = step if self.device.type == "cuda" else self.CPU_COUNT
        for i in range(0, len(batch.head), step):
            head, things = batch.head[i : i + step], batch.things[i : i + step]
            if self.device.type == "cuda":
                blank = ((0, step - len(head)), (0, 0))
                head, things = np.pad(head, blank), np.pad(things, (*blank, (0, 0)), constant_values=-1)
            pixels = resize(self.draw(batch.rows, batch.columns, head, things), final[0] * 16, final[1] * 16)
            if again:
                back = self.vision.decode(self.vision.encode(self._floats(pixels)))
                pixels = ((back.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)
            found.append(self.vision.encode(self._floats(pixels)).flatten(1))
        return torch.cat(found)[: len(batch.head)].cpu().numpy()

    def _floats(self, pixels: Tensor) -> Tensor:
        return (pixels.to(self.dtype) / 127.5 - 1).contiguous(memory_format=torch.channels_last)

    def draw(self, rows: int, columns: int, head: NDArray[np.int32], things: NDArray[np.int32]) -> Tensor:
        """(N, 3, H, W) uint8 pictures, the same by either way."""
        most = things.shape[1]
        if self._draw is None or (rows, columns) != SQUARE or most > self.MOST:
            batch = Batch(rows, columns, head, things)
            return render(batch, self.device)
        things = np.pad(things, ((0, 0), (0, self.MOST - most), (0, 0)), constant_values=-1)
        tensors = (torch.from_numpy(x).to(self.device) for x in (head, things))
        return self._draw(*tensors, *self.paints, self.place)


def draw_square(head: Tensor, things: Tensor, palette: Tensor, sheet: Tensor, place: Tensor) -> Tensor:
    return grained(paint(head, things, palette, sheet, *SQUARE), head, place)


def fill(part: Chunk, encoder: Encoder, visual: int) -> NDArray[np.int32]:
    """The chunk's ids with the codes of its drawn pictures in place of the blanks."""
    codes = np.zeros(part.blanks, np.int32)
    for (_, final, again), (batch, firsts) in part.scenes.items():
        found = encoder.codes(batch, final, again)
        codes[firsts[:, None] + np.arange(found.shape[1])] = found
    blank = part.ids >= visual + BLANK
    ids = part.ids.copy()
    ids[blank] = visual + codes[part.ids[blank] - visual - BLANK]
    return ids


def sort_in(rows: Rows, part: Chunk, encoder: Encoder, visual: int) -> None:
    """Put the chunk's lines among those of their length; the few longer than all LENGTHS are left out."""
    ids = fill(part, encoder, visual)
    ends = np.cumsum(part.lengths)
    for first, end in zip(ends - part.lengths, ends, strict=True):
        length = next((n for n in LENGTHS if n >= end - first), None)
        if length is not None:
            rows.setdefault(length, []).append((ids[first:end], part.learn[first:end]))


def write(path: Path, rows: Rows, pad: int) -> None:
    """One file of (M, length) int16 ids and uint8 marks for every length, in place whole or not at all."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for length, lines in sorted(rows.items()):
        ids = np.full((len(lines), length), pad, np.int16)
        learn = np.zeros((len(lines), length), np.uint8)
        for i, (line, mask) in enumerate(lines):
            ids[i, : len(line)], learn[i, : len(line)] = line, mask
        arrays |= {f"ids_{length}": ids, f"learn_{length}": learn}
    unfinished = path.with_suffix(".unfinished.npz")
    np.savez(unfinished, **arrays)
    unfinished.rename(path)


def part_name(seed: int, number: int) -> str:
    return f"part-{seed:04d}-{number:05d}.npz"


def parts_there(folder: Path, seed: int) -> int:
    """How many of `seed`'s parts an earlier start, cut off perhaps, has left in `folder`."""
    number = 0
    while (folder / part_name(seed, number)).exists():
        number += 1
    return number


def parts(source: Iterator[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks in lists of CHUNKS_A_PART."""
    group: list[Chunk] = []
    for one in source:
        group.append(one)
        if len(group) == CHUNKS_A_PART:
            yield group
            group = []
    if group:
        yield group


def shares(text: str) -> dict[str, int]:
    """The option's JSON: whole numbers by task; argparse tells what is wrong."""
    given = json.loads(text)
    wrong = not isinstance(given, dict) or any(type(n) is not int or n < 0 for n in given.values())
    if wrong or not set(given) <= set(SHARES) or not sum(given.values()):
        raise argparse.ArgumentTypeError(f"{text!r} is not an object of whole numbers for {', '.join(SHARES)}")
    return given


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vision", type=Path, required=True, help="folder of the vision tokenizer")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder of the tokenizer files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the examples and the log")
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further part after this wall time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--shares",
        type=shares,
        default=SHARES,
        help=f"how often each task is drawn, as JSON; default {json.dumps(SHARES)}. The held-out samples keep to that",
    )
    parser.add_argument(
        "--many", type=fraction, default=0.0, help=f"which part of t2i, 0 to 1, is to show {MANY} things or more"
    )
    parser.add_argument(
        "--beyond",
        type=fraction,
        default=0.0,
        help="which part of t2i and x2i, 0 to 1, goes beyond the examination: longer lists, places for several "
        "things, two changes at once, things alike",
    )
    parser.add_argument(
        "--reworded", type=fraction, default=0.0, help="which part of the questions, 0 to 1, is put in other words"
    )
    parser.add_argument("--wordings", type=int, default=1, help="ways each sample is asked in, over the same pictures")
    parser.add_argument("--held-out", type=int, default=HELD_OUT_SAMPLES, help="samples kept to measure with, at most")
    parser.add_argument("--compile", action="store_true", help="compile the drawing")
    args = parser.parse_args()
    if args.wordings < 1 or args.held_out < 1:
        parser.error("--wordings and --held-out count from 1")
    started = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    words = tokenizer(args.vocabulary)
    visual, pad = words.ids.visual, words.ids.pad
    size = min(SAMPLES_A_CHUNK, args.samples)
    mix = Mix(args.shares, args.many, args.beyond, args.reworded, args.wordings)
    jobs = [(args.seed * 1_000_003 + i, size, args.vocabulary, mix) for i in range(-(-args.samples // size))]
    there = parts_there(args.out, args.seed)
    jobs = jobs[there * CHUNKS_A_PART :]
    if not jobs:
        raise SystemExit(
            f"{args.out} holds all {there} parts of seed {args.seed} already: give another --seed for more"
        )
    chunks = begin(chunk, jobs, processes=workers())  # before CUDA is touched, which does not outlive a fork
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    encoder = Encoder(load_vision_tokenizer(args.vision, device=device), device, compiled=args.compile)
    held: Rows = {}
    sort_in(held, chunk((900_000_000, min(size, args.held_out), args.vocabulary, Mix())), encoder, visual)
    write(args.out / HELD_OUT, held, pad)
    ready = time.time()

    samples, written, working = there * CHUNKS_A_PART * size, there, 0.0
    bar = tqdm(total=args.samples, initial=samples, mininterval=5.0)
    for group in parts(chunks):
        begun = time.time()
        rows: Rows = {}
        for one in group:
            sort_in(rows, one, encoder, visual)
            samples += len(one.lengths)
            bar.update(len(one.lengths))
        write(args.out / part_name(args.seed, written), rows, pad)
        written += 1
        working += time.time() - begun
        if time.time() - started > args.seconds:
            break
    record = {
        "samples": samples,
        "parts": written,
        "seconds": round(time.time() - started, 1),
        "setup_seconds": round(ready - started, 1),
        "waiting_seconds": round(time.time() - ready - working, 1),
        "seed": args.seed,
        "shares": args.shares,
        "many": args.many,
        "beyond": args.beyond,
        "reworded": args.reworded,
        "wordings": args.wordings,
        "device": device_name(device),
    }
    log_record(record, args.out / LOG)


if __name__ == "__main__":
    main()
