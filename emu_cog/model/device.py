"""Which device and dtype a model is loaded with, and whether the memory suffices: settled before anything is loaded."""

from __future__ import annotations

import torch

from emu_cog.errors import InputError


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
