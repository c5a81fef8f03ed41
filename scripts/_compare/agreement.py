"""Does the native path agree with upstream's code? One checkpoint, both backends, step by step.

The native side runs first and is freed before upstream's is loaded: no single device holds two copies of the released
model. Distributions are compared by teacher forcing, upstream being fed the native answer, so that every step is
compared even after a tie that rounding broke; at top-k 1 both sides run freely.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from _compare import model_file
from _compare.cases import AREA, CASES, CODE_AREAS, QUESTION, Answer, Case, Native, case_settings, photo, run_native
from _compare.differences import Checked, check_all, force
from emu_cog.log import log
from emu_cog.model import torch_settings
from emu_cog.model.loader import EMU3_DEFAULTS
from emu_cog.pipeline import Pipeline
from emu_cog.prompt import prompts, tasks
from emu_cog.prompt.tokens import TokenIds
from emu_cog.request import Sampling
from emu_cog.upstream import adapter
from emu_cog.upstream.imports import config_defaults

TOKENS = 300
"""Ids compared in each case, forced ones included."""
EDGES = 100
"""At most one step in EDGES may exceed the tolerance because of an edge token, the least likely of those that top-k or
top-p keeps on one side only.

Known, in fp32: at the released vocabulary and the default top-k, 43 of 3060 steps had an edge token, each with less
than 1e-4 of the probability, so those steps agreed within `Tolerance.mass` without this allowance. On tiny checkpoints
none of 23050 steps had one. The allowance is for an edge token with more probability, which a low top-k makes possible.
It does not hide a filter that keeps one token too many: that is off at every step, and at SHARP beyond the tolerance.
"""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What may differ: `logits` absolute, `mass` the total variation distance of two distributions, `codes` the share
    of a photo's codes, `pixels` in steps of 1/255."""

    logits: float
    mass: float
    codes: float
    pixels: int


