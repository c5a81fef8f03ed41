"""Examples to token sequences, in exactly the form inference uses: built by the package's own prompts and grammar.

Pictures are not known to the process that writes the text; it leaves numbered blanks where their codes go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from emu_cog.prompt.geometry import reference_size
from emu_cog.prompt.prompts import build
from emu_cog.prompt.tasks import TABLE
from emu_cog.prompt.tokenizer import Tokenizer
from scripts.mini.pool import AREA, SQUARE
from scripts.mini.render import Batch
from scripts.mini.rewording import reworded
from scripts.mini.tasks import BEYOND, sample
from scripts.mini.tasks.sample import GLOBAL, THOUGHT, Said, Sample
from scripts.mini.world import Scene

SHARES = {"t2i": 36, "x2i": 36, "howto": 7, "story": 7, "explore": 7, "vla": 7}
"""How often each task is drawn, of 100, where nothing else is asked for."""
MANY = 3
"""Things from which on a picture is hard: of 400 prompts, the model of 2026-11-25 failed 31 % of those that ask for so
many, and 5 % of the others."""
WITHOUT_TEXT = 0.12
"""Share of samples that become the unconditional stream: no words, the pictures alone."""
AGAIN = 0.15
"""Share of square samples whose references look like pictures the model made itself."""
BLANK = 1 << 20
"""Blank number i stands as the id `visual + BLANK + i` until its code is filled in."""

Size = tuple[int, int]
T2I_SIZES: tuple[Size, ...] = ((10, 13), (13, 10), (10, 14), (14, 10), (10, 16), (16, 10), (10, 18), (18, 10))
X2I_SIZES: tuple[Size, ...] = ((10, 14), (14, 10), (11, 14), (14, 11), (10, 13), (13, 10), (10, 16), (16, 10))
OTHER_SIZES: tuple[Size, ...] = ((10, 14), (14, 10))
SIZES: tuple[tuple[Size, Size], ...] = (
    (SQUARE, SQUARE),
    *((size, size) for size in T2I_SIZES),
    *((size, reference_size((size[1] * 16, size[0] * 16), AREA)) for size in (*X2I_SIZES, *OTHER_SIZES)),
)
"""All (drawn, after the resize of references) sizes there are."""
SQUARE_SHARE = {"t2i": 0.6, "x2i": 0.74}


@dataclass(frozen=True)
class Mix:
    """What is drawn: `shares` say how often each task, `many` which part of t2i is drawn anew until it is hard,
    `beyond` which part of t2i and x2i goes beyond the examination (tasks.BEYOND), `reworded` which part of the
    questions is put in other words, `wordings` how many ways each sample is asked in."""

    shares: Mapping[str, int] = field(default_factory=lambda: SHARES)
    many: float = 0.0
    beyond: float = 0.0
    reworded: float = 0.0
    wordings: int = 1


@dataclass(frozen=True)
class Chunk:
    """Sequences laid end to end. `ids` int32 with blanks, `learn` uint8 (1: a token to be learnt), `lengths`.

    `scenes` lists the pictures by (drawn size, size in tokens after the resize of references, again): a batch and
    the number of each picture's first blank. With `again` a reference is one that the vision tokenizer has been
    through before, as those are that the model made.
    """

    ids: NDArray[np.int32]
    learn: NDArray[np.uint8]
    lengths: NDArray[np.int32]
    scenes: dict[tuple[Size, Size, bool], tuple[Batch, NDArray[np.int64]]]
    blanks: int


@cache
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def chunk(job: tuple[int, int, Path, Mix]) -> Chunk:
    """`job` is (seed, samples, folder of the tokenizer files, what is drawn)."""
    seed, count, folder, mix = job
    rng, words = Random(seed), tokenizer(folder)
    ids: list[int] = []
    learn: list[int] = []
    lengths: list[int] = []
    pictures: dict[tuple[Size, Size, bool], list[tuple[Scene, int]]] = {}
    blanks = 0
    for _ in range(count):
        made, final, with_text, again = draw(rng, mix)
        for asked in _asked(rng, made, mix, with_text=with_text):
            line, mask = sequence(asked, words, final, blanks, with_text=with_text)
            ids += line
            learn += mask
            lengths.append(len(line))
        for i, scene in enumerate((*made.references, *made.pictures)):
            key = (scene.rows, scene.columns), final, again and i < len(made.references)
            pictures.setdefault(key, []).append((scene, blanks))
            blanks += final[0] * final[1]
    scenes = {
        key: (Batch.of([scene for scene, _ in group]), np.array([first for _, first in group]))
        for key, group in pictures.items()
    }
    return Chunk(np.array(ids, np.int32), np.array(learn, np.uint8), np.array(lengths, np.int32), scenes, blanks)


def _asked(rng: Random, made: Sample, mix: Mix, *, with_text: bool) -> Iterator[Sample]:
    """The sample as it was drawn, and in further wordings over the same pictures; without text there is but one."""
    yield made
    for _ in range(mix.wordings - 1 if with_text else 0):
        yield replace(made, question=reworded(rng, made))


def draw(rng: Random, mix: Mix) -> tuple[Sample, Size, bool, bool]:
    """A sample of any task, the size of its pictures in tokens after the resize of references, whether its words are
    told, and whether its references have been through the vision tokenizer before."""
    task = rng.choices(tuple(mix.shares), tuple(mix.shares.values()))[0]
    drawn = draw_size(rng, task)
    made = draw_sample(rng, task, drawn, mix)
    final = reference_size((drawn[1] * 16, drawn[0] * 16), AREA) if made.references else drawn
    return made, final, rng.random() >= WITHOUT_TEXT, drawn == SQUARE and rng.random() < AGAIN


def draw_sample(rng: Random, task: str, size: Size, mix: Mix) -> Sample:
    """An example of `task` with pictures of `size`, as hard and in such words as `mix` wants."""
    if task in BEYOND and mix.beyond and rng.random() < mix.beyond:
        made = sample(rng, task, *size, beyond=True)
    else:
        made = sample(rng, task, *size)
    if task == "t2i" and mix.many and rng.random() < mix.many:
        while len(made.wishes[-1].wanted) < MANY:
            made = sample(rng, task, *size)
    if mix.reworded and rng.random() < mix.reworded:
        made = replace(made, question=reworded(rng, made))
    return made


def draw_size(rng: Random, task: str) -> Size:
    """Mostly square, as the defaults are; else what the presets and the references' resize give."""
    if rng.random() < SQUARE_SHARE.get(task, 0.9):
        return SQUARE
    return rng.choice({"t2i": T2I_SIZES, "x2i": X2I_SIZES}.get(task, OTHER_SIZES))


