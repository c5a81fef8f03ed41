"""What is compared between the two backends, and the native side's answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from emu_cog.engine.sequence import Opened, Tokens
from emu_cog.log import log
from emu_cog.model.qwen3 import Chunk
from emu_cog.pipeline import Pipeline, Prepared
from emu_cog.prompt import geometry, tasks
from emu_cog.prompt.segments import ImageCodes, Reader
from emu_cog.prompt.tokens import TokenIds
from emu_cog.request import Request, Sampling
from emu_cog.vision.images import decode_image, encode_image

AREA = 160 * 160
"""Pixels of the references: small, so that the comparison takes minutes on the released model."""
CODE_AREAS = (AREA, 96 * 96)
GREEDY = Sampling(top_k=1)
RESIZED = (3, 4)
"""Rows and columns requested with two references; upstream discards them."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One answer to compare. `size` None: the model's choice, or upstream's rule with references, the last one's."""

    task: str
    references: int = 0
    size: tuple[int, int] | None = None
    sharp: bool = False
    """Sample with SHARP instead of the task's defaults, whose top-k of thousands cuts nothing in a small vocabulary."""

    @property
    def name(self) -> str:
        size = f"{self.size[0]}x{self.size[1]}" if self.size else "reference's size" if self.references else "own size"
        return f"{self.task}, {self.references} reference(s), {size}{', sharp' if self.sharp else ''}"


SHARP = (
    Sampling(temperature=8.0, top_k=20, top_p=0.9),
    Sampling(temperature=0.8, top_k=12, top_p=0.95),
)
"""Image and text sampling at which top-k and top-p both cut, in a vocabulary of any size. Guidance makes image logits
steep: at a lower temperature only top-p would cut."""
CASES = (
    Case(task="t2i", size=(10, 12)),
    Case(task="t2i", size=(7, 3)),
    Case(task="t2i"),
    Case(task="t2i", size=(6, 6), sharp=True),
    *(Case(task="x2i", references=n) for n in (1, 2, 3)),
    Case(task="x2i", references=1, size=(6, 9)),
    Case(task="howto", size=(5, 6)),
    Case(task="story", size=(5, 6)),
    Case(task="story", references=1),
    Case(task="story", sharp=True),
    Case(task="explore", references=2),
    Case(task="vla", references=1, size=(4, 7)),
)
QUESTION = 'Put 2 red boats on the shore, "café" style; 東京 🙂\nAt {dusk}, 10*12 m wide.'


