"""Cog's real server over tiny checkpoints, and the folder of Cog's own data."""

from __future__ import annotations

import base64
import io
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from _models.tiny import TinyFolders
from _server import Server
from PIL import Image

from tests.conftest import ROOT

BIG = {"aspect_ratio": "custom", "width": 1584, "height": 1584}
"""A picture of 9801 tokens: a tiny model takes seconds for it, which leaves time to cancel."""


def cog_data() -> Path:
    """Cog's schemas and examples: EMU_TEST_COG_DATA, or a folder beside the checkout."""
    folder = Path(os.environ.get("EMU_TEST_COG_DATA", ROOT.parent / "shared/data/cog"))
    if not folder.is_dir():
        pytest.skip("Cog's schemas and examples are not here (set EMU_TEST_COG_DATA)")
    return folder


def settings(folders: TinyFolders) -> dict[str, str]:
    """The environment of a server over `folders`."""
    return {
        "EMU_CHECKPOINT": str(folders.model),
        "EMU_VISION_TOKENIZER": str(folders.vision),
        "EMU_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def serving(folders: TinyFolders) -> Iterator[Server]:
    """A server that is ready."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings(folders).items():
            patch.setenv(name, value)
        with Server() as server:
            yield server


def run(server: Server, **inputs: Any) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, Any]]:
    """One prediction to its end: the events before the last, and the data of the last one."""
    *events, (name, result) = server.stream(inputs, identifier=uuid.uuid4().hex)
    assert name == "completed"
    return events, result


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def from_data_url(url: str) -> tuple[str, bytes]:
    """MIME type and bytes."""
    head, _, body = url.partition(";base64,")
    return head.removeprefix("data:"), base64.b64decode(body)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
