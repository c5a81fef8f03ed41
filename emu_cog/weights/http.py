"""One file on a server: asked for by ranges, read as it arrives, asked again when something breaks."""

from __future__ import annotations

import email.utils
import http.client
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from emu_cog.errors import CheckpointError, redacted
from emu_cog.log import log

T = TypeVar("T")
BLOCK = 1 << 20
_HAND_ON = 0.2
"""Seconds; what a kill loses is what has not been handed on."""
_RETRIED = {408, 425, 429}
_HOPELESS = {
    "InvalidURL",
    "LocalProtocolError",
    "SSLError",
    "TooManyRedirects",
    "UnsupportedProtocol",
}
_HTTP = {401: "not authorised", 403: "access refused", 404: "not found", 410: "gone"}


class FetchError(CheckpointError):
    """This source can't give what was asked for; another may. The message says why."""


class ChangedError(FetchError):
    """The server's file is no longer the one that was begun."""


class RefusedError(FetchError):
    """What the server has is damaged, or of a kind that is not accepted. Nothing of it is worth keeping."""


class Transient(Exception):
    """Worth another attempt. `wait` is what the server asked for, in seconds; `progressed` forgives past failures."""

    def __init__(self, message: str, *, wait: float | None = None, progressed: bool = False) -> None:
        super().__init__(redacted(message))
        self.wait = wait
        self.progressed = progressed


class Stopped(Exception):
    """Another download of the same batch failed, so this one was stopped."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """When to wait and when to give up; times in seconds.

    `attempts` counts failures in a row during which nothing worth mentioning arrived. The n-th wait is
    `first_wait` * 2**(n-1), at most `longest_wait`, or what the server asks for, at most `longest_asked`.
    `stall` is how long a connection may be silent. Over twice that time at least `slowest` bytes a second must arrive.
    """

    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    longest_asked: float = 600.0
    connect: float = 10.0
    stall: float = 30.0
    slowest: int = 4096


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A file on a server. `size` (bytes) and `validator` (ETag or date), where known, must not change under way.

    `token` goes to the URL's own host only, never to one it redirects to.
    """

    url: str
    size: int | None = None
    validator: str | None = None
    token: str | None = field(default=None, repr=False)


class Body:
    """An answer being read. `start` is the position of its first byte in the remote file, `size` that file's size.

    `partial`: the server sent the range that was asked for.
    """

    def __init__(self, response: Any, *, start: int, size: int | None, validator: str | None, patience: Patience):
        self.start, self.size, self.validator = start, size, validator
        self.partial = response.status_code == 206
        self._response, self._patience = response, patience

    def blocks(self) -> Iterator[bytes]:
        """Blocks of up to 1 MiB, handed on several times a second while bytes arrive.

        Raises Transient when the connection breaks, is silent for too long, or is too slow to wait for.
        """
        import urllib3

        patience, raw = self._patience, self._response.raw
        buffer = bytearray()
        handed_on = marked = time.monotonic()
        since_mark = total = 0
        promised = _whole(self._response.headers.get("Content-Length"))
        trouble: str | None = None
        while trouble is None:
            try:
                data = raw.read1(BLOCK)
            except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
                data, trouble = b"", f"the connection broke ({reason_of(error)})"
            buffer += data
            total += len(data)
            since_mark += len(data)
            now = time.monotonic()
            if buffer and (not data or len(buffer) >= BLOCK or now - handed_on > _HAND_ON):
                yield bytes(buffer)
                buffer.clear()
                handed_on = now
            if not data and trouble is None:
                if promised in (None, total):
                    return
                trouble = f"the connection closed after {total} of {promised} bytes"
            if now - marked > 2 * patience.stall:
                if since_mark < patience.slowest * (now - marked):
                    trouble = f"only {since_mark / (now - marked):.0f} bytes/s arrive"
                marked, since_mark = now, 0
        raise Transient(trouble)


@contextmanager
def open_range(remote: Remote, start: int, stop: int | None, *, patience: Patience) -> Iterator[Body]:
    """GET bytes `start`..`stop`-1 (None: to the end) of `remote`.

    A server without ranges answers with the whole file: then the body's `start` is 0. Raises Transient for what
    may pass, ChangedError if the file is no longer the one that was begun, FetchError for the rest.
    """
    import requests

    headers = {"Accept-Encoding": "identity"}
    if start or stop is not None:
        headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        if remote.validator and not remote.validator.startswith("W/"):
            headers["If-Range"] = remote.validator
    try:
        response = requests.get(
            remote.url,
            headers=headers,
            auth=_bearer(remote.token),
            stream=True,
            timeout=(patience.connect, patience.stall),
        )
    except Exception as error:
        reason = reason_of(error, remote.token)
        if hopeless(error):
            raise FetchError(f"{remote.url}: {reason}") from None
        if isinstance(error, (OSError, http.client.HTTPException)):  # requests' own errors are OSErrors
            raise Transient(f"no answer from {remote.url} ({reason})") from None
        raise
    with response:
        yield _body(response, remote, start, patience)


