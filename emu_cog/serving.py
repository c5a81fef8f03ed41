"""Several predictions at once on Cog's server: what predict.py returns to it. Cog itself is not imported here.

coglet 0.23.1 can serve several predictions and deliver files as they are made in one way only: `predict` is a coroutine
that returns a plain generator. (It keeps the results of an async generator to its end, and refuses a plain `predict`
when more than one may run.) It runs the coroutine in an event loop, then iterates over the generator in a thread of
that prediction. Two things are missing in that thread, and `stream` adds them: the context variables by which coglet
assigns logs and metrics to predictions, and the cancel.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import threading
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from pathlib import Path
from queue import SimpleQueue

from emu_cog.log import log

Files = Generator[Path, None, None]
_Queue = SimpleQueue[Path | BaseException | None]
"""Files; an exception or None ends them."""


def stream(files: Files, cancelled: threading.Event) -> Files:
    """A generator of `files` for coglet. Call it in the coroutine of the prediction.

    `files` runs in a thread of its own, in the prediction's context. A cancel ends the prediction at once with
    asyncio.CancelledError, which coglet reports as canceled. Whatever ends the prediction sets `cancelled`; `files`
    should then end soon, and is closed at its next file at the latest. Files made before a cancel are delivered.
    """
    queue: _Queue = SimpleQueue()
    if not call_on_cancel(lambda: queue.put(asyncio.CancelledError())):
        _warn_once()
    return _deliver(files, queue, cancelled, contextvars.copy_context())


def _deliver(files: Files, queue: _Queue, cancelled: threading.Event, context: contextvars.Context) -> Files:
    """A real generator: coglet streams no other kind of iterator. It only waits, so that a cancel takes no time."""
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

        with suppress(AttributeError, TypeError):  # a Future written in C takes no attributes
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
    log.warning("cancels can't be received with this version of Cog or Python: a cancelled prediction runs to its end")
