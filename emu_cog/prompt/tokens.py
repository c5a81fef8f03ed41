"""The roles of special tokens and the grammar of an image block. No torch, no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Roles by the tokens' written form; the source is upstream's model_utils.py and its example configs.
ROLES: dict[str, str] = {
    "pad": "<|endoftext|>",
    "boc": "<|extra_50|>",  # an image's reasoning begins
    "eoc": "<|extra_51|>",
    "bog": "<|extra_60|>",  # global reasoning begins
    "eog": "<|extra_61|>",
    "bss": "<|extra_100|>",  # the assistant's answer begins
    "ess": "<|extra_101|>",
    "eol": "<|extra_200|>",  # between two rows of an image
    "eof": "<|extra_201|>",
    "tms": "<|extra_202|>",
    "bos": "<|extra_203|>",
    "eos": "<|extra_204|>",
    "img": "<|image token|>",
    "boi": "<|image start|>",
    "eoi": "<|image end|>",
}
EXTRA_COUNT = 205


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """Token ids of one checkpoint, all derived from its tokenizer files.

    `visual` is the id of visual token 0; the `visual_count` codes follow it without a gap and end the
    vocabulary. `digits` holds the ids of "0".."9", `star` the id of "*".
    """

    pad: int
    boc: int
    eoc: int
    bog: int
    eog: int
    bss: int
    ess: int
    eol: int
    eof: int
    tms: int
    bos: int
    eos: int
    img: int
    boi: int
    eoi: int
    visual: int
    visual_count: int
    digits: tuple[int, ...]
    star: int

    @property
    def vocab_size(self) -> int:
        return self.visual + self.visual_count

    def header(self, rows: int, columns: int) -> tuple[int, ...]:
        """`BOI h*w IMG` for an image of `rows` x `columns` tokens."""
        return (self.boi, *self.number(rows), self.star, *self.number(columns), self.img)

    def number(self, value: int) -> tuple[int, ...]:
        return tuple(self.digits[int(d)] for d in str(value))

    def image_block(self, codes: Sequence[Sequence[int]]) -> list[int]:
        """A whole block, BOI to EOI, for `codes[row][column]` of the vision tokenizer."""
        ids = list(self.header(len(codes), len(codes[0])))
        for row in codes:
            ids += [self.visual + code for code in row]
            ids.append(self.eol)
        ids[-1] = self.eoi  # EOL stands between rows; the last row ends the image
        return ids


def block_length(rows: int, columns: int) -> int:
    """Tokens of a whole image block, BOI to EOI. Source: upstream's format_image_string."""
    return len(f"{rows}*{columns}") + 2 + body_length(rows, columns)


def body_length(rows: int, columns: int) -> int:
    """Tokens of an image block after IMG: every row's codes and EOL, in the last row EOI for EOL."""
    return rows * (columns + 1)
