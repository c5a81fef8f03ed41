"""One prediction, from a server's inputs to files: all of predict.py that needs no Cog."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import math
import os
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from emu_cog.errors import InputError
from emu_cog.events import Event, Progress, RunStats
from emu_cog.log import log, log_to_stderr
from emu_cog.outputs import Writer
from emu_cog.pipeline import Pipeline
from emu_cog.prompt.tasks import TABLE
from emu_cog.request import Request
from emu_cog.settings import Settings
from emu_cog.vision.images import open_reference

KEEP_SECONDS = 3600
"""Files of past predictions are removed after this: their upload is done by then, and Cog itself deletes none."""
FOLDER_PREFIX = "prediction-"


class Service:
    """Holds a loaded backend and serves predictions: as many at once as threads call `run`."""

    def __init__(self, pipeline: Backend, *, root: Path | None = None) -> None:
        log_to_stderr()
        self.pipeline = pipeline
        self._root = root or output_root()
        self._in_use: set[Path] = set()
        self._opening = threading.Lock()  # opening a photo changes Python's warning filters, which all threads share

    @classmethod
    def from_settings(cls, settings: Settings) -> Service:
        """Load the model that the environment names with the backend that it names."""
        log_to_stderr()
        check_root(output_root())  # before minutes of loading
        backend = load(settings)
        return cls(OneAtATime(backend) if settings.backend in ONE_AT_A_TIME else backend)

    def warm_up(self) -> None:
        self.pipeline.warm_up()
        # What is here now stays: without this, Python's collector walks over all of it now and then, 400,000 objects
        # and 140 ms on a small CPU, and all pictures wait.
        gc.collect()
        gc.freeze()

    def run(
        self,
        *,
        references: Mapping[str, Any],
        output_format: str,
        output_quality: int,
        record_metric: Callable[[str, Any], None],
        cancelled: threading.Event | None = None,
        **fields: Any,
    ) -> Generator[Path, None, None]:
        """Yield each file as it is made. `references` maps input names to uploaded files or None; `fields` are
        Request's other fields. Raises InputError before any model work, and asyncio.CancelledError soon after
        `cancelled` is set. Closing the generator ends the backend's work on the request, too."""
        with self._opening:
            images = tuple(
                open_reference(_uploaded(value, name), name=name)
                for name, value in references.items()
                if value is not None
            )
        request = Request(images=images, **_whole_numbers(fields))
        check_root(self._root)
        _sweep(self._root, keep=self._in_use)
        folder = _new_folder(self._root)
        writer = Writer(
            folder,
            task=request.task,
            prompt=request.prompt,
            interleaved=TABLE[request.task].interleaved,
            output_format=output_format,
            quality=output_quality,
        )
        with ExitStack() as stack:
            self._in_use.add(folder)
            stack.callback(self._in_use.discard, folder)
            bar = stack.enter_context(_Bar())
            events = self.pipeline.stream(request, on_progress=_reporter(bar, cancelled))
            stack.callback(getattr(events, "close", lambda: None))  # now, and not when its last reference is gone
            for event in events:
                _check(cancelled)
                if isinstance(event, RunStats):
                    _record(event, record_metric)
                elif file := writer.write(event):
                    yield file
            if page := writer.finish():
                yield page
            bar.finish()


def _reporter(bar: _Bar, cancelled: threading.Event | None) -> Callable[[Progress], None]:
    """What a backend calls with the progress of a request. In the request's own thread it raises CancelledError once
    `cancelled` is set. In a thread that the backend shares among requests, it never raises, and what it logs still
    belongs to this prediction: servers assign lines by context variables."""
    thread, context = threading.get_ident(), contextvars.copy_context()

    def report(progress: Progress) -> None:
        if threading.get_ident() == thread:
            _check(cancelled)
            bar.show(progress)
        elif cancelled is None or not cancelled.is_set():
            context.copy().run(bar.show, progress)  # a context can be entered once at a time

    return report


