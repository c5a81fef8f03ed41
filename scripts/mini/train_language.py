"""Trains the miniature's language model on freshly drawn examples of all six tasks."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from scripts.mini.encode import HELD_OUT, LENGTHS
from scripts.mini.language_model import MATRICES, LanguageModel, Shape
from scripts.mini.muon import Muon
from scripts.mini.sequences import tokenizer

TOKENS = 40320
"""A step; every one of LENGTHS divides it."""
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


class Data:
    """The examples in a folder that `encode` fills: `refresh` takes in the parts that have come since."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.buckets: dict[int, Bucket] = {}
        self.seen: set[Path] = set()
        self.samples = 0

    def wait(self, seconds: float) -> None:
        """Until there is a part at least; FileNotFoundError after `seconds`."""
        until = time.time() + seconds
        while not self.refresh():
            if time.time() > until:
                raise FileNotFoundError(f"{self.folder} holds no examples: run encode first, or give --wait longer")
            time.sleep(0.2)

    def refresh(self) -> bool:
        """Whether there was anything new."""
        new = sorted(set(self.folder.glob("part-?????.npz")) - self.seen)
        for path in new:
            self.seen.add(path)
            for length, (ids, learn) in read(path).items():
                own = self.buckets.get(length)
                ids, learn = ids.to(self.device), learn.to(self.device)
                if own:
                    ids, learn = torch.cat([own.ids, ids]), torch.cat([own.learn, learn])
                order = torch.randperm(len(ids), device=self.device)
                self.buckets[length] = Bucket(ids, learn, order)
        self.samples = sum(len(b.ids) for b in self.buckets.values())
        return bool(new)

    def weights(self) -> tuple[list[int], NDArray[np.float64]]:
        """The lengths, and how often each is to be drawn: by its tokens."""
        weights = np.array([len(b.ids) * n for n, b in self.buckets.items()], float)
        return list(self.buckets), weights / weights.sum()


def read(path: Path) -> dict[int, tuple[Tensor, Tensor]]:
    """(ids, learn) of a part by length."""
    with np.load(path) as arrays:
        return {
            int(name.removeprefix("ids_")): (
                torch.from_numpy(arrays[name]),
                torch.from_numpy(arrays[name.replace("ids_", "learn_")]),
            )
            for name in arrays.files
            if name.startswith("ids_")
        }


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
def held_out_loss(model: LanguageModel, path: Path, visual: int, tokens: int) -> dict[str, float]:
    """Mean cross entropy of pictures' and of text's tokens over all of a file's examples."""
    device = model.embed.device
    sums = torch.zeros(4, device=device)
    for length, found in read(path).items():
        for ids, learn in zip(*(x.to(device).split(tokens // length) for x in found), strict=True):
            _, each = model.loss(ids.long(), learn)
            seen = torch.cat([learn[:, 1:] > 0, torch.zeros_like(learn[:, :1]) > 0], 1)
            picture = torch.cat([ids[:, 1:] >= visual, torch.zeros_like(seen[:, :1])], 1) & seen
            text = seen & ~picture
            sums += torch.stack([each[picture].sum(), picture.sum(), each[text].sum(), text.sum()])
    picture_sum, picture_count, text_sum, text_count = sums.tolist()
    return {"picture": picture_sum / max(picture_count, 1), "other": text_sum / max(text_count, 1)}


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
    data: Data,
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
    lengths, weights = data.weights()
    begun, n, saves, smooth = time.time(), 0, 1, torch.zeros((), device=model.embed.device)
    bar = tqdm(total=steps, mininterval=5.0)
    while True:
        spent = (time.time() - begun) / seconds if math.isfinite(seconds) else 0.0
        progress = max(n / steps, spent)
        if progress >= 1:
            break
        length = lengths[int(rng.choice(len(lengths), p=weights))]
        ids, learn = data.buckets[length].draw(tokens // length)
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
            if data.refresh():
                lengths, weights = data.weights()
                print(f"{data.samples} samples", flush=True)
            if spent > SAVE_EVERY * saves:
                model.save(out)
                saves += 1
    bar.close()
    return {"steps": n, "train_seconds": round(time.time() - begun, 1), "loss": round(float(smooth), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of examples, by encode")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder of the tokenizer files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the log")
    parser.add_argument("--resume", type=Path, help="folder of weights to go on from")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end this long after the start")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for the first examples")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens a step; a multiple of every length")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shape", type=json.loads, default={}, help="JSON of sizes that depart from the default")
    parser.add_argument("--compile", action="store_true", help="compile what each step computes")
    parser.add_argument("--eager", action="store_true", help="launch every kernel anew, without CUDA graphs")
    args = parser.parse_args()
    started = time.time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")

    words = tokenizer(args.vocabulary)
    shape = replace(Shape(vocab_size=words.ids.vocab_size), **args.shape)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = LanguageModel(shape, dtype=dtype, compiled=args.compile).to(device)
    if args.resume:
        model.load_released(read_weights(args.resume))
    gradients = Gradients(model, LENGTHS, args.tokens, captured=device.type == "cuda" and not args.eager)
    print(f"steps ready {time.time() - started:.0f}s", flush=True)
    data = Data(args.data, device)
    data.wait(args.wait)
    print(f"data {time.time() - started:.0f}s, {data.samples} samples", flush=True)

    record = train(
        model,
        gradients,
        data,
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
    loss = held_out_loss(model, args.data / HELD_OUT, words.ids.visual, args.tokens)
    record |= {
        "held_out_loss": {k: round(v, 4) for k, v in loss.items()},
        "seconds": round(time.time() - started, 1),
        "samples": data.samples,
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
