"""Steady arrivals at Cog's real server: 24 mixed requests as fast as it takes them, against one after another."""

from __future__ import annotations

import base64
import io
import itertools
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _server import Server, ServerError

from _bench import loading, soak
from _bench.report import Report, Row
from _bench.sizes import SIZES, Size
from emu_cog.model.loader import read_config
from emu_cog.weights.store import MINIATURE

REQUESTS = 24
RETRY = 0.2
"""Seconds from a 409 to the next try, as README says."""
BUSY = "answered 409"
"""Of the message of ServerError where no slot is free."""


def measure(report: Report, device: torch.device, *, shape: str, concurrency: int) -> None:
    """Both ways on one server over the miniature, or over random weights of a larger shape with its vocabulary."""
    if not (MINIATURE / "model").is_dir():
        report.not_measured("arrivals", "this package holds no trained miniature, whose tokenizer is needed")
        return
    requests = mixed(small=shape == "mini", trained=shape == "mini")
    what = f"{shape}, {len(requests)} mixed requests"
    totals = []
    with _checkpoint(shape) as model, _environment(model, device), Server(concurrency=concurrency) as server:
        _timed(server, requests[0])  # what comes first warms up
        for how, senders in (
            ("one after another", 1),
            (f"as fast as {concurrency} slots take them", len(requests)),
        ):
            total, latencies = _all(server, requests, senders=senders)
            mean, longest = sum(latencies) / len(latencies), max(latencies)
            note = f"latency {mean:.2f} s on average, {longest:.2f} at most: {longest / mean:.2f} x the average"
            report.add(Row(part="arrivals", what=f"{what} {how}", value=total, unit="s", note=note))
            totals.append(total)
    ratio = Row(part="arrivals", what=f"{what}: throughput", value=totals[0] / totals[1], unit="x one after another")
    report.add(ratio)


def mixed(*, small: bool, trained: bool) -> list[dict[str, Any]]:
    """Inputs of REQUESTS requests of all tasks and several sizes.

    Random weights write text up to `max_new_tokens`, here the least that is accepted. They are asked for t2i and x2i
    alone, which make a picture after that.
    """
    buffer = io.BytesIO()
    soak.photos()[0].save(buffer, "PNG")
    photo = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    # Small enough that both ways together take an H200 a minute and a half at 8 B.
    sizes = (
        [(160, 160), (224, 160), (160, 192), (192, 192)] if small else [(320, 320), (384, 256), (256, 384), (256, 256)]
    )
    kinds: list[dict[str, Any]] = [
        {"task_type": "t2i", "prompt": "two small red stars above a blue circle"},
        {"task_type": "x2i", "prompt": "Paint the heart white.", "reference_image": photo},
        {"task_type": "t2i", "prompt": "a large orange fish on a blue background"},
    ]
    if trained:
        kinds += [
            {"task_type": "story", "prompt": "Tell a story about a fish.", "max_new_tokens": 512},
            {"task_type": "howto", "prompt": "How do I draw a fish?", "max_new_tokens": 512},
            {"task_type": "vla", "prompt": "Put the red ball above the blue box.", "reference_image": photo},
            {"task_type": "explore", "prompt": "explore a green world: go right, down", "max_new_tokens": 512},
        ]
    made = []
    for i, (kind, (width, height)) in enumerate(
        itertools.islice(zip(itertools.cycle(kinds), itertools.cycle(sizes)), REQUESTS)
    ):
        size = {"aspect_ratio": "custom", "width": width, "height": height}
        limit = {} if trained else {"max_new_tokens": 512}
        made.append(kind | size | limit | {"seed": i})
    return made


def _all(server: Server, requests: Sequence[Mapping[str, Any]], *, senders: int) -> tuple[float, list[float]]:
    """Total seconds and each request's, from `senders` threads; the first error of any is raised."""
    left, lock = iter(requests), threading.Lock()
    latencies: list[float] = []
    errors: list[BaseException] = []

    def send() -> None:
        while not errors:
            with lock:
                request = next(left, None)
            if request is None:
                return
            try:
                seconds = _timed(server, request)
            except BaseException as error:  # raised again in the caller's thread
                errors.append(error)
                return
            with lock:
                latencies.append(seconds)

    started = time.perf_counter()
    threads = [threading.Thread(target=send) for _ in range(senders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - started, latencies


def _timed(server: Server, inputs: Mapping[str, Any]) -> float:
    """Seconds of one request, from its first try to its last file. RuntimeError where it fails."""
    started = time.perf_counter()
    while True:
        try:
            *_, (_, result) = server.stream(dict(inputs), identifier=uuid.uuid4().hex)
        except ServerError as error:
            if BUSY not in str(error):
                raise
            time.sleep(RETRY)
            continue
        if result.get("status") != "succeeded":
            raise RuntimeError(f"a prediction has {result.get('status')}: {result.get('error')}")
        return time.perf_counter() - started


@contextmanager
def _checkpoint(shape: str) -> Iterator[Path]:
    """The folder of the language model: the miniature's, or one with random weights of `shape`, written once."""
    if shape == "mini":
        yield MINIATURE / "model"
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder, plain = Path(temporary), SIZES[shape]
        for file in (MINIATURE / "model").iterdir():
            if file.suffix != ".safetensors" and "index" not in file.name:
                shutil.copy(file, folder / file.name)
        vocabulary = read_config(MINIATURE / "model").vocab_size
        loading.write(folder, Size(**vars(plain) | {"text": vocabulary, "visual": 0}))
        yield folder


@contextmanager
def _environment(model: Path, device: torch.device) -> Iterator[None]:
    """What the server's process finds in its environment; as before afterwards."""
    wanted = {
        "EMU_CHECKPOINT": str(model),
        "EMU_VISION_TOKENIZER": str(MINIATURE / "vision"),
        "EMU_DEVICE": str(device),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ |= wanted
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