def sequence(made: Sample, words: Tokenizer, size: Size, first: int, *, with_text: bool) -> tuple[list[int], list[int]]:
    """(ids with blanks from number `first` on, what is to be learnt) of one sample in one of its two streams."""
    rows, columns = size
    count = len(made.references) + len(made.pictures)
    grids = [
        [[BLANK + first + (n * rows + r) * columns + c for c in range(columns)] for r in range(rows)]
        for n in range(count)
    ]
    given, drawn = grids[: len(made.references)], iter(grids[len(made.references) :])
    prompt = build(TABLE[made.task], made.question, given, words)
    ids = words.ids
    line = list(prompt.conditional if with_text else prompt.unconditional)
    mask = [0] * len(line)
    marks = {GLOBAL: (ids.bog, ids.eog), THOUGHT: (ids.boc, ids.eoc)}
    for part in made.answer:
        if isinstance(part, Said):
            if not with_text:
                continue
            opening, closing = marks.get(part.kind, (None, None))
            text = words.encode(part.text)
            piece = text if opening is None or closing is None else [opening, *text, closing]
            mask += [1] * len(piece)
        else:
            piece = ids.image_block(next(drawn))
            # The unconditional stream is only ever asked for visual tokens.
            mask += [1] * len(piece) if with_text else [int(i >= ids.visual) for i in piece]
        line += piece
    if with_text:
        line.append(ids.eos)
        mask.append(1)
    return line, mask
