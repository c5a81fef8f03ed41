"""EMU_BACKEND: whose code answers, this package's or upstream's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from emu_cog.config import InputError, Request, Settings
from emu_cog.pipeline import Event, Pipeline, Progress, RunStats


class Backend(Protocol):
    """What `Pipeline` and `UpstreamPipeline` have in common."""

    stats: RunStats | None

    def warm_up(self) -> None: ...

    def stream(self, request: Request, *, on_progress: Callable[[Progress], None] | None = None) -> Iterator[Event]: ...


def _upstream(settings: Settings) -> Backend:
    from emu_cog.upstream_pipeline import UpstreamPipeline  # needs git and the clone; native needs neither

    return UpstreamPipeline.from_settings(settings)


BACKENDS: Mapping[str, Callable[[Settings], Backend]] = {"native": Pipeline.from_settings, "upstream": _upstream}


def load(settings: Settings) -> Backend:
    """The backend that `settings` name, its model loaded. InputError for a name that is none of BACKENDS."""
    if settings.backend not in BACKENDS:
        raise InputError(f"EMU_BACKEND={settings.backend!r} is not known, accepted are {', '.join(BACKENDS)}")
    return BACKENDS[settings.backend](settings)
