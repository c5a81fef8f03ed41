"""scripts/predict and scripts/serve as a person runs them: inputs, names, files, exit codes, signals, dead servers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import _inputs
import _openapi
import _outputs
import _server
import _signals
import psutil
import pytest
from _inputs import UsageError
from _models import tiny
from _server import PREDICTOR, Server, ServerError
from PIL import Image

from tests.cog_kit import data_url, serving, settings
from tests.conftest import ROOT, photo

FIELDS = _openapi.inputs(PREDICTOR)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tiny.TinyFolders:
    return tiny.make_tiny(
        tmp_path_factory.mktemp("scripts"),
        seed=7,
        logit_bias=tiny.STORYTELLER,
        defaults=tiny.small_defaults(),
        context=16384,
    )


@pytest.fixture(scope="module")
def environment(folders: tiny.TinyFolders) -> dict[str, str]:
    return os.environ | settings(folders) | {"EMU_VENV": "none"}


@pytest.fixture
def server(shared_server: Server) -> Server:
    """The shared server once its slot is free, which is shortly after the last answer."""
    shared_server._settle()
    return shared_server


@pytest.fixture(scope="module")
def shared_server(folders: tiny.TinyFolders) -> Iterator[Server]:
    with serving(folders) as running:
        yield running


@pytest.fixture(scope="module")
def script_module() -> ModuleType:
    """scripts/predict as a module, to run against the shared server."""
    loader = SourceFileLoader("scripts_predict", str(ROOT / "scripts" / "predict"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / name), *arguments]


def predict(
    folder: Path, environment: dict[str, str], *arguments: str, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    command = script("predict", *arguments)
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, input=stdin, check=False, timeout=120
    )


def no_server(environment: dict[str, str]) -> dict[str, str]:
    """A checkpoint that does not exist: a script that starts its server all the same fails over another thing."""
    return environment | {"EMU_CHECKPOINT": "/nonexistent"}


def read(*flags: str, as_json: str | None = None) -> dict[str, Any]:
    return _inputs.read(list(flags), as_json, FIELDS)


# ---------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["promt=x"], "there is no input 'promt', the inputs are prompt, task_type"),
        (["promt=x"], "did you mean prompt?"),
        (["prompt"], "must be NAME=VALUE"),
        (["task_type=story"], "the input prompt is missing"),
        (["prompt=x", "aspect_ratio=16x9"], "accepted are auto, model, 1:1"),
        (["prompt=x", "aspect_ratio=16x9"], "did you mean 16:9?"),
        (["prompt=x", "num_outputs=5"], "num_outputs=5 is out of range: it must be a whole number from 1 to 4"),
        (["prompt=x", "num_outputs=two"], "num_outputs='two' is not accepted: it must be a whole number from 1 to 4"),
        (["prompt=x", "num_outputs=1.5"], "num_outputs=1.5 is out of range"),
        (["prompt=x", f"seed={'9' * 5000}"], "seed="),
        (["prompt=x", "guidance_scale=nan"], "guidance_scale=nan is not accepted"),
        (["prompt=x", "guidance_scale=1e999"], "guidance_scale=inf is not accepted"),
        (["prompt=x", "prompt=y"], "the input prompt is given 2 times"),
        (["prompt=caf\udce9"], "prompt has the byte 0xE9 in it, which is not UTF-8 text"),
        # what needs several inputs: the package's own sentences
        (["prompt= "], "prompt is blank"),
        (["prompt=x", "task_type=x2i"], "needs 1 to 3 reference images"),
        (["prompt=x", "reference_image=https://host/a.png"], "t2i makes a picture from words alone"),
        (["prompt=x", "width=160", "height=160"], "go with aspect_ratio custom only"),
        (["prompt=x", "seed=-1"], "seed=-1 is out of range"),
        # files
        (["prompt=x", "reference_image=@nowhere.jpg"], "nowhere.jpg can't be read: No such file"),
        (["prompt=x", "reference_image=@."], "is a folder"),
        (["prompt=x", "reference_image=photo.jpg"], "for a file write reference_image=@photo.jpg"),
        (["prompt=x", "reference_image=@/dev/null"], "t2i makes a picture"),
        (["prompt=@nowhere.txt"], "nowhere.txt can't be read"),
    ],
)
def test_inputs_that_are_refused_in_one_sentence(flags: list[str], words: str) -> None:
    """All of these were found by the server only after the model was loaded, or shown as a traceback."""
    with pytest.raises(UsageError) as caught:
        read(*flags)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "must be an object of names and values"),
        ('"x"', "must be an object of names and values"),
        ('{"prompt":', "is not valid JSON: Expecting value at line 1, column 11"),
        ('{"prompt": "x", "seed": NaN}', "NaN is not a number in JSON"),
        (" ", "--json ' ' is empty"),
        ('{"prompt": null}', "the input prompt is missing"),
        ('{"prompt": 5}', "prompt=5 is not accepted: it must be text"),
        ('{"prompt": "x", "resolution": 1024}', 'write it as text, "1024"'),
        ('{"prompt": "x", "num_outputs": "2"}', "num_outputs='2' is not accepted"),
        ('{"prompt": "x", "num_outputs": true}', "num_outputs=True is not accepted"),
        ('{"prompt": "\\ud800"}', "half a character"),
        ("[" * 100_000, "can't be used"),
        ("@nowhere.json", "can't be read: No such file"),
    ],
)
def test_json_that_is_refused_in_one_sentence(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(as_json=text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_json_files_as_other_systems_write_them(encoding: str, tmp_path: Path) -> None:
    """A byte-order mark or UTF-16, as PowerShell's `>` writes it, was refused with a codec's message."""
    (tmp_path / "inputs.json").write_bytes('{"prompt": "ein rotes Boot für 2 €"}'.encode(encoding))
    assert read(as_json=f"@{tmp_path / 'inputs.json'}") == {"prompt": "ein rotes Boot für 2 €"}


def test_json_in_no_known_encoding(tmp_path: Path) -> None:
    (tmp_path / "inputs.json").write_bytes('{"prompt": "café"}'.encode("latin-1"))
    with pytest.raises(UsageError, match="is not text in UTF-8 or UTF-16"):
        read(as_json=f"@{tmp_path / 'inputs.json'}")


def test_null_means_not_given() -> None:
    """The server answers an explicit null with 422."""
    assert read(as_json='{"prompt": "x", "seed": null, "task_type": null}') == {"prompt": "x"}


def test_numbers_and_quotes() -> None:
    made = read('prompt="a boat"', "seed=7", "guidance_scale=2", "num_outputs=2.0")
    assert made == {"prompt": "a boat", "seed": 7, "guidance_scale": 2.0, "num_outputs": 2}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a boat\n", "a boat"),
        (b"\xef\xbb\xbfa boat\r\n", "a boat"),
        (b"two\n\n", "two\n"),
        ("für".encode("utf-16"), "für"),
    ],
)
def test_a_text_input_reads_the_text_of_its_file(data: bytes, text: str, tmp_path: Path) -> None:
    """The base64 of the file was the prompt, and a nonsense picture was made."""
    (tmp_path / "prompt.txt").write_bytes(data)
    assert read(f"prompt=@{tmp_path / 'prompt.txt'}")["prompt"] == text
    assert read(as_json=json.dumps({"prompt": f"@{tmp_path / 'prompt.txt'}"}))["prompt"] == text


def test_a_number_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "seed").write_text("7\n")
    assert read("prompt=x", f"seed=@{tmp_path / 'seed'}")["seed"] == 7


@pytest.mark.parametrize("data", [b"caf\xe9", b"\x89PNG\r\n\0\0", b"a\0b"])
def test_a_text_file_that_holds_no_text(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(data)
    with pytest.raises(UsageError, match="is not a text file in UTF-8"):
        read(f"prompt=@{tmp_path / 'prompt.txt'}")


def test_a_photo_becomes_a_data_url(tmp_path: Path) -> None:
    photo(1).save(tmp_path / "photo.webp")
    made = read("prompt=x", "task_type=x2i", f"reference_image=@{tmp_path / 'photo.webp'}")
    assert made["reference_image"] == data_url((tmp_path / "photo.webp").read_bytes(), "image/webp")


def test_files_beyond_the_servers_limit_are_refused_by_their_size(tmp_path: Path) -> None:
    """A TIFF of 144 MB ended in a traceback, after the model was loaded."""
    for name, size in (("big.tif", 144_000_000), ("half.tif", 45_000_000)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
    with pytest.raises(UsageError, match="has 144 MB, Cog's server takes at most 79 MB"):
        read("prompt=x", "task_type=x2i", f"reference_image=@{tmp_path / 'big.tif'}")
    half = f"@{tmp_path / 'half.tif'}"
    with pytest.raises(UsageError, match="the files together have 90 MB"):
        read("prompt=x", "task_type=x2i", f"reference_image={half}", f"reference_image_2={half}")


# ----------------------------------------------------------------------------------------------------------- names


def plan(wanted: str | None, *, as_json: bool = False, **inputs: Any) -> _outputs.Target:
    return _outputs.plan(wanted, inputs, as_json=as_json)[0]


@pytest.mark.parametrize(
    ("wanted", "mime", "name"),
    [
        (None, "image/png", "output.1.png"),
        ("x.png", "image/png", "x.1.png"),
        ("x.jpeg", "image/jpeg", "x.1.jpeg"),
        ("x", "image/webp", "x.1.webp"),
        ("heart-v1.2", "image/png", "heart-v1.1.2.png"),  # an ending in digits is none, as in Cog
        ("a.b", "image/png", "a.1.b"),  # an ending that Cog keeps and nobody knows
        (".hidden", "image/png", ".hidden.1.png"),
        ("story.png", "text/plain", "story.1.txt"),  # Cog would put the text into a .png
        ("story.png", "text/html", "story.1.html"),
    ],
)
def test_names_follow_cogs_rule(
    wanted: str | None, mime: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """heart-v1.2 made heart-v1.0.2, which no viewer opens."""
    monkeypatch.chdir(tmp_path)
    task = "story" if mime.startswith("text/") else "t2i"
    made = plan(wanted, task_type=task, output_format=mime.split("/")[1] if mime.startswith("image/") else "png")
    assert made.file(1, mime).name == name


def test_names_beside_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target, file = _outputs.plan("x.json", {}, as_json=True)
    assert (target.file(0, "image/png").name, file) == ("x.0.png", Path("x.json"))
    for wanted in (None, "-", "/dev/stdout"):
        target, file = _outputs.plan(wanted, {}, as_json=True)
        assert (target.file(0, "image/png").name, file) == ("output.0.png", None)


@pytest.mark.parametrize(
    ("wanted", "inputs", "words"),
    [
        ("a.png", {"output_format": "webp"}, "the output is .webp, not .png: give the name another ending"),
        ("a.html", {}, "the output is .png, not .html"),
        ("a.gif", {"task_type": "story"}, "the output is .png, .txt, .html, not .gif"),
        ("-", {}, "files can't go to standard output"),
        ("/dev/null", {}, "is a device or a pipe"),
        ("no/such/folder/x.png", {}, "not a folder that can be written to"),
        ("folder/", {}, "is no folder: make it first"),
        ("a" * 255, {}, "the file system takes 255"),
        ("a" * 300, {}, "File name too long"),
        ("taken.png", {"num_outputs": 2}, "taken.1.png, the name of an output, is a folder"),
        (None, {}, "output is a folder: name the output with -o"),
    ],
)
def test_names_that_are_refused_before_anything_is_computed(
    wanted: str | None, inputs: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.1.png").mkdir()
    (tmp_path / "output").mkdir()
    with pytest.raises(UsageError) as caught:
        plan(wanted, **inputs)
    assert words in str(caught.value)


def test_a_name_that_is_a_folder_gets_the_files(tmp_path: Path) -> None:
    assert plan(str(tmp_path)).file(0, "image/png") == tmp_path / "output.0.png"


def test_a_full_disk_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.open", raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UsageError, match="can't be saved in .*: No space left on device"):
        plan(str(tmp_path / "x.png"))


def raising(error: Exception) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_a_file_is_put_in_place_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a PNG stayed where the disk was full."""
    path = tmp_path / "x.png"
    _outputs.put(path, b"old")
    monkeypatch.setattr(os, "replace", raising(OSError(errno.EDQUOT, "Disk quota exceeded")))
    with pytest.raises(_outputs.SaveError, match="x.png .* can't be saved: Disk quota exceeded"):
        _outputs.put(path, b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]
    monkeypatch.undo()
    _outputs.put(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ------------------------------------------------------------------------------------- before the server is started


def test_a_taken_port_is_refused() -> None:
    """serve announced whatever answered there, Cog or not, as its own server."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} is taken by another program"):
            Server(port=port).__enter__()


def test_a_server_that_answers_in_the_childs_place_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The port may be taken between the check and the child's own try."""
    server = Server()
    monkeypatch.setattr(server, "_health", lambda: {"status": "READY"})
    server._process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        with pytest.raises(ServerError, match="taken by another program"):
            server._wait()
    finally:
        server._kill()


@pytest.mark.parametrize("port", ["99999", "abc", "0", "-1", "²"])
def test_ports_that_are_none(port: str, environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(script("serve", f"--port={port}"), env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "give a number from 1 to 65535" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.ENOSPC, "full")])
def test_a_coglet_folder_that_cant_be_written_is_found_first(
    error: OSError, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """coglet loses its slot over it: every prediction of a second user on the machine failed, and 409 for ever."""
    monkeypatch.setattr(_server, "COGLET_FOLDER", tmp_path)
    monkeypatch.setattr(Path, "mkdir", raising(error))
    with pytest.raises(ServerError, match=f"needs to write to .* which fails: {error.strerror}"):
        Server().__enter__()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a link another user's")
def test_a_strangers_link_in_place_of_coglets_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "coglet").symlink_to(tmp_path / "theirs")
    os.lchown(tmp_path / "coglet", 54321, -1)
    monkeypatch.setattr(_server, "COGLET_FOLDER", tmp_path / "coglet")
    with pytest.raises(ServerError, match="is a link that another user made"):
        _server._check_coglet_folder()
    assert not list((tmp_path / "theirs").iterdir())


