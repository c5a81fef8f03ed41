"""The inputs of a prediction from the command line, judged before the server starts and loads a model."""

from __future__ import annotations

import base64
import codecs
import dataclasses
import difflib
import json
import math
import mimetypes
import re
import stat
import sys
from pathlib import Path
from typing import Any

from _predictor import Field

from emu_cog import InputError, Request

MAX_BODY = 100 * 2**20
"""Bytes of a request's body. Cog's server (coglet 0.23.1) answers 413 from one byte more; found by trying."""
_MAX_FILES = MAX_BODY // 4 * 3
"""Bytes of all files together: base64 makes four of three."""
_KINDS = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}


class UsageError(Exception):
    """The command line can't be used; one sentence."""


def read(flags: list[str], as_json: str | None, fields: dict[str, Field]) -> dict[str, Any]:
    """The inputs as the server takes them: typed, files as data URLs. Raises UsageError.

    `flags` are the NAME=VALUE of -i, `as_json` the value of --json ("" and None: not given).
    """
    if as_json and flags:
        raise UsageError("give the inputs either as --json INPUTS or as -i, not both")
    given: dict[str, Any] = _from_json(as_json) if as_json else _from_flags(flags, fields)
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in fields:
            raise UsageError(f"there is no input {name!r}, the inputs are {', '.join(fields)}{_guess(name, fields)}")
    for name, field in fields.items():
        if field.required and name not in given:
            raise UsageError(f"the input {name} is missing: give it as -i {name}=... or in --json")
    values = {name: _value(value, fields[name]) for name, value in given.items()}
    _check_together(values)
    return _with_data_urls(values)


def _from_flags(flags: list[str], fields: dict[str, Field]) -> dict[str, Any]:
    given: dict[str, list[Any]] = {}
    for flag in flags:
        name, equals, value = flag.partition("=")
        if not equals:
            raise UsageError(f"-i {flag!r} must be NAME=VALUE")
        value = value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
        field = fields.get(name)
        # A text that is read from a file becomes a number below, as one that stands on the command line does.
        if field and value.startswith("@") and not _is_file(field):
            value = _text_of(value, name)
        given.setdefault(name, []).append(_typed(value, field.type) if field else value)
    for name, values in given.items():
        if len(values) > 1 and not (name in fields and fields[name].schema.get("type") == "array"):
            raise UsageError(f"the input {name} is given {len(values)} times, it takes one value")
    return {
        name: values if name in fields and fields[name].schema.get("type") == "array" else values[0]
        for name, values in given.items()
    }


def _typed(value: str, kind: str) -> Any:
    """`value` as the number or truth value it reads as; else as it is."""
    try:
        if kind == "integer" and re.fullmatch(r"\s*[+-]?\d+\s*", value):
            return int(value)
        if kind in ("integer", "number"):
            return float(value)
    except ValueError:
        return value
    return {"true": True, "false": False}.get(value.lower(), value) if kind == "boolean" else value


def _from_json(text: str) -> dict[str, Any]:
    what = "the JSON from standard input" if text in ("@-", "-") else f"--json {text[:60]!r}"
    data: str | bytes = text
    try:
        if text in ("@-", "-"):
            data = sys.stdin.buffer.read()
        elif text.startswith("@"):
            data = Path(text[1:]).expanduser().read_bytes()
        if not data.strip():
            raise UsageError(f"{what} is empty")
        # json.loads finds UTF-8 with a byte-order mark, UTF-16 and UTF-32 out by itself, but in bytes only.
        given = json.loads(data, parse_constant=_refuse_constant)
    except OSError as error:
        raise UsageError(f"{what} can't be read: {error.strerror}") from None
    except UnicodeError:
        raise UsageError(f"{what} is not text in UTF-8 or UTF-16: save it as UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UsageError(f"{what} is not valid JSON: {error.msg} at {where}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what} can't be used: {error}") from None
    if not isinstance(given, dict):
        raise UsageError(f'{what} must be an object of names and values, such as {{"prompt": "a red boat"}}')
    return given


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _value(value: Any, field: Field) -> Any:
    """The checked value; of a file input a Path or a URL. A list is checked item by item."""
    if field.schema.get("type") == "array":
        items = value if isinstance(value, list) else [value]
        one = dataclasses.replace(field, schema=field.schema["items"])
        return [_value(item, one) for item in items]
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            byte = ord(value[error.start])
            shown = f"the byte 0x{byte & 0xFF:02X}" if 0xDC80 <= byte <= 0xDCFF else "half a character"
            raise UsageError(f"{field.name} has {shown} in it, which is not UTF-8 text: give it as UTF-8") from None
    if _is_file(field):
        return _file_or_url(value, field.name)
    if isinstance(value, str) and value.startswith("@"):
        value = _text_of(value, field.name)
    low, high = field.keywords.get("minimum"), field.keywords.get("maximum")
    limits = f" from {low:g} to {high:g}" if low is not None and high is not None else ""
    if high is not None and high >= 1e6:
        limits = f" from {low} to {high}"
    wanted = f"it must be {_KINDS.get(field.type, field.type)}{limits}"
    shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:77]}..."
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if field.choices:
        if value not in field.choices:
            hint = f'; write it as text, "{value}"' if str(value) in field.choices else _guess(value, field.choices)
            accepted = ", ".join(map(str, field.choices))
            raise UsageError(f"{field.name}={shown} is not known, accepted are {accepted}{hint}")
    elif field.type in ("integer", "number"):
        if not number or (isinstance(value, float) and not math.isfinite(value)):
            raise UsageError(f"{field.name}={shown} is not accepted: {wanted}")
        if (low is not None and value < low) or (high is not None and value > high) or (
            field.type == "integer" and value != int(value)
        ):  # fmt: skip
            raise UsageError(f"{field.name}={shown} is out of range: {wanted}")
        if field.type == "integer":
            return int(value)
    elif not isinstance(value, {"string": str, "boolean": bool}.get(field.type, object)):
        raise UsageError(f"{field.name}={shown} is not accepted: {wanted}")
    return value


