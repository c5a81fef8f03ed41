"""The vision decoder with its blocks compiled, once for every picture size; uncompiled it is the reference.

What is compiled are the residual blocks and the tail, not the decoder as a whole: blocks of one width share a graph,
so there are few and small ones, and height and width are symbols in them, so a new aspect ratio compiles nothing.
The gain is the group norms: PyTorch's kernel gives each of the 32 groups one thread block, and took 105 of the 245 ms
of a 1024x1024 picture on an H100; compiled they are split over the GPU and fused with what follows: 99 ms, 59 of them
in the convolutions. bfloat16 convolutions moved a sixth of the values by 2 to 6 of 255 and are not used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as shapes

from emu_cog.log import log
from emu_cog.vision.ibq import IBQ, ResBlock


class CompiledDecoder:
    """`vision.pixels` with compiled blocks: (N, embed_dim, h, w) features to (N, 3, 16h, 16w).

    When compiling fails, at whatever call, that is told once and the blocks run uncompiled from then on.
    """

    def __init__(self, vision: IBQ, *, backend: str | Callable[..., Any] = "inductor") -> None:
        self._vision, self.active = vision, True
        decoder = vision.decoder
        for block in decoder.modules():
            if isinstance(block, ResBlock):
                block.compile(dynamic=True, backend=backend)
        decoder.tail = torch.compile(decoder.tail, dynamic=True, backend=backend)  # type: ignore[method-assign]
        if vision.device.type == "cuda":
            # Tensor-core convolutions read channels last; otherwise each one would turn its input around and back.
            decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        vision.compiled = self

    def __call__(self, features: Tensor) -> Tensor:
        if self.active:
            try:
                with _unrelated_sizes():
                    return self._vision.pixels(features)
            except Exception as error:  # compilers fail in many ways; the uncompiled decoder is always right
                told = " ".join(str(error).split())[:300]
                log.warning(
                    "the vision decoder can't be compiled and runs uncompiled: %s: %s", type(error).__name__, told
                )
                self.active = False
        with torch.compiler.set_stance("force_eager"):
            return self._vision.pixels(features)

    @torch.inference_mode()
    def warm_up(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Decode blank pictures of `sizes` (rows, columns), so that no request waits for compiling; told in seconds."""
        device = self._vision.device
        for number, (rows, columns) in enumerate(sizes):
            started = time.perf_counter()
            self._vision.decode(torch.zeros(1, rows, columns, dtype=torch.long, device=device))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            what = "compiled, " if number == 0 and self.active else ""
            seconds = time.perf_counter() - started
            log.info("setup: vision decoder, %s%dx%d tokens: %.1f s", what, rows, columns, seconds)


def _unrelated_sizes() -> AbstractContextManager[Any]:
    """A square picture that comes first must not let the compiler conclude that height always equals width."""
    return shapes.patch(use_duck_shape=False)  # type: ignore[attr-defined,no-any-return]
