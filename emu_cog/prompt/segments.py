"""From a stream of ids to texts, reasoning and images, in reading order and as early as possible."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from emu_cog.prompt.tokenizer import Tokenizer

Kind = Literal["text", "global_reasoning", "image_reasoning"]


@dataclass(frozen=True)
class Text:
    """A finished piece of writing. `complete` is False where generation ended before its closing token."""

    output: int
    kind: Kind
    text: str
    complete: bool = True


@dataclass(frozen=True)
class ImageCodes:
    """A finished image as vision-tokenizer codes, `codes[row][column]`."""

    output: int
    codes: tuple[tuple[int, ...], ...]


class Reader:
    """Reads one output's ids. `feed` yields the segments that are complete, `finish` what is left.

    Special tokens inside text keep their written form, as upstream shows them; only ESS and EOS are dropped
    (source: multimodal_decode in upstream's generation_utils.py). An image block always ends the text before it, but
    not the reasoning that this text is part of; reasoning that is never closed lasts to the end. An image is read by
    its declared size.
    """

    def __init__(self, tokenizer: Tokenizer, *, output: int = 0) -> None:
        self._tokenizer, self._ids, self._output = tokenizer, tokenizer.ids, output
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._kind: Kind = "text"
        self._text = ""
        self._image: list[int] | None = None
        ids = self._ids
        self._opens: dict[int, Kind] = {ids.bog: "global_reasoning", ids.boc: "image_reasoning"}
        self._closes: dict[int, Kind] = {ids.eog: "global_reasoning", ids.eoc: "image_reasoning"}

    def feed(self, tokens: Sequence[int]) -> Iterator[Text | ImageCodes]:
        """Read `tokens` and yield each segment as soon as it is complete."""
        for token in tokens:
            if self._image is not None:
                yield from self._feed_image(token)
            elif token == self._ids.boi:
                yield from self._flush(complete=True)
                self._image = []
            elif token in self._opens and self._kind == "text":
                yield from self._flush(complete=True)
                self._kind = self._opens[token]
            elif self._closes.get(token) == self._kind:
                yield from self._flush(complete=True)
                self._kind = "text"
            elif token not in (self._ids.ess, self._ids.eos):
                self._text += self._utf8.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> Iterator[Text]:
        """The last text, also without its closing token. ValueError for an unfinished image: the engine makes none."""
        if self._image is not None:
            raise ValueError(f"output {self._output}: the ids end inside an image")
        yield from self._flush(complete=self._kind == "text")

    def _feed_image(self, token: int) -> Iterator[ImageCodes]:
        assert self._image is not None
        if token != self._ids.eoi:
            self._image.append(token)
            return
        yield ImageCodes(self._output, parse_image(self._image, self._tokenizer))
        self._image = None

    def _flush(self, *, complete: bool) -> Iterator[Text]:
        text = self._text + self._utf8.decode(b"", final=True)
        self._text = ""
        if text.strip():
            yield Text(self._output, self._kind, text, complete)


def parse_image(inner: Sequence[int], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The codes of one image from the ids between BOI and EOI. ValueError where they break the grammar."""
    ids = tokenizer.ids
    if ids.img not in inner:
        raise ValueError("an image block has no image token after its size")
    split = list(inner).index(ids.img)
    size, body = tokenizer.decode(list(inner[:split])), inner[split + 1 :]
    rows, columns = (int(n) for n in size.split("*"))
    if len(body) != rows * (columns + 1) - 1:
        raise ValueError(f"an image block declared as {size} has {len(body)} tokens after its size")
    lines = [tuple(body[r * (columns + 1) : r * (columns + 1) + columns]) for r in range(rows)]
    ends = [body[r * (columns + 1) + columns] for r in range(rows - 1)]
    codes = tuple(tuple(token - ids.visual for token in line) for line in lines)
    if any(end != ids.eol for end in ends) or any(not 0 <= code < ids.visual_count for line in codes for code in line):
        raise ValueError(f"an image block declared as {size} is not {rows} rows of {columns} visual tokens")
    return codes
