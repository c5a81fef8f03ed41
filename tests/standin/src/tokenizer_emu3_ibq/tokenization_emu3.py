"""The tokenizer: unlike this package's it takes special tokens written in text for what they look like."""

import re
from pathlib import Path

import torch

from emu_cog.prompt.tokenizer import Tokenizer

SPECIAL_START_ID = 151643


class Emu3Tokenizer:
    def __init__(self, folder):
        self._inner = Tokenizer.load(Path(folder))
        assert self._inner.ids.pad == SPECIAL_START_ID  # the caller sets it to the checkpoint's
        last = self._inner.ids.vocab_size
        self.special_tokens = {self._inner.decode([i]): i for i in range(SPECIAL_START_ID, last)}

    def encode(self, text, return_tensors=None, add_special_tokens=True):
        ids = []
        for piece in re.split(r"(<\|[^|]*\|>)", text):
            ids += [self.special_tokens[piece]] if piece in self.special_tokens else self._inner.encode(piece)
        return torch.tensor([ids]) if return_tensors else ids

    def decode(self, ids, skip_special_tokens=False):
        return self._inner.decode([int(i) for i in ids])
