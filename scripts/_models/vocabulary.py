"""A small byte-level vocabulary in the format and order of the released tokenizer's files."""

from __future__ import annotations

import base64
import re
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

from emu_cog.prompt.tokenizer import RANKS_FILE, VISION_FILE

# The text that the merges are learned from: the templates' words and some typical prompts.
_CORPUS = """
You are a helpful assistant for this task. Please generate a response with interleaved text and images. USER ASSISTANT
A small red boat lies on the grey sand of the shore while the evening light falls over the water and the hills.
Draw the same street in the rain, with the lamps lit and the people walking home under their umbrellas.
First take the flour and the warm milk, then stir until the dough is smooth, and let it rest in a quiet place.
The fox went over the frozen river and found a garden where the snow had never fallen and the apples were still green.
Move the cup to the left side of the table, close the drawer, and put the spoon next to the plate.
Walk through the old house: the hall, the stairs, the room with the blue window and the view of the mountains.
"""


def write_vocabulary(folder: Path, *, visual_tokens: int, merges: int, source: Path | None = None) -> None:
    """Write `emu3.tiktoken` and `emu3_vision_tokens.txt`: new ones, or those of `source` with fewer visual tokens."""
    names = ["<|image token|>", "<|image start|>", "<|image end|>"]
    names += [f"<|visual token {i:06d}|>" for i in range(visual_tokens)]
    if source is None:
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(_byte_pairs(merges))]
        (folder / RANKS_FILE).write_text("".join(lines), encoding="ascii")
    else:
        shutil.copyfile(source / RANKS_FILE, folder / RANKS_FILE)
        known = (source / VISION_FILE).read_text(encoding="utf-8").split("\n")
        if known[: len(names)] != names:
            raise ValueError(f"{source / VISION_FILE} does not begin with {visual_tokens} visual tokens")
    (folder / VISION_FILE).write_text("\n".join(names) + "\n", encoding="utf-8")


def _byte_pairs(merges: int) -> list[bytes]:
    """The 256 bytes in the order of the released file ("*" is 9, the digits are 15 to 24), then learned merges."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    tokens = [bytes([b]) for b in [*shown, *(b for b in range(256) if b not in shown)]]
    words = Counter(re.findall(r" ?[A-Za-z]+", _CORPUS))
    pieces = {word: [bytes([b]) for b in word.encode()] for word in words}
    for _ in range(merges):
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        tokens.append(left + right)
        for parts in pieces.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == (left, right):
                    parts[i : i + 2] = [left + right]
                i += 1
    return tokens
