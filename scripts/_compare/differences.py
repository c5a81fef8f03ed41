"""Where this package differs from upstream on purpose: upstream's defects, and other decisions.

Each is reproduced on the checkpoint at hand where that is possible: what upstream does, and what is done here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor

from _compare.cases import AREA, RESIZED, Native, photo
from emu_cog.errors import InputError
from emu_cog.prompt import geometry, prompts, tasks
from emu_cog.prompt.segments import Reader, Text
from emu_cog.prompt.tokens import TokenIds
from emu_cog.request import Request, Sampling
from emu_cog.upstream import adapter
from emu_cog.vision.images import open_reference

Check = Callable[[adapter.Upstream, Native], tuple[bool, bool]]
"""Whether upstream does what is said of it, and whether this package does."""
Why = Literal["defect", "decision"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What upstream does and what is done here; `check` None where these functions can't reproduce it."""

    why: Why
    upstream: str
    here: str
    check: Check | None = None


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One line of the table. `seen`: upstream did so just now; `kept`: so did this package; None: not run."""

    why: Why
    upstream: str
    here: str
    seen: bool | None = None
    kept: bool | None = None


def check_all(up: adapter.Upstream, native: Native) -> Iterator[Checked]:
    """Every difference, defects first, reproduced where that is possible."""
    for one in (*DEFECTS, *decisions()):
        seen, kept = one.check(up, native) if one.check else (None, None)
        yield Checked(why=one.why, upstream=one.upstream, here=one.here, seen=seen, kept=kept)


def force(scores: Tensor, token: int) -> Tensor:
    """(1, V) scores that leave `token` alone."""
    alone = torch.full_like(scores, -torch.inf)
    alone[0, token] = 0.0
    return alone


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
    last = geometry.reference_size(photo(1).size, AREA)
    return _size_of_two(up, RESIZED) == last, native.resized == RESIZED


def _size_of_two(up: adapter.Upstream, size: tuple[int, int] | None) -> tuple[int, int] | None:
    """(rows, columns) that upstream makes with the references 0 and 1 where `size` is requested."""
    header = _header(up, "x2i", [photo(0), photo(1)], size, _Begin(up.ids.boi))
    if up.ids.img not in header:
        return None
    rows, columns = up.own_tokenizer.decode(header[1 : header.index(up.ids.img)]).split("*")
    return int(rows), int(columns)


def _header(
    up: adapter.Upstream, task: str, images: Sequence[Image.Image], size: tuple[int, int] | None, begin: _Begin
) -> list[int]:
    """The first 9 ids of upstream's answer; `begin` makes it start with an image."""
    conditional, unconditional = up.prompt(task, "-", images, AREA)
    return up.generate(
        conditional,
        unconditional,
        guidance=3.0,
        image=Sampling(),
        text=Sampling(),
        size=size,
        max_new_tokens=9,
        references=len(images),
        seed=0,
        after=[begin],
    )


class _Begin(LogitsProcessor):
    """Forces the answer's first token, and counts the tokens allowed at its second."""

    def __init__(self, token: int) -> None:
        self._token, self._prompt = token, 0
        self.allowed = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._prompt = self._prompt or input_ids.shape[1]
        if input_ids.shape[1] == self._prompt:
            return force(scores, self._token)
        if input_ids.shape[1] == self._prompt + 1:
            self.allowed = int(torch.isfinite(scores).sum())
        return scores


def _unfinished(up: adapter.Upstream, native: Native) -> tuple[bool, bool]:
    made = [*up.own_tokenizer.encode("before it"), *up.ids.header(2, 2), up.ids.visual]
    ours = list(Reader(up.own_tokenizer).feed(made))
    return up.segments(made) == [], [s.text for s in ours if isinstance(s, Text)] == ["before it"]


def _ragged(up: adapter.Upstream, native: Native) -> tuple[bool, bool]:
    made = _block(up.ids, declared=(2, 2), rows=(2, 1))
    return up.segments(made) == [], _refused(up, made)


def _undeclared(up: adapter.Upstream, native: Native) -> tuple[bool, bool]:
    made = _block(up.ids, declared=(3, 3), rows=(2, 2))
    theirs = [value.size for kind, value in up.segments(made) if kind == "image"]
    return theirs == [(32, 32)], _refused(up, made)


def _block(ids: TokenIds, *, declared: tuple[int, int], rows: Sequence[int]) -> list[int]:
    """An image block of rows of so many codes, whatever its header declares."""
    body = [token for row in rows for token in (*[ids.visual] * row, ids.eol)]
    return [*ids.header(*declared), *body[:-1], ids.eoi]


def _refused(up: adapter.Upstream, made: Sequence[int]) -> bool:
    """Whether reading `made` raises the error for an image that breaks the grammar."""
    try:
        list(Reader(up.own_tokenizer).feed(made))
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


