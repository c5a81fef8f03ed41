"""What every long run here does alike: stops when told to, keeps its state whole, tells what came of it."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def stop_when_told(stop: Callable[..., object]) -> None:
    """Call `stop` where a signal would end the process: on Ctrl-C and on SIGTERM."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def keep(state: Mapping[str, object], path: Path) -> None:
    """`torch.save`, in place whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(dict(state), unfinished)
    unfinished.rename(path)


def part(text: str) -> float:
    """An option that is a part of something, 0 to 1; argparse tells what is wrong."""
    given = float(text)
    if not 0 <= given <= 1:
        raise argparse.ArgumentTypeError(f"a part, 0 to 1, is needed, not {text}")
    return given


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


def tell(record: Mapping[str, object], path: Path) -> None:
    """One JSON line: the last of `path`, and printed."""
    line = json.dumps(record)
    with path.open("a") as log:
        log.write(line + "\n")
    print(line, flush=True)
