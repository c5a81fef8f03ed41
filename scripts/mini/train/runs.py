"""Shared by the training commands: stopping on a signal, saving checkpoints atomically, logging results."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def stop_on_signal(stop: Callable[..., object]) -> None:
    """Call `stop` on SIGINT (Ctrl-C) and SIGTERM instead of ending the process."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def save_atomically(state: Mapping[str, object], path: Path) -> None:
    """`torch.save` to a temporary file, then rename: `path` never holds a partial checkpoint."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(dict(state), unfinished)
    unfinished.rename(path)


def fraction(text: str) -> float:
    """Parse a command-line option between 0 and 1; argparse reports the error."""
    given = float(text)
    if not 0 <= given <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return given


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


def log_record(record: Mapping[str, object], path: Path) -> None:
    """Append `record` to `path` as one JSON line, and print it."""
    line = json.dumps(record)
    with path.open("a") as log:
        log.write(line + "\n")
    print(line, flush=True)
