"""The vision tokenizer with the methods that the callers expect of it."""

from pathlib import Path
from types import SimpleNamespace

from emu_cog.vision.ibq import load_vision_tokenizer


class Tokenizer:
    def __init__(self, model):
        self.model = model
        self.quantize = SimpleNamespace(e_dim=model.config.embed_dim)

    def parameters(self):
        return self.model.parameters()

    def encode(self, pixels):
        return None, None, [self.model.encode(pixels.float())]

    def decode_code(self, codes, shape):
        assert (*codes.shape, self.quantize.e_dim) == tuple(shape)
        return self.model.decode(codes)


def build_vision_tokenizer(kind, path, device):
    assert kind == "ibq"
    return Tokenizer(load_vision_tokenizer(Path(path), device=device))
