"""What servers, lines and disks do wrong, really done to the transfer: it goes on where it was, or says what is wrong."""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import Fault, HubServer, http_date
from weights_kit import HASTY, IMAGE, TAR, VISION, assert_whole, fill, parts, settings, start, tar_of, wanted

from emu_cog.config import CheckpointError
from emu_cog.fetch import DiskFullError
from emu_cog.manifest import Entry, Pin, write_lock
from emu_cog.remote import Patience
from emu_cog.weights import Checkpoint, resolve

NO_LOCK = Path("/nowhere/weights.lock")
SHARD = "model-00001-of-00003.safetensors"
HALF = 250_000  # bytes; about half of that shard
TOTAL = sum(len(c) for repo in (IMAGE, VISION) for c in wanted(repo).values())
HEADERS = 8 * 65536  # what reading a tar's headers may cost
WAYS = ["hub", "tar by ranges", "tar as a stream"]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        fill(server)
        server.files[TAR] = tar_of()
        yield server


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="emu_cog")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, hub: HubServer) -> str:
    """How the weights come; the fault's `path` is then `address(way)`."""
    hub.ranges = request.param != "tar as a stream"
    return str(request.param)


def address(way: str) -> str:
    """The pattern of a request for the bytes of a large file: by ranges, one that begins within the first shard."""
    return "/cdn/" if way == "hub" else TAR


def bring(hub: HubServer, weights: Path, way: str, patience: Patience = HASTY, lock: Path = NO_LOCK) -> Checkpoint:
    source = "hub" if way == "hub" else "cdn"
    return resolve(settings(hub, weights, source=source), patience=patience, lock_file=lock)


def assert_complete(found: Checkpoint) -> None:
    assert_whole(found.model, IMAGE)
    assert_whole(found.vision_tokenizer, VISION)


def nothing_half(weights: Path) -> bool:
    """No folder that a start could take for weights is there."""
    return not [p for p in weights.iterdir() if not p.name.startswith(".")]


def body(hub: HubServer, way: str, **what: object) -> Fault:
    """A fault in the bytes of the largest file, model.ckpt, however they come."""
    if way == "hub":
        return Fault("/cdn/", minimum=1_000_000, **what)  # type: ignore[arg-type]
    return Fault(TAR, minimum=1_000_000, **what)  # type: ignore[arg-type]


class TestOnce:
    """One thing goes wrong, then all is well: no error, and no byte twice where the server can send parts."""

    @pytest.mark.parametrize(
        "fault",
        [
            pytest.param({"reset": True, "after": HALF}, id="connection reset"),
            pytest.param({"end": True, "after": HALF}, id="closed before the end"),
            pytest.param({"stall": True, "after": HALF}, id="silent for ever"),
            pytest.param({"stall": True, "after": 0}, id="silent from the beginning"),
            pytest.param({"status": 500}, id="500"),
            pytest.param({"status": 503}, id="503"),
            pytest.param({"status": 429}, id="429"),
            pytest.param({"status": 408}, id="408"),
        ],
    )
    def test_goes_on(self, hub: HubServer, tmp_path: Path, way: str, fault: dict[str, object]) -> None:
        hub.faults = [body(hub, way, **fault)]
        assert_complete(bring(hub, tmp_path / "w", way))
        assert hub.faults[0].times == 0
        if way != "tar as a stream":  # a little is sent into a connection that breaks, and never read
            assert hub.sent() < TOTAL + HEADERS + 50_000

    def test_many_breaks_in_a_row_are_no_reason_to_give_up_while_something_arrives(
        self, hub: HubServer, tmp_path: Path
    ) -> None:
        hub.faults = [Fault("/cdn/", minimum=100_000, times=12, reset=True, after=60_000)]
        assert_complete(bring(hub, tmp_path / "w", "hub"))
        assert hub.faults[0].times == 0

    def test_slow_connection_is_left_for_another(self, hub: HubServer, tmp_path: Path) -> None:
        hub.faults = [body(hub, "hub", rate=2000)]
        patience = replace(HASTY, slowest=20_000)
        begun = time.monotonic()
        assert_complete(bring(hub, tmp_path / "w", "hub", patience))
        assert time.monotonic() - begun < 10  # at that rate model.ckpt would take a quarter of an hour

    def test_slow_but_steady_is_waited_for(self, hub: HubServer, tmp_path: Path) -> None:
        """A whole transfer may take much longer than any timeout."""
        hub.faults = [body(hub, "hub", rate=900_000)]
        assert_complete(bring(hub, tmp_path / "w", "hub"))
        assert len([s for s in hub.asked("/cdn/") if s.sent > 1_000_000]) == 1

    def test_redirects_are_followed(self, hub: HubServer, tmp_path: Path) -> None:
        hub.files["/elsewhere.tar"] = hub.files[TAR]
        hub.faults = [Fault(TAR, times=None, location="/elsewhere.tar")]
        assert_complete(bring(hub, tmp_path / "w", "tar by ranges"))

    @pytest.mark.parametrize("way", ["hub"])
    def test_altered_or_cut_file_is_fetched_anew(self, hub: HubServer, tmp_path: Path, way: str) -> None:
        for fault in ({"alter": True, "after": 5}, {"cut": True, "after": 1_200_000}):
            hub.faults = [body(hub, way, **fault)]
            weights = tmp_path / next(iter(fault))
            assert_complete(bring(hub, weights, way))
            assert hub.faults[0].times == 0

    def test_altered_small_file_is_found_by_its_git_hash(self, hub: HubServer, tmp_path: Path) -> None:
        hub.faults = [Fault("/config.json", alter=True)]
        assert_complete(bring(hub, tmp_path / "w", "hub"))
        assert len(hub.asked(f"{IMAGE}/resolve/.*/config.json")) == 2


