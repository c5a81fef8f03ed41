"""Does the native path still do what upstream's code does? One checkpoint, both backends, step by step.

The native side goes first and is freed, then upstream's takes the same steps: two copies of the released model fit
on no single device. Along a native answer upstream is led token by token, so that every distribution is compared
even where rounding would have parted the two; at top-k 1 each goes its own way.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from _compare.cases import AREA, CASES, CODE_AREAS, QUESTION, Answer, Case, Native, case_settings, photo, run_native
from _compare.defects import Known, provoke
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
"""In fp32 an edge was a token off once in tens of thousands of steps compared on tiny models; a filter that keeps one
token too many is off at every step."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What may differ. `logits` absolute; `mass` of probability that may lie elsewhere (total variation);
    `codes` the share of a picture's codes; `pixels` in steps of 255."""

    logits: float
    mass: float
    codes: float
    pixels: int


# fp32: rounding alone, of sums taken in another order. bf16 and fp16: logits carry 8 (11) bits, guidance multiplies
# their noise, and a top-k or top-p border may fall to either side of a token.
TOLERANCES = {
    torch.float32: Tolerance(logits=1e-3, mass=1e-3, codes=0.0, pixels=1),
    torch.bfloat16: Tolerance(logits=0.25, mass=0.25, codes=0.0, pixels=1),
    torch.float16: Tolerance(logits=0.05, mass=0.05, codes=0.0, pixels=1),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table. `worst` and `allowed` are in the unit of what is compared; `note` says where it failed."""

    what: str
    compared: int
    worst: float
    allowed: float
    agrees: bool
    note: str = ""


class Leader(LogitsProcessor):
    """Stands after upstream's processor: keeps the distributions at `places` and has `said` chosen."""

    def __init__(self, said: Sequence[int], prompt: int, places: Sequence[int], see: Callable[[int, Tensor], None]):
        self._said, self._prompt, self._places, self._see = said, prompt, set(places), see
        self.refused: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1] - self._prompt
        token = self._said[place]
        if place in self._places:
            self._see(place, scores[0].float().softmax(dim=-1).cpu())
        elif self.refused is None and not torch.isfinite(scores[0, token]):
            self.refused = place  # a forced token that upstream's grammar does not force
        alone = torch.full_like(scores, -torch.inf)
        alone[0, token] = 0.0
        return alone


def compare(
    pipeline: Callable[[], Pipeline],
    reference: Callable[[], adapter.Upstream],
    *,
    dtype: torch.dtype,
    tokens: int = TOKENS,
    cases: Sequence[Case] = CASES,
) -> Iterator[Row | Known]:
    """The rows of the table, as they are known. The two callables load the one and the other side, in this order."""
    tolerance = TOLERANCES[dtype]
    loaded = pipeline()
    torch_settings.exact()
    native = run_native(loaded, cases, tokens)
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    up = reference()
    yield _compare_defaults(up.code.clone)
    yield from _compare_prompts(up, native)
    yield from _compare_codes(up, native, tolerance)
    for case, answer in native.answers.items():
        log.info("upstream: %s", case.name)
        yield from _compare_case(up, case, answer, tolerance)
    yield from provoke(up, native)


def _compare_defaults(clone: Path) -> Row:
    theirs = config_defaults(clone)
    wrong = [name for name, ours in EMU3_DEFAULTS.items() if theirs[name] != ours]
    return _row("config.json's defaults", len(EMU3_DEFAULTS), len(wrong), 0, note=", ".join(wrong))


def _row(what: str, compared: int, worst: float, allowed: float, *, note: str = "") -> Row:
    agrees = worst <= allowed
    return Row(what=what, compared=compared, worst=worst, allowed=allowed, agrees=agrees, note="" if agrees else note)


