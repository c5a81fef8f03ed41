"""Several predictions at once on Cog's server, without importing it: what predict.py returns, and how a cancel arrives.

coglet 0.23.1 runs every `async def predict` in one event loop and iterates what it returns in a thread of that
prediction. Of its three ways only one both serves several predictions and delivers files as they are made: a coroutine
that returns a plain generator. (It collects an async generator to the end, and refuses a plain `predict` when it may
run more than one.) Two things are missing in that thread, and `stream` adds them: the context variables by which coglet
assigns logs and metrics, and the cancel.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import threading
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue

from emu_cog.log import log

Files = Generator[Path, None, None]
_Queue = SimpleQueue[Path | BaseException | None]
"""Files; an exception or None ends them."""


def stream(files: Files, cancelled: threading.Event) -> Files:
    """A generator of `files` for coglet. Call it in the coroutine of the prediction.

    `files` runs in a thread of its own, in the prediction's context. A cancel ends the prediction at once with
    asyncio.CancelledError, which coglet reports as canceled; it sets `cancelled`, by which `files` is to end itself
    soon after, and closes `files` at its next file. So do an error of the server and a client that is gone.
    """
    queue: _Queue = SimpleQueue()

    def cancel() -> None:
        queue.put(asyncio.CancelledError())  # before `cancelled` is set: whatever ends `files` by it comes after
        cancelled.set()

    if not call_on_cancel(cancel):
        _warn_once()
    return _deliver(files, queue, cancelled, contextvars.copy_context())


def _deliver(files: Files, queue: _Queue, cancelled: threading.Event, context: contextvars.Context) -> Files:
    """A real generator: coglet streams no other kind of iterator. Its thread only waits, so a cancel needs no delay."""
    delivered = threading.Semaphore(0)
    make = functools.partial(context.run, _make, files, queue, cancelled, delivered)
    threading.Thread(target=make, name="prediction", daemon=True).start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
            delivered.release()
    finally:
        cancelled.set()
        delivered.release()


def _make(files: Files, queue: _Queue, cancelled: threading.Event, delivered: threading.Semaphore) -> None:
    try:
        with closing(files):
            for file in files:
                queue.put(file)
                delivered.acquire()  # else what is logged next could arrive before the file
                if cancelled.is_set():
                    break
        queue.put(None)
    except BaseException as error:
        queue.put(error)


def call_on_cancel(function: Callable[[], None]) -> bool:
    """Have `function` called when Cog cancels the prediction whose coroutine this is called in, from any thread.

    False if that can't be arranged; then a cancel during the prediction has no effect.

    To cancel, coglet calls `cancel()` of the concurrent.futures.Future that asyncio.run_coroutine_threadsafe gave it.
    That does nothing once the coroutine has returned its generator, so the method is replaced on that one object. It
    is found where asyncio links it to the task: in the closure of the task's done callback. Both are private details,
    of coglet 0.23.1 and of asyncio in Python 3.11 to 3.13.
    """
    for future in _linked_futures(asyncio.current_task()):
        original = future.cancel

        def cancel(original: Callable[[], bool] = original) -> bool:
            function()
            return original()

        future.cancel = cancel  # type: ignore[method-assign]
        return True
    return False


def _linked_futures(task: object) -> list[concurrent.futures.Future[object]]:
    try:
        callbacks = [entry[0] for entry in task._callbacks or ()]  # type: ignore[attr-defined]
        cells = [cell.cell_contents for callback in callbacks for cell in getattr(callback, "__closure__", None) or ()]
    except (AttributeError, TypeError, LookupError, ValueError):  # another Python, another form
        return []
    return [value for value in cells if isinstance(value, concurrent.futures.Future)]


@functools.cache
def _warn_once() -> None:
    log.warning("this version of Cog or Python does not tell of a cancel: a cancelled prediction runs to its end")
