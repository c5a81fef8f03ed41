"""Several predictions at once on Cog's real server, over a backend that does what the prompt says."""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import _openapi
import _predictor
import _server
import pytest
import scripted_predictor
from _server import HOST, PREDICTOR, Server, ServerError
from scripted_predictor import picture

from emu_cog import service as module
from emu_cog import serving
from emu_cog.events import Event, Progress, RunStats
from emu_cog.log import log
from emu_cog.request import Request
from emu_cog.service import OneAtATime, Service
from emu_cog.settings import Settings
from tests.conftest import ROOT

SLOTS = 8
SCRIPTED = Path(scripted_predictor.__file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scripted")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCRIPTED_FOLDER", str(folder))
        patch.setenv("TMPDIR", str(folder))
        with Server(concurrency=SLOTS, predictor=SCRIPTED) as running:
            yield running


@pytest.fixture(autouse=True)
def _log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Service sets the package's logger up for its process; undo that after each test."""
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)


class Refused(Exception):
    """The server answered 409."""


@dataclass
class Prediction:
    """One prediction over the event stream, read by a thread of its own."""

    server: Server
    inputs: dict[str, Any]
    name: str = field(default_factory=lambda: f"p{uuid.uuid4().hex[:8]}")

    def __post_init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.error: ServerError | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for event in self.server.stream(self.inputs, identifier=self.name):
                with self._changed:
                    self.events.append(event)
                    self._changed.notify_all()
        except ServerError as error:
            with self._changed:
                self.error = error
                self._changed.notify_all()

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive(), f"{self.inputs}: {self.events}"

    def until(self, done: Callable[[], bool]) -> Prediction:
        with self._changed:
            assert self._changed.wait_for(lambda: done() or self.error, 30), f"{self.inputs}: {self.events}"
        if self.error:
            raise Refused(str(self.error))
        return self

    def began(self) -> Prediction:
        return self.until(lambda: any(name == "log" for name, _ in self.events))

    def logged(self, line: str) -> Prediction:
        return self.until(lambda: any(name == "log" and data["data"] == line for name, data in self.events))

    def has(self, outputs: int) -> Prediction:
        return self.until(lambda: self.outputs >= outputs)

    @property
    def outputs(self) -> int:
        return sum(name == "output" for name, _ in self.events)

    @property
    def finished(self) -> bool:
        return any(name == "completed" for name, _ in self.events)

    def result(self) -> dict[str, Any]:
        self.until(lambda: self.finished)
        return self.events[-1][1]

    def progress(self) -> list[int]:
        """The percentages in the form that Replicate's clients look for."""
        return [int(percent) for percent in re.findall(r"^\s*(\d+)%\s*\|.+?\|\s*\d+\/\d+", self.result()["logs"], re.M)]


class Kit:
    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.started: list[Prediction] = []
        self.gates: set[str] = set()

    def start(self, steps: str, **inputs: Any) -> Prediction:
        self.gates |= set(re.findall(r"(?:wait|deaf):(\w+)", steps))
        name = f"p{uuid.uuid4().hex[:8]}"
        self.started.append(Prediction(self.server, {"prompt": f"{name} {steps}"} | inputs, name))
        return self.started[-1]

    def when_a_slot_is_free(self, steps: str) -> Prediction:
        """One that is accepted: coglet frees a slot a moment after its answer."""
        until = time.monotonic() + 30
        while True:
            try:
                return self.start(steps).began()
            except Refused:
                assert time.monotonic() < until, "no slot is ever free"
                time.sleep(0.02)

    def gate(self) -> str:
        return uuid.uuid4().hex[:8]

    def open(self, gate: str) -> None:
        (self.folder / gate).touch()

    def record(self) -> list[str]:
        path = self.folder / "record"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, line: str) -> None:
        """Until the backend has recorded `line`."""
        until = time.monotonic() + 30
        while line not in self.record():
            assert time.monotonic() < until, (line, self.record())
            time.sleep(0.005)


@pytest.fixture
def kit(server: Server, folder: Path) -> Iterator[Kit]:
    """Starts predictions; whatever a test did, the next prediction works."""
    kit = Kit(server, folder)
    yield kit
    for gate in kit.gates:
        kit.open(gate)
    for started in kit.started:
        started.join()
    assert kit.when_a_slot_is_free("pic").result()["status"] == "succeeded"


# ------------------------------------------------------------------------------------------------ side by side