def test_a_checkout_that_cant_be_written_keeps_its_schema_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A checkout that root had installed ended in a traceback about .cog."""
    server, write = Server(), _openapi.write

    def refuse_the_checkout(predictor: Path, target: Path) -> None:
        if target.is_relative_to(ROOT):
            raise PermissionError(errno.EACCES, "Permission denied")
        write(predictor, target)

    monkeypatch.setattr(_openapi, "is_current", lambda *_: False)
    monkeypatch.setattr(_openapi, "write", refuse_the_checkout)
    monkeypatch.setenv("EMU_CHECKPOINT", "tests/golden")
    folder = server._folder()
    assert json.loads((folder / ".cog" / "openapi_schema.json").read_text())["openapi"]
    made = _server._environment(folder)
    assert made["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert made["EMU_CHECKPOINT"] == str(ROOT / "tests/golden")
    server.__exit__()
    assert not folder.exists()
    monkeypatch.setattr(_openapi, "write", raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(ServerError, match="set TMPDIR to a folder that you can write to"):
        server._folder()


def test_a_current_schema_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    _openapi.write(PREDICTOR, ROOT / ".cog" / "openapi_schema.json")
    monkeypatch.setattr(_openapi, "write", raising(OSError(errno.EROFS, "Read-only file system")))
    assert Server()._folder() == ROOT


def test_the_worker_gets_our_python_where_none_is_called_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With EMU_VENV=none and only `python3` at hand the server said "failed to spawn worker"."""
    (tmp_path / "python3").symlink_to(sys.executable)
    real = sys.executable
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    server = Server()
    folder = server._wrapped_python()
    assert folder is not None
    monkeypatch.setenv("PYTHONHOME", sys.base_prefix)  # a bare link to Python doesn't find its library
    done = subprocess.run([f"{folder}/python", "-c", "print(1 + 1)"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2\n")
    server.__exit__()
    assert not Path(folder).exists()
    (tmp_path / "python").symlink_to(real)
    assert Server()._wrapped_python() is None


def test_an_environment_that_cant_be_made(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    venv = {"EMU_VENV": str(tmp_path / "file" / "venv")}
    done = predict(tmp_path, environment | venv, "-i", "prompt=x")
    assert done.returncode == 1
    assert "set EMU_VENV to a folder that you can write to" in done.stderr
    assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(closed: str, environment: dict[str, str], tmp_path: Path) -> None:
    """With 2>&- the worker crashed: its sockets had got the number of standard error."""
    code = "import sys, _stdio; _stdio.ensure_open(); _stdio.note('x'); f = open('f', 'w'); print(f.fileno(), file=f)"
    command = f'{sys.executable} -c "{code}" {closed}'
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT / "scripts")})
    assert done.returncode == 0
    assert int((tmp_path / "f").read_text()) > 2


