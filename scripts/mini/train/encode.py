"""Writes the language model's dataset: worker processes generate samples; pictures are rendered and encoded here.

Shards are written atomically, so that training can start with the first.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from emu_cog.vision.ibq import IBQ, load_vision_tokenizer
from scripts.mini.pool import SQUARE, prefetched, workers
from scripts.mini.render import Batch, add_noise, compose, palette_and_atlas, places, render, resize
from scripts.mini.train.fused import fuse
from scripts.mini.train.runs import device_name, fraction, log_record
from scripts.mini.train.sequences import BLANK, FLASH_SHARES, MANY, SHARES, Chunk, Mix, chunk, tokenizer

LENGTHS = (180, 210, 240, 360, 420, 560, 720, 840, 1008, 1260)
"""Sequences are padded to the next of these lengths."""
FLASH_LENGTHS = (192, 224, 288, 336, 384, 480, 576, 720)
"""The same of FlashAR sequences; multiples of 16 for attention with a mask, and divisors of train_language.TOKENS."""
SAMPLES_PER_CHUNK = 10_000
"""Large, so that rarer picture sizes fill their batches, too."""
CHUNKS_PER_SHARD = 2
HELD_OUT_SAMPLES = 4000
HELD_OUT = "held-out.npz"
SHARDS = "part-*-?????.npz"
"""Glob pattern for the complete shards of any seed (see `shard_name`)."""
LOG = "encode.log"
"""One JSON line per completed run."""
Rows = dict[int, list[tuple[NDArray[np.int32], NDArray[np.uint8] | NDArray[np.int16]]]]
"""By padded length: ids, and either the loss mask (uint8) or the grid of a FlashAR sequence (int16)."""


class Encoder:
    """Encodes pictures in bulk. On a GPU: half precision, fused norms, and compiled rendering of the most common
    size.
    """

    BATCH, SMALL_BATCH = 256, 128
    """Fixed batch sizes, in pictures, of the most common and of other sizes: every new shape needs setup."""
    CPU_BATCH = 8
    """Batch size on a CPU, where larger batches spend their time on memory allocation."""
    MAX_THINGS = 10
    """Maximum things per picture in the compiled renderer; fuller pictures are rendered eagerly."""

    def __init__(self, vision: IBQ, device: torch.device, *, compiled: bool) -> None:
        self.vision, self.device = copy.deepcopy(vision), device
        if device.type == "cuda":
            self.vision = fuse(self.vision.half())
        self.dtype = self.vision.dtype
        self.palette_and_atlas = palette_and_atlas(device)
        self.place = places(SQUARE[0] * 16, SQUARE[1] * 16, device)
        self._draw = torch.compile(draw_square, dynamic=False) if compiled and device.type == "cuda" else None

    @torch.inference_mode()
    def codes(self, batch: Batch, final: tuple[int, int], reencoded: bool) -> NDArray[np.int64]:
        """(N, rows * columns) codes of a batch, resized to `final` (rows, columns); `reencoded`: encoded, decoded and
        encoded a second time."""
        found = []
        step = self.BATCH if (batch.rows, batch.columns) == SQUARE else self.SMALL_BATCH
        step = step if self.device.type == "cuda" else self.CPU_BATCH
        for i in range(0, len(batch.head), step):
            head, things = batch.head[i : i + step], batch.things[i : i + step]
            if self.device.type == "cuda":
                blank = ((0, step - len(head)), (0, 0))
                head, things = np.pad(head, blank), np.pad(things, (*blank, (0, 0)), constant_values=-1)
            pixels = resize(self.draw(batch.rows, batch.columns, head, things), final[0] * 16, final[1] * 16)
            if reencoded:
                back = self.vision.decode(self.vision.encode(self._floats(pixels)))
                pixels = ((back.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)
            found.append(self.vision.encode(self._floats(pixels)).flatten(1))
        return torch.cat(found)[: len(batch.head)].cpu().numpy()

    def _floats(self, pixels: Tensor) -> Tensor:
        return (pixels.to(self.dtype) / 127.5 - 1).contiguous(memory_format=torch.channels_last)

    def draw(self, rows: int, columns: int, head: NDArray[np.int32], things: NDArray[np.int32]) -> Tensor:
        """(N, 3, H, W) uint8 pictures, the same with and without compilation."""
        most = things.shape[1]
        if self._draw is None or (rows, columns) != SQUARE or most > self.MAX_THINGS:
            batch = Batch(rows, columns, head, things)
            return render(batch, self.device)
        things = np.pad(things, ((0, 0), (0, self.MAX_THINGS - most), (0, 0)), constant_values=-1)
        tensors = (torch.from_numpy(x).to(self.device) for x in (head, things))
        return self._draw(*tensors, *self.palette_and_atlas, self.place)


def draw_square(head: Tensor, things: Tensor, palette: Tensor, sheet: Tensor, place: Tensor) -> Tensor:
    return add_noise(compose(head, things, palette, sheet, *SQUARE), head, place)


def fill(part: Chunk, encoder: Encoder, visual: int) -> NDArray[np.int32]:
    """The chunk's ids with blanks replaced by the codes of its pictures."""
    codes = np.zeros(part.blanks, np.int32)
    for (_, final, reencoded), (batch, firsts) in part.scenes.items():
        found = encoder.codes(batch, final, reencoded)
        codes[firsts[:, None] + np.arange(found.shape[1])] = found
    blank = part.ids >= visual + BLANK
    ids = part.ids.copy()
    ids[blank] = visual + codes[part.ids[blank] - visual - BLANK]
    return ids


