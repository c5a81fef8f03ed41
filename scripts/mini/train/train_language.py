"""Trains the miniature's language model on samples of all six tasks."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from scripts.mini.train.encode import HELD_OUT, LENGTHS
from scripts.mini.train.examples import Data, read
from scripts.mini.train.language_model import MATRICES, LanguageModel, Shape
from scripts.mini.train.muon import Muon
from scripts.mini.train.runs import device_name, log_record, save_atomically, stop_on_signal
from scripts.mini.train.sequences import tokenizer

TOKENS = 40320
"""Tokens per step, divisible by all LENGTHS."""
SAVE_EVERY = 45.0
"""Seconds between evaluations of the held-out loss, each followed by a checkpoint."""
STATE = "training.pt"


class Trainable(Protocol):
    """What a training needs of a model: a LanguageModel or a FlashModel."""

    @property
    def embed(self) -> Tensor: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Any, /) -> Any: ...
    def uncompiled(self) -> AbstractContextManager[None]: ...
    def example(self, count: int, length: int) -> tuple[Tensor, Tensor]: ...
    def loss(self, tokens: Tensor, other: Tensor, /) -> tuple[Tensor, Tensor]: ...
    def save(self, folder: Path) -> None: ...


Model = TypeVar("Model", bound=Trainable)


class Gradients:
    """Computes loss and gradients of a batch. On a GPU each shape is captured once as a CUDA graph and replayed, as
    kernel launches would take longer than the kernels of so small a model."""

    def __init__(self, model: Trainable, lengths: Sequence[int], tokens: int, *, captured: bool) -> None:
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
        ids, learn = self.model.example(count, length)
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):  # warm-up pass for one-time setup
            self._pass(ids, learn)
        torch.cuda.current_stream().wait_stream(side_stream)
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
    """Mean cross entropy of visual and of other tokens over all sequences of a shard."""
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


@dataclass
class RunState:
    """Training progress over all runs, saved with the weights and optimizer states in STATE."""

    steps: int = 0
    seconds: float = 0.0
    best: float = math.inf
    """The lowest held-out loss on visual tokens so far, that of the saved weights."""

    def save(self, path: Path, model: Trainable, optims: Sequence[torch.optim.Optimizer]) -> None:
        save_atomically(
            {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optims], **asdict(self)}, path
        )

    @classmethod
    def resume(cls, path: Path, model: Trainable, optims: Sequence[torch.optim.Optimizer]) -> RunState:
        state = torch.load(path, map_location=model.embed.device, weights_only=True)
        model.load_state_dict(state["model"])
        for optim, own in zip(optims, state["optimizers"], strict=True):
            optim.load_state_dict(own)
        return cls(state["steps"], state["seconds"], state["best"])


def rate_at(progress: float, step: int, rate: float) -> float:
    """Learning rate: linear warm-up, plateau to 30 % of the run, linear decay to zero."""
    return rate * min(1.0, (step + 1) / 150) * min(1.0, (1 - progress) / 0.7)


class Training(Generic[Model]):
    """Trains until `steps` or `seconds` are reached; the learning rate decays to zero at whichever comes first.

    Every SAVE_EVERY seconds the held-out loss is logged, the weights are saved in `out` if they are the best so far,
    and STATE is written, from which an interrupted training resumes.
    """

    def __init__(
        self,
        model: Model,
        gradients: Gradients,
        data: Data,
        out: Path,
        *,
        rate: float,
        decay: float,
        tokens: int,
        visual: int,
        seed: int,
    ) -> None:
        self.model, self.gradients, self.data, self.out = model, gradients, data, out
        self.rate, self.tokens, self.visual = rate, tokens, visual
        self.optims = self.optimizers(decay)
        self.state = RunState()
        out.mkdir(parents=True, exist_ok=True)
        if (out / STATE).exists():
            self.state = RunState.resume(out / STATE, model, self.optims)
            print(f"resumed at step {self.state.steps}, {self.state.seconds:.0f} s", flush=True)
        self.rng = np.random.default_rng((seed, self.state.steps))
        self.stopped = False

    def optimizers(self, decay: float) -> list[torch.optim.Optimizer]:
        assert isinstance(self.model, LanguageModel)
        return optimizers(self.model, self.rate, decay, self.model.embed.is_cuda)

    def held_out(self) -> dict[str, float]:
        assert isinstance(self.model, LanguageModel)
        return held_out_loss(self.model, self.data.folder / HELD_OUT, self.visual, self.tokens)

    def set_rates(self, now: float, progress: float) -> None:
        for optim in self.optims:
            for group in optim.param_groups:
                group["lr"] = now

    def stop(self, *_: object) -> None:
        """Stop after the current step; the training can be resumed."""
        self.stopped = True

    def run(self, *, steps: int, seconds: float) -> dict[str, Any]:
        state, earlier, run_start = self.state, self.state.seconds, time.time()
        lengths, weights = self.data.weights()
        smooth, saves, first = torch.zeros((), device=self.model.embed.device), 1, state.steps
        bar = tqdm(total=steps, initial=first, mininterval=5.0)
        while not self.stopped:
            state.seconds = earlier + time.time() - run_start
            progress = max(state.steps / steps, state.seconds / seconds)
            if progress >= 1:
                break
            length = lengths[int(self.rng.choice(len(lengths), p=weights))]
            loss = self.step(*self.data.buckets[length].draw(self.tokens // length), progress)
            smooth = loss if state.steps == first else smooth.lerp(loss, 0.02)
            state.steps += 1
            bar.update()
            if (state.steps - first) % 200 == 0:
                value, spent = float(smooth), time.time() - run_start
                bar.set_postfix(loss=f"{value:.3f}")
                if not math.isfinite(value):
                    raise RuntimeError("the loss is not finite: lower --rate")
                if self.data.refresh():
                    lengths, weights = self.data.weights()
                if spent > SAVE_EVERY * saves:
                    throughput = (state.steps - first) * self.tokens / spent / 1e6
                    print(f"step {state.steps} {state.seconds:.0f}s loss {value:.4f}, {throughput:.2f}M tokens/s, "
                          f"{self.data.samples} samples, held out {self.save()}", flush=True)  # fmt: skip
                    saves += 1
        bar.close()
        held_out = self.save()
        return {
            "finished": not self.stopped,
            "steps": state.steps,
            "train_seconds": round(state.seconds, 1),
            "loss": round(float(smooth), 4),
            "held_out_loss": held_out,
            "best_held_out_picture_loss": round(state.best, 4),
            "samples": self.data.samples,
            "tokens": state.steps * self.tokens,
            "parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "rate": self.rate,
        }

    def step(self, ids: Tensor, learn: Tensor, progress: float) -> Tensor:
        self.set_rates(rate_at(progress, self.state.steps, self.rate), progress)
        loss = self.gradients(ids, learn)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optim in self.optims:
            optim.step()
        return loss

    def save(self) -> dict[str, float]:
        """Write STATE, and the weights if they are the best so far; return the held-out losses."""
        with self.model.uncompiled():
            loss = self.held_out()
        if loss["picture"] < self.state.best:
            self.state.best = loss["picture"]
            self.model.save(self.out)
        self.state.save(self.out / STATE, self.model, self.optims)
        return {k: round(v, 4) for k, v in loss.items()}


def add_options(parser: argparse.ArgumentParser, *, steps: int, rate: float) -> None:
    """The options of every training on a dataset."""
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights, state and log")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seconds", type=float, default=math.inf, help="training time over all runs, without setup")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for the first shard")
    parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens per step; a multiple of all lengths")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile the model")
    parser.add_argument("--eager", action="store_true", help="do not use CUDA graphs")


def prepare(seed: int) -> tuple[torch.device, torch.dtype]:
    """Seed torch; what to train on, and the model's dtype there."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of dataset shards, written by encode")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder of the tokenizer files")
    parser.add_argument("--resume", type=Path, help="folder of the initial weights")
    parser.add_argument("--shape", type=json.loads, default={}, help="model sizes other than the default, as JSON")
    add_options(parser, steps=12_000, rate=3e-3)
    args = parser.parse_args()
    started = time.time()
    device, dtype = prepare(args.seed)

    words = tokenizer(args.vocabulary)
    shape = replace(Shape(vocab_size=words.ids.vocab_size), **args.shape)
    model = LanguageModel(shape, dtype=dtype, compiled=args.compile).to(device)
    if args.resume:
        model.load_released(read_weights(args.resume))
    gradients = Gradients(model, LENGTHS, args.tokens, captured=device.type == "cuda" and not args.eager)
    print(f"steps ready {time.time() - started:.0f}s", flush=True)
    data = Data(args.data, device)
    data.wait(args.wait)
    print(f"data {time.time() - started:.0f}s, {data.samples} samples", flush=True)

    training = Training(
        model,
        gradients,
        data,
        args.out,
        rate=args.rate,
        decay=args.decay,
        tokens=args.tokens,
        visual=words.ids.visual,
        seed=args.seed,
    )
    stop_on_signal(training.stop)
    record = training.run(steps=args.steps, seconds=args.seconds)
    record |= {
        "seconds": round(time.time() - started, 1),
        "device": device_name(device),
        "seed": args.seed,
        "shape": asdict(shape),
    }
    log_record(record, args.out / "train.log")


if __name__ == "__main__":
    main()
