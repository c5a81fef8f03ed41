"""Where a prediction's files go: named as `cog predict` names them, each put in place whole or not at all."""

from __future__ import annotations

import base64
import mimetypes
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _inputs import UsageError

ENDINGS = {
    "image/png": (".png",),
    "image/jpeg": (".jpg", ".jpeg"),
    "image/webp": (".webp",),
    "text/plain": (".txt",),
    "text/html": (".html", ".htm"),
}
_SEQUENCE_FILES = 1000
"""More than a sequence can have: its context holds a few dozen pictures."""
_PROBE = 2**18
"""Bytes written to find a full disk before anything is computed."""


class SaveError(Exception):
    """A file could not be saved; one sentence."""


@dataclass(frozen=True)
class Target:
    """The name that -o gives: x.png makes x.0.png, x.1.png and so on; x makes x.0 with the ending of its type.

    An ending in digits is no ending (`heart-v1.2` makes heart-v1.0.2.png): the rule of pkg/cli/predict.go in
    replicate/cog. Where Cog would put a text into a .png, the text gets its own ending here.
    """

    path: Path

    def file(self, number: int, mime: str) -> Path:
        """The path of output `number` from 0."""
        name, ending = os.path.splitext(self.path.name)
        own = ENDINGS.get(mime) or (mimetypes.guess_extension(mime, strict=False) or "",)
        if re.fullmatch(r"\.\d+", ending):
            return self.path.with_name(f"{name}.{number}{ending}{own[0]}")
        if not ending or (_promised(ending) and ending.lower() not in own):
            ending = own[0]
        return self.path.with_name(f"{name}.{number}{ending}")

    def save(self, url: str, number: int) -> Path:
        """Save a data URL as output `number`. Raises SaveError."""
        head, _, body = url.partition(",")
        path = self.file(number, head.removeprefix("data:").split(";")[0])
        put(path, base64.b64decode(body))
        return path


def put(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all. Raises SaveError."""
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb") as file:
            file.write(data)
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SaveError(f"{path} ({len(data):,} bytes) can't be saved: {error.strerror}") from None
        raise


def plan(wanted: str | None, inputs: dict[str, Any], *, as_json: bool) -> tuple[Target, Path | None]:
    """Judge -o before anything is computed: the target of the outputs, and of --json the file (None: stdout).

    Raises UsageError.
    """
    fallback = "output.json" if as_json else "output"
    wanted = (wanted or "").removeprefix("@")
    if wanted == "-" and not as_json:
        raise UsageError("-o -: files can't go to standard output, give a name such as picture.png (or use --json)")
    if wanted in ("-", "/dev/stdout") and as_json:
        wanted = ""
    try:
        path = Path(wanted or fallback).expanduser()
        if path.is_dir():
            if not wanted:
                raise UsageError(f"{path} is a folder: name the output with -o")
            path /= fallback
        elif wanted.endswith("/"):
            raise UsageError(f"{wanted} is no folder: make it first (mkdir -p {wanted})")
        elif path.exists() and not path.is_file():
            raise UsageError(f"{path} is a device or a pipe: give the name of a file")
        # x.json for the prediction, x.0.png and so on for its outputs
        target = Target(path.with_name(os.path.splitext(path.name)[0]) if as_json else path)
        if not as_json:
            _check_ending(target, inputs)
        _check_folder(target, inputs)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"-o {wanted[:80]} can't be used: {getattr(error, 'strerror', None) or error}") from None
    return target, path if as_json and wanted else None


def _mimes(inputs: dict[str, Any]) -> list[str]:
    """What this prediction can make."""
    pictures = f"image/{inputs.get('output_format', 'png')}"
    sequence = inputs.get("task_type", "t2i") not in ("t2i", "x2i")
    return [pictures, "text/plain", "text/html"] if sequence else [pictures]


def _check_ending(target: Target, inputs: dict[str, Any]) -> None:
    ending = target.path.suffix
    made = {mime: ENDINGS[mime] for mime in _mimes(inputs) if mime in ENDINGS}
    if made and _promised(ending) and not any(ending.lower() in endings for endings in made.values()):
        kinds = ", ".join(endings[0] for endings in made.values())
        raise UsageError(
            f"-o {target.path}: the output is {kinds}, not {ending}: give the name another ending or none, "
            "or set output_format"
        )


def _check_folder(target: Target, inputs: dict[str, Any]) -> None:
    """Whether a file of the longest name, and some bytes, can be put there."""
    folder = target.path.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{folder} is not a folder that can be written to")
    mimes = _mimes(inputs)
    count = int(inputs.get("num_outputs", 1)) if len(mimes) == 1 else _SEQUENCE_FILES
    longest = max((target.file(count - 1, mime).name for mime in mimes), key=lambda name: len(os.fsencode(name)))
    limit = os.pathconf(folder, "PC_NAME_MAX")
    if len(os.fsencode(longest)) > limit:
        raise UsageError(
            f"-o {target.path.name[:40]}...: the names of the files would have up to {len(os.fsencode(longest))} "
            f"bytes, the file system takes {limit}: give a shorter one"
        )
    for number in range(min(count, 4)):
        for path in (target.file(number, mime) for mime in mimes):
            if path.is_dir():
                raise UsageError(f"{path}, the name of an output, is a folder: give another name with -o")
    probe = target.path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with open(probe, "xb") as file:
            file.write(bytes(_PROBE))
    except OSError as error:
        raise UsageError(f"the output can't be saved in {folder.absolute()}: {error.strerror}") from None
    finally:
        probe.unlink(missing_ok=True)


def _promised(ending: str) -> bool:
    """Whether a file with this ending is taken for a picture or a text of some type."""
    mime = mimetypes.guess_type(f"x{ending}", strict=False)[0] or ""
    return mime.startswith("image/") or mime in ENDINGS