def _guess(value: Any, accepted: Any) -> str:
    near = difflib.get_close_matches(str(value).lower(), list(map(str, accepted)), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _check_together(values: dict[str, Any]) -> None:
    """Let the package judge what needs several inputs: Request's own checks, which need neither torch nor a model."""
    names = {field.name for field in dataclasses.fields(Request)}
    renamed = {{"task_type": "task"}.get(name, name): value for name, value in values.items()}
    images = sum(name.startswith("reference_image") for name in values)
    try:
        # Request counts the images and looks into none.
        Request(images=(None,) * images, **{n: v for n, v in renamed.items() if n in names})  # type: ignore[arg-type]
    except InputError as error:
        raise UsageError(str(error)) from None


def _is_file(field: Field) -> bool:
    return bool(field.schema.get("items", field.schema).get("format") == "uri")


def _file_or_url(value: Any, name: str) -> Any:
    if isinstance(value, str) and value.startswith("@"):
        return _found(value, name)
    if isinstance(value, str) and re.match(r"(https?://.|data:)", value):
        return value
    hint = f": for a file write {name}=@{value}" if isinstance(value, str) and Path(value).name else ""
    raise UsageError(f"{name}={str(value)[:80]!r} is neither @FILE nor an http, https or data URL{hint}")


def _found(value: str, name: str) -> Path:
    """The path in `@path`: a file, not empty, that the server would take."""
    path = Path(value[1:])
    try:
        path = path.expanduser()
        found = path.stat()
        if stat.S_ISREG(found.st_mode):
            path.open("rb").close()
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"{name}: {path} can't be read: {getattr(error, 'strerror', None) or error} (@ names a file)"
        ) from None
    if stat.S_ISDIR(found.st_mode):
        raise UsageError(f"{name}: {path} is a folder, a file is needed")
    if stat.S_ISREG(found.st_mode) and found.st_size == 0:
        raise UsageError(f"{name}: {path} is empty")
    if found.st_size > _MAX_FILES:
        raise _too_large(f"{name}: {path} has", found.st_size)
    return path


def _read(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as file:  # may be a pipe, or endless
            data = file.read(_MAX_FILES + 1)
    except OSError as error:
        raise UsageError(f"{name}: {path} can't be read: {error.strerror}") from None
    if len(data) > _MAX_FILES:
        raise _too_large(f"{name}: {path} has more than", _MAX_FILES)
    return data


def _too_large(what: str, size: int) -> UsageError:
    return UsageError(
        f"{what} {size / 1e6:,.0f} MB, Cog's server takes at most {_MAX_FILES / 1e6:,.0f} MB of files in a request: "
        "make it smaller (a JPEG of the same picture will do), or give its https URL"
    )


def _text_of(value: str, name: str) -> str:
    """The text in the file that `@path` names, without its last line end."""
    path = _found(value, name)
    data = _read(path, name)
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UsageError(f"{name}: {path} is not a text file in UTF-8: save its text as UTF-8")
    return re.sub(r"\r?\n\Z", "", text)


def _with_data_urls(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with each Path as a data URL, all together within the server's limit."""
    paths = [p for value in values.values() for p in (value if isinstance(value, list) else [value])]
    sizes = sum(path.stat().st_size for path in paths if isinstance(path, Path))
    if sizes > _MAX_FILES:
        raise _too_large("the files together have", sizes)

    def encoded(value: Any, name: str) -> Any:
        if isinstance(value, list):
            return [encoded(item, name) for item in value]
        if not isinstance(value, Path):
            return value
        mime = mimetypes.guess_type(value.name, strict=False)[0] or "application/octet-stream"
        return f"data:{mime};base64,{base64.b64encode(_read(value, name)).decode()}"

    made = {name: encoded(value, name) for name, value in values.items()}
    size = sum(len(v) for value in made.values() for v in (value if isinstance(value, list) else [value])
               if isinstance(v, str))  # fmt: skip
    if size > MAX_BODY - 2**16:  # room for the names and quotes
        raise _too_large("the inputs together have", size * 3 // 4)
    return made