def add_sequences(rows: Rows, part: Chunk, encoder: Encoder, visual: int) -> None:
    """Add the chunk's sequences to `rows` by padded length; those longer than all LENGTHS are dropped."""
    ids = fill(part, encoder, visual)
    ends = np.cumsum(part.lengths)
    flash = len(part.grids) > 0
    for i, (first, end) in enumerate(zip(ends - part.lengths, ends, strict=True)):
        length = next((n for n in (FLASH_LENGTHS if flash else LENGTHS) if n >= end - first), None)
        if length is not None:
            rows.setdefault(length, []).append((ids[first:end], part.grids[i] if flash else part.learn[first:end]))


def write(path: Path, rows: Rows, pad: int) -> None:
    """Write one shard atomically, by length: (M, length) int16 ids, and uint8 loss masks or (M, 4) int16 grids."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for length, lines in sorted(rows.items()):
        ids = np.full((len(lines), length), pad, np.int16)
        flash = lines[0][1].dtype == np.int16
        other = np.zeros((len(lines), 4), np.int16) if flash else np.zeros((len(lines), length), np.uint8)
        for i, (line, more) in enumerate(lines):
            ids[i, : len(line)], other[i, : len(more)] = line, more
        arrays |= {f"ids_{length}": ids, f"{'grid' if flash else 'learn'}_{length}": other}
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished.npz")  # others may write to this folder
    np.savez(unfinished, **arrays)
    unfinished.rename(path)


def shard_name(seed: int, number: int) -> str:
    return f"part-{seed:04d}-{number:05d}.npz"


def complete_shards(folder: Path, seed: int) -> int:
    """Number of complete shards of `seed` in `folder`, from earlier runs."""
    number = 0
    while (folder / shard_name(seed, number)).exists():
        number += 1
    return number


def grouped(source: Iterator[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks in groups of CHUNKS_PER_SHARD."""
    group: list[Chunk] = []
    for one in source:
        group.append(one)
        if len(group) == CHUNKS_PER_SHARD:
            yield group
            group = []
    if group:
        yield group


