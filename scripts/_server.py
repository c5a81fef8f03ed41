"""Cog's real server as a child process on a loopback port, and predictions over its event stream."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import _openapi
from _venv import ROOT

HOST = "127.0.0.1"
PREDICTOR = ROOT / "predict.py"
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class ServerError(RuntimeError):
    """The server could not be started, or setup failed; the message carries its logs."""


class Server:
    """`with Server() as server:` is ready for predictions; leaving stops it and its worker."""

    def __init__(self, *, port: int | None = None) -> None:
        self.port = port or _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> Server:
        schema = ROOT / ".cog" / "openapi_schema.json"
        _openapi.write(PREDICTOR, schema)  # without it the server validates nothing
        environment = os.environ | {
            "PORT": str(self.port),
            "COG_PREDICT_TYPE_STUB": f"{PREDICTOR.name}:Predictor",
            "COG_NO_UPDATE_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
            # Predictor and predict() are what this project's users asked for; Cog's advice to rename them is known.
            "PYTHONWARNINGS": "ignore::DeprecationWarning",
        }
        environment.setdefault("RUST_LOG", "error")
        # Threads that spin while they wait slow a small model to a crawl on a machine that has other work.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cog.server.http", "--host", HOST],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,  # Ctrl-C is ours to turn into a cancel
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        self._settle()
        for sign, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
            try:
                os.killpg(process.pid, sign)
                process.wait(patience)
                return
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                return

    def _settle(self) -> None:
        """Cog frees its slot a moment after the answer, and complains in the log when it is stopped before that.

        A server that gives no answer any more is not waited for.
        """
        until = time.monotonic() + 1
        with contextlib.suppress(OSError, ValueError):
            while self.get("/health-check", timeout=1).get("status") == "BUSY" and time.monotonic() < until:
                time.sleep(0.02)

    def _wait(self) -> None:
        """Until health is READY."""
        assert self._process is not None
        while True:
            if self._process.poll() is not None:
                raise ServerError(f"the server ended with code {self._process.returncode} before it was ready")
            try:
                health = self.get("/health-check")
            except OSError:
                health = {}
            if health.get("status") in ("READY", "BUSY"):
                return
            if health.get("status") in ("SETUP_FAILED", "DEFUNCT", "UNHEALTHY"):
                setup = health.get("setup") or {}
                raise ServerError(f"setup failed:\n{str(setup.get('logs', '')).strip()}")
            time.sleep(0.05)

    def get(self, path: str, *, timeout: float = 30) -> dict[str, Any]:
        return self._request("GET", path, timeout=timeout)[1]

    def cancel(self, identifier: str) -> None:
        self._request("POST", f"/predictions/{identifier}/cancel")

    def _request(self, method: str, path: str, body: Any = None, *, timeout: float = 30) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
            return response.status, json.loads(text) if text.strip() else {}
        finally:
            connection.close()

    def stream(self, inputs: dict[str, Any], *, identifier: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Run a prediction and yield its events (name, data): start, log, output, metric, completed.

        Raises ServerError with the server's words where it refuses the request.
        """
        connection = http.client.HTTPConnection(HOST, self.port)
        try:
            headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
            connection.request("PUT", f"/predictions/{identifier}", json.dumps({"input": inputs}), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ServerError(_refusal(response.status, response.read()))
            name = ""
            for raw in response:
                line = raw.decode("utf-8").rstrip("\r\n")
                if line.startswith("event:"):
                    name = line.removeprefix("event:").strip()
                elif line.startswith("data:"):
                    yield name, json.loads(line.removeprefix("data:"))
        finally:
            connection.close()


def _refusal(status: int, body: bytes) -> str:
    """A 422's `loc` and `msg` in a line each; anything else as it came."""
    try:
        details = json.loads(body)["detail"]
        return "\n".join(f"{'.'.join(str(part) for part in d['loc'][1:])}: {d['msg']}" for d in details)
    except (ValueError, KeyError, TypeError):
        return f"the server answered {status}: {body.decode(errors='replace')}"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind((HOST, 0))
        return int(s.getsockname()[1])


def _die_with_parent() -> None:
    """The server gets SIGTERM when this process dies in any way, kill -9 included, and takes its worker along."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
