"""Cog's real server as a child process on a loopback port, and predictions over its event stream."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import http.client
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _openapi
import _signals
import _stdio
import psutil
from _venv import ROOT

HOST = "127.0.0.1"
PREDICTOR = ROOT / "predict.py"
COGLET_FOLDER = Path("/tmp/coglet")
"""Where coglet 0.23.1 keeps a folder for each prediction, whatever TMPDIR says (found by running it)."""
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_SETUP_FAILED = re.compile(rb'\{"timestamp":[^\n]*"Worker initialization failed"[^\n]*\n')
"""A line of coglet's log that says in JSON what `_wait` says in a sentence."""
_SLOT_LOST = b"PermitInUse dropped without state transition"
"""coglet's log line after a prediction that it could not begin: its slot stays taken, health stays BUSY for good."""
_LAYERS = re.compile(r"^(worker setup failed( \(slot [^)]*\))?: |setup failed: )+", re.IGNORECASE)


class ServerError(RuntimeError):
    """The server can't be started, has ended, or refuses a request; the message is for the user."""


class Server:
    """`with Server() as server:` is ready for predictions; leaving stops it and its worker.

    It serves `concurrency` predictions at once and refuses further ones with 409. `predictor` is a file of the checkout
    whose Predictor has the inputs of predict.py. Everything that the server needs is checked first. Raises ServerError.
    """

    def __init__(self, *, port: int | None = None, concurrency: int = 1, predictor: Path = PREDICTOR) -> None:
        self.port, self.concurrency, self._predictor = port or _free_port(), concurrency, predictor
        self._process: subprocess.Popen[bytes] | None = None
        self._relay: threading.Thread | None = None
        self._ready, self._slots_lost = False, 0
        self._made = contextlib.ExitStack()  # temporary folders

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> Server:
        _check_port(self.port)
        _check_coglet_folder()
        try:
            self._start()
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the server; whatever interrupts this (a second Ctrl-C) kills it at once."""
        try:
            self._stop()
        finally:
            self._kill()
            self._made.close()

    def _start(self) -> None:
        folder = self._folder()
        environment = _environment(folder, self._predictor) | {
            "PORT": str(self.port),
            "COG_MAX_CONCURRENCY": str(self.concurrency),
        }
        if (python := self._wrapped_python()) is not None:
            environment["PATH"] = f"{python}{os.pathsep}{environment['PATH']}"
        # A signal before all of this is done would leave a server that nobody stops, or a thread that can't be joined.
        signal.pthread_sigmask(signal.SIG_BLOCK, _signals.ALL)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cog.server.http", "--host", HOST],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to turn into a cancel
                preexec_fn=_in_the_child,
            )
            self._relay = threading.Thread(target=self._pass_on, daemon=True)
            self._relay.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _signals.ALL)

    def _folder(self) -> Path:
        """The folder that holds .cog/openapi_schema.json, without which the server validates nothing.

        The checkout; a temporary folder where the schema there is not up to date and can't be written.
        """
        target = ROOT / ".cog" / "openapi_schema.json"
        if _openapi.is_current(PREDICTOR, target):
            return ROOT
        try:
            _openapi.write(PREDICTOR, target)
            return ROOT
        except OSError as error:
            try:
                folder = Path(self._made.enter_context(tempfile.TemporaryDirectory(prefix="emu-cog-server-")))
                _openapi.write(PREDICTOR, folder / ".cog" / target.name)
            except OSError as other:
                raise ServerError(
                    f"the schema can be written neither to {target} ({error.strerror}) nor to a temporary folder "
                    f"({other.strerror}): make room, or set TMPDIR to a folder that you can write to"
                ) from None
            return folder

    def _wrapped_python(self) -> str | None:
        """A folder with a `python` that is ours, where there is none beside our own: the worker starts as `python`."""
        found = shutil.which("python", path=str(Path(sys.executable).parent))
        if found and os.path.realpath(found) == os.path.realpath(sys.executable):
            return None
        folder = self._made.enter_context(tempfile.TemporaryDirectory(prefix="emu-cog-python-"))
        # A script and not a link: a virtual environment's Python finds its packages by its own path.
        script = Path(folder) / "python"
        script.write_text(f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n")
        script.chmod(0o755)
        return folder

    def _pass_on(self) -> None:
        """Copy the server's output to our standard error, and count the lost slots in it."""
        assert self._process is not None
        assert self._process.stdout is not None
        tail, reader = b"", True
        while data := os.read(self._process.stdout.fileno(), 2**16):
            self._slots_lost += (tail + data).count(_SLOT_LOST)
            tail = (tail + data)[1 - len(_SLOT_LOST) :]
            data = _SETUP_FAILED.sub(b"", data)
            try:
                while reader and data:
                    data = data[os.write(2, data) :]
            except OSError:  # closed or full: go on reading, or the server would stand still
                reader = False

    def _wait(self) -> None:
        """Until health is READY and it is our own child that listens."""
        assert self._process is not None
        while True:
            if self._process.poll() is not None:
                raise ServerError(f"the server {_how(self._process.returncode)} before it was ready")
            health = self._health()
            if health.get("status") in ("READY", "BUSY"):
                if not self._listens():
                    raise ServerError(f"port {self.port} was taken by another program meanwhile: give another --port")
                self._ready = True
                return
            if health.get("status") in ("SETUP_FAILED", "DEFUNCT", "UNHEALTHY"):
                logs = _LAYERS.sub("", str((health.get("setup") or {}).get("logs", "")).strip())
                if logs == "worker crashed":
                    logs += " (killed, perhaps for want of memory)"
                raise ServerError(f"setup failed:\n{logs}")
            time.sleep(0.05)

    def _health(self) -> dict[str, Any]:
        try:
            return self.get("/health-check")
        except (OSError, ValueError, http.client.HTTPException):
            return {}

    def _listens(self) -> bool:
        """Whether the port is our child's. True where the system doesn't tell."""
        assert self._process is not None
        try:
            connections = psutil.Process(self._process.pid).net_connections("tcp")
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return True
        return any(c.status == psutil.CONN_LISTEN and c.laddr.port == self.port for c in connections)

    def watch(self, *, interval: float = 1) -> None:
        """Return when the server is shut down (POST /shutdown). Raises ServerError once it can't serve any more."""
        assert self._process is not None
        noted = 0
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if code := self._process.wait(interval):
                    raise ServerError(f"the server {_how(code)}")
                return
            worker = self._has_worker()
            lost = self._slots_lost if worker else 0  # coglet logs the same of a worker that died in a prediction
            why = (
                f"a prediction's folder could not be made in {COGLET_FOLDER} (a full disk, or an id of more than 255 "
                "bytes)"
            )
            if lost >= self.concurrency:
                raise ServerError(
                    f"the server has lost {'its only slot' if self.concurrency == 1 else 'all its slots'} for "
                    f"predictions and would refuse every request with 409: {why}; start it again"
                )
            if lost > noted:
                noted = lost
                _stdio.note(
                    f"warning: the server has lost {lost} of its {self.concurrency} slots for predictions: {why}; "
                    "start it again to have them back"
                )
            status = self._health().get("status")
            if status == "DEFUNCT" or (status == "UNHEALTHY" and not worker):
                raise ServerError("the model's process has ended (out of memory?): start the server again")

    def _has_worker(self) -> bool:
        assert self._process is not None
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self._process.pid).children()
            return any(child.status() != psutil.STATUS_ZOMBIE for child in children)
        return False

    def _stop(self) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        if self._ready:
            self._settle()
        # Before it is ready there is nothing to finish, and coglet would wait for the model to be loaded.
        with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(10 if self._ready else 1)

    def _kill(self) -> None:
        """Kill what is left of the server's process group, and collect it."""
        if self._process is None:
            return
        # Its leader collected, the group lives on while a worker does: its number can't be another's before that.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        if self._relay is not None:
            self._relay.join(1)

    def _settle(self) -> None:
        """Cog frees its slot shortly after the answer, and complains in the log when it is stopped before that."""
        until = time.monotonic() + 1
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            while self.get("/health-check", timeout=1).get("status") == "BUSY" and time.monotonic() < until:
                time.sleep(0.02)

    def get(self, path: str, *, timeout: float = 30) -> dict[str, Any]:
        return self._request("GET", path, timeout=timeout)[1]

    def cancel(self, identifier: str) -> None:
        """Ask for the end of a prediction; a server that is gone has ended it."""
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            self._request("POST", f"/predictions/{identifier}/cancel", timeout=5)

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

        Raises ServerError with the server's words where it refuses the request, and where it ends meanwhile.
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
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"the connection to the server broke during the prediction: {error}") from None
        finally:
            connection.close()