def _compare_prompts(up: adapter.Upstream, native: Native) -> Iterator[Row]:
    """All tasks with 0 to 3 references; the images' codes are taken from the native side, which is compared apart."""
    for task in tasks.TABLE.values():
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
    """The first place where the two differ, the end of the shorter one included."""
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return place
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def _compare_case(up: adapter.Upstream, case: Case, answer: Answer, tolerance: Tolerance) -> Iterator[Row]:
    streams = [torch.tensor([ids], device=up.device) for ids in answer.prompt]
    with torch.no_grad():
        logits = [up.model(stream).logits[0, -1].float().cpu() for stream in streams]
    apart = [float((a - b[: len(a)]).abs().max()) for a, b in zip(answer.logits, logits, strict=True)]
    yield _row(f"logits after the prompt: {case.name}", 2, max(apart), tolerance.logits)

    # along the native answer, every distribution
    theirs: dict[int, Tensor] = {}
    leader = Leader(
        answer.sampled,
        len(answer.prompt[0]),
        list(answer.distributions),
        lambda place, probs: theirs.update({place: probs}),
    )
    run = _Run(up, case, streams)
    run(greedy=False, tokens=len(answer.sampled), after=[leader])
    yield _distributions(case, answer, theirs, leader.refused, tolerance)

    # at top-k 1, each on its own
    said = run(greedy=True, tokens=len(answer.greedy))
    first = _first_difference(answer.greedy, said)
    gap = 0.0 if first is None else run.gap(answer.greedy, said, first)
    what = f"tokens at top-k 1: {case.name}"
    agreed = len(said) if first is None else first
    row = _row(what, agreed, gap, tolerance.mass, note=f"first at token {first}")
    if first is not None and row.agrees:
        row = Row(**(vars(row) | {"note": f"a tie at token {first} ends the comparison"}))
    yield row

    # pixels
    if answer.pictures:
        drawn = [np.asarray(value) for kind, value in up.segments(_whole(answer.sampled, up.ids)) if kind == "image"]
        steps = [np.abs(a.astype(int) - b.astype(int)).max() for a, b in zip(answer.pictures, drawn, strict=True)]
        yield _row(f"pixels: {case.name}", sum(a.size for a in drawn), float(max(steps)), tolerance.pixels)


def _distributions(
    case: Case, answer: Answer, theirs: Mapping[int, Tensor], refused: int | None, tolerance: Tolerance
) -> Row:
    """Every step's distribution. Rounding may put the last token that top-k or top-p keeps to either side of the edge:
    such a step is compared without that token, if there is no more than one in EDGES steps of the kind."""
    what = f"processed scores: {case.name}"
    ours = answer.distributions
    if refused is not None:
        return _row(what, len(theirs), 1.0, tolerance.mass, note=f"upstream forces another token at token {refused}")
    distances = {place: _distance(ours[place], probs) for place, probs in sorted(theirs.items())}
    edges = {
        place: edge
        for place, d in distances.items()
        if d > tolerance.mass and (edge := _edge(ours[place], theirs[place])) is not None
    }
    if len(edges) <= -(-len(distances) // EDGES):
        distances |= edges
    wrong = [place for place, distance in distances.items() if distance > tolerance.mass]
    worst = max(distances.values(), default=0.0)
    row = _row(what, len(distances), worst, tolerance.mass, note=f"first at token {wrong[0]}" if wrong else "")
    if edges and row.agrees:
        note = f"the edge of what is kept is a token off at token {', '.join(map(str, edges))}"
        row = Row(**(vars(row) | {"note": note}))
    return row


def _edge(ours: Tensor, theirs: Tensor) -> float | None:
    """The distance without the one token that only one side keeps, if that is the least likely one it keeps."""
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


def _whole(said: Sequence[int], ids: TokenIds) -> list[int]:
    """`said` up to the end of its last finished picture."""
    return list(said[: max(i for i, token in enumerate(said) if token == ids.eoi) + 1])


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """Total variation: the probability that lies elsewhere. Upstream's vector may be longer than the vocabulary."""
    return float((ours - theirs[: len(ours)]).abs().sum() + theirs[len(ours) :].sum()) / 2


class _Run:
    """Upstream's `generate` in one case."""

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

    def gap(self, ours: Sequence[int], theirs: Sequence[int], place: int) -> float:
        """Where the two part: by how much, of two, upstream prefers its own token. 1.0 if ours is not its second."""
        if place >= min(len(ours), len(theirs)):
            return 1.0
        seen: dict[int, Tensor] = {}
        leader = Leader(ours, self._streams[0].shape[1], [place], lambda at, probs: seen.update({at: probs}))
        self(greedy=False, tokens=place + 1, after=[leader], top=2)
        mine, other = float(seen[place][ours[place]]), float(seen[place][theirs[place]])
        return other - mine if mine > 0 else 1.0