class TestAskedToWait:
    @pytest.mark.parametrize(
        "headers",
        [
            {"Retry-After": "1"},
            {"Retry-After": lambda: http_date(2)},
            {"RateLimit": '"resolvers";r=0;t=1'},
        ],
        ids=["seconds", "date", "the hub's own header"],
    )
    @pytest.mark.parametrize("path", ["/cdn/", "/api/models/"])
    def test_waits_as_long_as_asked(
        self, hub: HubServer, tmp_path: Path, headers: dict[str, str | Callable[[], str]], path: str
    ) -> None:
        given = {name: value() if callable(value) else value for name, value in headers.items()}
        hub.faults = [Fault(path, status=429, headers=given)]
        begun = time.monotonic()
        assert_complete(bring(hub, tmp_path / "w", "hub"))
        assert time.monotonic() - begun >= 0.95

    def test_not_longer_than_makes_sense(self, hub: HubServer, tmp_path: Path) -> None:
        hub.faults = [Fault("/cdn/", status=429, headers={"Retry-After": "86400"})]
        with pytest.raises(CheckpointError, match="asks to come back in 86400 s"):
            bring(hub, tmp_path / "w", "hub")


class TestForGood:
    """It does not get better: a clear reason, nothing half in place, and the next start goes on from what arrived."""

    @pytest.mark.parametrize(
        ("fault", "says"),
        [
            pytest.param({"reset": True, "after": 0}, "connection broke|no answer", id="connection reset"),
            pytest.param({"stall": True, "after": 0}, "timed out", id="silent"),
            pytest.param({"status": 404}, r"404 \(not found\)", id="404"),
            pytest.param({"status": 403}, r"403 \(access refused\)", id="403"),
            pytest.param({"status": 500}, "answered 500 .* given up after 4 attempts", id="500"),
            pytest.param({"status": 503}, "answered 503 .* given up after 4 attempts", id="503"),
            pytest.param({"status": 429}, "answered 429 .* given up after 4 attempts", id="429"),
            pytest.param({"location": "/round"}, "redirects", id="redirected in a circle"),
        ],
    )
    def test_says_why_and_goes_on_next_time(
        self, hub: HubServer, tmp_path: Path, way: str, fault: dict[str, object], says: str
    ) -> None:
        hub.faults = [Fault("/round", times=None, location="/round"), body(hub, way, times=None, **fault)]
        with pytest.raises(CheckpointError, match=says):
            bring(hub, tmp_path / "w", way)
        model = tmp_path / "w" / "Emu3.5-Image"
        assert not (tmp_path / "w" / "Emu3.5-VisionTokenizer").exists()
        assert way == "hub" or not model.exists()
        hub.faults = []
        hub.seen.clear()
        assert_complete(bring(hub, tmp_path / "w", way))
        if way != "tar as a stream":  # only model.ckpt was missing
            assert hub.sent() < len(parts()[VISION]["model.ckpt"]) + HEADERS

    def test_file_that_arrives_altered_each_time(self, hub: HubServer, tmp_path: Path) -> None:
        hub.faults = [body(hub, "hub", times=None, alter=True)]
        with pytest.raises(CheckpointError, match=r"arrived altered, 3 time\(s\): model.ckpt has SHA-256"):
            bring(hub, tmp_path / "w", "hub")
        assert not (tmp_path / "w" / "Emu3.5-VisionTokenizer").exists()

    def test_file_that_is_cut_off_on_the_server(self, hub: HubServer, tmp_path: Path) -> None:
        hub.faults = [body(hub, "hub", times=None, cut=True, after=1_500_000)]
        with pytest.raises(CheckpointError, match="has 1500000 bytes where 1.* were expected"):
            bring(hub, tmp_path / "w", "hub")

    @pytest.mark.parametrize("stall", [False, True])
    def test_hub_whose_listing_fails(self, hub: HubServer, tmp_path: Path, stall: bool) -> None:
        hub.faults = [Fault("/api/", times=None, stall=True) if stall else Fault("/api/", times=None, status=502)]
        begun = time.monotonic()
        with pytest.raises(CheckpointError, match="given up after 4 attempts"):
            bring(hub, tmp_path / "w", "hub")
        assert time.monotonic() - begun < 15

    def test_nobody_answers(self, hub: HubServer, tmp_path: Path) -> None:
        chosen = settings(hub, tmp_path / "w")
        environ = {**chosen.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "EMU_WEIGHTS_CDN_URL": "http://127.0.0.1:9/x"}
        with pytest.raises(CheckpointError) as caught:
            resolve(replace(chosen, environ=environ), patience=HASTY, lock_file=NO_LOCK)
        assert str(caught.value).count("refused") >= 2

    @pytest.mark.parametrize("url", ["weights.tar", "ftp://127.0.0.1/weights.tar", "http://"])
    def test_address_that_is_none(self, hub: HubServer, tmp_path: Path, url: str) -> None:
        chosen = settings(hub, tmp_path / "w", source="cdn", EMU_WEIGHTS_CDN_URL=url)
        with pytest.raises(CheckpointError, match="cdn: "):
            resolve(chosen, patience=HASTY, lock_file=NO_LOCK)