def test_files_arrive_as_they_are_made(kit: Kit) -> None:
    """coglet keeps all files of an async generator to the end, and loses them in a cancel."""
    gate = kit.gate()
    steps = f"pic wait:{gate} pic"
    pictures = [kit.start(steps) for _ in range(2)]
    stories = [kit.start(steps, task_type="story") for _ in range(2)]
    for prediction in pictures + stories:
        prediction.has(outputs=1)
    assert not any(prediction.finished for prediction in pictures + stories)
    kit.open(gate)
    for prediction in pictures + stories:
        assert prediction.result()["status"] == "succeeded"
    assert [prediction.outputs for prediction in pictures + stories] == [2, 2, 3, 3]  # a story ends with its page


def test_a_file_comes_before_what_is_logged_after_it(kit: Kit) -> None:
    prediction = kit.start("pic log:after pic log:last")
    prediction.result()
    kinds = [
        name if name == "output" else data["data"].split()[-1]
        for name, data in prediction.events
        if name == "output" or (name == "log" and data["data"].startswith("p"))
    ]
    assert kinds == ["output", "after", "output", "last"]


def test_logs_progress_and_metrics_belong_to_their_prediction(kit: Kit) -> None:
    """In a raw thread logs vanish and a metric lands on another prediction."""
    gates = [kit.gate() for _ in range(3)]
    steps = " ".join(f"log:{n} wait:{gate} report:{30 * n + 20} shared:{n}" for n, gate in enumerate(gates))
    together = [kit.start(f"{steps} pic", seed=100 + n) for n in range(4)]
    for number, gate in enumerate(gates):
        for prediction in together:
            prediction.logged(f"{prediction.name} {number}\n")
        kit.open(gate)
    for number, prediction in enumerate(together):
        result = prediction.result()
        assert set(re.findall(r"^(p\w{8}) ", result["logs"], re.M)) == {prediction.name}
        assert (result["metrics"]["seed"], result["metrics"]["image_output_count"]) == (100 + number, 1)
        percents = prediction.progress()
        assert (percents[0], percents[-1]) == (0, 100)
        assert percents == sorted(set(percents))
        assert {20, 50, 80} <= set(percents)  # reported by the shared thread
        assert "engine" not in result["logs"]


def test_omitted_inputs_arrive_as_their_defaults(kit: Kit) -> None:
    """With a decorator that wraps `predict` they arrive as FieldInfo objects; Cog's own return the function itself."""
    gate = kit.gate()
    together = [kit.start(f"wait:{gate} pic") for _ in range(2)]
    kit.open(gate)
    for prediction in together:
        result = prediction.result()
        assert result["status"] == "succeeded", result.get("error")
        [chunk] = [data["chunk"] for name, data in prediction.events if name == "output"]
        assert chunk.startswith("data:image/png")


def test_the_hosted_model_serves_eight_and_its_schema_is_that_of_one(tmp_path: Path) -> None:
    text = PREDICTOR.read_text()
    decorator = f"    @cog.concurrent(max={SLOTS})\n"
    assert decorator in text
    plain = text.replace(decorator, "").replace("async def", "def")
    (tmp_path / "predict.py").write_text(plain)
    assert _openapi.render(_predictor.read(tmp_path / "predict.py")) == _openapi.render(_predictor.read(PREDICTOR))


# ------------------------------------------------------------------------------------------------------ cancel


def cancel(server: Server, name: str) -> int:
    return server._request("POST", f"/predictions/{name}/cancel")[0]


@pytest.mark.parametrize("wait", ["wait", "deaf"])
def test_a_cancel_ends_one_prediction_and_keeps_its_files(wait: str, kit: Kit) -> None:
    """A cancel did not reach a generator that a coroutine had returned. "deaf": while the backend reports nothing."""
    gate, other = kit.gate(), kit.gate()
    going = kit.start(f"pic wait:{other} pic").has(outputs=1)
    victim = kit.start(f"pic {wait}:{gate} pic pic").has(outputs=1)
    assert cancel(kit.server, victim.name) == 200
    result = victim.result()
    assert (result["status"], victim.outputs) == ("canceled", 1)
    if wait == "deaf":
        assert f"{victim.name} ends" not in kit.record()
        kit.open(gate)
    kit.wait_for(f"{victim.name} ends")
    assert not going.finished
    assert f"{going.name} ends" not in kit.record()
    kit.open(other)
    assert going.result()["status"] == "succeeded"
    assert going.outputs == 2


