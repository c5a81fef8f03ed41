"""Trains the miniature's language model on freshly drawn examples of all six tasks."""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
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
from scripts.mini.language_model import MATRICES, LanguageModel, Shape
from scripts.mini.muon import Muon
from scripts.mini.pool import SQUARE, begin, workers
from scripts.mini.render import Batch, render, resize
from scripts.mini.sequences import BLANK, Chunk, chunk, tokenizer
from scripts.mini.train_vision import DONE

LENGTHS = (180, 210, 240, 360, 420, 560, 720, 840, 1008, 1260)
"""Sequences are filled up to one of these; each divides the tokens of a batch."""
TOKENS = 40320
SAMPLES_A_CHUNK = 1000
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
    """Pictures to codes in bulk: half precision, equal batches, compiled for the commonest size."""

    COUNT = 256

    def __init__(self, vision: IBQ, device: torch.device, *, compiled: bool) -> None:
        self.vision, self.device = copy.deepcopy(vision), device
        self.compiled = compiled and device.type == "cuda"
        self.dtype = torch.float32
        if device.type == "cuda":
            self.dtype = torch.float16
            self.vision = self.vision.half().to(memory_format=torch.channels_last)
        self._encode = torch.compile(self.vision.encode, dynamic=False) if self.compiled else self.vision.encode

    def load(self, vision: IBQ) -> None:
        """Take the weights of `vision`, and keep what is compiled."""
        self.vision.load_state_dict(vision.state_dict())

    @torch.inference_mode()
    def codes(self, batch: Batch, final: tuple[int, int]) -> NDArray[np.int64]:
        """(N, rows * columns) codes of a batch's pictures, resized to `final` rows and columns."""
        encode = self._encode if final == SQUARE else self.vision.encode
        found = []
        for i in range(0, len(batch.head), self.COUNT):
            piece = Batch(batch.rows, batch.columns, batch.head[i : i + self.COUNT], batch.things[i : i + self.COUNT])
            pixels = resize(render(piece, self.device), final[0] * 16, final[1] * 16)
            if self.compiled and len(pixels) < self.COUNT:  # one shape only, so that nothing is compiled anew
                pixels = torch.cat([pixels, pixels[:1].expand(self.COUNT - len(pixels), -1, -1, -1)])
            found.append(encode(self._floats(pixels)).flatten(1))
        return torch.cat(found)[: len(batch.head)].cpu().numpy()

    def _floats(self, pixels: Tensor) -> Tensor:
        return (pixels.to(self.dtype) / 127.5 - 1).contiguous(memory_format=torch.channels_last)

    def warm_up(self) -> None:
        """Compile ahead of the first real batch."""
        if self.compiled:
            blank = torch.zeros(self.COUNT, 3, SQUARE[0] * 16, SQUARE[1] * 16, dtype=torch.uint8, device=self.device)
            with torch.inference_mode():
                self._encode(self._floats(blank))


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
        loss, _ = model.loss(ids, learn)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        smooth = loss.detach() if n == 0 else smooth.lerp(loss.detach(), 0.02)
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
    parser.add_argument("--compile", action="store_true")
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
    torch.backends.cudnn.benchmark = True
    shape = replace(Shape(vocab_size=words.ids.vocab_size), **args.shape)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = LanguageModel(shape, dtype=dtype, compiled=args.compile).to(device)
    if args.resume:
        model.load_released(read_weights(args.resume))
    if args.compile:
        blank = torch.ones(args.tokens // LENGTHS[0], LENGTHS[0], dtype=torch.long, device=device)
        model.loss(blank, blank)[0].backward()
        model.zero_grad(set_to_none=True)
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
