"""Trains the miniature's language model on freshly drawn examples of all six tasks."""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from emu_cog.vision import CONFIG_FILE, IBQ, VisionConfig, load_vision_tokenizer
from scripts.mini.fused import fuse
from scripts.mini.language_model import MATRICES, LanguageModel, Shape
from scripts.mini.muon import Muon
from scripts.mini.pool import SQUARE, begin, workers
from scripts.mini.render import Batch, grained, paint, paints, places, render, resize
from scripts.mini.sequences import BLANK, SIZES, Chunk, chunk, tokenizer
from scripts.mini.train_vision import DONE

LENGTHS = (180, 210, 240, 360, 420, 560, 720, 840, 1008, 1260)
"""Sequences are filled up to one of these; each divides the tokens of a batch."""
TOKENS = 40320
SAMPLES_A_CHUNK = 2000
SAVE_EVERY = 45.0
"""Seconds between two saves of the weights."""


@dataclass
class Bucket:
    """All sequences of one padded length: (M, T) ids, what is to be learnt, and an order to draw them in."""

    ids: Tensor
    learn: Tensor
    order: Tensor
    place: int = 0

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        if self.place + count > len(self.order):
            self.order = torch.randperm(len(self.ids), device=self.ids.device)
            self.place = 0
        pick = self.order[self.place : self.place + count]
        if len(pick) < count:
            pick = pick.repeat(-(-count // len(pick)))[:count]
        self.place += count
        return self.ids[pick].long(), self.learn[pick]


class Encoder:
    """Pictures to codes in bulk: on a GPU in half precision with fused norms, the commonest size drawn by compiled
    code."""

    COUNT, FEW = 256, 64
    """Pictures a batch, of the commonest and of other sizes: always as many, since each new shape is set up anew."""
    MOST = 10
    """Things in a picture that compiled code draws; the rare fuller ones are drawn step by step."""

    def __init__(self, vision: IBQ, device: torch.device, *, compiled: bool) -> None:
        self.vision, self.device = copy.deepcopy(vision), device
        if device.type == "cuda":
            self.vision = fuse(self.vision.half())
        self.dtype = self.vision.dtype
        self.paints = paints(device)
        self.place = places(SQUARE[0] * 16, SQUARE[1] * 16, device)
        self._draw = torch.compile(_draw, dynamic=False) if compiled and device.type == "cuda" else None

    def load(self, vision: IBQ) -> None:
        """Take the weights of `vision`."""
        self.vision.load_state_dict(vision.state_dict())

    @torch.inference_mode()
    def codes(self, batch: Batch, final: tuple[int, int]) -> NDArray[np.int64]:
        """(N, rows * columns) codes of a batch's pictures, resized to `final` rows and columns."""
        found = []
        step = self.COUNT if (batch.rows, batch.columns) == SQUARE else self.FEW
        for i in range(0, len(batch.head), step):
            head, things = batch.head[i : i + step], batch.things[i : i + step]
            if self.device.type == "cuda":
                blank = ((0, step - len(head)), (0, 0))
                head, things = np.pad(head, blank), np.pad(things, (*blank, (0, 0)), constant_values=-1)
            pixels = resize(self.draw(batch.rows, batch.columns, head, things), final[0] * 16, final[1] * 16)
            floats = (pixels.to(self.dtype) / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            found.append(self.vision.encode(floats).flatten(1))
        return torch.cat(found)[: len(batch.head)].cpu().numpy()

    def draw(self, rows: int, columns: int, head: NDArray[np.int32], things: NDArray[np.int32]) -> Tensor:
        """(N, 3, H, W) uint8 pictures, the same by either way."""
        most = things.shape[1]
        if self._draw is None or (rows, columns) != SQUARE or most > self.MOST:
            batch = Batch(rows, columns, head, things)
            return render(batch, self.device)
        things = np.pad(things, ((0, 0), (0, self.MOST - most), (0, 0)), constant_values=-1)
        tensors = (torch.from_numpy(x).to(self.device) for x in (head, things))
        return self._draw(*tensors, *self.paints, self.place)

    def warm_up(self) -> None:
        """Set up every size ahead of the first real batch."""
        for drawn, final in SIZES:
            self.codes(Batch(*drawn, np.zeros((2, 3), np.int32), np.full((2, 1, 4), -1, np.int32)), final)


def _draw(head: Tensor, things: Tensor, palette: Tensor, sheet: Tensor, place: Tensor) -> Tensor:
    return grained(paint(head, things, palette, sheet, *SQUARE), head, place)


def fill(part: Chunk, encoder: Encoder, visual: int) -> NDArray[np.int32]:
    """The chunk's ids with the codes of its drawn pictures in place of the blanks."""
    codes = np.zeros(part.blanks, np.int32)
    for (_, final), (batch, firsts) in part.scenes.items():
        found = encoder.codes(batch, final)
        codes[firsts[:, None] + np.arange(found.shape[1])] = found
    blank = part.ids >= visual + BLANK
    ids = part.ids.copy()
    ids[blank] = visual + codes[part.ids[blank] - visual - BLANK]
    return ids


def gather(
    parts: Iterator[Chunk], encoder: Encoder, visual: int, pad: int, *, seconds: float = math.inf
) -> tuple[dict[int, Bucket], int]:
    """(buckets, samples): all chunks, or those of the first `seconds`, their pictures drawn and encoded, sorted."""
    device, begun, samples = encoder.device, time.time(), 0
    rows: dict[int, list[tuple[NDArray[np.int32], NDArray[np.uint8]]]] = {}
    for part in parts:
        ids = fill(part, encoder, visual)
        ends = np.cumsum(part.lengths)
        for first, end in zip(ends - part.lengths, ends, strict=True):
            length = next((n for n in LENGTHS if n >= end - first), None)
            if length is not None:
                rows.setdefault(length, []).append((ids[first:end], part.learn[first:end]))
        samples += len(part.lengths)
        if time.time() - begun > seconds:
            break
    buckets = {}
    for length, lines in sorted(rows.items()):
        ids = np.full((len(lines), length), pad, np.int16)
        learn = np.zeros((len(lines), length), np.uint8)
        for i, (line, mask) in enumerate(lines):
            ids[i, : len(line)], learn[i, : len(line)] = line, mask
        order = torch.randperm(len(lines), device=device)
        buckets[length] = Bucket(torch.from_numpy(ids).to(device), torch.from_numpy(learn).to(device), order)
    return buckets, samples


class Gradients:
    """One call a batch: gradients and loss. On a GPU each shape's pass is captured once as a CUDA graph and
    replayed, since launching a small model's kernels one by one takes longer than they run."""

    def __init__(self, model: LanguageModel, lengths: Sequence[int], tokens: int, *, captured: bool) -> None:
        self.model, self.captured = model, captured
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}
        if captured:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            pool = torch.cuda.graph_pool_handle()
            for length in lengths:
                self.graphs[length] = self._capture(tokens // length, length, pool)

    def _capture(
        self, count: int, length: int, pool: tuple[int, int]
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        device = self.model.embed.device
        ids = torch.ones(count, length, dtype=torch.long, device=device)
        learn = torch.ones(count, length, dtype=torch.uint8, device=device)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # a first pass, for all that is set up once
            self._pass(ids, learn)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            loss = self._pass(ids, learn)
        return graph, ids, learn, loss

    def _pass(self, ids: Tensor, learn: Tensor) -> Tensor:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if grads:
            torch._foreach_zero_(grads)
        loss, _ = self.model.loss(ids, learn)
        loss.backward()
        return loss.detach()

    def __call__(self, ids: Tensor, learn: Tensor) -> Tensor:
        if ids.shape[1] not in self.graphs:
            return self._pass(ids, learn)
        graph, own_ids, own_learn, loss = self.graphs[ids.shape[1]]
        own_ids.copy_(ids)
        own_learn.copy_(learn)
        graph.replay()
        return loss.clone()


@torch.no_grad()
def held_out_loss(model: LanguageModel, buckets: dict[int, Bucket], visual: int, tokens: int) -> dict[str, float]:
    """Mean cross entropy of pictures' and of text's tokens over all buckets."""
    sums = torch.zeros(4, device=model.embed.device)
    for length, bucket in buckets.items():
        count = tokens // length
        for i in range(0, len(bucket.ids) - len(bucket.ids) % count or count, count):
            ids, learn = bucket.ids[i : i + count].long(), bucket.learn[i : i + count]
            if len(ids) < count:  # one shape only, so that nothing is compiled anew
                fills = count - len(ids)
                ids = torch.cat([ids, ids[:1].expand(fills, -1)])
                learn = torch.cat([learn, torch.zeros_like(learn[:1]).expand(fills, -1)])
            _, each = model.loss(ids, learn)
            seen = torch.cat([learn[:, 1:] > 0, torch.zeros_like(learn[:, :1]) > 0], 1)
            picture = torch.cat([ids[:, 1:] >= visual, torch.zeros_like(seen[:, :1])], 1) & seen
            text = seen & ~picture
            sums += torch.stack([each[picture].sum(), picture.sum(), each[text].sum(), text.sum()])
    picture_sum, picture_count, text_sum, text_count = sums.tolist()
    return {"picture": picture_sum / max(picture_count, 1), "other": text_sum / max(text_count, 1)}


def wait_for(path: Path, seconds: float) -> Path:
    """`path` as soon as it is there; FileNotFoundError after `seconds`."""
    until = time.time() + seconds
    while not path.exists():
        if time.time() > until:
            raise FileNotFoundError(f"{path} is not there: train the vision tokenizer first, or give --wait longer")
        time.sleep(0.2)
    return path


def read_weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return state


def optimizers(model: LanguageModel, rate: float, decay: float, fused: bool) -> list[torch.optim.Optimizer]:
    matrices = [model.stack[name] for name in MATRICES]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return [
        Muon(matrices, lr=rate, weight_decay=decay),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=fused),
    ]


def train(
    model: LanguageModel,
    gradients: Gradients,
    buckets: dict[int, Bucket],
    out: Path,
    *,
    steps: int,
    seconds: float,
    rate: float,
    decay: float,
    tokens: int,
    seed: int,
) -> dict[str, Any]:
    """Steps until `steps` or `seconds` are up; the rate falls to zero along whichever ends first.

    Saves the weights into `out` every SAVE_EVERY seconds, so that a run cut off leaves something.
    """
    cuda = model.embed.is_cuda
    optims = optimizers(model, rate, decay, cuda)
    rng = np.random.default_rng(seed)
    lengths = list(buckets)
    weights = np.array([len(b.ids) * n for n, b in buckets.items()], float)
    weights /= weights.sum()
    begun, n, saves, smooth = time.time(), 0, 1, torch.zeros((), device=model.embed.device)
    bar = tqdm(total=steps, mininterval=5.0)
    while True:
        spent = (time.time() - begun) / seconds if math.isfinite(seconds) else 0.0
        progress = max(n / steps, spent)
        if progress >= 1:
            break
        length = lengths[int(rng.choice(len(lengths), p=weights))]
        ids, learn = buckets[length].draw(tokens // length)
        # A short climb, a plateau for a third of the way, then a straight fall to zero.
        now = rate * min(1.0, (n + 1) / 150) * min(1.0, (1 - progress) / 0.7)
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = now
        loss = gradients(ids, learn)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
        smooth = loss if n == 0 else smooth.lerp(loss, 0.02)
        n += 1
        bar.update()
        if n % 200 == 0:
            value = float(smooth)
            bar.set_postfix(loss=f"{value:.3f}")
            spent = time.time() - begun
            print(f"step {n} {spent:.0f}s loss {value:.4f}, {n * tokens / spent / 1e6:.2f}M tokens/s", flush=True)
            if not math.isfinite(value):
                raise RuntimeError("the loss is no number any more: lower --rate")
            if spent > SAVE_EVERY * saves:
                model.save(out)
                saves += 1
    bar.close()
    return {"steps": n, "train_seconds": round(time.time() - begun, 1), "loss": round(float(smooth), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vision", type=Path, required=True, help="folder of the vision tokenizer")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder of the tokenizer files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the log")
    parser.add_argument("--resume", type=Path, help="folder of weights to go on from")
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end this long after the start")
    parser.add_argument("--data-seconds", type=float, default=math.inf, help="start training after this long at most")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for a vision tokenizer in training")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens a step; a multiple of every length")
    parser.add_argument("--seed", type=int, default=1, help="another one draws other samples")
    parser.add_argument("--shape", type=json.loads, default={}, help="JSON of sizes that depart from the default")
    parser.add_argument("--compile", action="store_true", help="compile what each step computes")
    parser.add_argument("--eager", action="store_true", help="launch every kernel anew, without CUDA graphs")
    args = parser.parse_args()
    started = time.time()

    words = tokenizer(args.vocabulary)
    visual, pad = words.ids.visual, words.ids.pad
    size = min(SAMPLES_A_CHUNK, args.samples)
    jobs = [(args.seed * 1_000_003 + i, size, args.vocabulary) for i in range(-(-args.samples // size))]
    # 1. what needs no vision tokenizer: words and scenes in the background, the model, everything compiled
    parts = begin(chunk, jobs, processes=workers())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    shape = replace(Shape(vocab_size=words.ids.vocab_size), **args.shape)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = LanguageModel(shape, dtype=dtype, compiled=args.compile).to(device)
    if args.resume:
        model.load_released(read_weights(args.resume))
    gradients = Gradients(model, LENGTHS, args.tokens, captured=device.type == "cuda" and not args.eager)
    print(f"steps ready {time.time() - started:.0f}s", flush=True)
    config = VisionConfig.read(wait_for(args.vision / CONFIG_FILE, args.wait).parent)
    encoder = Encoder(IBQ(config).to(device), device, compiled=args.compile)
    encoder.warm_up()
    print(f"ready {time.time() - started:.0f}s", flush=True)

    # 2. the pictures' codes
    encoder.load(load_vision_tokenizer(wait_for(args.vision / DONE, args.wait).parent, device=device))
    since = time.time()
    buckets, samples = gather(parts, encoder, visual, pad, seconds=args.data_seconds)
    held = [(900_000_000 + i, max(size // 2, 10), args.vocabulary) for i in range(2)]
    other, _ = gather(map(chunk, held), encoder, visual, pad)
    data_seconds = time.time() - since
    counts = {n: len(b.ids) for n, b in buckets.items()}
    print(f"data {data_seconds:.0f}s, {samples} samples", counts, flush=True)

    # 3. training
    record = train(
        model,
        gradients,
        buckets,
        args.out,
        steps=args.steps,
        seconds=max(args.seconds - (time.time() - started), 1.0),
        rate=args.rate,
        decay=args.decay,
        tokens=args.tokens,
        seed=args.seed,
    )
    model.save(args.out)
    model.uncompiled()
    record |= {
        "held_out_loss": {k: round(v, 4) for k, v in held_out_loss(model, other, visual, args.tokens).items()},
        "seconds": round(time.time() - started, 1),
        "data_seconds": round(data_seconds, 1),
        "samples": samples,
        "tokens": record["steps"] * args.tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "seed": args.seed,
        "rate": args.rate,
        "shape": asdict(shape),
    }
    with (args.out / "train.log").open("a") as log:
        log.write(json.dumps(record) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
