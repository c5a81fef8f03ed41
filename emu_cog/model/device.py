"""Which device and dtype a model is loaded with, and whether the device can do what the settings ask for."""

from __future__ import annotations

import time
from typing import Any

import torch

from emu_cog.errors import InputError
from emu_cog.model.quantize import check_format


def check_settings(*, device: str | None, dtype: str | None, device_map: str | None, quantize: str | None) -> None:
    """InputError for whatever this machine can't do. Needs no weights: call it before any are downloaded."""
    target, spread = choose_device(device), choose_spread(device_map)
    choose_dtype(dtype, target)
    every = spread and target.type == "cuda"
    for used in [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if every else [target]:
        check_format(quantize, used)


def choose_device(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one, else the CPU. InputError for any that is not here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"EMU_DEVICE={name!r} is not a device, accepted are cpu, cuda, cuda:0 and so on")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"EMU_DEVICE={name!r} but PyTorch sees no CUDA device here: set EMU_DEVICE=cpu")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise InputError(f"EMU_DEVICE={name!r} but PyTorch sees {count} CUDA device(s): the last is cuda:{count - 1}")
    return device


def choose_spread(device_map: str | None) -> bool:
    """Whether the layers are spread over all GPUs. InputError for any name but "auto"."""
    if device_map not in (None, "auto"):
        raise InputError(f"EMU_DEVICE_MAP={device_map!r} is not known, accepted is auto, or leave it empty")
    return device_map == "auto"


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The named dtype, or bfloat16 on CUDA and float32 elsewhere. InputError for any other name."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"EMU_DTYPE={name!r} is not known, accepted are {', '.join(DTYPES)}")
    return DTYPES[name]


class DeviceTimer:
    """Times what is queued on `device` from now until `stop`. Only `wait` and `seconds` wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._marks = [self._mark()]

    def stop(self) -> None:
        self._marks.append(self._mark())

    def wait(self) -> None:
        """Return when the device is done."""
        if self._stream:
            self._marks[1].synchronize()

    def seconds(self) -> float:
        self.wait()
        begun, ended = self._marks
        return begun.elapsed_time(ended) / 1000 if self._stream else ended - begun

    def _mark(self) -> Any:
        if not self._stream:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event