def _body(response: Any, remote: Remote, start: int, patience: Patience) -> Body:
    status, url = response.status_code, remote.url
    if status in _RETRIED or status >= 500:
        raise Transient(f"{url} answered {status} {response.reason}", wait=asked_wait(response.headers, patience, url))
    if status == 416 and start == 0:
        raise FetchError(f"{url} is empty")
    if status == 416:
        raise ChangedError(f"{url} ends before byte {start}: it is shorter than expected")
    if status not in (200, 206):
        raise FetchError(f"{url} answered {status} ({_HTTP.get(status, response.reason)})")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise FetchError(f"{url} is sent compressed ({response.headers['Content-Encoding']}) though that was declined")
    size = _whole(response.headers.get("Content-Length"))
    first = 0
    if status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != start:
            raise FetchError(f"{url} answered a range with {response.headers.get('Content-Range')!r}")
        first, size = start, None if found[2] == "*" else int(found[2])
    validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
    if remote.validator and validator and validator != remote.validator:
        raise ChangedError(f"{url} has changed: it was {remote.validator} and is now {validator}")
    if None not in (remote.size, size) and remote.size != size:
        raise ChangedError(f"{url} has {size} bytes where {remote.size} were expected")
    return Body(response, start=first, size=size, validator=validator, patience=patience)


def retrying(action: Callable[[], T], *, what: str, patience: Patience, stop: threading.Event | None = None) -> T:
    """`action()`, again after a growing wait for as long as it raises Transient; FetchError after too many failures."""
    stop = stop or threading.Event()
    failures = 0
    while True:
        try:
            return action()
        except Transient as error:
            failures = 1 if error.progressed else failures + 1
            if failures >= patience.attempts:
                raise FetchError(f"{what}: {error}; given up after {failures} attempts") from None
            wait = error.wait
            if wait is None:  # spread, so that many machines don't come back at once
                wait = min(patience.first_wait * 2 ** (failures - 1), patience.longest_wait) * random.uniform(0.75, 1)
            label = redacted(what)
            log.warning("%s: %s; attempt %d of %d in %.1f s", label, error, failures + 1, patience.attempts, wait)
            if stop.wait(wait):
                raise Stopped from None


def asked_wait(headers: Mapping[str, str], patience: Patience, url: str) -> float | None:
    """Seconds to wait by `Retry-After` (seconds or a date) or the hub's `RateLimit: "api";r=0;t=55`."""
    asked: float | None = None
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        asked = float(value)
    elif value:
        try:
            asked = max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            asked = None
    elif found := re.search(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("RateLimit", "")):
        asked = float(found[1])
    if asked is not None and asked > patience.longest_asked:
        raise FetchError(f"{url} asks to come back in {asked:.0f} s, longer than the {patience.longest_asked:.0f} s")
    return asked


def _whole(value: str | None) -> int | None:
    return int(value) if value is not None and value.isdigit() else None


def _bearer(token: str | None) -> Callable[[Any], Any]:
    """Authorisation for `requests`; given also without a token, or a ~/.netrc would be sent instead."""

    def sign(request: Any) -> Any:
        if token is not None:
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    return sign


def hopeless(error: BaseException) -> bool:
    """Whether the same request would fail in the same way: a bad header, URL, protocol, certificate or redirect.

    By the names of classes, because the two clients (requests, and huggingface_hub's httpx) have their own.
    """
    if isinstance(error, json.JSONDecodeError):  # an answer was cut off, or a proxy's page came instead
        return False
    names = {cls.__name__ for link in _chain(error) for cls in type(link).__mro__}
    broken_handshake = "SSLEOFError" in names  # the connection's fault, not the certificate's
    return isinstance(error, (ValueError, TypeError)) or bool(names & _HOPELESS and not broken_handshake)


def reason_of(error: BaseException, secret: str | None = None) -> str:
    """The innermost message of nested network errors, in one line and without `secret`."""
    text = " ".join(str(_chain(error)[-1]).split())
    return redacted(text, secret) or type(_chain(error)[-1]).__name__


def _chain(error: BaseException) -> list[BaseException]:
    """`error` and the errors that caused it, outermost first."""
    chain = [error]
    while (inner := getattr(error, "reason", None) or error.__cause__ or error.__context__) is not None:
        if not isinstance(inner, BaseException) or any(inner is link for link in chain):
            break
        chain.append(inner)
        error = inner
    return chain
