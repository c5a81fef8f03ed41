"""predict.py's Predictor over a backend that does what the prompt says, for tests of several predictions at once.

A prompt is a name and steps, such as "ann pic wait:go pic". SCRIPTED_FOLDER holds the file `record`, to which the
backend writes what happens, and the files that `wait` steps wait for.

pic          make a picture
noise        make a picture of more bytes than a file may have
log:WORD     log "NAME WORD" in the request's own thread
shared:WORD  log "engine WORD" in the thread that all requests share
report:N     report N percent from the shared thread
wait:FILE    wait for a file, and report progress meanwhile, as a backend does
deaf:FILE    wait for a file without looking at anything else
fail         fail, as where the device is gone while a picture is decoded
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from emu_cog.events import Event, Finished, Picture, Progress, RunStats
from emu_cog.log import log
from emu_cog.request import Request
from emu_cog.service import Service
from predict import Predictor as RealPredictor

LARGEST_FILE = 100_000


class Predictor(RealPredictor):
    def setup(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, resource.RLIM_INFINITY))
        self.service = Service(Scripted(Path(os.environ["SCRIPTED_FOLDER"])))


class Scripted:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shared = ThreadPoolExecutor(1)

    def warm_up(self) -> None: ...

    def stream(self, request: Request, *, on_progress: Callable[[Progress], None] | None = None) -> Iterator[Event]:
        assert on_progress is not None
        name, *steps = request.prompt.split()
        pictures = 0
        self.record(f"{name} begins")
        try:
            for number, step in enumerate(steps):
                what, _, word = step.partition(":")
                on_progress(Progress(number / len(steps)))
                if what in ("pic", "noise"):
                    pictures += 1
                    yield picture(pictures, noise=what == "noise")
                elif what == "log":
                    log.info("%s %s", name, word)
                elif what == "shared":
                    self.shared.submit(log.info, "engine %s", word).result()
                elif what == "report":
                    self.shared.submit(on_progress, Progress(int(word) / 100)).result()
                elif what in ("wait", "deaf"):
                    while not (self.folder / word).exists():
                        time.sleep(0.005)
                        if what == "wait":
                            on_progress(Progress(number / len(steps)))
                else:
                    assert what == "fail"
                    raise RuntimeError("the device is gone")
            yield Finished(0, "image")
            yield RunStats(seed=request.seed or 0, size=(64, 64), pictures=pictures, tokens=len(steps))
        finally:
            self.record(f"{name} ends")

    def record(self, text: str) -> None:
        with open(self.folder / "record", "a") as file:
            file.write(f"{text}\n")


def picture(number: int, *, noise: bool) -> Picture:
    side = 400 if noise else 16
    pixels = np.random.default_rng(number).integers(0, 256 if noise else 1, (side, side, 3), dtype=np.uint8)
    return Picture(output=0, number=number, image=Image.fromarray(pixels), codes=((0,),), settings={})
