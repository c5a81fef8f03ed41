"""Archives that change, are cut off or mean harm: never mixed, never half in place, never followed outside."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import pytest
from hub_server import Fault, HubServer
from weights_kit import (
    HALF,
    HASTY,
    IMAGE,
    TAR,
    VISION,
    assert_complete,
    body,
    bring,
    nothing_half,
    parts,
    settings,
    tar_of,
    wanted,
)

from emu_cog.errors import CheckpointError
from emu_cog.weights.manifest import Entry, Pin, write_pins
from emu_cog.weights.store import resolve

pytestmark = pytest.mark.usefixtures("log_captured")

SHARD = "model-00001-of-00003.safetensors"


class TestArchiveChanges:
    """Another tar at the same address: the two are never mixed."""

    @pytest.mark.parametrize("ranges", [True, False])
    def test_between_two_starts(self, hub: HubServer, tmp_path: Path, ranges: bool) -> None:
        hub.ranges = ranges
        old = hub.files[TAR]
        at = old.index(parts()[IMAGE][SHARD]) + 300_000
        hub.files[TAR] = old[:at] + bytes([old[at] ^ 1]) + old[at + 1 :]
        hub.faults = [body("tar", times=None, status=404)] if ranges else []
        hub.faults += [] if ranges else [Fault(TAR, minimum=1_000_000, times=None, end=True, after=1_000_000)]
        with pytest.raises(CheckpointError):
            bring(hub, tmp_path / "w", "tar")
        assert list((tmp_path / "w" / ".staging" / "Emu3.5-Image").glob("*.safetensors"))
        hub.files[TAR], hub.faults = old, []
        assert_complete(bring(hub, tmp_path / "w", "tar"))

    def test_while_it_is_read(self, hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        new = hub.files[TAR]
        at = new.index(parts()[IMAGE][SHARD]) + 300_000
        hub.files[TAR] = new[:at] + bytes([new[at] ^ 1]) + new[at + 1 :]
        hub.faults = [body("tar", reset=True, after=HALF)]

        def change(sent: int) -> None:
            if hub.faults[0].times == 0:
                hub.files[TAR] = new

        hub.on_bytes = change
        assert_complete(bring(hub, tmp_path / "w", "tar"))
        assert "has changed" in caplog.text

    def test_without_a_validator_a_changed_size_is_noticed(self, hub: HubServer, tmp_path: Path) -> None:
        hub.etags[TAR] = None
        new = hub.files[TAR]
        hub.files[TAR] = tar_of([VISION, IMAGE], above="x/") + b"\0" * 10240
        hub.faults = [body("tar", times=None, status=404)]
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
        assert_complete(resolve(settings(hub, tmp_path / "w"), patience=HASTY))

    @pytest.mark.parametrize("ranges", [True, False])
    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"<html>not here</html>" * 100, "is no tar"),
            (b"", "is empty|is no tar"),
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
            hub.files[TAR] = tar_of(above="cut/")
        finally:
            files[SHARD] = whole
        with pytest.raises(CheckpointError, match=rf"{SHARD} is damaged or cut off: .*{len(whole) - 1000} bytes"):
            bring(hub, tmp_path / "w", "tar")
        assert not (tmp_path / "w" / "Emu3.5-Image").exists()


def test_pinned_hash_guards_the_archive_against_a_single_bit(hub: HubServer, tmp_path: Path) -> None:
    """Without pins, a changed weight inside a tar can't be told from the right one; with it, it is."""
    tar = hub.files[TAR]
    at = tar.index(parts()[IMAGE][SHARD]) + 300_000
    hub.files[TAR] = tar[:at] + bytes([tar[at] ^ 1]) + tar[at + 1 :]
    files = {n: Entry(len(c), hashlib.sha256(c).hexdigest()) for n, c in wanted(IMAGE).items()}
    write_pins({IMAGE: Pin("a" * 40, files=files)}, tmp_path / "weights.pins.json")
    with pytest.raises(CheckpointError, match=f"{SHARD} has SHA-256"):
        bring(hub, tmp_path / "w", "tar", pins=tmp_path / "weights.pins.json")
