"""Loading weights: a checkpoint of several GB written to disk, read back by a fresh process through the loader."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

from _bench.report import Report, Row
from _bench.sizes import Size
from emu_cog.memory import GIB

SHARDS = 4
BLOCK = 2**20 + 7
"""Numbers that repeat in a matrix: an odd number, so that its rows differ."""
CHILD = """
import json, os, sys, threading, time
import psutil, torch
from pathlib import Path
from emu_cog.model.loader import load_language_model
from _bench.models import held_bytes
from _bench.sizes import Size
folder, device, size = Path(sys.argv[1]), torch.device(sys.argv[2]), Size(**json.loads(sys.argv[3]))
torch.zeros(1, device=device)  # the device's own start is not loading
process, done, peak = psutil.Process(), threading.Event(), [0]
def private():
    info = process.memory_info()
    return info.rss - getattr(info, "shared", 0)
before = private()
def watch():
    while not done.wait(0.02):
        peak[0] = max(peak[0], private())
watcher = threading.Thread(target=watch)
watcher.start()
started = time.perf_counter()
lm = load_language_model(folder, size.ids(), device=device, dtype=torch.bfloat16)
if device.type == "cuda":
    torch.cuda.synchronize()
seconds = time.perf_counter() - started
done.set(); watcher.join()
held = held_bytes(lm.weights)
print(json.dumps({"seconds": seconds, "bytes": held, "private": peak[0] - before}))
"""


def shape_for(size: Size, budget: float) -> Size:
    """`size` with as many layers, at least one, as fit `budget` bytes at two bytes per number."""
    fixed = 4.0 * size.hidden * (size.text + size.visual)
    return replace(size, layers=max(1, min(size.layers, int((budget - fixed) // (2 * size.layer_weights)))))


def measure(report: Report, size: Size, *, device: torch.device, folder: Path, limit: float) -> None:
    """Write, drop from the page cache, read raw, drop again, load. At most `limit` bytes, and what disk and RAM allow.

    The raw read of the same files, by one reader 16 MiB at a time, is what the disk can do.
    """
    room = min(limit, shutil.disk_usage(folder).free / 3, psutil.virtual_memory().available / 3)
    small = shape_for(size, room)
    if 2.0 * small.parameters > room:
        report.not_measured("weight loading", f"{room / GIB:.1f} GiB of disk and memory are too few for one layer")
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-") as temporary:
        target = Path(temporary)
        total = write(target, small)
        if not forget(target):
            report.not_measured("weight loading", "the page cache can't be emptied here")
            return
        raw = total / read_seconds(target)
        forget(target)
        command = [sys.executable, "-c", CHILD, str(target), str(device), json.dumps(vars(small))]
        path = os.pathsep.join(str(p) for p in (Path(__file__).parents[1], Path(__file__).parents[2]))
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=300, env=os.environ | {"PYTHONPATH": path}
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        found = json.loads(done.stdout.strip().splitlines()[-1])
    pace = found["bytes"] / found["seconds"]
    report.add(
        Row(
            part="loading",
            what=f"loading {total / 1e9:.1f} GB in {SHARDS} shards",
            value=pace / 1e9,
            unit="GB/s",
            against=f"{pace / raw:.2f} of the {raw / 1e9:.2f} GB/s of a plain read",
            note=f"{found['seconds']:.1f} s",
        )
    )
    extra = found["private"] - (found["bytes"] if device.type == "cpu" else 0)
    report.add(
        Row(
            part="loading",
            what="host memory besides the weights while loading",
            value=max(extra, 0) / GIB,
            unit="GiB",
            note="private pages; the mapped files can be dropped at any time",
        )
    )


def write(folder: Path, size: Size) -> int:
    """config.json and bf16 shards with their index; bytes written."""
    (folder / "config.json").write_text(json.dumps(dict(size.config())), encoding="utf-8")
    wanted = shapes(size)
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(SHARDS)]
    for i, (name, shape) in enumerate(wanted.items()):
        # One random block repeated, so that nothing between disk and memory can compress it. Its scale keeps
        # activations level, so that the checkpoint can also be run.
        if len(shape) == 1:
            value = torch.ones(shape, dtype=torch.bfloat16)
        else:
            count = shape[0] * shape[1]
            noise = (torch.randn(min(count, BLOCK)) * shape[1] ** -0.5).bfloat16()
            value = noise.repeat(-(-count // len(noise)))[:count].reshape(shape)
        shards[i * SHARDS // len(wanted)][name] = value
    weight_map: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
        total += (folder / name).stat().st_size
        shard.clear()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    from accelerate import init_empty_weights
    from transformers import Qwen3ForCausalLM

    from _bench.models import config_of

    with init_empty_weights():
        model = Qwen3ForCausalLM(config_of(size))
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def forget(folder: Path) -> bool:
    """Write the files of `folder` out and drop them from the page cache."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    return True


def read_seconds(folder: Path) -> float:
    """Seconds of one plain read of all files."""
    buffer = bytearray(16 * 2**20)
    started = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - started