def test_an_unknown_prediction_cant_be_cancelled(kit: Kit) -> None:
    assert cancel(kit.server, "nobody") == 404


def test_all_may_be_cancelled_at_once(kit: Kit) -> None:
    gate = kit.gate()
    together = [kit.start(f"wait:{gate} pic").began() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda p: cancel(kit.server, p.name), together)) == [200] * 4
    for prediction in together:
        assert prediction.result()["status"] == "canceled"
        kit.wait_for(f"{prediction.name} ends")


@pytest.mark.parametrize("method", ["POST", "PUT", "POST SSE", "PUT SSE"])
def test_a_client_that_leaves_ends_its_prediction(method: str, kit: Kit) -> None:
    gate, name = kit.gate(), f"left{uuid.uuid4().hex[:8]}"
    kit.gates.add(gate)
    going = kit.start(f"wait:{gate} pic").began()
    headers = {"Content-Type": "application/json"} | ({"Accept": "text/event-stream"} if "SSE" in method else {})
    connection = http.client.HTTPConnection(HOST, kit.server.port, timeout=30)
    path = f"/predictions/{name}" if "PUT" in method else "/predictions"
    body = json.dumps({"input": {"prompt": f"{name} wait:{gate} pic"}})
    connection.request(method.split()[0], path, body, headers)
    kit.wait_for(f"{name} begins")
    if "SSE" in method:
        assert connection.getresponse().readline()
    connection.close()
    kit.wait_for(f"{name} ends")
    assert f"{going.name} ends" not in kit.record()
    kit.open(gate)
    assert going.result()["status"] == "succeeded"


# -------------------------------------------------------------------------------------------------- the limit


def test_one_more_than_there_are_slots_is_refused_until_one_is_free(kit: Kit) -> None:
    """coglet has no queue: it refuses with 409 what finds no free slot, and a client has to ask again."""
    gate = kit.gate()
    together = [kit.when_a_slot_is_free(f"wait:{gate} pic") for _ in range(SLOTS)]
    assert kit.server.get("/health-check")["status"] == "BUSY"
    with pytest.raises(Refused, match="409.*At capacity"):
        kit.start("pic").began()
    assert cancel(kit.server, together[0].name) == 200
    assert together[0].result()["status"] == "canceled"
    assert kit.when_a_slot_is_free("pic").result()["status"] == "succeeded"
    kit.open(gate)
    assert {prediction.result()["status"] for prediction in together[1:]} == {"succeeded"}


# ---------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("steps", "inputs", "words", "outputs"),
    [
        ("pic", {"task_type": "x2i"}, "InputError: task_type x2i needs 1 to 3 reference images", 0),
        ("pic fail", {}, "RuntimeError: the device is gone", 1),
        ("pic noise", {}, "can't be saved, free some space: File too large", 1),
    ],
    ids=["input", "decoding", "disk"],
)
def test_a_failure_harms_no_other_prediction(
    steps: str, inputs: dict[str, Any], words: str, outputs: int, kit: Kit
) -> None:
    gate = kit.gate()
    going = [kit.start(f"pic wait:{gate} pic").has(outputs=1) for _ in range(2)]
    failing = kit.start(steps, **inputs)
    result = failing.result()
    assert (result["status"], failing.outputs) == ("failed", outputs)
    assert words in result["error"]
    assert "\n" not in result["error"]
    if steps != "pic":
        kit.wait_for(f"{failing.name} ends")
    kit.open(gate)
    for prediction in going:
        assert prediction.result()["status"] == "succeeded"
        assert prediction.outputs == 2


# --------------------------------------------------------------------------------------------- the real pipeline


