"""The vision decoder with its blocks compiled once for all picture sizes, and on a GPU with convolutions in fp16; the
uncompiled one is the reference.

Not the decoder is compiled but its residual blocks and its tail: blocks of one width share a graph, so there are few
graphs and all are small. Height and width are symbols in them, so a new aspect ratio compiles nothing.

Most of the gain is in the group norms. PyTorch's kernel runs each of the 32 groups on one thread block and took 105 of
the 245 ms of a 1024x1024 picture on an H100. Compiled, the norms are split over the GPU and fused with what follows:
99 ms, of which the convolutions take 59. bfloat16 convolutions changed a sixth of the values by 2 to 6 of 255 and are
not used.

Convolutions in fp16 have as many bits as in TF32, half the bytes and twice the pace: 63 instead of 94 ms on an H200,
6.1 % of the values off by 1 of 255 from exact ones, where TF32's are 5.1 %. They differ in range: fp16 ends at 65504.
Nobody here has seen whether the released weights stay below; a picture with a number beyond comes out as infinities or
NaN, and is decoded again in TF32, like all after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shapes
from torch.nn import functional as F

from emu_cog.log import log
from emu_cog.vision.ibq import IBQ, ResBlock

T = TypeVar("T", bound=nn.Module)


class HalfConv(nn.Module):
    """The convolution `exact` in fp16, with fp32 sums: fp32 or fp16 to `dtype`."""

    weight: Tensor
    bias: Tensor

    def __init__(self, exact: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        assert exact.bias is not None
        self.exact, self.dtype = exact, dtype
        self.register_buffer("weight", exact.weight.half(), persistent=False)
        self.register_buffer("bias", exact.bias.half(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.half(), self.weight, self.bias, self.exact.stride, self.exact.padding).to(self.dtype)


def halve(decoder: nn.Module) -> None:
    """Put each convolution of `decoder` into a HalfConv. Within a residual block they leave fp16, else fp32."""
    for block, name, conv in _children(decoder, nn.Conv2d):
        setattr(block, name, HalfConv(conv, torch.float16 if isinstance(block, ResBlock) else torch.float32))


def unhalve(decoder: nn.Module) -> None:
    """Take them out again."""
    for block, name, conv in _children(decoder, HalfConv):
        setattr(block, name, conv.exact)


def _children(decoder: nn.Module, kind: type[T]) -> list[tuple[nn.Module, str, T]]:
    """The modules of one kind: each with the one that holds it, and its name there."""
    held = ((block, name, child) for block in decoder.modules() for name, child in block.named_children())
    return [(block, name, child) for block, name, child in held if isinstance(child, kind)]


class CompiledDecoder:
    """`vision.pixels` with compiled blocks: (N, embed_dim, h, w) features to (N, 3, 16h, 16w).

    When compiling fails, at any call, a warning is logged once and the blocks run uncompiled from then on.
    """

    def __init__(
        self, vision: IBQ, *, half: bool | None = None, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        """`half`: with convolutions in fp16, by default on a GPU."""
        self._vision, self.active = vision, True
        decoder = vision.decoder
        self.half = vision.device.type == "cuda" if half is None else half
        if self.half:
            halve(decoder)
        for block in decoder.modules():
            if isinstance(block, ResBlock):
                block.compile(dynamic=True, backend=backend)
        decoder.tail = torch.compile(decoder.tail, dynamic=True, backend=backend)  # type: ignore[method-assign]
        if vision.device.type == "cuda":
            # Tensor-core convolutions read channels last; otherwise each would convert its input and output.
            decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        vision.compiled = self

    def __call__(self, features: Tensor) -> Tensor:
        pixels = self._pixels(features)
        if self.half and not bool(pixels.isfinite().all()):
            log.warning("the vision decoder's numbers are too large for fp16: from now on it decodes in TF32")
            self.half = False
            unhalve(self._vision.decoder)
            torch._dynamo.reset()  # both kinds of blocks would be more graphs than it keeps of one function
            pixels = self._pixels(features)
        return pixels

    def _pixels(self, features: Tensor) -> Tensor:
        if self.active:
            try:
                with _unrelated_sizes():
                    return self._vision.pixels(features)
            except Exception as error:  # compilers fail in many ways; the uncompiled decoder is always right
                reason = " ".join(str(error).split())[:300]
                log.warning(
                    "the vision decoder can't be compiled and runs uncompiled: %s: %s", type(error).__name__, reason
                )
                self.active = False
        with torch.compiler.set_stance("force_eager"):
            return self._vision.pixels(features)

    @torch.inference_mode()
    def warm_up(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Decode random codes of each of `sizes` (rows, columns), so that no request waits for compiling, nor finds out
        that fp16 does not suffice.

        Logs the seconds of each.
        """
        device, codes = self._vision.device, self._vision.config.n_embed
        for number, (rows, columns) in enumerate(sizes):
            started = time.perf_counter()
            self._vision.decode(torch.randint(codes, (1, rows, columns), device=device))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            what = "compiled, " if number == 0 and self.active else ""
            seconds = time.perf_counter() - started
            log.info("setup: vision decoder, %s%dx%d tokens: %.1f s", what, rows, columns, seconds)


def _unrelated_sizes() -> AbstractContextManager[Any]:
    """Without this, a square first picture would make the compiler assume that height equals width."""
    return shapes.patch(use_duck_shape=False)  # type: ignore[attr-defined,no-any-return]
