"""Processes that are really killed, with and without a pget, and processes that really run at once."""

from __future__ import annotations

import functools
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hub_server import Fault, HubServer
from weights_kit import (
    HASTY,
    HEADERS,
    IMAGE,
    TAR,
    VISION,
    assert_complete,
    assert_whole,
    body,
    parts,
    settings,
    start,
    tar_of,
    total,
)

from emu_cog.errors import CheckpointError
from emu_cog.settings import Settings
from emu_cog.weights.checkpoint import PARTS
from emu_cog.weights.manifest import MANIFEST_FILE, write_manifest
from emu_cog.weights.pget import program
from emu_cog.weights.staging import Staging
from emu_cog.weights.store import Checkpoint, resolve

TOTAL = total()
LATER = functools.partial(pytest.param, marks=pytest.mark.slow)
PGET = """#!{python}
# Stands in for Replicate's pget: `pget URL FOLDER -x`, strictly in the archive's order, and as slow as asked.
import os, sys, tarfile, time, urllib.request
url, folder, flag = sys.argv[1:]
assert flag == "-x" and not os.path.exists(folder), sys.argv
print("pget runs", os.getpid(), flush=True)
with urllib.request.urlopen(url) as answer, tarfile.open(fileobj=answer, mode="r|") as tar:
    for member in tar:
        path = os.path.join(folder, member.name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if {fail!r} and member.name.endswith({fail!r}):
            sys.exit("pget: gave up")
        with open(path, "wb", buffering=0) as file:
            source = tar.extractfile(member)
            while block := source.read(20_000):
                file.write(block)
                time.sleep({pause})
        if {hang!r} and member.name.endswith({hang!r}):
            time.sleep(600)
"""


def resolved(chosen: Settings) -> Checkpoint:
    return resolve(chosen, patience=HASTY)