def test_the_miniature_makes_side_by_side_what_it_makes_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight at once, of which one is cancelled half way: the other seven are bit-equal to themselves alone."""
    inputs = {"prompt": "a red circle", "aspect_ratio": "custom", "width": 160, "height": 160}

    def pictures(prediction: Prediction) -> list[str]:
        result = prediction.result()
        assert result["status"] == "succeeded", result.get("error")
        assert prediction.progress()[-1] == 100
        assert f"seed {prediction.inputs['seed']}," in result["logs"]
        assert result["metrics"]["seed"] == prediction.inputs["seed"]
        return [data["chunk"] for name, data in prediction.events if name == "output"]

    monkeypatch.setenv("EMU_CHECKPOINT", "mini")
    monkeypatch.setenv("EMU_DEVICE", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with Server(concurrency=8, predictor=PREDICTOR) as server:
        alone = [pictures(Prediction(server, inputs | {"seed": seed})) for seed in range(2)]
        victim = Prediction(server, inputs | {"seed": 9}).began()
        together = [Prediction(server, inputs | {"seed": seed % 2}) for seed in range(7)]
        for prediction in together:
            prediction.began()
        cancel(server, victim.name)
        assert victim.result()["status"] == "canceled"
        assert [pictures(prediction) for prediction in together] == [alone[seed % 2] for seed in range(7)]


# ------------------------------------------------------------------------------- without a server: emu_cog.serving


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own, as coglet has."""
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever)
    thread.start()
    yield made
    made.call_soon_threadsafe(made.stop)
    thread.join()
    made.close()


def test_a_cancel_is_received_after_the_coroutine_has_returned(loop: asyncio.AbstractEventLoop) -> None:
    called: list[int] = []

    async def predict() -> bool:
        return serving.call_on_cancel(lambda: called.append(1))

    future = asyncio.run_coroutine_threadsafe(predict(), loop)
    assert future.result()
    assert not called
    assert future.cancel() is False
    assert called == [1]


def test_files_are_delivered_where_a_cancel_cant_be_received(
    loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    """What `call_on_cancel` reads is private: another version of Cog or Python may not have it."""
    serving._warn_once.cache_clear()
    name: ContextVar[str] = ContextVar("name")

    def files() -> serving.Files:
        yield Path(name.get())
        yield Path("second")

    async def predict() -> serving.Files:
        name.set("first")
        return serving.stream(files(), threading.Event())

    async def one_more_task() -> serving.Files:  # nothing links this task to a concurrent.futures.Future
        return await asyncio.ensure_future(predict())

    for _ in range(2):
        made = asyncio.run_coroutine_threadsafe(one_more_task(), loop).result()
        assert list(made) == [Path("first"), Path("second")]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


# ------------------------------------------------------------------------------- without a server: emu_cog.service


class Canned:
    """A backend that waits for `gate` between two pictures and never fails."""

    def __init__(self) -> None:
        self.begun, self.gate = threading.Semaphore(0), threading.Event()
        self.active = self.most = 0

    def warm_up(self) -> None: ...

    def stream(self, request: Request, *, on_progress: Callable[[Progress], None] | None = None) -> Iterator[Event]:
        self.active += 1
        self.most = max(self.most, self.active)
        try:
            yield picture(1, noise=False)
            self.begun.release()
            assert self.gate.wait(30)
            yield picture(2, noise=False)
            yield RunStats(seed=0)
        finally:
            self.active -= 1


def run(service: Service, cancelled: threading.Event | None = None) -> list[Path]:
    return list(
        service.run(
            references={},
            record_metric=lambda *_: None,
            cancelled=cancelled,
            prompt="a fox",
            output_format="png",
            output_quality=90,
        )
    )


def test_requests_of_one_moment_have_folders_of_their_own_that_are_not_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A prediction of more than an hour lost its folder to the next one's sweep; two sweeps of one folder warned."""
    backend = Canned()
    service = Service(backend, root=tmp_path)
    log.propagate = True
    for number in range(20):
        old = tmp_path / f"prediction-old{number}"
        old.mkdir()
        os.utime(old, (1, 1))
    with ThreadPoolExecutor(8) as pool:
        first = [pool.submit(run, service) for _ in range(7)]
        for _ in first:
            assert backend.begun.acquire(timeout=30)
        folders = [path for path in tmp_path.iterdir() if "old" not in path.name]
        assert len(folders) == 7
        for path in folders:
            os.utime(path, (1, 1))
        last = pool.submit(run, service)
        assert backend.begun.acquire(timeout=30)
        backend.gate.set()
        made = [file for future in [*first, last] for file in future.result()]
    assert len({file.name for file in made}) == len(made) == 16
    assert all(file.exists() for file in made)
    assert not list(tmp_path.glob("prediction-old*"))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    os.utime(made[0].parent, (1, 1))
    run(service)
    assert not made[0].parent.exists()  # no longer in use


def test_a_folder_that_another_request_sweeps_is_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def swept(path: Path) -> None:
        raise FileNotFoundError(path)

    (tmp_path / "prediction-old").mkdir()
    os.utime(tmp_path / "prediction-old", (1, 1))
    monkeypatch.setattr(module.shutil, "rmtree", swept)
    module._sweep(tmp_path, keep=())
    assert not caplog.records


def test_a_backend_that_serves_one_makes_the_others_wait(tmp_path: Path) -> None:
    inner = Canned()
    service = Service(OneAtATime(inner), root=tmp_path)
    give_up = threading.Event()
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(run, service, give_up) for _ in range(3)]
        assert inner.begun.acquire(timeout=30)
        inner.gate.set()
        try:
            assert [len(future.result(30)) for future in futures] == [2, 2, 2]
        finally:
            give_up.set()
    assert inner.most == 1