def shares(text: str) -> dict[str, int]:
    """Parse the option's JSON (integers by task); argparse reports the error."""
    given = json.loads(text)
    wrong = not isinstance(given, dict) or any(type(n) is not int or n < 0 for n in given.values())
    if wrong or not set(given) <= set(SHARES) or not sum(given.values()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a JSON object of non-negative integers, at least one positive, for {', '.join(SHARES)}"
        )
    return given


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vision", type=Path, required=True, help="folder of the vision tokenizer")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder of the tokenizer files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards and the log")
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no further shard after this wall time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--shares",
        type=shares,
        help=f"sampling weight of each task as JSON; default {json.dumps(SHARES)}, or {json.dumps(FLASH_SHARES)} with "
        "--flash; held-out samples always have the default",
    )
    parser.add_argument(
        "--many", type=fraction, default=0.0, help=f"minimum fraction of t2i with {MANY} things or more, 0 to 1"
    )
    parser.add_argument(
        "--beyond",
        type=fraction,
        default=0.0,
        help="fraction of t2i and x2i harder than the standard evaluation, 0 to 1: longer lists, positions for several "
        "things, two changes at once, identical things",
    )
    parser.add_argument("--reworded", type=fraction, default=0.0, help="fraction of questions to paraphrase, 0 to 1")
    parser.add_argument("--wordings", type=int, default=1, help="number of wordings per sample, over the same pictures")
    parser.add_argument("--held-out", type=int, default=HELD_OUT_SAMPLES, help="maximum number of held-out samples")
    parser.add_argument("--flash", action="store_true", help="write sequences for train-flash, of t2i and x2i alone")
    parser.add_argument("--compile", action="store_true", help="compile the renderer")
    args = parser.parse_args()
    if args.wordings < 1 or args.held_out < 1:
        parser.error("--wordings and --held-out must be at least 1")
    default = FLASH_SHARES if args.flash else SHARES
    args.shares = args.shares or default
    if args.flash and not {task for task, share in args.shares.items() if share} <= set(FLASH_SHARES):
        parser.error(f"--flash supports {' and '.join(FLASH_SHARES)} alone in --shares")
    started = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    words = tokenizer(args.vocabulary)
    visual, pad = words.ids.visual, words.ids.pad
    size = min(SAMPLES_PER_CHUNK, args.samples)
    mix = Mix(args.shares, args.many, args.beyond, args.reworded, args.wordings, args.flash)
    jobs = [(args.seed * 1_000_003 + i, size, args.vocabulary, mix) for i in range(-(-args.samples // size))]
    present = complete_shards(args.out, args.seed)
    jobs = jobs[present * CHUNKS_PER_SHARD :]
    if not jobs:
        raise SystemExit(
            f"{args.out} already holds all {present} shards of seed {args.seed}: use another --seed for more"
        )
    chunks = prefetched(chunk, jobs, processes=workers())  # fork before CUDA is initialized
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    encoder = Encoder(load_vision_tokenizer(args.vision, device=device), device, compiled=args.compile)
    held_out: Rows = {}
    held_out_job = (900_000_000, min(size, args.held_out), args.vocabulary, Mix(default, flash=args.flash))
    add_sequences(held_out, chunk(held_out_job), encoder, visual)
    write(args.out / HELD_OUT, held_out, pad)
    ready = time.time()

    samples, written, busy_seconds = present * CHUNKS_PER_SHARD * size, present, 0.0
    bar = tqdm(total=args.samples, initial=samples, mininterval=5.0)
    for group in grouped(chunks):
        group_start = time.time()
        rows: Rows = {}
        for one in group:
            add_sequences(rows, one, encoder, visual)
            samples += len(one.lengths)
            bar.update(len(one.lengths))
        write(args.out / shard_name(args.seed, written), rows, pad)
        written += 1
        busy_seconds += time.time() - group_start
        if time.time() - started > args.seconds:
            break
    record = {
        "samples": samples,
        "parts": written,
        "seconds": round(time.time() - started, 1),
        "setup_seconds": round(ready - started, 1),
        "waiting_seconds": round(time.time() - ready - busy_seconds, 1),
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
