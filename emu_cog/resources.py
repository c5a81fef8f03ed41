"""Which device and dtype a model is loaded with, and whether the memory suffices: settled before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from emu_cog import tasks
from emu_cog.config import InputError, Request
from emu_cog.loading import plan_memory
from emu_cog.memory import Budget
from emu_cog.tokens import block_length

PROMPT_TOKENS = 512
"""A long prompt, for reckoning how much cache a picture needs."""


def reckon_memory(
    folder: Path,
    vision_folder: Path,
    defaults: tasks.ModelDefaults,
    *,
    device: torch.device,
    dtype: torch.dtype,
    spread: bool,
    quantize: str | None = None,
    max_context: int | None = None,
    max_outputs: int = 1,
) -> Budget:
    """What a run needs, told in the log before anything is loaded. InputError with the numbers where it is too much."""
    picture = tasks.plan(Request(prompt="-"), defaults)
    budget = plan_memory(
        folder,
        vision_folder,
        device=device,
        dtype=dtype,
        spread=spread,
        area=picture.image_area,
        quantize=quantize,
    )
    typical = PROMPT_TOKENS + tasks.PICTURE_TEXT_TOKENS + block_length(*(picture.size or (64, 64)))
    budget.check(max_context or typical, max_outputs)
    return budget


def choose_device(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one, else the CPU. InputError for a name torch does not know."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"EMU_DEVICE={name!r} is not a device, accepted are cpu, cuda, cuda:0 and so on") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"EMU_DEVICE={name!r} but PyTorch sees no CUDA device here: set EMU_DEVICE=cpu")
    return device


def choose_spread(device_map: str | None) -> bool:
    """Whether the layers are spread over all GPUs. InputError for any name but "auto"."""
    if device_map not in (None, "auto"):
        raise InputError(f"EMU_DEVICE_MAP={device_map!r} is not known, accepted is auto, or leave it empty")
    return device_map == "auto"


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The named dtype, or bfloat16 on CUDA and float32 elsewhere."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"EMU_DTYPE={name!r} is not known, accepted are {', '.join(DTYPES)}")
    return DTYPES[name]
