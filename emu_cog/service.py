"""One prediction, from a server's inputs to files: the part of predict.py that needs no Cog."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

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
"""Files of past predictions are swept after this: uploads are long done, and Cog itself deletes none."""


class Service:
    """Holds a loaded backend and serves predictions one after another."""

    def __init__(self, pipeline: Backend, *, root: Path | None = None) -> None:
        log_to_stderr()
        self.pipeline = pipeline
        self._root = root or Path(tempfile.gettempdir()) / "emu-cog-outputs"

    @classmethod
    def from_settings(cls, settings: Settings) -> Service:
        """Load what the environment names, by the backend it names; the log is seen from the first line on."""
        log_to_stderr()
        return cls(load(settings))

    def warm_up(self) -> None:
        self.pipeline.warm_up()

    def run(
        self,
        *,
        references: Mapping[str, Any],
        output_format: str,
        output_quality: int,
        record_metric: Callable[[str, Any], None],
        **fields: Any,
    ) -> Iterator[Path]:
        """Yield each file as it is made. `references` maps input names to uploaded files or None; `fields` are
        Request's other fields. Raises InputError before any model work."""
        images = tuple(
            open_reference(_uploaded(value, name), name=name) for name, value in references.items() if value is not None
        )
        request = Request(images=images, **_whole_numbers(fields))
        _sweep(self._root)
        self._root.mkdir(parents=True, exist_ok=True)
        writer = Writer(
            Path(tempfile.mkdtemp(dir=self._root)),
            task=request.task,
            prompt=request.prompt,
            interleaved=TABLE[request.task].interleaved,
            output_format=output_format,
            quality=output_quality,
        )
        with _Bar() as bar:
            for event in self.pipeline.stream(request, on_progress=bar.show):
                if isinstance(event, RunStats):
                    _record(event, record_metric)
                elif file := writer.write(event):
                    yield file
        if page := writer.finish():
            yield page


def _record(stats: RunStats, record_metric: Callable[[str, Any], None]) -> None:
    """Report what a request cost: as metrics, and in the log."""
    metrics: dict[str, Any] = {"seed": stats.seed, "pictures": stats.pictures, "tokens": stats.tokens}
    if stats.size:
        metrics |= {"width": stats.size[0], "height": stats.size[1]}
    for name in ("tokens_per_second", "prefill_seconds", "decode_seconds", "vq_seconds"):
        metrics[name] = round(getattr(stats, name), 3)
    for name, value in metrics.items():
        record_metric(name, value)
    log.info("%s", ", ".join(f"{name} {value}" for name, value in metrics.items()))


def _uploaded(value: Any, name: str) -> Path:
    """Only a file that the server downloaded is a Path; any other string arrives as str and is never opened."""
    if not isinstance(value, Path):
        raise InputError(
            f"{name}: {str(value)[:80]!r} is not an uploaded file: give a file, an https URL or a data URL"
        )
    return value


def _whole_numbers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """2.0 passes an integer input as a float; it is meant as 2."""
    return {k: int(v) if isinstance(v, float) and v.is_integer() and k in _WHOLE else v for k, v in fields.items()}


_WHOLE = ("width", "height", "num_outputs", "text_top_k", "image_top_k", "max_new_tokens", "seed")


def _sweep(root: Path) -> None:
    """Remove what predictions of more than an hour ago left."""
    for folder in root.glob("*"):
        try:
            if time.time() - folder.stat().st_mtime > KEEP_SECONDS:
                shutil.rmtree(folder)
        except OSError as error:
            log.warning("%s can't be removed: %s", folder, error)


class _Bar:
    """A tqdm bar in rows of the picture in the making; hosted playgrounds read its last line."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, progress: Progress) -> None:
        if progress.row == 0 or self._bar is None:
            self.__exit__()
            self._bar = tqdm(total=progress.rows, desc=f"picture {progress.number}", unit="row", ascii=False, ncols=80)
        self._bar.update(progress.row - self._bar.n)


class Backend(Protocol):
    """What `Pipeline` and `UpstreamPipeline` have in common."""

    def warm_up(self) -> None: ...

    def stream(self, request: Request, *, on_progress: Callable[[Progress], None] | None = None) -> Iterator[Event]: ...


def _upstream(settings: Settings) -> Backend:
    from emu_cog.upstream.pipeline import UpstreamPipeline  # needs git and the clone; native needs neither

    return UpstreamPipeline.from_settings(settings)


BACKENDS: Mapping[str, Callable[[Settings], Backend]] = {"native": Pipeline.from_settings, "upstream": _upstream}


def load(settings: Settings) -> Backend:
    """The backend that `settings` name, its model loaded. InputError for a name that is none of BACKENDS."""
    if settings.backend not in BACKENDS:
        raise InputError(f"EMU_BACKEND={settings.backend!r} is not known, accepted are {', '.join(BACKENDS)}")
    return BACKENDS[settings.backend](settings)
