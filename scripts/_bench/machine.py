"""The machine: names, versions, commit, memory, timing that synchronizes, and copy bandwidth."""

from __future__ import annotations

import gc
import platform
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from emu_cog.memory import GIB

ROOT = Path(__file__).resolve().parent.parent.parent


def describe(device: torch.device) -> dict[str, Any]:
    """What has to be reported along with a figure."""
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "memory_gib": round(total_bytes(device) / GIB, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    else:
        facts["threads"] = torch.get_num_threads()
    return facts


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """What an exported tree carries in a file COMMIT, else the checkout's commit, "+" where files differ from it."""
    try:
        return (ROOT / "COMMIT").read_text(encoding="utf-8").strip()
    except OSError:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def total_bytes(device: torch.device) -> float:
    return float(torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else psutil.virtual_memory().total)


def free_bytes(device: torch.device) -> float:
    """Bytes that can be allocated now; PyTorch's cache is freed first."""
    gc.collect()
    if device.type != "cuda":
        return float(psutil.virtual_memory().available)
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info(device)[0])


def peak_gib(device: torch.device) -> float:
    """The most memory in use so far: of the device, on a CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device, *, repeats: int = 5) -> float:
    """The median of `repeats` runs after one that is not counted, the device synchronized."""
    work()
    wait(device)
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - started)
    return sorted(taken)[len(taken) // 2]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a plain copy on the device, counting reads and writes: the most that memory can do.

    The best of several sizes and runs, all far larger than the caches.
    """
    best = 0.0
    sizes = (2**30, 2**32, 2**33) if device.type == "cuda" else (2**27, 2**28)
    for count in sizes:
        if 2.5 * count > free_bytes(device):
            continue
        source = torch.ones(count // 4, dtype=torch.int32, device=device)
        target = torch.empty_like(source)
        for _ in range(12):
            best = max(best, 2 * count / _seconds(lambda s=source, t=target: t.copy_(s), device))  # type: ignore[misc]
        del source, target
    free_bytes(device)
    return best


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
