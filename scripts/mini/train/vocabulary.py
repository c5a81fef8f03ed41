"""Writes the miniature's tokenizer files: byte-pair ranks trained on the world's sentences, and the visual tokens."""

from __future__ import annotations

import argparse
import base64
import json
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from emu_cog.prompt.tasks import TABLE, UNCONDITIONAL
from emu_cog.prompt.tokenizer import RANKS_FILE, SPLIT, VISION_FILE
from scripts.mini.pool import SQUARE
from scripts.mini.tasks import MAKERS, sample
from scripts.mini.tasks.sample import TextPart

RANKS = 749
"""With 211 special tokens and 2048 codes the vocabulary is 3008, a multiple of 64."""


def corpus(samples: int, seed: int) -> list[str]:
    """Questions and answers of all tasks, with the prompt templates."""
    rng = Random(seed)
    lines = []
    for task in MAKERS:
        for _ in range(samples):
            made = sample(rng, task, *SQUARE)
            lines.append(f"{TABLE[task].before()}{made.question} ASSISTANT: ")
            lines += [part.text for part in made.answer if isinstance(part, TextPart)]
    return [*lines, "".join(UNCONDITIONAL)]


def ranks(lines: list[str], count: int) -> list[bytes]:
    """`count` byte-pair tokens by rank: the 256 bytes in GPT-2's order, then the merges."""
    alphabet = _byte_letters()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    letters = list(alphabet)
    tokenizer.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=count + 64, initial_alphabet=letters, show_progress=False)
    )
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    found = [bytes([alphabet[letter]]) for letter in letters]
    for pair in merges:
        token = bytes(alphabet[letter] for letter in "".join(pair))
        if token not in found:
            found.append(token)
    if len(found) < count:
        raise ValueError(f"the corpus gives only {len(found)} of {count} tokens: increase --samples")
    return found[:count]


def _byte_letters() -> dict[str, int]:
    """GPT-2's byte-to-character table: printable bytes first, as themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def write(folder: Path, tokens: list[bytes], codes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / RANKS_FILE).write_text("".join(lines))
    names = ["<|image token|>", "<|image start|>", "<|image end|>"]
    names += [f"<|visual token {i:06d}|>" for i in range(codes)]
    (folder / VISION_FILE).write_text("".join(f"{name}\n" for name in names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=3000, help="training samples per task")
    parser.add_argument("--codes", type=int, default=2048, help="codes of the vision tokenizer")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    tokens = ranks(corpus(args.samples, args.seed), RANKS)
    write(args.out, tokens, args.codes)
    print(json.dumps({"ranks": len(tokens), "codes": args.codes, "seed": args.seed}))


if __name__ == "__main__":
    main()
