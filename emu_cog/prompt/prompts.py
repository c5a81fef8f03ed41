"""From a question and its reference images to the ids of the two streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emu_cog.prompt.tasks import Task
from emu_cog.prompt.tokenizer import Tokenizer

Codes = Sequence[Sequence[int]]
"""One image as vision-tokenizer codes, `codes[row][column]`."""


@dataclass(frozen=True)
class Prompt:
    """Ids of the conditional stream (all of the prompt) and of the unconditional one (the images alone)."""

    conditional: tuple[int, ...]
    unconditional: tuple[int, ...]


def build(task: Task, question: str, images: Sequence[Codes], tokenizer: Tokenizer) -> Prompt:
    """The ids upstream's templates give. Text between two special tokens is encoded in one piece, because
    byte-pair merges run across the template and the question; the question itself is only ever text."""
    ids = tokenizer.ids
    blocks = [token for codes in images for token in ids.image_block(codes)]

    def stream(before: str, after: str) -> tuple[int, ...]:
        if not blocks:
            return (ids.bos, *tokenizer.encode(before + after), ids.bss)
        return (ids.bos, *tokenizer.encode(before), *blocks, *tokenizer.encode(after), ids.bss)

    if task.images_first:
        conditional = stream(task.before(), f"{question} ASSISTANT: ")
    else:
        conditional = stream(f"{task.before()}{question}", " ASSISTANT: ")
    return Prompt(conditional=conditional, unconditional=stream(*task.unconditional))