def _refusal(status: int, body: bytes) -> str:
    """A 422's `loc` and `msg`, one line each; anything else as it came."""
    try:
        details = json.loads(body)["detail"]
        return "\n".join(f"{'.'.join(str(part) for part in d['loc'][1:])}: {d['msg']}" for d in details)
    except (ValueError, KeyError, TypeError):
        return f"the server answered {status}: {body.decode(errors='replace')}"


def _how(code: int) -> str:
    """How a process ended, from its return code."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code}"


def _environment(folder: Path, predictor: Path = PREDICTOR) -> dict[str, str]:
    environment = os.environ | {
        # The worker is started as plain `python`.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "COG_PREDICT_TYPE_STUB": f"{predictor if folder != ROOT else predictor.relative_to(ROOT)}:Predictor",
        "COG_NO_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
        # Predictor and predict() are what this project's users asked for; Cog's advice to rename them is known.
        "PYTHONWARNINGS": "ignore::DeprecationWarning",
    }
    # The lost slot is found in the errors of coglet::permit, however quiet or loud the user wants the rest.
    environment["RUST_LOG"] = (
        f"{environment['RUST_LOG']},coglet::permit=error" if "RUST_LOG" in environment else "error"
    )
    # Threads that spin while they wait slow a small model to a crawl on a machine that has other work.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if folder != ROOT:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
        for name, value in environment.items():  # paths relative to the checkout stay so
            if name.startswith("EMU_") and value and not os.path.isabs(value) and (ROOT / value).exists():
                environment[name] = str(ROOT / value)
    return environment


def _free_port() -> int:
    with socket.socket() as s:
        s.bind((HOST, 0))
        return int(s.getsockname()[1])


def _check_port(port: int) -> None:
    """ServerError where `port` is taken, by a server of any kind, or not ours to take."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a port just left is free
        try:
            s.bind((HOST, port))
        except OSError as error:
            why = {
                errno.EADDRINUSE: "is taken by another program",
                errno.EACCES: "needs root's rights (all below 1024 do)",
            }.get(error.errno or 0, f"can't be used ({error.strerror})")
            raise ServerError(f"port {port} {why}: give another --port, or none for a free one") from None


