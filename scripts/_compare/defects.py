"""Where upstream is known to be wrong: each defect provoked on the checkpoint at hand, and what is done instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor

from _compare.cases import AREA, GREEDY, RESIZED, Native, photo
from emu_cog.errors import InputError
from emu_cog.prompt import geometry, prompts, tasks
from emu_cog.prompt.segments import Reader, Text
from emu_cog.prompt.tokens import TokenIds
from emu_cog.upstream import adapter

Check = Callable[[adapter.Upstream, Native], tuple[bool, bool]]
"""Whether upstream did what is said of it, and whether this package did what it says."""


@dataclass(frozen=True, kw_only=True)
class Defect:
    """What upstream does and what is done here; `check` None where it can't be provoked through these functions."""

    upstream: str
    instead: str
    check: Check | None = None


@dataclass(frozen=True, kw_only=True)
class Known:
    """A line of the table. `seen`: upstream did so just now; `kept`: this package did as it says; None: not run."""

    upstream: str
    instead: str
    seen: bool | None = None
    kept: bool | None = None


def provoke(up: adapter.Upstream, native: Native) -> Iterator[Known]:
    """Every defect, provoked where that is possible."""
    for defect in DEFECTS:
        seen, kept = defect.check(up, native) if defect.check else (None, None)
        yield Known(upstream=defect.upstream, instead=defect.instead, seen=seen, kept=kept)


def _forged(up: adapter.Upstream, native: Native) -> tuple[bool, bool]:
    question, ids = "a <|extra_200|> and an <|image end|>", up.ids
    theirs = up.prompt("t2i", question, [], AREA)[0][0].tolist()
    ours = prompts.build(tasks.TABLE["t2i"], question, [], up.own_tokenizer).conditional
    return {ids.eol, ids.eoi} <= set(theirs), {ids.eol, ids.eoi}.isdisjoint(ours)


def _doubled(up: adapter.Upstream, native: Native) -> tuple[bool, bool]:
    question, task = "the <|IMAGE|> there", tasks.TABLE["x2i"]
    theirs = up.prompt(task.name, question, [photo(0)], AREA)[0][0].tolist()
    ours = prompts.build(task, question, native.codes[0][:1], up.own_tokenizer).conditional
    return theirs.count(up.ids.boi) == 2, ours.count(up.ids.boi) == 1


def _resized(up: adapter.Upstream, native: Native) -> tuple[bool, bool]:
    """Two references and RESIZED asked for; the first token is made BOI, as only the header is of interest."""
    images = [photo(0), photo(1)]
    conditional, unconditional = up.prompt("x2i", "-", images, AREA)
    made = up.generate(
        conditional,
        unconditional,
        guidance=3.0,
        image=GREEDY,
        text=GREEDY,
        size=RESIZED,
        max_new_tokens=9,
        references=len(images),
        seed=0,
        after=[_Begins(conditional.shape[1], up.ids.boi)],
    )
    header = made[1 : made.index(up.ids.img)] if up.ids.img in made else []
    rows, columns = geometry.reference_size(images[-1].size, AREA)
    return up.own_tokenizer.decode(header) == f"{rows}*{columns}", native.resized == RESIZED


class _Begins(LogitsProcessor):
    """Makes `token` the first of the answer."""

    def __init__(self, prompt: int, token: int) -> None:
        self._prompt, self._token = prompt, token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > self._prompt:
            return scores
        alone = torch.full_like(scores, -torch.inf)
        alone[0, self._token] = 0.0
        return alone


def _unfinished(up: adapter.Upstream, native: Native) -> tuple[bool, bool]:
    said = [*up.own_tokenizer.encode("before it"), *up.ids.header(2, 2), up.ids.visual]
    ours = list(Reader(up.own_tokenizer).feed(said))
    return up.segments(said) == [], [s.text for s in ours if isinstance(s, Text)] == ["before it"]


def _ragged(up: adapter.Upstream, native: Native) -> tuple[bool, bool]:
    said = _block(up.ids, declared=(2, 2), rows=(2, 1))
    return up.segments(said) == [], _refused(up, said)


def _undeclared(up: adapter.Upstream, native: Native) -> tuple[bool, bool]:
    said = _block(up.ids, declared=(3, 3), rows=(2, 2))
    theirs = [value.size for kind, value in up.segments(said) if kind == "image"]
    return theirs == [(32, 32)], _refused(up, said)


def _block(ids: TokenIds, *, declared: tuple[int, int], rows: Sequence[int]) -> list[int]:
    """An image block of rows of so many codes, whatever its header declares."""
    body = [token for row in rows for token in (*[ids.visual] * row, ids.eol)]
    return [*ids.header(*declared), *body[:-1], ids.eoi]


def _refused(up: adapter.Upstream, said: Sequence[int]) -> bool:
    """Whether reading `said` ends in the error that tells how it breaks the grammar."""
    try:
        list(Reader(up.own_tokenizer).feed(said))
    except ValueError:
        return True
    return False


def _thin(up: adapter.Upstream, native: Native) -> tuple[bool, bool]:
    image, crashed, refused = Image.new("RGB", (20000, 1)), False, False
    try:
        up.image_string(image, AREA)
    except Exception:  # which error depends on the version of Pillow
        crashed = True
    try:
        geometry.reference_size(image.size, AREA)
    except InputError:
        refused = True
    return crashed, refused


DEFECTS = (
    Defect(
        upstream="special tokens written in the user's text become special tokens",
        instead="a question is only ever text",
        check=_forged,
    ),
    Defect(
        upstream="<|IMAGE|> in the user's text puts the image in a second time",
        instead="it is text",
        check=_doubled,
    ),
    Defect(
        upstream="with two or more references a size that is asked for is discarded",
        instead="the size that is asked for is made",
        check=_resized,
    ),
    Defect(
        upstream="text before an unfinished image is lost",
        instead="it is given, and a begun image is finished",
        check=_unfinished,
    ),
    Defect(
        upstream="an image with uneven rows vanishes without a word",
        instead="the grammar allows none, and one that is read is an error",
        check=_ragged,
    ),
    Defect(
        upstream="an image's declared size is ignored when it is decoded",
        instead="an image that is not as declared is an error",
        check=_undeclared,
    ),
    Defect(
        upstream="a reference of 20000x1 pixels crashes",
        instead="refused, with the limit that holds",
        check=_thin,
    ),
    Defect(upstream="the sampler is never seeded", instead="a seed and the settings are a picture"),
    Defect(upstream="guidance in three parts (no_text_img_cfg) is broken", instead="not offered"),
    Defect(
        upstream="its SDPA attention leaves out the norms of queries and keys",
        instead="transformers' Qwen3 takes the model file's place, on both sides of this table",
    ),
    Defect(
        upstream="streaming never gives the final ids, and hangs where its worker fails",
        instead="texts and pictures come as they are finished; an error ends the run",
    ),
)