class TestArchiveChanges:
    """Another tar at the same address: the two are never mixed."""

    @pytest.mark.parametrize("ranges", [True, False])
    def test_between_two_starts(self, hub: HubServer, tmp_path: Path, ranges: bool) -> None:
        hub.ranges = ranges
        old = hub.files[TAR]
        at = old.index(parts()[IMAGE][SHARD]) + 300_000
        hub.files[TAR] = old[:at] + bytes([old[at] ^ 1]) + old[at + 1 :]
        hub.faults = [body(hub, "tar", times=None, status=404)] if ranges else []
        hub.faults += [] if ranges else [Fault(TAR, minimum=1_000_000, times=None, reset=True, after=1_000_000)]
        with pytest.raises(CheckpointError):
            bring(hub, tmp_path / "w", "tar")
        assert list((tmp_path / "w" / ".staging" / "Emu3.5-Image").glob("*.safetensors"))
        hub.files[TAR], hub.faults = old, []
        assert_complete(bring(hub, tmp_path / "w", "tar"))

    def test_while_it_is_read(self, hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        new = hub.files[TAR]
        at = new.index(parts()[IMAGE][SHARD]) + 300_000
        hub.files[TAR] = new[:at] + bytes([new[at] ^ 1]) + new[at + 1 :]
        hub.faults = [body(hub, "tar", reset=True, after=HALF)]

        def change(total: int) -> None:
            if hub.faults[0].times == 0:
                hub.files[TAR] = new

        hub.on_bytes = change
        assert_complete(bring(hub, tmp_path / "w", "tar"))
        assert "has changed" in caplog.text

    def test_without_a_validator_a_changed_size_is_noticed(self, hub: HubServer, tmp_path: Path) -> None:
        hub.etags[TAR] = None
        new = hub.files[TAR]
        hub.files[TAR] = tar_of([VISION, IMAGE], above="x/") + b"\0" * 10240
        hub.faults = [body(hub, "tar", times=None, status=404)]
        with pytest.raises(CheckpointError):
            bring(hub, tmp_path / "w", "tar")
        hub.files[TAR], hub.faults = new, []
        assert_complete(bring(hub, tmp_path / "w", "tar"))


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


class TestRefusedArchives:
    @pytest.mark.parametrize("ranges", [True, False])
    @pytest.mark.parametrize(
        ("extra", "says"),
        [
            (member("../outside", size=5), "points outside"),
            (member("Emu3.5-Image/../../outside", size=5), "points outside"),
            (member("/tmp/emu-outside", size=5), "points outside"),
            (member("Emu3.5-Image/link", tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
            (member("Emu3.5-Image/link", tarfile.SYMTYPE, "config.json"), "is a link"),
            (member("Emu3.5-Image/link", tarfile.LNKTYPE, "Emu3.5-Image/config.json"), "is a link"),
            (member("device", tarfile.CHRTYPE), "neither a plain file nor a folder"),
            (member("device", tarfile.BLKTYPE), "neither a plain file nor a folder"),
            (member("pipe", tarfile.FIFOTYPE), "neither a plain file nor a folder"),
            (member("Emu3.5-Image/config.json", size=5), "holds Emu3.5-Image/config.json twice"),
        ],
    )
    def test_nothing_is_kept(
        self, hub: HubServer, tmp_path: Path, ranges: bool, extra: tarfile.TarInfo, says: str
    ) -> None:
        hub.ranges = ranges
        hub.files[TAR] = tar_of(extra=[extra])
        before = sorted(tmp_path.iterdir())
        with pytest.raises(CheckpointError, match=f"is refused: .*{says}"):
            bring(hub, tmp_path / "w", "tar")
        assert nothing_half(tmp_path / "w")
        assert not [p for p in (tmp_path / "w").rglob("*") if p.is_file() and p.suffix != ".lock"]
        assert [p for p in sorted(tmp_path.iterdir()) if p.name not in ("w", "hf-home")] == before
        assert not Path("/tmp/emu-outside").exists()

    @pytest.mark.parametrize("ranges", [True, False])
    def test_hub_is_used_instead(self, hub: HubServer, tmp_path: Path, ranges: bool) -> None:
        hub.ranges = ranges
        hub.files[TAR] = tar_of(extra=[member("x", tarfile.SYMTYPE, "/etc")])
        assert_complete(resolve(settings(hub, tmp_path / "w"), patience=HASTY, lock_file=NO_LOCK))

    @pytest.mark.parametrize("ranges", [True, False])
    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"<html>not here</html>" * 100, "is no tar"),
            (b"", "is no tar"),
            (tar_of()[:2_000_000], "cut off"),
            (tar_of()[:600_000], "cut off"),
            (tar_of(["BAAI/Emu3.5"]), "holds none of Emu3.5-Image, Emu3.5-VisionTokenizer"),
        ],
        ids=["a web page", "empty", "cut in the last file", "cut in a shard", "another model"],
    )
    def test_no_checkpoint(self, hub: HubServer, tmp_path: Path, ranges: bool, content: bytes, says: str) -> None:
        hub.files[TAR], hub.ranges = content, ranges
        with pytest.raises(CheckpointError, match=says):
            bring(hub, tmp_path / "w", "tar")
        assert nothing_half(tmp_path / "w")

    @pytest.mark.parametrize("ranges", [True, False])
    def test_shard_that_is_shorter_than_its_header_says(self, hub: HubServer, tmp_path: Path, ranges: bool) -> None:
        """The archive is whole as an archive, but was made from a folder that was not."""
        files = parts()[IMAGE]
        whole = files[SHARD]
        hub.ranges = ranges
        try:
            files[SHARD] = whole[:-1000]
            hub.files[TAR] = tar_of()
        finally:
            files[SHARD] = whole
        with pytest.raises(CheckpointError, match=rf"{SHARD} has {len(whole) - 1000} bytes where its header implies"):
            bring(hub, tmp_path / "w", "tar")
        assert not (tmp_path / "w" / "Emu3.5-Image").exists()


