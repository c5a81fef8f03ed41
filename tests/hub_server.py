"""A server on 127.0.0.1 that the real huggingface_hub client takes for the hub, and that serves tars; it can misbehave.

It speaks what the client asks for: a model's information with file metadata, the tree listing, and `resolve` with the
hub's headers, where files in LFS are a redirect to another address that knows ranges and files in git are sent at once.
"""

from __future__ import annotations

import email.utils
import functools
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Fault:
    """What goes wrong with requests whose path matches `path`, the first `times` of them (None: all).

    With `minimum`, only requests for at least so many bytes count: by their range, or by the size of the file.
    `status` answers with that code and `headers`; `location` redirects. Of the body, after `after` bytes: `reset`
    breaks the connection, `end` closes it in good order, `stall` says nothing more. `cut` sends a file that ends
    there, `alter` changes the byte there. `rate` sends that many bytes a second.
    """

    path: str
    times: int | None = 1
    minimum: int = 0
    method: str = "GET"
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    after: int = 0
    reset: bool = False
    end: bool = False
    stall: bool = False
    cut: bool = False
    alter: bool = False
    rate: float | None = None
    location: str | None = None


@dataclass
class Seen:
    """One request: what was asked and how many bytes of body were sent."""

    method: str
    path: str
    headers: Message
    status: int = 0
    sent: int = 0

    @property
    def range(self) -> str | None:
        return self.headers.get("Range")


