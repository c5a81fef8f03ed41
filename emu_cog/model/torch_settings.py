"""PyTorch's process-wide switches and the compilers' caches: each in this one place, with its reason.

Nothing is set on import. What goes by call and not by process is not here: every prediction runs in
`torch.inference_mode` (Pipeline.stream), because autograd's bookkeeping costs time and memory that nothing uses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from emu_cog.log import log

CACHE_VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Where inductor and Triton keep what they compiled, and the subfolder that each gets here."""


def apply(device: torch.device) -> None:
    """Set what `device` is fast with. On a CPU nothing: its fp32 is what the tests' tolerances are stated for."""
    if device.type != "cuda":
        return
    # The language model is bfloat16; what is left in fp32 is the vision tokenizer. TF32 keeps fp32's range and ten
    # bits of its mantissa, and runs on tensor cores: several times fp32's speed for a pixel's last bit.
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    # cuDNN's own choice of convolutions stays: letting it time them (cudnn.benchmark) won nothing on an H100 (1.7%
    # uncompiled, nothing compiled), cost up to 4 s a new picture size, and its trials took 58 GiB of workspace.
    torch.backends.cudnn.benchmark = False
    # Of SDPA's kernels PyTorch takes a fused one wherever it can. The math kernel, which writes the whole attention
    # matrix, stays as the last resort: an odd head size shall run slowly rather than not at all.
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(True)


def exact() -> None:
    """Plain fp32 for every product and convolution of the process: for comparisons, where TF32 would be the noise."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Plain fp32 matrix products inside: for an argmax, where rounding to TF32 would change the answer."""
    before = torch.get_float32_matmul_precision()
    if device.type != "cuda" or before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def keep_compiled(folder: Path) -> None:
    """Let the compilers' caches lie in `folder`, so that a second start finds them. Call before anything compiles.

    A variable that is set already is left as it is. A folder that can't be written to is told, and no error.
    """
    for variable, name in CACHE_VARIABLES.items():
        if variable in os.environ:
            continue
        target = folder.absolute() / name
        try:
            target.mkdir(parents=True, exist_ok=True)
            writable = os.access(target, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            log.warning("%s can't be written to: what is compiled is not kept for the next start", target)
            return
        os.environ[variable] = str(target)