def _check_coglet_folder() -> None:
    """ServerError where coglet could not make a prediction's folder: it would lose its slot over it, for good."""
    folder = COGLET_FOLDER / "predictions" / f"check-{uuid.uuid4().hex}"
    try:
        owner = COGLET_FOLDER.lstat().st_uid if COGLET_FOLDER.is_symlink() else 0
        if owner not in (0, os.getuid()):
            raise ServerError(f"{COGLET_FOLDER} is a link that another user made, Cog's server needs it: remove it")
        try:
            folder.mkdir(parents=True)
            (folder / "check").write_bytes(bytes(2**16))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        advice = "make room there"
        if isinstance(error, PermissionError):
            advice = (
                f"it belongs to {_owner(COGLET_FOLDER)}, who can run "
                f"`chmod 1777 {COGLET_FOLDER} {COGLET_FOLDER / 'predictions'}` or remove it"
            )
        raise ServerError(
            f"Cog's server needs to write to {COGLET_FOLDER} (a fixed place), which fails: {error.strerror}; {advice}"
        ) from None


def _owner(path: Path) -> str:
    try:
        return pwd.getpwuid(path.stat().st_uid).pw_name
    except (OSError, KeyError):
        return "another user"


def _in_the_child() -> None:
    """Unblock the signals; on Linux the server gets SIGTERM when this process dies in any way, kill -9 included."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _signals.ALL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