def _check(cancelled: threading.Event | None) -> None:
    if cancelled is not None and cancelled.is_set():
        raise asyncio.CancelledError


def _record(stats: RunStats, record_metric: Callable[[str, Any], None]) -> None:
    """Report what a request cost: as metrics, and in the log. `image_output_count` is the usual billing metric."""
    metrics: dict[str, Any] = {"seed": stats.seed, "image_output_count": stats.pictures, "tokens": stats.tokens}
    if stats.passes:
        metrics["passes"] = stats.passes
    if stats.size:
        width, height = stats.size
        metrics |= {"width": width, "height": height}
        if stats.clipped:
            divisor = math.gcd(width, height)
            made = f"{width // divisor}:{height // divisor}"
            metrics |= {"aspect_ratio_requested": stats.clipped, "aspect_ratio_made": made}
    for name in ("tokens_per_second", "prefill_seconds", "decode_seconds", "vq_seconds"):
        metrics[name] = round(getattr(stats, name), 3)
    for name, value in metrics.items():
        record_metric(name, value)
    log.info("%s", ", ".join(f"{name} {value}" for name, value in metrics.items()))


def _uploaded(value: Any, name: str) -> Path:
    """`value` if it is a file that the server downloaded. Other strings arrive as str and are never opened."""
    if not isinstance(value, Path):
        raise InputError(
            f"{name}: {str(value)[:80]!r} is not an uploaded file: give a file, an https URL or a data URL"
        )
    return value


def _whole_numbers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Integers for 2.0 and the like, which Cog passes to integer inputs as floats."""
    return {k: int(v) if isinstance(v, float) and v.is_integer() and k in _WHOLE else v for k, v in fields.items()}


_WHOLE = ("width", "height", "num_outputs", "text_top_k", "image_top_k", "max_new_tokens", "seed")


def output_root() -> Path:
    """The folder for this user's outputs: one per user, so that two users of a machine don't meet."""
    return Path(tempfile.gettempdir()) / f"emu-cog-outputs-{os.getuid()}"


def check_root(root: Path) -> None:
    """Make `root`, readable by its owner alone. InputError where something else is in its place: files written there
    could be read or replaced by somebody else, and the sweep would delete what is not ours."""
    advice = "remove it, or set TMPDIR to a folder of your own"
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o700, exist_ok=True)
        found = root.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
            if stat.S_IMODE(found.st_mode) & 0o077:
                root.chmod(0o700)
            return
    except FileExistsError:
        found = root.lstat()
    except OSError as error:
        raise InputError(f"outputs can't be written to {root}: {error.strerror}; set TMPDIR to a folder") from None
    if stat.S_ISLNK(found.st_mode):
        raise InputError(f"outputs can't be written to {root}: it is a symbolic link; {advice}")
    if not stat.S_ISDIR(found.st_mode):
        raise InputError(f"outputs can't be written to {root}: it is not a folder; {advice}")
    raise InputError(f"outputs can't be written to {root}: it belongs to another user (uid {found.st_uid}); {advice}")


def _new_folder(root: Path) -> Path:
    """A new folder for one prediction. OSError in one sentence where the disk has no room for it."""
    try:
        return Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=root))
    except OSError as error:
        raise OSError(error.errno, f"no folder for the results can be made: {error.strerror}", str(root)) from error


def _sweep(root: Path, *, keep: Collection[Path]) -> None:
    """Remove the folders of predictions of more than an hour ago: real folders of our naming that belong to us, except
    those to `keep`.

    A link is neither followed nor removed (rmtree does not follow those inside a folder either).
    """
    for folder in root.glob(f"{FOLDER_PREFIX}*"):
        try:
            found = folder.lstat()
            old = time.time() - found.st_mtime > KEEP_SECONDS
            if old and stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and folder not in keep:
                shutil.rmtree(folder)
        except FileNotFoundError:
            pass  # another request sweeps as well
        except OSError as error:
            log.warning("%s can't be removed: %s", folder, error)


class _Bar:
    r"""The progress of one prediction: a moving bar on a terminal, lines in the log elsewhere. A terminal has room for
    one moving bar: predictions that begin while there is one have lines, which appear above it.

    Replicate's client libraries read the log for lines that begin with the percentage and end in a newline, by
    `^\s*(\d+)%\s*\|.+?\|\s*(\d+)\/(\d+)` (lib/util.js in replicate-javascript, prediction.py in replicate-python).
    """

    STEP = 2
    """Percent from one line to the next: 51 lines at most."""
    FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
    _terminal = threading.Lock()
    """Held by the prediction that has the moving bar; its log lines' way around it is set for the whole process."""

    def __init__(self) -> None:
        self._started, self._percent = time.monotonic(), -self.STEP
        self._stack = ExitStack()
        self._moving: tqdm[Any] | None = None
        if sys.stderr is not None and sys.stderr.isatty() and self._terminal.acquire(blocking=False):
            self._stack.callback(self._terminal.release)
            self._moving = self._stack.enter_context(tqdm(total=100, bar_format=self.FORMAT, ncols=80, leave=True))
            self._stack.enter_context(logging_redirect_tqdm([log]))  # log lines go above the bar

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def show(self, progress: Progress) -> None:
        """100 % is left for `finish`: files may be still to be written, and what came last may fail."""
        self._show(min(int(100 * progress.done), 99))

    def finish(self) -> None:
        self._show(100)

    def _show(self, percent: int) -> None:
        if self._moving is not None:
            self._moving.update(percent - self._moving.n)
        elif percent >= self._percent + self.STEP or percent == 100:
            self._percent = percent
            elapsed = time.monotonic() - self._started
            line = tqdm.format_meter(percent, 100, elapsed, ncols=80, ascii=True, bar_format=self.FORMAT)
            log.info("%s", line)


