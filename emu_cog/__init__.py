"""Emu3.5 as a Cog predictor and as a library: `from emu_cog import Pipeline, Request`."""

from typing import TYPE_CHECKING, Any

from emu_cog.errors import CheckpointError, InputError
from emu_cog.request import Request
from emu_cog.settings import Settings

if TYPE_CHECKING:
    from emu_cog.pipeline import Pipeline

__all__ = ["CheckpointError", "InputError", "Pipeline", "Request", "Settings"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Pipeline brings torch and transformers along; only those who ask for it wait for them.
    if name == "Pipeline":
        from emu_cog.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
