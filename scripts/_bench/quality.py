"""8-bit weights: their step times, and how far they move the distribution that tokens are drawn from."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from _bench import decoding, machine
from _bench.decoding import GUIDANCE, IMAGE, Bench
from _bench.report import Row
from emu_cog.engine import Engine
from emu_cog.lm import LanguageModel
from emu_cog.memory import GIB
from emu_cog.quantize import check_format, quantize
from emu_cog.sampling import guide, probabilities
from emu_cog.steps import build

SCALE_BYTES = 4
POSITIONS = 256
SHARD = 32
"""Positions whose 131072 logits are held at a time."""


@dataclass(frozen=True)
class Distances:
    """Means over positions: share with the same likeliest token, KL in nats, probability that lies elsewhere."""

    top1: float
    kl: float
    moved: float


@torch.inference_mode()
def hidden_states(lm: LanguageModel, context: int = 256) -> Tensor:
    """(2, POSITIONS, hidden) final states of both streams along one fixed piece of an image."""
    ids = lm.ids
    codes = [ids.visual + (7919 * i) % ids.visual_count for i in range(POSITIONS - 1)]
    lines = [[*decoding.prompt(ids, context, salt), ids.img, *codes] for salt in (1, 2)]
    tokens = torch.tensor(lines, device=lm.device)
    length = tokens.shape[1]
    cache = lm.new_cache(rows=2, capacity=length)
    start = torch.zeros(2, dtype=torch.int64, device=lm.device)
    return lm.forward(tokens, start, cache, rows=slice(None), filled=length)[:, -POSITIONS:]


@torch.inference_mode()
def distances(lm: LanguageModel, exact: Tensor, other: Tensor) -> Distances:
    """Compare the guided distributions of two sets of hidden states; the head is the same for both."""
    same, kl, moved = 0.0, 0.0, 0.0
    for at in range(0, exact.shape[1], SHARD):
        p, q = (_guided(lm, states[:, at : at + SHARD]) for states in (exact, other))
        same += float((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
        log_p, log_q = p.log_softmax(dim=-1), q.log_softmax(dim=-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        moved += float((probabilities(p, IMAGE) - probabilities(q, IMAGE)).abs().sum() / 2)
    count = exact.shape[1]
    return Distances(same / count, kl / count, moved / count)


def _guided(lm: LanguageModel, states: Tensor) -> Tensor:
    return guide(lm.visual_logits(states[0]), lm.visual_logits(states[1]), GUIDANCE)


def compare(
    bench: Bench, name: str, exact: Tensor, remake: Callable[[], LanguageModel], *, short: int, step: float | None
) -> None:
    """Turn a fresh model of the same weights to format `name` and measure it. `step`: bf16's seconds, if known."""
    check_format(name, bench.device)
    lm = remake()
    quantize(lm.model, name)
    part = f"quantized {name}"
    found = distances(lm, exact, hidden_states(lm))
    held = sum(v.nbytes for v in lm.model.parameters()) + sum(v.nbytes for v in lm.model.buffers())
    bench.report.add(Row(part=part, what=f"{name}: weights", value=held / GIB, unit="GiB"))
    bench.report.add(
        Row(
            part=part,
            what=f"{name}: the same likeliest token",
            value=100 * found.top1,
            unit="% of steps",
            note=f"random weights; KL of the guided distribution {found.kl:.5f} nats, "
            f"{100 * found.moved:.2f}% of the probability moved after top-k",
        )
    )
    small = replace(bench, lm=lm, item=1.0)
    engine = Engine(lm, build(lm, compile=bench.compile))
    timed = decoding.time_image(small, engine, context=short, images=1)
    decoding.add_step(small, f"{name}: step, 1 image, {short} tokens", timed, 1, part)
    if step:
        speed = step / timed.step
        bench.report.add(Row(part=part, what=f"{name} against {bench.lm.dtype}", value=speed, unit="x as fast"))
    tokens = 32768
    needed = bench.size.cache_bytes(tokens=tokens, rows=2, item=bench.lm.dtype.itemsize)
    total = (held + needed) / GIB
    what = f"{name}: weights and caches of one output of {tokens} tokens"
    bench.report.add(Row(part=part, what=what, value=total, unit="GiB"))
    del engine, small, lm
    gc.collect()
    machine.free_bytes(bench.device)