def test_the_upstream_backend_serves_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "BACKENDS", {"native": lambda _: Canned(), "upstream": lambda _: Canned()})
    kinds = [type(Service.from_settings(Settings(backend=name)).pipeline) for name in ("native", "upstream")]
    assert kinds == [Canned, OneAtATime]


def test_a_waiting_request_can_be_cancelled(tmp_path: Path) -> None:
    inner = Canned()
    service = Service(OneAtATime(inner), root=tmp_path)
    cancelled = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        going = pool.submit(run, service)
        assert inner.begun.acquire(timeout=30)
        waiting = pool.submit(run, service, cancelled)
        cancelled.set()
        assert isinstance(waiting.exception(30), asyncio.CancelledError)
        assert not going.done()
        inner.gate.set()
        assert len(going.result()) == 2


class Terminal:
    """Standard error of a person who looks."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, text: str) -> int:
        self.written.append(text)
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


def test_a_terminal_has_one_moving_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars side by side write cursor movements into each other."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    module.log_to_stderr()
    handlers = log.handlers
    with module._Bar() as first:
        first.show(Progress(0.25))
        with module._Bar() as second:
            second.show(Progress(0.5))
        first.show(Progress(0.75))
    text = "".join(terminal.written)
    assert "\x1b[A" not in text
    assert re.search(r"\r 50%\|[^\r\n]*\n", text)  # a line of its own; the moving bar comes again below it
    assert log.handlers is handlers
    with module._Bar() as third:
        assert third._moving is not None


# --------------------------------------------------------------------------------------------------- the scripts


def given_to_the_server(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The keyword arguments of the Server that a script would start."""
    loader = SourceFileLoader(f"scripts_{name}", str(ROOT / "scripts" / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    script = importlib.util.module_from_spec(spec)
    loader.exec_module(script)
    given: list[dict[str, Any]] = []

    def server(**keywords: Any) -> Server:
        given.append(keywords)
        raise ServerError("not started")

    monkeypatch.setattr(script, "Server", server)
    monkeypatch.setattr(script._signals, "raise_stopped", lambda: None)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    assert script.main() == 1
    return given[0]


@pytest.mark.parametrize(("arguments", "expected"), [([], SLOTS), (["--concurrency=3"], 3)])
def test_serve_serves_as_many_as_the_hosted_model(
    arguments: list[str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second request was refused with 409 while the first ran."""
    assert given_to_the_server("serve", *arguments, monkeypatch=monkeypatch)["concurrency"] == expected


def test_predict_stays_single(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert given_to_the_server("predict", "-i", "prompt=x", monkeypatch=monkeypatch) == {}
    assert Server().concurrency == 1


def test_serve_says_how_many_slots_are_lost_and_ends_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """One lost slot of eight ended the server in mid-prediction for all others, with words about its only slot."""
    server = Server(concurrency=2)
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        server._slots_lost = 2

    server._slots_lost = 1
    monkeypatch.setattr(_server._stdio, "note", note)
    monkeypatch.setattr(server, "_has_worker", lambda: True)
    monkeypatch.setattr(server, "_health", lambda: {"status": "READY"})
    server._process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        with pytest.raises(ServerError, match="has lost all its slots for predictions"):
            server.watch(interval=0.01)
    finally:
        server._kill()
    [text] = notes
    assert "lost 1 of its 2 slots" in text


@pytest.mark.parametrize("number", ["0", "65", "-1", "two", "1.5", "²"])
def test_numbers_at_once_that_are_none(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "serve"), f"--concurrency={number}"],
        env=os.environ | {"EMU_VENV": "none"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "give a number from 1 to 64" in done.stderr
