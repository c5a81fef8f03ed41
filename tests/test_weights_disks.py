"""Disks that are too small or fill up, for real: told with numbers, nothing half in place, and resumed later."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer
from weights_kit import (
    HASTY,
    assert_complete,
    bring,
    settings,
    start,
    total,
)

from emu_cog.weights.fetch import DiskFullError
from emu_cog.weights.store import resolve

pytestmark = pytest.mark.usefixtures("log_captured")


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
        assert not list((small_disk / "w" / ".staging").rglob("model.ckpt"))

    def test_disk_that_fills_up_under_way(self, hub: HubServer, small_disk: Path, way: str) -> None:
        """Somebody else takes the room while the weights arrive; afterwards the next start goes on."""
        subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
        hog = small_disk / "hog"

        filled = []  # once: the server may still be sending when the room is given back

        def fill_up(sent: int) -> None:
            if sent > total() - 1_000_000 and not filled:
                filled.append(sent)
                free = os.statvfs(small_disk)
                hog.write_bytes(b"x" * max(0, free.f_bavail * free.f_frsize - 200_000))

        hub.on_bytes = fill_up
        hub.rate = 2_000_000
        with pytest.raises(DiskFullError, match="no room to write .* No space left on device|No space left") as caught:
            bring(hub, small_disk / "w", way)
        assert "EMU_WEIGHTS_DIR" in str(caught.value)
        assert not (small_disk / "w" / "Emu3.5-VisionTokenizer").exists()
        hub.on_bytes = lambda sent: None  # first: the server may still be sending, and would take the room again
        hog.unlink()
        hub.rate = None
        hub.seen.clear()
        assert_complete(bring(hub, small_disk / "w", way))
        if way != "tar as a stream":
            assert hub.sent() < total() - 500_000

    def test_other_sources_are_not_tried(self, hub: HubServer, small_disk: Path) -> None:
        with pytest.raises(DiskFullError):
            resolve(settings(hub, small_disk / "w"), patience=HASTY)
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
