"""PyTorch's process-wide switches and the compilers' caches: each in this one place, with its reason.

Nothing is set on import. What can be set per call is not here: every prediction runs in `torch.inference_mode`
(Pipeline), because autograd's bookkeeping costs time and memory for nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from emu_cog.log import log

CACHE_VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""The variables that name inductor's and Triton's caches, and the subfolder each gets."""


def apply(device: torch.device) -> None:
    """Set what makes `device` fast. Nothing on a CPU: the tests' tolerances are stated for its plain fp32."""
    if device.type != "cuda":
        return
    # The language model is bfloat16; only the vision tokenizer is fp32. TF32 keeps fp32's range and ten
    # bits of its mantissa, and runs on tensor cores: several times fp32's speed, at the cost of a pixel's last bit.
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    # cuDNN chooses convolutions itself: letting it time them (cudnn.benchmark) won nothing on an H100 (1.7%
    # uncompiled, nothing compiled), cost up to 4 s per new picture size, and its trials took 58 GiB of workspace.
    torch.backends.cudnn.benchmark = False
    # Of SDPA's kernels PyTorch uses a fused one wherever it can. The math kernel, which materializes the attention
    # matrix, stays as the last resort: an odd head size is to run slowly rather than not at all.
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(True)


def exact() -> None:
    """Plain fp32 for every product and convolution of the process: for comparisons, where TF32 would be the noise."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Plain fp32 matrix products in this context: for an argmax, which rounding to TF32 would change."""
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
    """Keep the compilers' caches in `folder`, so that the next start finds them. Call before anything compiles.

    A variable that is already set is left alone. A folder that can't be written to is logged, not an error.
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