def _unclosed(up: adapter.Upstream, native: Native) -> tuple[bool, bool]:
    """Reasoning that is opened but never closed."""
    made = [up.ids.bog, *up.own_tokenizer.encode("think"), *up.ids.image_block([[0, 0], [0, 0]])]
    theirs = [(kind, value) for kind, value in up.segments(made) if kind != "image"]
    ours = [(s.kind, s.text) for s in Reader(up.own_tokenizer).feed(made) if isinstance(s, Text)]
    return theirs == [("text", up.own_tokenizer.decode([up.ids.bog]) + "think")], ours == [
        ("global_reasoning", "think")
    ]


def _chosen(up: adapter.Upstream, native: Native) -> tuple[bool, bool]:
    """Upstream samples the first digit of a sequence's size where none is requested."""
    begin = _Begin(up.ids.boi)
    _header(up, "story", [], None, begin)
    return begin.allowed > 1, True


def _last_size(up: adapter.Upstream, native: Native) -> tuple[bool, bool]:
    return _size_of_two(up, None) == geometry.reference_size(photo(1).size, AREA), True


def _pixels(up: adapter.Upstream, native: Native) -> tuple[bool, bool]:
    """A photo on its side, a transparent one and a 16-bit one; upstream opens references with `convert("RGB")`
    (source: inference.py)."""
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: rotate by 90 degrees
    files = {
        "turned.png": (Image.new("RGB", (96, 64)), {"exif": turned}),
        "transparent.png": (Image.new("RGBA", (64, 64), (10, 20, 30, 0)), {}),
        "deep.png": (Image.fromarray(np.full((64, 64), 40000, np.uint16)), {}),
    }
    ours, theirs = {}, {}
    with tempfile.TemporaryDirectory(prefix="emu-cog-") as folder:
        for name, (image, options) in files.items():
            path = Path(folder) / name
            image.save(path, **options)
            ours[name] = open_reference(path, name=name)
            with Image.open(path) as opened:
                theirs[name] = opened.convert("RGB")
    read = [(made["turned.png"].size, *(made[n].getpixel((0, 0)) for n in list(files)[1:])) for made in (theirs, ours)]
    (size, clear, deep), (our_size, our_clear, our_deep) = read
    seen = size == (96, 64) and clear == (10, 20, 30) and deep == (255, 255, 255)
    return seen, our_size == (64, 96) and our_clear != clear and our_deep != deep


def decisions() -> Iterator[Difference]:
    """Where this package decided otherwise. The sizes come from `tasks.plan`, so that the lines follow the code."""
    size = tasks.plan(Request(prompt="-", task="story")).size
    if size is not None:
        yield Difference(
            why="decision",
            upstream="sequences without photos have the size that the model chooses",
            here=f"{16 * size[1]}x{16 * size[0]} pixels; the model's choice with aspect_ratio=model",
            check=_chosen,
        )
    photos = [photo(n) for n in range(2)]
    first, last = (geometry.reference_size(image.size, AREA) for image in photos)
    size = tasks.plan(Request(prompt="-", task="x2i", images=tuple(photos), image_area=AREA)).size
    if size != last:
        yield Difference(
            why="decision",
            upstream="with several photos a picture takes the last one's size",
            here={first: "the first one's", None: "the model's choice"}.get(size, "another"),
            check=_last_size,
        )
    yield Difference(
        why="decision",
        upstream="photos are read without their EXIF orientation and transparency, and 16 bits are clipped",
        here="turned upright, laid on a background, scaled to 8 bits",
        check=_pixels,
    )
    yield Difference(
        why="decision",
        upstream="reasoning that is never closed is text, with its opening token spelled out",
        here="it is reasoning, up to the end",
        check=_unclosed,
    )


DEFECTS = (
    Difference(
        why="defect",
        upstream="special tokens written in the user's text become special tokens",
        here="the text of a request is only text",
        check=_forged,
    ),
    Difference(
        why="defect",
        upstream="<|IMAGE|> in the user's text puts the image in a second time",
        here="it is text",
        check=_doubled,
    ),
    Difference(
        why="defect",
        upstream="with two or more references a size that is asked for is discarded",
        here="the size that is asked for is made",
        check=_resized,
    ),
    Difference(
        why="defect",
        upstream="text before an unfinished image is lost",
        here="it is kept, and an image begun at the token limit is finished",
        check=_unfinished,
    ),
    Difference(
        why="defect",
        upstream="an image with uneven rows is dropped silently",
        here="the grammar allows none, and one that is read is an error",
        check=_ragged,
    ),
    Difference(
        why="defect",
        upstream="an image's declared size is ignored when it is decoded",
        here="an image that is not as declared is an error",
        check=_undeclared,
    ),
    Difference(
        why="defect",
        upstream="a reference of 20000x1 pixels crashes",
        here="refused, with the limit that holds",
        check=_thin,
    ),
    Difference(why="defect", upstream="the sampler is never seeded", here="a seed and the settings are a picture"),
    Difference(why="defect", upstream="guidance in three parts (no_text_img_cfg) is broken", here="not offered"),
    Difference(
        why="defect",
        upstream="its SDPA attention leaves out the norms of queries and keys",
        here="transformers' Qwen3 takes the model file's place",
    ),
    Difference(
        why="defect",
        upstream="streaming never gives the final ids, and hangs where its worker fails",
        here="texts and pictures come as they are finished; an error ends the run",
    ),
)