def test_a_reader_that_leaves_is_no_error(environment: dict[str, str]) -> None:
    code = 'import _stdio\nfor _ in range(100_000): _stdio.note("note"); _stdio.result("result")'
    command = f"{sys.executable} -c '{code}' 2>&1 | head -1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], env=environment | {"PYTHONPATH": str(ROOT / "scripts")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "note\n", "")


def test_the_relay_finds_a_lost_slot_and_survives_a_closed_standard_error() -> None:
    lines = b"x" * 70_000 + _server._SLOT_LOST
    server = Server()
    code = f"import os; os.write(1, {lines!r})"
    server._process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    stderr = os.dup(2)
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 2)
    try:
        server._pass_on()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(writing)
        server._kill()
        server._process.stdout.close()  # type: ignore[union-attr]
    assert server._slots_lost == 1


# --------------------------------------------------------------------------------------------------------- signals


def test_ctrl_c_while_the_environment_is_made_prints_no_traceback(environment: dict[str, str], tmp_path: Path) -> None:
    with open(tmp_path / "venv.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = environment | {"EMU_VENV": str(tmp_path / "venv")}
        process = subprocess.Popen(script("predict"), env=waiting, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        assert "another script is making" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == -signal.SIGINT  # a shell shows 130
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    "sign",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_during_setup_takes_the_server_along(
    sign: signal.Signals, environment: dict[str, str], tmp_path: Path
) -> None:
    """After SIGTERM or SIGHUP the server stayed for up to 21 seconds."""
    process = subprocess.Popen(
        script("predict", "-i", "prompt=x"), cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    parent = psutil.Process(process.pid)
    while not (children := parent.children(recursive=True)):
        assert process.poll() is None
    process.send_signal(sign)
    assert process.wait(20) == 128 + sign
    _, alive = psutil.wait_procs(children, timeout=1)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    assert process.stderr is not None
    assert process.stderr.read().splitlines()[-1] == "stopped"


def test_the_first_signal_calls_the_next_one_ends() -> None:
    former = {number: signal.getsignal(number) for number in _signals.ALL}
    calls: list[int] = []
    try:
        _signals.raise_stopped()
        with _signals.first_calls(lambda: calls.append(1)) as arrived:
            signal.raise_signal(signal.SIGTERM)
            assert (calls, arrived) == ([1], [signal.SIGTERM])
            with pytest.raises(_signals.Stopped) as caught:
                signal.raise_signal(signal.SIGINT)
        assert caught.value.code == 130
        with pytest.raises(_signals.Stopped):
            signal.raise_signal(signal.SIGHUP)
        assert _signals.exit_code(lambda: signal.raise_signal(signal.SIGTERM)) == 143  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGINT)  # too late to matter
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------- with a real server


def test_words_to_a_file(tmp_path: Path, environment: dict[str, str]) -> None:
    done = predict(tmp_path, environment, "-i", "prompt=a red boat", "-i", "seed=3", "-i", "num_outputs=2")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["output.0.png", "output.1.png"]
    assert Image.open(tmp_path / "output.0.png").size == (160, 160)
    assert "seed 3" in done.stderr
    assert "100/100 [" in done.stderr  # the progress
    assert done.stdout == ""


def test_a_photo_and_a_name(server: Server, script_module: ModuleType, tmp_path: Path) -> None:
    photo(1).save(tmp_path / "photo.jpg")
    inputs = read(
        "task_type=x2i", "prompt=make it winter", "output_format=webp", f"reference_image=@{tmp_path / 'photo.jpg'}"
    )
    _, code = script_module.predict(server, inputs, plan(str(tmp_path / "winter.webp"), **inputs))
    assert code == 0
    assert Image.open(tmp_path / "winter.0.webp").format == "WEBP"


def test_a_sequence(server: Server, script_module: ModuleType, tmp_path: Path) -> None:
    inputs = read(as_json='{"prompt": "a fox", "task_type": "story", "seed": 16, "max_new_tokens": 512}')
    result, code = script_module.predict(server, inputs, plan(str(tmp_path / "story.png"), **inputs))
    assert code == 0
    assert result["status"] == "succeeded"
    assert result["metrics"]["seed"] == 16
    kinds = [Path(name).suffix for name in result["output"]]
    assert kinds[-1] == ".html"
    assert {".txt", ".png"} <= set(kinds)
    assert sorted(map(str, tmp_path.iterdir())) == sorted(result["output"])


def test_a_disk_that_fills_up_names_the_files_saved(
    server: Server, script_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = _outputs.put

    def full(path: Path, data: bytes) -> None:
        if ".1." in path.name:
            raise _outputs.SaveError(f"{path} can't be saved: No space left on device")
        put(path, data)

    monkeypatch.setattr(_outputs, "put", full)
    inputs = read("prompt=x", "num_outputs=2")
    with pytest.raises(_outputs.SaveError, match=r"x\.1\.png can't be saved.*; saved before it: .*x\.0\.png"):
        script_module.predict(server, inputs, plan(str(tmp_path / "x.png"), **inputs))


def test_a_failed_prediction_is_one_sentence(
    server: Server, script_module: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    while server.get("/health-check")["status"] != "READY":
        pass
    inputs = {"prompt": "many words " * 20000}
    result, code = script_module.predict(server, inputs, plan(str(tmp_path / "x.png")))
    assert (code, result["output"]) == (1, [])
    assert "error: prediction failed: the prompt with its 0 reference image(s)" in capfd.readouterr().err


def test_a_wrong_command_starts_no_server(tmp_path: Path, environment: dict[str, str]) -> None:
    """-i aspect_ratio=16x9 took 11 seconds, and would have loaded 68 GB first."""
    done = predict(tmp_path, no_server(environment), "-i", "prompt=x", "-i", "aspect_ratio=16x9")
    assert done.returncode == 1
    assert done.stderr.startswith("error: aspect_ratio='16x9' is not known")
    assert done.stderr.count("\n") == 1


def test_bytes_that_are_no_utf8_in_an_argument(tmp_path: Path, environment: dict[str, str]) -> None:
    command = [os.fsencode(part) for part in script("predict", "-i")] + [b"prompt=caf\xe9"]
    done = subprocess.run(command, cwd=tmp_path, env=no_server(environment), capture_output=True)
    assert done.returncode == 1
    assert done.stderr == b"error: prompt has the byte 0xE9 in it, which is not UTF-8 text: give it as UTF-8\n"


@pytest.mark.slow
def test_a_prediction_as_json(tmp_path: Path, environment: dict[str, str]) -> None:
    given = json.dumps({"prompt": "a fox", "seed": 16})
    done = predict(tmp_path, environment, "--json", "@-", stdin=given)
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    assert (made["status"], made["metrics"]["seed"], made["output"]) == ("succeeded", 16, ["output.0.png"])


@pytest.mark.slow
def test_a_broken_checkpoint_is_reported(tmp_path: Path, environment: dict[str, str]) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    done = predict(tmp_path, environment | {"EMU_CHECKPOINT": str(broken)}, "-i", "prompt=x")
    assert done.returncode == 1
    assert "emu3.tiktoken is missing" in done.stderr
    assert "slot" not in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_the_prediction(sign: signal.Signals, tmp_path: Path, environment: dict[str, str]) -> None:
    process = running_prediction(tmp_path, environment)
    process.send_signal(sign)
    assert process.stderr is not None
    rest = process.stderr.read()
    assert process.wait(20) == 128 + sign
    assert "cancelling" in rest
    assert "prediction canceled" in rest
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["server", "worker"])
def test_a_server_killed_during_a_prediction_is_reported(
    victim: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    process = running_prediction(tmp_path, environment)
    family = children(process)
    os.kill(family[victim].pid, signal.SIGKILL)
    assert process.stderr is not None
    rest = process.stderr.read()
    assert process.wait(30) == 1
    assert "Traceback" not in rest
    assert [line for line in rest.splitlines() if line.startswith("error: prediction failed: ")]


def running_prediction(folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """scripts/predict while it makes a picture that takes seconds."""
    command = script("predict", "-i", "prompt=x", "-i", "aspect_ratio=custom", "-i", "width=1584", "-i", "height=1584")
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "%|" in line:
            return process
    pytest.fail("no row was made")


def children(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    [server] = psutil.Process(process.pid).children()
    [worker] = server.children()
    return {"server": server, "worker": worker}


# ----------------------------------------------------------------------------------------------------------- serve


@contextlib.contextmanager
def serve(environment: dict[str, str], *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """scripts/serve and its address; what it writes to standard error goes to `process.errors`."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            script("serve", *arguments), env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )  # fmt: skip
        process.errors = errors  # type: ignore[attr-defined]
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()
            process.wait()


def ending(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and last line."""
    code = process.wait(30)
    process.errors.seek(0)  # type: ignore[attr-defined]
    return code, process.errors.read().splitlines()[-1]  # type: ignore[attr-defined]


def test_serve_ends_when_its_slot_is_lost(environment: dict[str, str]) -> None:
    """A prediction id of 300 characters took the only slot for good: 409 for ever, and serve stayed up silently."""
    with serve(environment, "--concurrency=1") as (process, address):
        with urllib.request.urlopen(f"{address}/health-check") as answer:
            assert json.load(answer)["status"] == "READY"
        request = urllib.request.Request(
            f"{address}/predictions/{'a' * 300}", b'{"input": {"prompt": "x"}}', {"Content-Type": "application/json"},
            method="PUT",
        )  # fmt: skip
        with contextlib.suppress(OSError):
            urllib.request.urlopen(request).close()
        code, last = ending(process)
    assert code == 1
    assert last.startswith("error: the server has lost its only slot for predictions")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "words"),
    [("server", "error: the server was killed by SIGKILL"), ("worker", "error: the model's process has ended")],
)
def test_serve_ends_with_its_server_and_its_worker(victim: str, words: str, environment: dict[str, str]) -> None:
    """kill -9 of either left serve up, silently."""
    with serve(environment) as (process, _):
        family = children(process)
        family[victim].kill()
        code, last = ending(process)
        _, alive = psutil.wait_procs(family.values(), timeout=5)
    assert code == 1
    assert last.startswith(words)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_serve_is_stopped_by_a_signal(sign: signal.Signals, code: int, environment: dict[str, str]) -> None:
    with serve(environment) as (process, _):
        family = children(process)
        process.send_signal(sign)
        assert process.wait(20) == code
        _, alive = psutil.wait_procs(family.values(), timeout=5)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_serve_ends_with_a_shutdown(environment: dict[str, str]) -> None:
    with serve(environment) as (process, address):
        urllib.request.urlopen(f"{address}/shutdown", b"").close()
        assert ending(process) == (0, "the server was shut down")
