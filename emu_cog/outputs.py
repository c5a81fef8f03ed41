"""Events to files: pictures with their settings inside, texts, and one page that shows a whole sequence."""

from __future__ import annotations

import base64
import errno
import html
import io
import json
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from emu_cog.events import Finished, Picture
from emu_cog.log import log
from emu_cog.prompt.segments import Text

EXTENSIONS = {"png": "png", "jpeg": "jpg", "webp": "webp"}
MIME = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
SOFTWARE = "emu-cog"

_NOTES = {
    "limit": "The sequence stops here because max_new_tokens was reached.",
    "context": "The sequence stops here because the model's context is full.",
}
_HEADINGS = {"global_reasoning": "Plan", "image_reasoning": "Thoughts on the next picture"}


def encode_picture(image: Image.Image, settings: dict[str, Any], *, output_format: str, quality: int) -> bytes:
    """The file's bytes. `settings` go into EXIF ImageDescription as JSON, for PNG into a tEXt chunk as well."""
    note = json.dumps(settings)
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = note
    exif[ExifTags.Base.Software] = SOFTWARE
    options: dict[str, Any] = {"exif": exif}
    if output_format == "png":
        chunk = PngImagePlugin.PngInfo()
        chunk.add_text(SOFTWARE, note)
        options |= {"pnginfo": chunk}
    else:
        options |= {"quality": quality}
        if output_format == "jpeg":
            options |= {"subsampling": 0 if quality >= 90 else 2}  # full colour resolution at high quality
    buffer = io.BytesIO()
    image.save(buffer, format=output_format, **options)
    return buffer.getvalue()


def read_settings(image: Image.Image) -> dict[str, Any]:
    """The settings `encode_picture` put into a file."""
    settings: dict[str, Any] = json.loads(image.getexif()[ExifTags.Base.ImageDescription])
    return settings


class Writer:
    """Writes one prediction's files into `folder`. Names are unique over predictions: hosts upload by file name.

    Interleaved tasks get a text file for each text and, at the end, the page; t2i and x2i get pictures alone. All that
    the model writes goes to the log as well: hosted pages show text files as bare links.
    """

    def __init__(self, folder: Path, *, task: str, prompt: str, interleaved: bool, output_format: str, quality: int):
        self._folder, self._stem = folder, f"{task}-{uuid.uuid4().hex[:12]}"
        self._task, self._prompt, self._interleaved = task, prompt, interleaved
        self._format, self._quality = output_format, quality
        self._count = 0
        self._body: list[str] = []

    def write(self, event: Text | Picture | Finished) -> Path | None:
        """The file of `event`, or None where it makes none."""
        if isinstance(event, Picture):
            data = encode_picture(event.image, event.settings, output_format=self._format, quality=self._quality)
            self._show_picture(event, data)
            return self._save(data, EXTENSIONS[self._format])
        if isinstance(event, Finished):
            if event.reason in _NOTES:
                log.warning("%s", _NOTES[event.reason])
                self._body.append(f'<p class="note" dir="auto">{_NOTES[event.reason]}</p>')
            return None
        # The bar keeps a line of the model's from being read as a line of progress.
        log.info("%s: %s", _HEADINGS.get(event.kind, "the model wrote"), event.text.strip().replace("\n", "\n| "))
        self._show_text(event)
        if self._interleaved and event.kind == "text":
            return self._save(event.text.strip().encode() + b"\n", "txt")
        return None

    def finish(self) -> Path | None:
        """The page of an interleaved task; None for the others."""
        if not self._interleaved:
            return None
        body = "\n".join(self._body) or '<p class="note" dir="auto">The model ended without writing anything.</p>'
        page = _PAGE.format(title=html.escape(f"{self._task}: {self._prompt}"[:120]), task=self._task,
                            prompt=html.escape(self._prompt), body=body)  # fmt: skip
        return self._save(page.encode(), "html")

    def _save(self, data: bytes, extension: str) -> Path:
        path = self._folder / f"{self._stem}-{self._count}.{extension}"
        part = path.with_suffix(".part")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            os.replace(part, path)
        except OSError as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            advice = ", free some space" if full else ""
            raise OSError(
                error.errno, f"the result ({len(data):,} bytes) can't be saved{advice}: {error.strerror}", str(path)
            ) from error
        self._count += 1
        return path

    def _show_picture(self, picture: Picture, data: bytes) -> None:
        if not self._interleaved:
            return
        source = f"data:{MIME[self._format]};base64,{base64.b64encode(data).decode()}"
        width, height = picture.image.size
        self._body.append(f'<img src="{source}" width="{width}" height="{height}" alt="Picture {picture.number}">')

    def _show_text(self, text: Text) -> None:
        lines = [line for line in text.text.strip().split("\n") if line.strip()]
        words = "".join(f'<p dir="auto">{html.escape(line)}</p>' for line in lines)
        if text.kind in _HEADINGS:
            cut = "" if text.complete else " (unfinished)"
            words = f"<details><summary>{_HEADINGS[text.kind]}{cut}</summary>{words}</details>"
        self._body.append(words)


# The direction of the page is that of its first letter outside elements with a `dir` of their own: the prompt's.
_PAGE = """<!doctype html>
<html lang="en" dir="auto">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title dir="ltr">{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 1.05rem/1.6 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }}
header p {{ font-size: 1.3rem; font-weight: 600; white-space: pre-wrap; }}
header small, .note, summary {{ opacity: .7; }}
img {{ display: block; max-width: 100%; height: auto; margin: 1rem 0 2rem; border-radius: .5rem; }}
details {{ border-inline-start: 3px solid; padding-inline-start: 1rem; margin: 1rem 0; opacity: .85; }}
summary {{ cursor: pointer; }}
</style>
</head>
<body>
<header><small dir="ltr">{task}</small><p>{prompt}</p></header>
<main>
{body}
</main>
</body>
</html>
"""