class HubServer:
    """A context manager. `url` is the endpoint, `seen` lists the requests, `faults` may be changed at any time."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.files: dict[str, bytes] = {}  # plain addresses, such as a tar's
        self.etags: dict[str, str | None] = {}  # None: no ETag; absent: the content's SHA-256
        self.lfs_over = 4096
        self.ranges = True
        self.metadata = True  # whether listings tell sizes and hashes
        self.token: str | None = None
        self.cdn_host = "localhost"  # another host than `url`'s: no token may be sent there
        self.rate: float | None = None
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.on_bytes: Callable[[int], None] = lambda total: None
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def add_repo(self, name: str, files: Mapping[str, bytes], *, commit: str | None = None) -> str:
        """Put a commit on the branch main of the repository `name`; returns the commit."""
        digest = hashlib.sha1(name.encode())
        for file, content in sorted(files.items()):
            digest.update(file.encode() + sha256_of(content).encode())
        commit = commit or digest.hexdigest()
        self.repos.setdefault(name, {})[commit] = dict(files)
        self.branches[name, "main"] = commit
        return commit

    def sent(self, pattern: str = "") -> int:
        """Bytes of bodies sent for GET requests whose path matches `pattern`."""
        return sum(s.sent for s in list(self.seen) if s.method == "GET" and re.search(pattern, s.path))

    def asked(self, pattern: str) -> list[Seen]:
        return [s for s in list(self.seen) if re.search(pattern, s.path)]

    def _take_fault(self, method: str, path: str, length: int) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                fits = fault.method == method and fault.minimum <= length and re.search(fault.path, path)
                if fits and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    def _content(self, sha256: str) -> bytes | None:
        contents = (c for commits in self.repos.values() for files in commits.values() for c in files.values())
        return next((c for c in contents if sha256_of(c) == sha256), None)

    def _handler(hub) -> type[BaseHTTPRequestHandler]:  # `self` is the request's below
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._answer()

            def do_HEAD(self) -> None:
                self._answer()

            def _answer(self) -> None:
                self.note = Seen(self.command, self.path, self.headers)
                hub.seen.append(self.note)
                self.fault = hub._take_fault(self.command, self.path, self._length()) or Fault("")
                if self.fault.status is not None:
                    return self._send(self.fault.status, b"a fault\n", self.fault.headers)
                if self.fault.location is not None:
                    return self._send(302, b"", {"Location": self.fault.location})
                path = unquote(urlsplit(self.path).path)
                if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
                    return self._api(found[1], found[2] or "revision", found[3] or "main")
                if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                    return self._resolve(found[1], found[2], found[3])
                if found := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
                    content = hub._content(found[1])
                else:
                    content = hub.files.get(path)
                if content is None:
                    return self._send(404, b"no such file\n", {})
                etag = hub.etags.get(path, f'"{sha256_of(content)}"')
                return self._send_file(content, {"ETag": etag} if etag else {}, ranges=hub.ranges)

            def _length(self) -> int:
                """Bytes that the request is for, as far as can be told."""
                path = unquote(urlsplit(self.path).path)
                content = hub.files.get(path) or hub._content(path.removeprefix("/cdn/")) or b""
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if asked is None or (not hub.ranges and asked[0] != "bytes=0-0"):
                    return len(content)
                return max(0, min(int(asked[2] or len(content)), len(content) - 1) - int(asked[1]) + 1)

            def _commit(self, repo: str, revision: str) -> str | None:
                """The commit of `revision`, after an error was sent if there is none."""
                if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                    self._send(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
                    return None
                commit = hub.branches.get((repo, revision), revision)
                if repo not in hub.repos:
                    self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                    return None
                if commit not in hub.repos[repo]:
                    self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                    return None
                return commit

            def _api(self, repo: str, what: str, revision: str) -> None:
                if (commit := self._commit(repo, revision)) is None:
                    return
                listed: list[dict[str, Any]] = []
                for name, content in hub.repos[repo][commit].items():
                    sha256, size = sha256_of(content), len(content)
                    large = size > hub.lfs_over
                    if what == "tree":
                        lfs = {"lfs": {"oid": sha256, "size": size, "pointerSize": 130}} if large else {}
                        listed.append({"type": "file", "path": name, "size": size, "oid": git_sha1(content), **lfs})
                    elif hub.metadata and "blobs=" in self.path:
                        lfs = {"lfs": {"sha256": sha256, "size": size, "pointerSize": 130}} if large else {}
                        listed.append({"rfilename": name, "size": size, "blobId": git_sha1(content), **lfs})
                    else:
                        listed.append({"rfilename": name})
                answer: Any = listed
                if what == "revision":
                    answer = {"_id": "1", "id": repo, "modelId": repo, "sha": commit, "private": False, "tags": []}
                    answer |= {"siblings": listed, "downloads": 0, "likes": 0}
                self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

            def _resolve(self, repo: str, revision: str, name: str) -> None:
                if (commit := self._commit(repo, revision)) is None:
                    return
                content = hub.repos[repo][commit].get(name)
                if content is None:
                    return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                headers = {"X-Repo-Commit": commit}
                if len(content) <= hub.lfs_over:
                    return self._send_file(content, headers | {"ETag": f'"{git_sha1(content)}"'}, ranges=hub.ranges)
                sha256 = sha256_of(content)
                headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
                headers["Location"] = f"http://{hub.cdn_host}:{hub.port}/cdn/{sha256}"
                return self._send(302, b"", headers)

            def _send_file(self, content: bytes, headers: dict[str, str], *, ranges: bool) -> None:
                if self.fault.cut:
                    content = content[: self.fault.after]
                if self.fault.alter:
                    at = min(self.fault.after, len(content) - 1)
                    content = content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                condition = self.headers.get("If-Range")
                if asked is None or not ranges or condition not in (None, headers.get("ETag")):
                    return self._send(200, content, headers | ({"Accept-Ranges": "bytes"} if ranges else {}))
                first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
                if first >= len(content):
                    return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                headers |= {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
                return self._send(206, content[first : last + 1], headers)

            def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
                self.note.status = status
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                try:
                    self._send_body(body)
                except OSError:  # the client has gone
                    self.close_connection = True

            def _send_body(self, body: bytes) -> None:
                fault = self.fault
                breaks = fault.reset or fault.end or fault.stall
                whole = body if not breaks else body[: fault.after]
                rate = fault.rate or hub.rate
                block = 16384 if rate is None else max(1, min(16384, int(rate / 20)))
                for start in range(0, len(whole), block):
                    if hub.closing.is_set():
                        break
                    part = whole[start : start + block]
                    self.wfile.write(part)
                    self.note.sent += len(part)
                    hub.on_bytes(hub.sent())
                    if rate is not None:
                        hub.closing.wait(len(part) / rate)
                if not breaks:
                    return
                self.close_connection = True
                if fault.stall:
                    hub.closing.wait(60)
                elif fault.reset:
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.connection.close()

        return Handler


@functools.lru_cache(maxsize=256)
def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@functools.lru_cache(maxsize=256)
def git_sha1(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def http_date(seconds: float) -> str:
    """A date `seconds` from now, as Retry-After may give it."""
    return email.utils.formatdate(time.time() + seconds, usegmt=True)
