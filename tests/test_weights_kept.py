"""What is kept: local folders and manifests, the commit that a branch was resolved to, pinned hashes."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import Fault, HubServer
from weights_kit import (
    FOLDERS,
    HASTY,
    IMAGE,
    NO_PINS,
    TAR,
    VISION,
    assert_whole,
    fill,
    parts,
    put,
    settings,
    tar_of,
    wanted,
)

from emu_cog.errors import CheckpointError
from emu_cog.settings import Settings
from emu_cog.weights.manifest import MANIFEST_FILE, Entry, Pin, hash_files, read_manifest, write_pins
from emu_cog.weights.store import Checkpoint, resolve

pytestmark = pytest.mark.usefixtures("log_captured")


@pytest.fixture
def hub(bare_hub: HubServer) -> HubServer:
    return bare_hub


def resolved(chosen: Settings, pins: Path = NO_PINS) -> Checkpoint:
    return resolve(replace(chosen, weights_pins=pins), patience=HASTY)


class TestBranch:
    def test_is_resolved_once_even_if_the_first_start_fails(self, hub: HubServer, tmp_path: Path) -> None:
        commits = fill(hub)
        chosen = settings(hub, tmp_path / "w", source="hub")
        hub.faults = [Fault("model-00002", times=None, status=404)]
        with pytest.raises(CheckpointError, match="404"):
            resolved(chosen)
        newer = hub.add_repo(IMAGE, parts()[IMAGE] | {"config.json": b'{"vocab_size": 1}'})
        assert newer != commits[IMAGE]
        hub.faults = []
        assert resolved(chosen).revision == commits[IMAGE]

    def test_is_kept_for_a_file_that_is_lost_later(self, hub: HubServer, tmp_path: Path) -> None:
        commits = fill(hub)
        chosen = settings(hub, tmp_path / "w", source="hub")
        model = resolved(chosen).model
        (model / "model-00002-of-00003.safetensors").unlink()
        hub.add_repo(IMAGE, parts()[IMAGE] | {"config.json": b'{"vocab_size": 1}'})
        hub.seen.clear()
        assert resolved(chosen).revision == commits[IMAGE]
        assert_whole(model, IMAGE)
        assert hub.sent("/cdn/") == len(parts()[IMAGE]["model-00002-of-00003.safetensors"])
        assert not list(model.parent.glob("*.incomplete-*"))


class TestPin:
    @staticmethod
    def pins(tmp_path: Path, commits: dict[str, str], **changed: Entry) -> Path:
        pins = {}
        for repo, commit in commits.items():
            folder = tmp_path / "pins" / repo
            put(folder, wanted(repo))
            files = hash_files(folder, sorted(wanted(repo)))
            pins[repo] = Pin(commit, files={name: changed.get(name.split(".")[0], e) for name, e in files.items()})
        path = tmp_path / "weights.pins.json"
        write_pins(pins, path)
        return path

    def test_pinned_commit_wins_over_the_branch(self, hub: HubServer, tmp_path: Path) -> None:
        commits = fill(hub)
        hub.add_repo(IMAGE, parts()[IMAGE] | {"config.json": b"{}"})
        found = resolved(settings(hub, tmp_path / "w", source="hub"), self.pins(tmp_path, commits))
        assert found.revision == commits[IMAGE]
        assert_whole(found.model, IMAGE)

    def test_hub_that_disagrees_is_refused_before_anything_is_fetched(self, hub: HubServer, tmp_path: Path) -> None:
        commits = fill(hub)
        size = len(parts()[VISION]["model.ckpt"])
        pins = self.pins(tmp_path, commits, model=Entry(size, "0" * 64))
        with pytest.raises(CheckpointError, match="model.ckpt on the hub is not the file of weights.pins.json"):
            resolved(settings(hub, tmp_path / "w", source="hub"), pins)
        assert not hub.asked(f"/{VISION}/resolve/.*model.ckpt")

    @pytest.mark.parametrize("ranges", [True, False])
    def test_archive_that_differs_is_refused_and_the_hub_follows(
        self, hub: HubServer, tmp_path: Path, ranges: bool
    ) -> None:
        commits = fill(hub)
        tar = tar_of()
        at = tar.index(parts()[VISION]["model.ckpt"]) + 100_000
        hub.files[TAR], hub.ranges = tar[:at] + bytes([tar[at] ^ 1]) + tar[at + 1 :], ranges
        found = resolved(settings(hub, tmp_path / "w"), self.pins(tmp_path, commits))
        assert_whole(found.vision_tokenizer, VISION)
        assert read_manifest(found.vision_tokenizer).origin == f"{hub.url}/{VISION}"  # type: ignore[union-attr]

    def test_archive_that_agrees_is_used(self, hub: HubServer, tmp_path: Path) -> None:
        commits = fill(hub)
        hub.files[TAR] = tar_of()
        assert resolved(settings(hub, tmp_path / "w"), self.pins(tmp_path, commits)).revision.startswith("cdn:")
        assert not hub.asked("/api/")

    def test_known_local_folder_gets_its_commit_and_another_is_told(
        self, hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        pins = self.pins(tmp_path, dict.fromkeys((IMAGE, VISION), "a" * 40), config=Entry(3, "0" * 64))
        for repo in (IMAGE, VISION):
            put(tmp_path / "w" / FOLDERS[repo], wanted(repo))
        found = resolved(settings(hub, tmp_path / "w"), pins)
        assert found.revision == "local"
        assert "is not what weights.pins.json pins: config.json differs" in caplog.text
        shutil.rmtree(tmp_path / "w")
        for repo in (IMAGE, VISION):
            put(tmp_path / "w" / FOLDERS[repo], wanted(repo))
        pins = self.pins(tmp_path, dict.fromkeys((IMAGE, VISION), "a" * 40))
        assert resolved(settings(hub, tmp_path / "w"), pins).revision == "a" * 40


class TestLocalFolders:
    def test_named_folder_is_used_as_it_is(self, hub: HubServer, tmp_path: Path) -> None:
        put(tmp_path / "mine" / "model", wanted(IMAGE))
        put(tmp_path / "mine" / "vision", wanted(VISION))
        found = resolved(settings(hub, tmp_path / "w", checkpoint=str(tmp_path / "mine" / "model")))
        assert found == Checkpoint(tmp_path / "mine" / "model", tmp_path / "mine" / "vision", "local", "folder")
        put(tmp_path / "other", wanted(VISION))
        chosen = settings(
            hub, tmp_path / "w", checkpoint=str(tmp_path / "mine" / "model"), vision_tokenizer=str(tmp_path / "other")
        )
        assert resolved(chosen).vision_tokenizer == tmp_path / "other"
        assert not hub.seen
        assert not (tmp_path / "w").exists()

    def test_named_folder_without_a_vision_tokenizer_gets_one(self, hub: HubServer, tmp_path: Path) -> None:
        fill(hub)
        put(tmp_path / "mine", wanted(IMAGE))
        found = resolved(settings(hub, tmp_path / "w", source="hub", checkpoint=str(tmp_path / "mine")))
        assert_whole(found.vision_tokenizer, VISION)
        assert not hub.asked(f"/{IMAGE}/")

    def test_a_hand_placed_folder_gets_a_manifest_once(self, hub: HubServer, tmp_path: Path) -> None:
        for repo in (IMAGE, VISION):
            put(tmp_path / "w" / FOLDERS[repo], wanted(repo))
        found = resolved(settings(hub, tmp_path / "w"))
        assert_whole(found.model, IMAGE)
        written = (found.model / MANIFEST_FILE).stat().st_mtime_ns
        assert resolved(settings(hub, tmp_path / "w")) == found
        assert (found.model / MANIFEST_FILE).stat().st_mtime_ns == written
        assert not hub.seen

    def test_good_files_of_an_incomplete_folder_are_not_fetched_again(self, hub: HubServer, tmp_path: Path) -> None:
        """One shard is missing, one is altered; the folder was made by hand and is set aside, not deleted."""
        fill(hub)
        put(tmp_path / "w" / FOLDERS[VISION], wanted(VISION))
        files = dict(wanted(IMAGE))
        lost = files.pop("model-00001-of-00003.safetensors")
        good = files["model-00002-of-00003.safetensors"]
        files["model-00002-of-00003.safetensors"] = good[:-1] + bytes([good[-1] ^ 1])
        put(tmp_path / "w" / FOLDERS[IMAGE], files | {"notes.txt": b"mine"})
        found = resolved(settings(hub, tmp_path / "w", source="hub"))
        assert_whole(found.model, IMAGE)
        assert hub.sent("/cdn/") == len(lost) + len(good)
        (aside,) = (tmp_path / "w").glob("Emu3.5-Image.incomplete-*")
        assert (aside / "notes.txt").read_bytes() == b"mine"

    def test_archive_completes_what_it_brought_itself(self, hub: HubServer, tmp_path: Path) -> None:
        hub.files[TAR] = tar_of()
        model = resolved(settings(hub, tmp_path / "w")).model
        (model / "model-00002-of-00003.safetensors").unlink()
        hub.seen.clear()
        assert_whole(resolved(settings(hub, tmp_path / "w")).model, IMAGE)
        shard = len(parts()[IMAGE]["model-00002-of-00003.safetensors"])
        assert hub.sent() < shard + len(wanted(IMAGE)["config.json"]) + 8 * 65536

    def test_a_second_name_is_not_a_problem(self, hub: HubServer, tmp_path: Path) -> None:
        """An incomplete folder at the top does not hide a complete one below."""
        put(tmp_path / "w" / FOLDERS[IMAGE], {"config.json": b"{}"})
        for repo in (IMAGE, VISION):
            put(tmp_path / "w" / "unpacked" / FOLDERS[repo], wanted(repo))
        assert resolved(settings(hub, tmp_path / "w")).model == tmp_path / "w" / "unpacked" / FOLDERS[IMAGE]
        assert not hub.seen


def test_json_of_the_manifest_is_plain(hub: HubServer, tmp_path: Path) -> None:
    fill(hub)
    model = resolved(settings(hub, tmp_path / "w", source="hub")).model
    data = json.loads((model / MANIFEST_FILE).read_text())
    assert data["origin"] == f"{hub.url}/{IMAGE}"
    assert os.path.getsize(model / "config.json") == data["files"]["config.json"]["size"]
