"""Upstream's own model file against the native logits, in a Python whose transformers that file imports on.

Elsewhere in the comparison transformers' Qwen3 computes both sides, so a difference in that file would go unnoticed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from _compare.cases import Native
from _compare.other_python import run_other_python
from _compare.reference_logits import KEPT
from emu_cog.errors import CheckpointError
from emu_cog.model.qwen3 import Chunk
from emu_cog.pipeline import Pipeline

MODEL_FILE = "src/emu3p5/modeling_emu3.py"
STEPS = 16
"""Single-token passes after each conditional prompt."""
LONG = 2048
"""Tokens of the one long sequence, of random ids, which reaches high positions of the rotary embedding."""
_RUNNER = Path(__file__).with_name("reference_logits.py")


@dataclass(frozen=True, kw_only=True)
class Ids:
    """A sequence to compare: `prompt` in one pass, then each of `steps` in its own."""

    name: str
    prompt: Sequence[int]
    steps: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What upstream's model file computed, by sequence, and the versions it ran with."""

    logits: list[Tensor]
    versions: str


def sequences(native: Native, *, vocabulary: int, context: int) -> list[Ids]:
    """Both prompts of every case, the conditional one with the answer's first tokens, and one long random sequence."""
    rng = np.random.Generator(np.random.PCG64(0))
    made = [Ids(name="random ids", prompt=rng.integers(0, vocabulary, min(LONG, context)).tolist())]
    for case, answer in native.answers.items():
        conditional, unconditional = answer.prompt
        made.append(Ids(name=case.name, prompt=conditional, steps=answer.sampled[:STEPS]))
        made.append(Ids(name=f"{case.name}, unconditional", prompt=unconditional))
    return made


@torch.inference_mode()
def native_logits(pipeline: Pipeline, ids: Ids) -> Tensor:
    """(positions, vocabulary) fp32: the last KEPT positions of the prompt, then every step."""
    lm = pipeline.lm
    cache = lm.new_cache(len(ids.prompt) + len(ids.steps))
    pages, logits, begin = cache.take(cache.free), [], 0
    for chunk in (ids.prompt, *([token] for token in ids.steps)):
        hidden = lm.feed(cache, [Chunk(chunk, begin, pages)])[-KEPT:]
        begin += len(chunk)
        logits.append(torch.cat([lm.text_logits(hidden), lm.visual_logits(hidden)], dim=-1).cpu())
    return torch.cat(logits)


def run_reference(
    python: Path, clone: Path, checkpoint: Path, ids: Sequence[Ids], *, dtype: torch.dtype, device: torch.device
) -> Reference:
    """Run upstream's model file on `ids` in the Python interpreter `python`. CheckpointError says why it can't."""
    if not (clone / MODEL_FILE).exists():
        raise CheckpointError(
            f"{clone} was cloned by an earlier version, without {MODEL_FILE}: remove it, to have it cloned again"
        )
    with tempfile.TemporaryDirectory(prefix="emu-cog-") as folder:
        source, target = Path(folder) / "ids.npz", Path(folder) / "logits.npz"
        arrays = {
            f"{i}/{key}": np.array(value, dtype=np.int64)
            for i, one in enumerate(ids)
            for key, value in (("prompt", one.prompt), ("steps", one.steps))
        }
        np.savez(source, **arrays)  # type: ignore[arg-type]
        names = (str(dtype).removeprefix("torch."), str(device))
        versions = run_other_python(
            python,
            [_RUNNER, clone, checkpoint.resolve(), source, target, *names],
            what="upstream's model file",
            needs="torch, numpy and transformers 4.48.2",
        )
        with np.load(target) as made:
            logits = [torch.from_numpy(made[f"{i}/logits"]) for i in range(len(ids))]
    return Reference(logits=logits, versions=", ".join(f"{name} {number}" for name, number in versions.items()))