# fp32: only the order of summation differs. bf16 and fp16: logits have 8 and 11 significant bits, guidance multiplies
# their rounding errors, and a token may fall on either side of top-k or top-p.
TOLERANCES = {
    torch.float32: Tolerance(logits=1e-3, mass=1e-3, codes=0.0, pixels=1),
    torch.bfloat16: Tolerance(logits=0.25, mass=0.25, codes=0.0, pixels=1),
    torch.float16: Tolerance(logits=0.05, mass=0.05, codes=0.0, pixels=1),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. `worst` and `allowed` are in the unit of what is compared; `note` says where it failed."""

    what: str
    compared: int
    worst: float
    allowed: float
    agrees: bool
    note: str = ""


class TeacherForcing(LogitsProcessor):
    """Makes upstream generate `answer`. Placed after upstream's processor, it calls `see(index, probs)` with the
    distribution at each of `indices`."""

    def __init__(self, answer: Sequence[int], prompt: int, indices: Sequence[int], see: Callable[[int, Tensor], None]):
        self._answer, self._prompt, self._indices, self._see = answer, prompt, set(indices), see
        self.refused: int | None = None
        """Index of the first forced token that upstream's grammar rules out."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        index = input_ids.shape[1] - self._prompt
        token = self._answer[index]
        if index in self._indices:
            self._see(index, scores[0].float().softmax(dim=-1).cpu())
        elif self.refused is None and not torch.isfinite(scores[0, token]):
            self.refused = index
        return force(scores, token)


def compare(
    pipeline: Callable[[], Pipeline],
    reference: Callable[[], adapter.Upstream],
    *,
    dtype: torch.dtype,
    tokens: int = TOKENS,
    cases: Sequence[Case] = CASES,
    run_model_file: Callable[[Sequence[model_file.Ids]], model_file.Reference] | None = None,
) -> Iterator[Row | Checked]:
    """The rows of the table, each as soon as it is known. `pipeline` and `reference` load the two sides, in this order;
    `run_model_file` gives the logits of upstream's own model file."""
    tolerance = TOLERANCES[dtype]
    loaded = pipeline()
    torch_settings.exact()
    native = run_native(loaded, cases, tokens)
    ids, ours = [], list[Tensor]()
    if run_model_file:
        ids = model_file.sequences(native, vocabulary=loaded.lm.ids.vocab_size, context=loaded.lm.context)
        ours = [model_file.native_logits(loaded, one) for one in ids]
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if run_model_file:
        yield _compare_model_file(ids, ours, run_model_file(ids), tolerance)
    up = reference()
    yield _compare_defaults(up.code.clone)
    yield from _compare_prompts(up, native, {case.task for case in cases})
    yield from _compare_codes(up, native, tolerance)
    for case, answer in native.answers.items():
        log.info("upstream: %s", case.name)
        yield from _compare_case(up, case, answer, tolerance)
    yield from check_all(up, native)


def _compare_defaults(clone: Path) -> Row:
    theirs = config_defaults(clone)
    wrong = [name for name, ours in EMU3_DEFAULTS.items() if theirs[name] != ours]
    return _row("config.json's defaults", len(EMU3_DEFAULTS), len(wrong), 0, note=", ".join(wrong))


def _compare_model_file(
    ids: Sequence[model_file.Ids], ours: Sequence[Tensor], reference: model_file.Reference, tolerance: Tolerance
) -> Row:
    apart = [float((a - b).abs().max()) for a, b in zip(ours, reference.logits, strict=True)]
    worst = max(range(len(ids)), key=apart.__getitem__)
    row = _row("logits of upstream's own model file", sum(map(len, ours)), apart[worst], tolerance.logits)
    note = reference.versions if row.agrees else f"{reference.versions}; furthest apart: {ids[worst].name}"
    return replace(row, note=note)


def _row(what: str, compared: int, worst: float, allowed: float, *, note: str = "") -> Row:
    agrees = worst <= allowed
    return Row(what=what, compared=compared, worst=worst, allowed=allowed, agrees=agrees, note="" if agrees else note)


def _compare_prompts(up: adapter.Upstream, native: Native, names: Collection[str]) -> Iterator[Row]:
    """Each task with 0 to 3 references. The references' codes are the native ones, which are compared separately."""
    for task in tasks.TABLE.values():
        if task.name not in names:
            continue
        wrong, compared = [], 0
        for count in range(1 if task.name == "x2i" else 0, 1 if task.name == "t2i" else 4):
            made = prompts.build(task, QUESTION, native.codes[0][:count], up.own_tokenizer)
            theirs = up.prompt(task.name, QUESTION, [photo(n) for n in range(count)], AREA)
            for ours, ids in zip((made.conditional, made.unconditional), theirs, strict=True):
                compared += len(ours)
                first = _first_difference(list(ours), ids[0].tolist())
                if first is not None:
                    wrong.append(f"{count} reference(s): token {first} differs")
        yield _row(f"prompt ids, {task.name}", compared, len(wrong), 0, note="; ".join(wrong))


def _compare_codes(up: adapter.Upstream, native: Native, tolerance: Tolerance) -> Iterator[Row]:
    wrong, total = 0, 0
    for area, row in zip(CODE_AREAS, native.codes, strict=True):
        for number, ours in enumerate(row):
            block = up.tokenizer.encode(up.image_string(photo(number), area), add_special_tokens=False)
            expected = up.ids.image_block(ours)
            total += len(expected)
            wrong += abs(len(block) - len(expected)) + sum(a != b for a, b in zip(block, expected, strict=False))
    yield _row("codes of photos", total, wrong / total, tolerance.codes, note=f"{wrong} codes differ")


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The first index at which the two differ, the end of the shorter one included."""
    for index, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return index
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def _compare_case(up: adapter.Upstream, case: Case, answer: Answer, tolerance: Tolerance) -> Iterator[Row]:
    streams = [torch.tensor([ids], device=up.device) for ids in answer.prompt]
    with torch.no_grad():
        logits = [up.model(stream).logits[0, -1].float().cpu() for stream in streams]
    apart = [float((a - b[: len(a)]).abs().max()) for a, b in zip(answer.logits, logits, strict=True)]
    yield _row(f"logits after the prompt: {case.name}", 2, max(apart), tolerance.logits)

    # every distribution along the native answer
    theirs: dict[int, Tensor] = {}
    teacher = TeacherForcing(
        answer.sampled,
        len(answer.prompt[0]),
        list(answer.distributions),
        lambda index, probs: theirs.update({index: probs}),
    )
    run = _Run(up, case, streams)
    run(greedy=False, tokens=len(answer.sampled), after=[teacher])
    yield _distributions(case, answer, theirs, teacher.refused, tolerance)

    # both running freely at top-k 1
    made = run(greedy=True, tokens=len(answer.greedy))
    first = _first_difference(answer.greedy, made)
    gap = 0.0 if first is None else run.gap(answer.greedy, made, first)
    what = f"tokens at top-k 1: {case.name}"
    agreed = len(made) if first is None else first
    row = _row(what, agreed, gap, tolerance.mass, note=f"first at token {first}")
    if first is not None and row.agrees:
        row = replace(row, note=f"a tie at token {first} ends the comparison")
    yield row

    # pixels
    if answer.pictures:
        drawn = [np.asarray(value) for kind, value in up.segments(_finished(answer.sampled, up.ids)) if kind == "image"]
        steps = [np.abs(a.astype(int) - b.astype(int)).max() for a, b in zip(answer.pictures, drawn, strict=True)]
        yield _row(f"pixels: {case.name}", sum(a.size for a in drawn), float(max(steps)), tolerance.pixels)


def _distributions(
    case: Case, answer: Answer, theirs: Mapping[int, Tensor], refused: int | None, tolerance: Tolerance
) -> Row:
    """Every step's distribution. Rounding may decide whether top-k or top-p keeps its last token: a step beyond the
    tolerance is compared without that edge token, if there is at most one such step in EDGES."""
    what = f"processed scores: {case.name}"
    ours = answer.distributions
    if refused is not None:
        return _row(what, len(theirs), 1.0, tolerance.mass, note=f"upstream forces another token at token {refused}")
    distances = {index: _distance(ours[index], probs) for index, probs in sorted(theirs.items())}
    edges = {
        index: edge
        for index, d in distances.items()
        if d > tolerance.mass and (edge := _edge(ours[index], theirs[index])) is not None
    }
    if len(edges) <= -(-len(distances) // EDGES):
        distances |= edges
    wrong = [index for index, distance in distances.items() if distance > tolerance.mass]
    worst = max(distances.values(), default=0.0)
    row = _row(what, len(distances), worst, tolerance.mass, note=f"first at token {wrong[0]}" if wrong else "")
    if edges and row.agrees:
        note = f"one token more or less kept by top-k or top-p at token {', '.join(map(str, edges))}"
        row = replace(row, note=note)
    return row


def _edge(ours: Tensor, theirs: Tensor) -> float | None:
    """The distance without the edge token, or None if the step has no single one."""
    padded = torch.zeros_like(theirs)
    padded[: len(ours)] = ours
    lone = ((padded > 0) != (theirs > 0)).nonzero().flatten()
    if len(lone) != 1:
        return None
    token = int(lone[0])
    larger, other = (padded, theirs) if padded[token] > 0 else (theirs, padded)
    if larger[token] > larger[larger > 0].min():
        return None
    rest = larger.clone()
    rest[token] = 0.0
    return float((rest / rest.sum() - other).abs().sum()) / 2


def _finished(made: Sequence[int], ids: TokenIds) -> list[int]:
    """`made` up to the end of its last finished picture."""
    return list(made[: max(i for i, token in enumerate(made) if token == ids.eoi) + 1])


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """Total variation distance. Upstream's vector may be longer than the vocabulary."""
    return float((ours - theirs[: len(ours)]).abs().sum() + theirs[len(ours) :].sum()) / 2


class _Run:
    """Upstream's `generate` for one case."""

    def __init__(self, up: adapter.Upstream, case: Case, streams: Sequence[Tensor]) -> None:
        self._up, self._case, self._streams = up, case, streams

    def __call__(self, *, greedy: bool, tokens: int, after: Sequence[LogitsProcessor] = (), top: int = 1) -> list[int]:
        guidance, image, text = case_settings(self._case, greedy=greedy)
        if top > 1:
            image = text = Sampling(top_k=top)
        return self._up.generate(
            *self._streams,
            guidance=guidance,
            image=image,
            text=text,
            size=self._case.size,
            max_new_tokens=tokens,
            references=self._case.references,
            seed=0,
            after=after,
        )

    def gap(self, ours: Sequence[int], theirs: Sequence[int], index: int) -> float:
        """By how much upstream prefers its own token to ours at `index`, of the probability of its two likeliest; 1.0
        if ours is not one of them."""
        if index >= min(len(ours), len(theirs)):
            return 1.0
        seen: dict[int, Tensor] = {}
        teacher = TeacherForcing(ours, self._streams[0].shape[1], [index], lambda i, probs: seen.update({i: probs}))
        self(greedy=False, tokens=index + 1, after=[teacher], top=2)
        mine, other = float(seen[index][ours[index]]), float(seen[index][theirs[index]])
        return other - mine if mine > 0 else 1.0