class Backend(Protocol):
    """What `Pipeline` and `UpstreamPipeline` have in common."""

    def warm_up(self) -> None: ...

    def stream(self, request: Request, *, on_progress: Callable[[Progress], None] | None = None) -> Iterator[Event]:
        """The events of one request. Several threads may each iterate over one of their own. Closing it ends the work
        on its request alone, and so does what `on_progress` raises in the thread that iterates. A cancel is noticed
        when `on_progress` is called there, so call it often, also while the request only waits."""


class OneAtATime:
    """A backend that can serve one request at a time: others wait, and report no progress meanwhile."""

    LOOK = 0.1
    """Seconds between two looks at whether a waiting request is cancelled, which `on_progress` raises."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._turn = threading.Lock()

    def warm_up(self) -> None:
        self.backend.warm_up()

    def stream(self, request: Request, *, on_progress: Callable[[Progress], None] | None = None) -> Iterator[Event]:
        if not self._turn.acquire(blocking=False):
            log.info("waiting for another prediction to end: this backend makes one at a time")
            while not self._turn.acquire(timeout=self.LOOK):
                if on_progress:
                    on_progress(Progress(0.0))
        try:
            yield from self.backend.stream(request, on_progress=on_progress)
        finally:
            self._turn.release()


def _upstream(settings: Settings) -> Backend:
    from emu_cog.upstream.pipeline import UpstreamPipeline  # needs git and the clone; native needs neither

    return UpstreamPipeline.from_settings(settings)


BACKENDS: Mapping[str, Callable[[Settings], Backend]] = {"native": Pipeline.from_settings, "upstream": _upstream}
ONE_AT_A_TIME = ("upstream",)
"""Backends whose `stream` must not be called while another one runs."""


def load(settings: Settings) -> Backend:
    """The backend that `settings` name, its model loaded. InputError for a name that is none of BACKENDS."""
    if settings.backend not in BACKENDS:
        raise InputError(f"EMU_BACKEND={settings.backend!r} is not known, accepted are {', '.join(BACKENDS)}")
    return BACKENDS[settings.backend](settings)
