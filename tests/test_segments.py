"""Ids to text, reasoning and images, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from emu_cog.pipeline import Pipeline
from emu_cog.prompt.segments import ImageCodes, Reader, Text, parse_image
from emu_cog.prompt.tokenizer import Tokenizer

Pipelines = Callable[[str], Pipeline]
CODES = ((1, 2, 3), (4, 5, 6))


@pytest.fixture
def tokenizer(pipelines: Pipelines) -> Tokenizer:
    return pipelines("picture").tokenizer


def read(tokenizer: Tokenizer, ids: Sequence[int], step: int) -> list[Text | ImageCodes]:
    reader = Reader(tokenizer, output=3)
    found: list[Text | ImageCodes] = []
    for i in range(0, len(ids), step):
        found += reader.feed(ids[i : i + step])
    return [*found, *reader.finish()]


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_segments_come_in_reading_order_however_they_arrive(step: int, tokenizer: Tokenizer) -> None:
    t, e = tokenizer.ids, tokenizer.encode
    ids = [t.bog, *e("plan"), t.eog, *e("First."), t.boc, *e("think"), t.eoc, *t.image_block(CODES)]
    ids += [*t.image_block(CODES), *e("Then é世 🦤"), t.ess, t.eos]
    assert read(tokenizer, ids, step) == [
        Text(3, "global_reasoning", "plan"),
        Text(3, "text", "First."),
        Text(3, "image_reasoning", "think"),
        ImageCodes(3, CODES),
        ImageCodes(3, CODES),
        Text(3, "text", "Then é世 🦤"),
    ]


def test_a_segment_is_yielded_as_soon_as_it_is_complete(tokenizer: Tokenizer) -> None:
    t = tokenizer.ids
    reader = Reader(tokenizer)
    assert list(reader.feed([*tokenizer.encode("one"), t.boi])) == [Text(0, "text", "one")]
    block = t.image_block(CODES)
    assert list(reader.feed(block[1:-1])) == []
    assert list(reader.feed(block[-1:])) == [ImageCodes(0, CODES)]


def test_text_before_an_image_and_after_it_is_kept(tokenizer: Tokenizer) -> None:
    """Upstream drops text that stands before an unfinished image."""
    t = tokenizer.ids
    reader = Reader(tokenizer)
    assert list(reader.feed([*tokenizer.encode("kept"), *t.header(2, 3)])) == [Text(0, "text", "kept")]
    with pytest.raises(ValueError, match="end inside an image"):
        list(reader.finish())


def test_unclosed_reasoning_is_marked_incomplete(tokenizer: Tokenizer) -> None:
    t = tokenizer.ids
    assert read(tokenizer, [t.boc, *tokenizer.encode("and so")], 1) == [Text(3, "image_reasoning", "and so", False)]


def test_an_image_inside_reasoning_splits_it(tokenizer: Tokenizer) -> None:
    t, e = tokenizer.ids, tokenizer.encode
    ids = [t.bog, *e("before"), *t.image_block(CODES), *e("after"), t.eog, *e("text")]
    assert read(tokenizer, ids, 1) == [
        Text(3, "global_reasoning", "before"),
        ImageCodes(3, CODES),
        Text(3, "global_reasoning", "after"),
        Text(3, "text", "text"),
    ]


def test_stray_special_tokens_keep_their_written_form(tokenizer: Tokenizer) -> None:
    t, e = tokenizer.ids, tokenizer.encode
    assert read(tokenizer, [*e("a"), t.eoi, t.eog, *e("b")], 1) == [Text(3, "text", "a<|image end|><|extra_61|>b")]


def test_broken_utf8_never_raises(tokenizer: Tokenizer) -> None:
    broken = [tokenizer.encode("é")[0]] if len(tokenizer.encode("é")) > 1 else [0xC3]
    reader = Reader(tokenizer)
    texts = [*reader.feed([*broken, *tokenizer.encode(" ok"), *broken]), *reader.finish()]
    assert len(texts) == 1
    assert " ok" in texts[0].text  # type: ignore[union-attr]


def test_blank_text_is_no_segment(tokenizer: Tokenizer) -> None:
    assert read(tokenizer, [*tokenizer.encode(" \n "), tokenizer.ids.eos], 1) == []


@pytest.mark.parametrize("change", ["short", "long", "eol", "text"])
def test_a_ragged_image_is_refused(change: str, tokenizer: Tokenizer) -> None:
    inner = tokenizer.ids.image_block(CODES)[1:-1]
    broken = {
        "short": inner[:-1],
        "long": [*inner, inner[-1]],
        "eol": [*inner[:-4], inner[-1], *inner[-3:]],
        "text": [*inner[:-1], 5],
    }[change]
    with pytest.raises(ValueError, match="2\\*3"):
        parse_image(broken, tokenizer)