def kill_when(hub: HubServer, child: subprocess.Popen[str], sent: int, *, delay: float = 0.0) -> None:
    """SIGKILL `child` once the server has sent that many bytes; returns when it is dead."""
    reached = threading.Event()
    hub.on_bytes = lambda sent_now: reached.set() if sent_now >= sent else None
    assert reached.wait(30), child.communicate(timeout=1)
    time.sleep(delay)
    child.kill()
    child.communicate()
    hub.on_bytes = lambda sent_now: None


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def staged(weights: Path) -> int:
    """Bytes that lie in staging folders, without the notes beside them."""
    root = weights / ".staging"
    folders = [p for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
    return sum(p.stat().st_size for folder in folders for p in folder.rglob("*") if p.is_file())


def published(weights: Path) -> int:
    folders = [p for p in weights.iterdir() if p.is_dir() and not p.name.startswith(".")] if weights.is_dir() else []
    for folder in folders:  # whatever is in place is whole
        assert_whole(folder, IMAGE if folder.name.endswith("Image") else VISION)
    return sum(p.stat().st_size for folder in folders for p in folder.iterdir() if p.name != MANIFEST_FILE)


class TestKilled:
    @pytest.mark.parametrize("share", [LATER(0.03), 0.4, LATER(0.9)])
    @pytest.mark.parametrize("source", ["hub", "cdn"])
    def test_the_next_start_goes_on(self, hub: HubServer, tmp_path: Path, source: str, share: float) -> None:
        hub.rate = 3_000_000
        chosen = settings(hub, tmp_path / "w", source=source)
        child = start(chosen)
        kill_when(hub, child, int(TOTAL * share) + (HEADERS // 4 if source == "cdn" else 0))
        assert child.returncode == -signal.SIGKILL
        kept = staged(tmp_path / "w") + published(tmp_path / "w")
        assert kept > 0 or share < 0.1
        hub.seen.clear()
        hub.rate = None
        assert_complete(resolved(chosen))
        again = hub.sent() - hub.sent("/api/") if source == "hub" else hub.sent() - HEADERS
        assert again <= TOTAL - kept

    @pytest.mark.slow
    def test_several_times_in_a_row(self, hub: HubServer, tmp_path: Path) -> None:
        hub.rate = 3_000_000
        chosen = settings(hub, tmp_path / "w", source="hub")
        for _ in range(3):
            before = hub.sent()
            kill_when(hub, start(chosen), before + TOTAL // 5)
        hub.rate = None
        assert_complete(resolved(chosen))
        assert hub.sent() - hub.sent("/api/") < TOTAL + 3 * 400_000  # what is under way at each kill, at most

    def test_a_stream_keeps_its_whole_members(self, hub: HubServer, tmp_path: Path) -> None:
        hub.ranges = False
        hub.rate = 3_000_000
        chosen = settings(hub, tmp_path / "w", source="cdn")
        kill_when(hub, start(chosen), 1_300_000)
        shard = tmp_path / "w" / ".staging" / "Emu3.5-Image" / "model-00001-of-00003.safetensors"
        written = shard.stat()
        hub.rate = None
        assert_complete(resolved(chosen))
        now = (tmp_path / "w" / "Emu3.5-Image" / shard.name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)

    @pytest.mark.parametrize("delay", [LATER(0.0), LATER(0.01), 0.03, LATER(0.1), LATER(0.4)])
    def test_near_the_end(self, hub: HubServer, tmp_path: Path, delay: float) -> None:
        """After the last byte: while files are checked, the manifest is written, folders are renamed."""
        hub.rate = 3_000_000
        chosen = settings(hub, tmp_path / "w", source="hub")
        kill_when(hub, start(chosen), TOTAL + hub.sent("/api/"), delay=delay)
        published(tmp_path / "w")
        hub.seen.clear()
        hub.rate = None
        assert_complete(resolved(chosen))
        assert hub.sent() - hub.sent("/api/") < 500_000  # what had not been written yet

    @pytest.mark.parametrize("in_the_way", [False, True])
    def test_between_the_last_byte_and_the_rename(self, hub: HubServer, tmp_path: Path, in_the_way: bool) -> None:
        """The state that such a kill leaves, made by hand since the moment is too short to be hit."""
        chosen = settings(hub, tmp_path / "w", source="hub")
        found = resolved(chosen)
        staging = Staging(tmp_path / "w", PARTS["image"])
        staging.folder.parent.mkdir()
        found.model.rename(staging.folder)
        if in_the_way:  # an incomplete folder of ours had already been moved away
            old = staging.folder.with_name("Emu3.5-Image.old")
            old.mkdir()
            (old / "config.json").write_text("{}")
        hub.seen.clear()
        assert_complete(resolved(chosen))
        assert not hub.seen
        assert not (tmp_path / "w" / ".staging").exists()

    def test_notes_that_a_kill_cut_off(self, hub: HubServer, tmp_path: Path) -> None:
        """A half-written line, a half-written manifest, a state that is no JSON: the files are hashed again or anew."""
        chosen = settings(hub, tmp_path / "w", source="hub")
        hub.faults = [Fault(r"/resolve/.*\.(ckpt|safetensors)", times=None, status=404)]
        with pytest.raises(CheckpointError):
            resolved(chosen)
        hub.faults = []
        staging = Staging(tmp_path / "w", PARTS["image"])
        journal = staging.folder.with_name(f"{staging.part.folder}.sha256")
        with journal.open("a") as file:
            file.write("0123456789abcdef")
        staging.folder.with_name(f"{staging.part.folder}.json").write_text('{"origin": "ht')
        (staging.folder / MANIFEST_FILE).write_text('{"origin"')
        (staging.folder / f".{MANIFEST_FILE}.123").write_text("{")
        assert_complete(resolved(chosen))


class TestTwoAtOnce:
    def test_one_downloads_and_the_other_waits(self, hub: HubServer, tmp_path: Path) -> None:
        hub.rate = 3_000_000
        chosen = settings(hub, tmp_path / "w", source="hub")
        children = [start(chosen), start(chosen)]
        said = [child.communicate(timeout=60) for child in children]
        assert [child.returncode for child in children] == [0, 0], said
        assert said[0][0] == said[1][0]
        assert json.loads(said[0][0])[0] == str(tmp_path / "w" / "Emu3.5-Image")
        assert hub.sent() - hub.sent("/api/") == TOTAL  # each byte once
        assert sum("another process is downloading weights" in log for _, log in said) == 1

    def test_the_other_takes_over_when_the_first_is_killed(self, hub: HubServer, tmp_path: Path) -> None:
        hub.rate = 3_000_000
        chosen = settings(hub, tmp_path / "w", source="hub")
        first = start(chosen)
        reached = threading.Event()
        hub.on_bytes = lambda sent_now: reached.set() if sent_now > TOTAL // 8 else None
        assert reached.wait(30)
        second = start(chosen)
        kill_when(hub, first, TOTAL // 2)
        _, log = second.communicate(timeout=60)
        assert second.returncode == 0, log
        assert_whole(tmp_path / "w" / "Emu3.5-Image", IMAGE)
        assert_whole(tmp_path / "w" / "Emu3.5-VisionTokenizer", VISION)
        assert hub.sent() - hub.sent("/api/") < TOTAL * 1.25


class TestPget:
    @pytest.fixture
    def pget(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        return tmp_path / "bin" / "pget"

    @staticmethod
    def write(path: Path, *, pause: float = 0.0, fail: str = "", hang: str = "") -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(PGET.format(python=sys.executable, pause=pause, fail=fail, hang=hang))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def test_unpacks(self, hub: HubServer, tmp_path: Path, pget: Path) -> None:
        self.write(pget)
        hub.files[TAR] = tar_of(above="checkpoints/")
        assert_complete(resolved(settings(hub, tmp_path / "w")))
        (whole,) = [s for s in hub.asked(TAR) if s.range is None]
        assert whole.sent == len(hub.files[TAR])
        assert hub.sent() - whole.sent < HEADERS
        assert not (tmp_path / "w" / ".staging").exists()

    @pytest.mark.parametrize("trouble", [{"fail": "model.ckpt"}, {"hang": "model-00002-of-00003.safetensors"}])
    def test_what_it_leaves_undone_is_completed(
        self, hub: HubServer, tmp_path: Path, pget: Path, trouble: dict[str, str], caplog: pytest.LogCaptureFixture
    ) -> None:
        self.write(pget, **trouble)
        assert_complete(resolved(settings(hub, tmp_path / "w")))
        assert "going on without it" in caplog.text
        shard = len(parts()[IMAGE]["model-00001-of-00003.safetensors"])
        assert sum(s.sent for s in hub.asked(TAR) if s.range) < TOTAL + HEADERS - shard

    def test_archive_with_a_link_never_reaches_it(self, hub: HubServer, tmp_path: Path, pget: Path) -> None:
        import tarfile

        self.write(pget)
        link = tarfile.TarInfo("Emu3.5-Image/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        hub.files[TAR] = tar_of(extra=[link])
        assert_complete(resolved(settings(hub, tmp_path / "w")))  # from the hub
        assert all(s.range for s in hub.asked(TAR))

    def test_dies_with_its_killed_parent(self, hub: HubServer, tmp_path: Path, pget: Path) -> None:
        """It went on writing, and the next start had to wait for it to end. What it brought is used."""
        self.write(pget, hang="model-00001-of-00003.safetensors")
        chosen = settings(hub, tmp_path / "w")
        child = start(chosen, patience=replace(HASTY, stall=60))
        scratch = tmp_path / "w" / ".staging" / "pget"
        shard = len(parts()[IMAGE]["model-00001-of-00003.safetensors"])
        wait_for(lambda: any(p.stat().st_size == shard for p in scratch.rglob("model-00001*")))
        (pid,) = [process.pid for process in psutil.Process(child.pid).children()]
        child.kill()
        child.communicate()
        wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
        hub.seen.clear()
        assert_complete(resolved(replace(chosen, weights_source="cdn")))
        assert all(s.range for s in hub.asked(TAR))
        assert hub.sent() < TOTAL + HEADERS - shard

    def test_is_started_from_any_thread(self, hub: HubServer, tmp_path: Path, pget: Path) -> None:
        """The kernel's signal follows the thread that started it, here one that is not the main thread."""
        self.write(pget)
        with ThreadPoolExecutor(1) as pool:
            assert_complete(pool.submit(resolved, settings(hub, tmp_path / "w")).result())
        assert [s for s in hub.asked(TAR) if s.range is None and s.sent == len(hub.files[TAR])]

    def test_only_where_the_kernel_ends_it(
        self, hub: HubServer, tmp_path: Path, pget: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.write(pget, fail="config.json")
        monkeypatch.setattr(sys, "platform", "darwin")
        assert program() is None

    def test_not_used_when_something_is_there_already(self, hub: HubServer, tmp_path: Path, pget: Path) -> None:
        self.write(pget)
        chosen = settings(hub, tmp_path / "w", source="cdn")
        pget.rename(pget.with_name("away"))
        hub.faults = [body("tar", times=None, status=404)]
        with pytest.raises(CheckpointError):
            resolved(chosen)
        hub.faults = []
        pget.with_name("away").rename(pget)
        hub.seen.clear()
        assert_complete(resolved(chosen))
        assert all(s.range for s in hub.asked(TAR))


def test_manifest_is_written_whole_or_not_at_all(tmp_path: Path, hub: HubServer) -> None:
    """A manifest that can't be written leaves the old one."""
    found = resolved(settings(hub, tmp_path / "w", source="hub"))
    before = (found.model / MANIFEST_FILE).read_bytes()
    with pytest.raises(AttributeError):
        write_manifest(found.model, None)  # type: ignore[arg-type]
    assert (found.model / MANIFEST_FILE).read_bytes() == before