def photo(number: int) -> Image.Image:
    """Reference `number` (from 0): a smooth RGB picture, each of another shape."""
    width, height = ((200, 150), (140, 210), (256, 192))[number]
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    bands = (x * 255 // width, (x + number * y) // 2 % 256, y * 255 // height)
    return Image.fromarray(np.stack(bands, axis=-1).astype(np.uint8))


@dataclass
class Answer:
    """The native answer to one case."""

    prompt: tuple[list[int], list[int]]
    logits: list[Tensor]
    sampled: list[int] = field(default_factory=list)
    distributions: dict[int, Tensor] = field(default_factory=dict)  # by index into `sampled`; (vocabulary,) fp32
    greedy: list[int] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class Native:
    """What is kept of the native side after its model is freed."""

    answers: dict[Case, Answer]
    codes: list[list[tuple[tuple[int, ...], ...]]]
    """Of the references, by CODE_AREAS and number."""
    resized: tuple[int, int] | None
    """Rows and columns of the picture made where RESIZED was requested."""


def run_native(pipeline: Pipeline, cases: Sequence[Case], tokens: int) -> Native:
    """Answer every case, at most `tokens` ids each."""
    codes = [[encode_image(photo(n), area, pipeline.vision) for n in range(3)] for area in CODE_AREAS]
    answers = {}
    for case in cases:
        log.info("native: %s", case.name)
        prepared = _prepare(pipeline, case)
        (request,) = prepared.outputs
        streams = (list(request.conditional), list(request.unconditional))
        answer = Answer(streams, [_last_logits(pipeline, stream) for stream in streams])
        answer.greedy = _generate(pipeline, case, prepared, tokens, greedy=True)[0]
        answer.sampled, answer.distributions = _generate(pipeline, case, prepared, tokens, greedy=False)
        for segment in Reader(pipeline.tokenizer).feed(answer.sampled):
            if isinstance(segment, ImageCodes):
                answer.pictures.append(np.asarray(decode_image(segment.codes, pipeline.vision)))
        answers[case] = answer
    return Native(answers, codes, _resized(pipeline))


def _prepare(pipeline: Pipeline, case: Case) -> Prepared:
    """The case as a user's request, with the size that upstream would take."""
    return pipeline.prepare(
        Request(
            prompt=QUESTION,
            task=case.task,
            images=tuple(photo(n) for n in range(case.references)),
            image_area=AREA,
            size=case_size(case),
            aspect_ratio="model",  # where there is no size
            seed=1,
        )
    )


def _resized(pipeline: Pipeline) -> tuple[int, int] | None:
    prepared = pipeline.prepare(
        Request(
            prompt="-",
            task="x2i",
            images=(photo(0), photo(1)),
            image_area=AREA,
            size=RESIZED,
            image_top_k=1,
            text_top_k=1,
            max_new_tokens=1,
            seed=0,
        )
    )
    for event in pipeline.engine.generate(prepared.outputs, prepared.config):
        if isinstance(event, Opened):
            return event.size
    return None


@torch.inference_mode()
def _last_logits(pipeline: Pipeline, stream: list[int]) -> Tensor:
    """(vocabulary,) fp32 logits after the last token of `stream`."""
    lm = pipeline.lm
    cache = lm.new_cache(len(stream))
    hidden = lm.feed(cache, [Chunk(stream, 0, cache.take(cache.free))])[-1:]
    return torch.cat([lm.text_logits(hidden), lm.visual_logits(hidden)], dim=-1)[0].cpu()


def case_settings(case: Case, *, greedy: bool) -> tuple[float, Sampling, Sampling]:
    """Guidance, image and text sampling: the task's defaults, SHARP, or top-k 1."""
    task = tasks.TABLE[case.task]
    image, text = (GREEDY, GREEDY) if greedy else SHARP if case.sharp else (task.image, task.text)
    return task.guidance["image"], image, text


def case_size(case: Case) -> tuple[int, int] | None:
    if case.size or not case.references:
        return case.size
    return geometry.reference_size(photo(case.references - 1).size, AREA)


def _generate(
    pipeline: Pipeline, case: Case, prepared: Prepared, tokens: int, *, greedy: bool
) -> tuple[list[int], dict[int, Tensor]]:
    """At most `tokens` ids, and unless `greedy` the distribution of each sampled one by its index."""
    guidance, image, text = case_settings(case, greedy=greedy)
    # Upstream continues after a picture, and its limit counts forced tokens: ours is applied below.
    config = replace(
        prepared.config, cfg_scale=guidance, image=image, text=text, max_new_tokens=None, single_image=False
    )
    ids, steps, made = pipeline.tokenizer.ids, list[tuple[str, Tensor]](), list[int]()
    trace = None if greedy else lambda kind, probs: steps.append((kind, probs[0].cpu()))
    for event in pipeline.engine.generate(prepared.outputs, config, trace=trace):
        if isinstance(event, Tokens):
            made += event.ids
        if len(made) >= tokens:
            break
    made = made[:tokens]
    parts: dict[str, Any] = {
        "text": slice(0, ids.visual),
        "visual": slice(ids.visual, None),
        "digit": list(ids.digits),
    }
    distributions = {}
    for index, (kind, probs) in zip(_sampled_indices(made, ids, case_size(case)), steps, strict=False):
        distributions[index] = torch.zeros(ids.vocab_size)
        distributions[index][parts[kind]] = probs
    return made, distributions


def _sampled_indices(made: Sequence[int], ids: TokenIds, size: tuple[int, int] | None) -> Iterator[int]:
    """Indices of the sampled tokens of `made`: text, visual tokens, and the digits of a size the model chose."""
    inside, known = False, size is not None
    for index, token in enumerate(made):
        if token == ids.img:
            known = True
        if not inside or token >= ids.visual or (token in ids.digits and not known):
            yield index
        inside = token == ids.boi or (inside and token != ids.eoi)