class TestFullDisk:
    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        """A disk of 2 MB, less than the weights."""
        place = tmp_path / "disk"
        place.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, text=True, check=False
        )
        if mounted.returncode != 0:
            pytest.skip(f"a small disk can't be mounted here: {mounted.stderr.strip()}")
        yield place
        subprocess.run(["umount", str(place)], check=True)

    def test_too_little_room_is_told_before_anything_is_fetched(
        self, hub: HubServer, small_disk: Path, way: str
    ) -> None:
        with pytest.raises(DiskFullError, match=r"needs \d.\d MB more .* where \d.\d MB are free") as caught:
            bring(hub, small_disk / "w", way)
        assert "EMU_WEIGHTS_DIR" in str(caught.value)
        if way == "hub":
            assert (small_disk / "w" / "Emu3.5-Image").is_dir()  # that part fitted
        assert not [s for s in hub.seen if s.sent > 1_000_000]

    def test_disk_that_fills_up_under_way(self, hub: HubServer, small_disk: Path, way: str) -> None:
        """Somebody else takes the room while the weights arrive; afterwards the next start goes on."""
        subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
        hog = small_disk / "hog"

        def fill_up(total: int) -> None:
            if total > TOTAL - 1_000_000 and not hog.exists():
                free = os.statvfs(small_disk)
                hog.write_bytes(b"x" * max(0, free.f_bavail * free.f_frsize - 200_000))

        hub.on_bytes = fill_up
        hub.rate = 2_000_000
        with pytest.raises(DiskFullError, match="no room to write .* No space left on device|No space left") as caught:
            bring(hub, small_disk / "w", way)
        assert "EMU_WEIGHTS_DIR" in str(caught.value)
        assert not (small_disk / "w" / "Emu3.5-VisionTokenizer").exists()
        hog.unlink()
        hub.on_bytes = lambda total: None
        hub.rate = None
        hub.seen.clear()
        assert_complete(bring(hub, small_disk / "w", way))
        if way != "tar as a stream":
            assert hub.sent() < TOTAL - 500_000

    def test_other_sources_are_not_tried(self, hub: HubServer, small_disk: Path) -> None:
        with pytest.raises(DiskFullError):
            resolve(settings(hub, small_disk / "w"), patience=HASTY, lock_file=NO_LOCK)
        assert not hub.asked("/api/")

    def test_limit_on_the_size_of_files(self, hub: HubServer, tmp_path: Path, way: str) -> None:
        """The other way in which a disk refuses more; in a process of its own, for which the system sets the limit."""
        chosen = settings(hub, tmp_path / "w", source="hub" if way == "hub" else "cdn")
        child = start(chosen, preexec=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)))
        _, said = child.communicate(timeout=60)
        assert child.returncode == 1
        assert "DiskFullError: no room to write" in said
        assert "File too large" in said
        assert_complete(bring(hub, tmp_path / "w", way))


def test_pinned_hash_guards_the_archive_against_a_single_bit(hub: HubServer, tmp_path: Path) -> None:
    """Without a lock, a changed weight inside a tar can't be told from the right one; with it, it is."""
    import hashlib

    tar = hub.files[TAR]
    at = tar.index(parts()[IMAGE][SHARD]) + 300_000
    hub.files[TAR] = tar[:at] + bytes([tar[at] ^ 1]) + tar[at + 1 :]
    files = {n: Entry(len(c), hashlib.sha256(c).hexdigest()) for n, c in wanted(IMAGE).items()}
    write_lock({IMAGE: Pin("a" * 40, files=files)}, tmp_path / "weights.lock")
    with pytest.raises(CheckpointError, match=f"{SHARD} has SHA-256"):
        bring(hub, tmp_path / "w", "tar", lock=tmp_path / "weights.lock")
