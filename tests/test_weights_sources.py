"""Where weights come from: the order of the sources, what each gives, and what is kept and pinned."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Fault, HubServer
from weights_kit import BASE, FOLDERS, HASTY, IMAGE, TAR, VISION, VISION_COMMIT, assert_whole, fill, parts, settings
from weights_kit import tar_of, wanted

from emu_cog.config import CheckpointError, InputError, Settings
from emu_cog.manifest import MANIFEST_FILE, Entry, Pin, hash_files, read_manifest, write_lock
from emu_cog.weights import Checkpoint, resolve

NO_LOCK = Path("/nowhere/weights.lock")


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="emu_cog")


def bring(chosen: Settings, lock: Path = NO_LOCK) -> Checkpoint:
    return resolve(chosen, patience=HASTY, lock_file=lock)


def test_hub_brings_both_folders_and_only_what_is_needed(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commits = fill(hub)
    found = bring(settings(hub, tmp_path / "w", source="hub"))
    assert_whole(found.model, IMAGE)
    assert_whole(found.vision_tokenizer, VISION)
    assert (found.revision, found.kind) == (commits[IMAGE], "image")
    assert f"main is now commit {commits[IMAGE]}" in caplog.text
    assert hub.asked(f"/api/models/{VISION}/revision/{VISION_COMMIT}")
    assert not hub.asked(r"README|\.py")
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == [
        ".weights.lock",
        "Emu3.5-Image",
        "Emu3.5-VisionTokenizer",
    ]


def test_second_start_asks_nobody(hub: HubServer, tmp_path: Path) -> None:
    fill(hub)
    first = bring(settings(hub, tmp_path / "w", source="hub"))
    hub.seen.clear()
    begun = time.monotonic()
    assert bring(settings(hub, tmp_path / "w")) == first
    assert time.monotonic() - begun < 1
    assert not hub.seen


def test_shards_come_in_parallel(hub: HubServer, tmp_path: Path) -> None:
    fill(hub)
    hub.rate = 400_000  # bytes/s a connection
    largest = max(len(c) for c in parts()[IMAGE].values())
    total = sum(len(c) for c in wanted(IMAGE).values())
    assert total / hub.rate > 1.3 * largest / hub.rate
    begun = time.monotonic()
    chosen = settings(hub, tmp_path / "w", source="hub", vision_tokenizer=str(tmp_path))
    bring(chosen)
    assert time.monotonic() - begun < total / hub.rate


@pytest.mark.parametrize("above", ["", "./", "checkpoints/"])
@pytest.mark.parametrize("ranges", [True, False])
def test_cdn_tar(hub: HubServer, tmp_path: Path, above: str, ranges: bool) -> None:
    hub.files[TAR], hub.ranges = tar_of(above=above), ranges
    found = bring(settings(hub, tmp_path / "w"))
    assert_whole(found.model, IMAGE)
    assert_whole(found.vision_tokenizer, VISION)
    assert found.revision.startswith("cdn:")
    if ranges:  # only what is needed crosses the line, and headers
        assert hub.sent() < sum(len(c) for r in (IMAGE, VISION) for c in wanted(r).values()) + 8 * 65536
    hub.seen.clear()
    assert bring(settings(hub, tmp_path / "w")) == found
    assert not hub.seen


def test_archive_may_hold_one_folder_only(hub: HubServer, tmp_path: Path) -> None:
    fill(hub)
    hub.files[TAR] = tar_of([IMAGE])
    found = bring(settings(hub, tmp_path / "w"))
    assert_whole(found.model, IMAGE)
    assert_whole(found.vision_tokenizer, VISION)
    assert found.revision.startswith("cdn:")
    assert not hub.asked(f"/{IMAGE}/")
    assert hub.asked(f"/{VISION}/")


def test_vision_tokenizer_alone_is_not_worth_streaming_the_whole_archive(hub: HubServer, tmp_path: Path) -> None:
    fill(hub)
    hub.files[TAR], hub.ranges = tar_of(), False
    bring(settings(hub, tmp_path / "w", source="hub"))
    shutil.rmtree(tmp_path / "w" / "Emu3.5-VisionTokenizer")
    hub.seen.clear()
    assert_whole(bring(settings(hub, tmp_path / "w")).vision_tokenizer, VISION)
    assert len(hub.asked(TAR)) == 1


def test_hub_follows_when_the_cdn_fails(hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(hub)  # and no tar
    assert_whole(bring(settings(hub, tmp_path / "w")).model, IMAGE)
    text = caplog.text
    assert text.index("cdn: bringing") < text.index("404 (not found)") < text.index("hub: bringing")


def test_when_all_fail_each_tells_why(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        bring(settings(hub, tmp_path / "w"))
    lines = str(caught.value).splitlines()
    for folder in ("Emu3.5-Image", "Emu3.5-VisionTokenizer"):
        at = lines.index(f"{folder} could not be had:")
        local, cdn, from_hub = lines[at + 1 : at + 4]
        assert local.startswith("  local: no folder")
        assert cdn.startswith("  cdn: ") and "404" in cdn
        assert from_hub.startswith("  hub: ") and "does not exist there" in from_hub
    assert "EMU_WEIGHTS_DIR" in lines[-1]


@pytest.mark.parametrize(("source", "asked", "unasked"), [("cdn", TAR, "/api/"), ("hub", "/api/", TAR)])
def test_forced_source(hub: HubServer, tmp_path: Path, source: str, asked: str, unasked: str) -> None:
    with pytest.raises(CheckpointError, match=f"EMU_WEIGHTS_SOURCE={source} rules out"):
        bring(settings(hub, tmp_path / "w", source=source))
    assert hub.asked(asked)
    assert not hub.asked(unasked)


def test_forced_local_asks_nobody(hub: HubServer, tmp_path: Path) -> None:
    fill(hub)
    with pytest.raises(CheckpointError, match="local: no folder Emu3.5-Image"):
        bring(settings(hub, tmp_path / "w", source="local"))
    assert not hub.seen


def test_unknown_source_and_checkpoint_are_refused(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"EMU_WEIGHTS_SOURCE='ftp' .* local, cdn, hub"):
        bring(settings(hub, tmp_path / "w", source="ftp"))
    with pytest.raises(CheckpointError, match=r"EMU_CHECKPOINT=imgae is no folder .* mini, image, base"):
        bring(settings(hub, tmp_path / "w", checkpoint="imgae"))
    with pytest.raises(CheckpointError, match="EMU_VISION_TOKENIZER=/none is no folder"):
        bring(settings(hub, tmp_path / "w", vision_tokenizer="/none"))
    assert not hub.seen


class TestBase:
    """Upstream's code and the base model's weights are both called Emu3.5."""

    def test_hub_puts_it_into_a_folder_of_its_own(self, hub: HubServer, tmp_path: Path) -> None:
        commits = fill(hub)
        clone = tmp_path / "w" / "Emu3.5"
        (clone / ".git").mkdir(parents=True)
        (clone / "src.py").write_text("code")
        chosen = settings(hub, tmp_path / "w", checkpoint="base", EMU_WEIGHTS_CDN_URL="")
        found = bring(chosen)
        assert found.model == tmp_path / "w" / "Emu3.5-Base"
        assert (found.revision, found.kind) == (commits[BASE], "base")
        assert_whole(found.model, BASE)
        assert sorted(p.name for p in clone.iterdir()) == [".git", "src.py"]
        assert not hub.asked(TAR)

    def test_weights_in_a_folder_emu35_are_accepted(self, hub: HubServer, tmp_path: Path) -> None:
        for repo, folder in ((BASE, "Emu3.5"), (VISION, FOLDERS[VISION])):
            put(tmp_path / "w" / "below" / folder, wanted(repo))
        found = bring(settings(hub, tmp_path / "w", checkpoint="base"))
        assert (found.model.name, found.kind, found.revision) == ("Emu3.5", "base", "local")
        assert not hub.seen


class TestToken:
    def test_goes_to_the_hub_and_not_to_where_it_redirects(self, hub: HubServer, tmp_path: Path) -> None:
        fill(hub)
        hub.token = "hf_secret"
        bring(settings(hub, tmp_path / "w", source="hub", HF_TOKEN="hf_secret"))
        assert all(s.headers.get("Authorization") == "Bearer hf_secret" for s in hub.asked("/resolve/|/api/"))
        assert hub.asked("/cdn/")
        assert not [s for s in hub.asked("/cdn/") if "Authorization" in s.headers]

    def test_never_goes_to_the_cdn(self, hub: HubServer, tmp_path: Path) -> None:
        hub.files[TAR] = tar_of()
        bring(settings(hub, tmp_path / "w", HF_TOKEN="hf_secret"))
        assert not [s for s in hub.seen if "Authorization" in s.headers]

    def test_missing_or_wrong(self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fill(hub)
        hub.token = "hf_secret"
        monkeypatch.delenv("HF_TOKEN", raising=False)
        with pytest.raises(CheckpointError, match="set HF_TOKEN"):
            bring(settings(hub, tmp_path / "w", source="hub"))
        with pytest.raises(CheckpointError, match="HF_TOKEN is not accepted"):
            bring(settings(hub, tmp_path / "w", source="hub", HF_TOKEN="hf_wrong"))


class TestOffline:
    def test_hub_is_not_asked(self, hub: HubServer, tmp_path: Path) -> None:
        fill(hub)
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
            bring(settings(hub, tmp_path / "w", source="hub", HF_HUB_OFFLINE="1"))
        assert not hub.seen

    def test_the_hubs_own_cache_is_used_where_it_lies(self, hub: HubServer, tmp_path: Path) -> None:
        """The cache is filled by the real client's own snapshot_download, from this server."""
        from huggingface_hub import snapshot_download

        commits = fill(hub)
        chosen = settings(hub, tmp_path / "w", HF_HUB_OFFLINE="1")
        for repo, revision in ((IMAGE, "main"), (VISION, VISION_COMMIT)):
            cache = f"{chosen.environ['HF_HOME']}/hub"
            snapshot_download(repo, revision=revision, cache_dir=cache, endpoint=hub.url, token=False)
        hub.seen.clear()
        found = bring(chosen)
        assert found.revision == found.model.name == commits[IMAGE]
        assert found.vision_tokenizer.name == VISION_COMMIT
        assert not hub.seen
        assert not (found.model / MANIFEST_FILE).exists()


def test_a_mirror_that_lists_names_only(hub: HubServer, tmp_path: Path) -> None:
    """Sizes and hashes then come from each file's headers; an altered file is still found out."""
    fill(hub)
    hub.metadata = False
    hub.faults = [Fault("/cdn/", alter=True, after=1000)]
    assert_whole(bring(settings(hub, tmp_path / "w", source="hub")).model, IMAGE)
    assert [s for s in hub.seen if s.method == "HEAD"]


class TestBranch:
    def test_is_resolved_once_even_if_the_first_start_fails(self, hub: HubServer, tmp_path: Path) -> None:
        commits = fill(hub)
        chosen = settings(hub, tmp_path / "w", source="hub")
        hub.faults = [Fault("model-00002", times=None, status=404)]
        with pytest.raises(CheckpointError, match="404"):
            bring(chosen)
        newer = hub.add_repo(IMAGE, parts()[IMAGE] | {"config.json": b'{"vocab_size": 1}'})
        assert newer != commits[IMAGE]
        hub.faults = []
        assert bring(chosen).revision == commits[IMAGE]

    def test_is_kept_for_a_file_that_is_lost_later(self, hub: HubServer, tmp_path: Path) -> None:
        commits = fill(hub)
        chosen = settings(hub, tmp_path / "w", source="hub")
        model = bring(chosen).model
        (model / "model-00002-of-00003.safetensors").unlink()
        hub.add_repo(IMAGE, parts()[IMAGE] | {"config.json": b'{"vocab_size": 1}'})
        hub.seen.clear()
        assert bring(chosen).revision == commits[IMAGE]
        assert_whole(model, IMAGE)
        assert hub.sent("/cdn/") == len(parts()[IMAGE]["model-00002-of-00003.safetensors"])
        assert not list(model.parent.glob("*.incomplete-*"))


class TestLock:
    @staticmethod
    def lock(tmp_path: Path, commits: dict[str, str], **changed: Entry) -> Path:
        pins = {}
        for repo, commit in commits.items():
            folder = tmp_path / "pins" / repo
            put(folder, wanted(repo))
            files = hash_files(folder, sorted(wanted(repo)))
            pins[repo] = Pin(commit, files={name: changed.get(name.split(".")[0], e) for name, e in files.items()})
        path = tmp_path / "weights.lock"
        write_lock(pins, path)
        return path

    def test_pinned_commit_wins_over_the_branch(self, hub: HubServer, tmp_path: Path) -> None:
        commits = fill(hub)
        hub.add_repo(IMAGE, parts()[IMAGE] | {"config.json": b"{}"})
        found = bring(settings(hub, tmp_path / "w", source="hub"), self.lock(tmp_path, commits))
        assert found.revision == commits[IMAGE]
        assert_whole(found.model, IMAGE)

    def test_hub_that_disagrees_is_refused_before_anything_is_fetched(self, hub: HubServer, tmp_path: Path) -> None:
        commits = fill(hub)
        size = len(parts()[VISION]["model.ckpt"])
        lock = self.lock(tmp_path, commits, model=Entry(size, "0" * 64))
        with pytest.raises(CheckpointError, match="model.ckpt on the hub is not the file of weights.lock"):
            bring(settings(hub, tmp_path / "w", source="hub"), lock)
        assert not hub.asked(f"/{VISION}/resolve/.*model.ckpt")

    @pytest.mark.parametrize("ranges", [True, False])
    def test_archive_that_differs_is_refused_and_the_hub_follows(
        self, hub: HubServer, tmp_path: Path, ranges: bool
    ) -> None:
        commits = fill(hub)
        tar = tar_of()
        at = tar.index(parts()[VISION]["model.ckpt"]) + 100_000
        hub.files[TAR], hub.ranges = tar[:at] + bytes([tar[at] ^ 1]) + tar[at + 1 :], ranges
        found = bring(settings(hub, tmp_path / "w"), self.lock(tmp_path, commits))
        assert_whole(found.vision_tokenizer, VISION)
        assert read_manifest(found.vision_tokenizer).origin == f"{hub.url}/{VISION}"  # type: ignore[union-attr]

    def test_archive_that_agrees_is_used(self, hub: HubServer, tmp_path: Path) -> None:
        commits = fill(hub)
        hub.files[TAR] = tar_of()
        assert bring(settings(hub, tmp_path / "w"), self.lock(tmp_path, commits)).revision.startswith("cdn:")
        assert not hub.asked("/api/")

    def test_known_local_folder_gets_its_commit_and_another_is_told(
        self, hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        lock = self.lock(tmp_path, dict.fromkeys((IMAGE, VISION), "a" * 40), config=Entry(3, "0" * 64))
        for repo in (IMAGE, VISION):
            put(tmp_path / "w" / FOLDERS[repo], wanted(repo))
        found = bring(settings(hub, tmp_path / "w"), lock)
        assert found.revision == "local"
        assert "is not what weights.lock pins: config.json differs" in caplog.text
        shutil.rmtree(tmp_path / "w")
        for repo in (IMAGE, VISION):
            put(tmp_path / "w" / FOLDERS[repo], wanted(repo))
        lock = self.lock(tmp_path, dict.fromkeys((IMAGE, VISION), "a" * 40))
        assert bring(settings(hub, tmp_path / "w"), lock).revision == "a" * 40


class TestLocalFolders:
    def test_named_folder_is_used_as_it_is(self, hub: HubServer, tmp_path: Path) -> None:
        put(tmp_path / "mine" / "model", wanted(IMAGE))
        put(tmp_path / "mine" / "vision", wanted(VISION))
        found = bring(settings(hub, tmp_path / "w", checkpoint=str(tmp_path / "mine" / "model")))
        assert found == Checkpoint(tmp_path / "mine" / "model", tmp_path / "mine" / "vision", "local", "folder")
        put(tmp_path / "other", wanted(VISION))
        chosen = settings(
            hub, tmp_path / "w", checkpoint=str(tmp_path / "mine" / "model"), vision_tokenizer=str(tmp_path / "other")
        )
        assert bring(chosen).vision_tokenizer == tmp_path / "other"
        assert not hub.seen
        assert not (tmp_path / "w").exists()

    def test_named_folder_without_a_vision_tokenizer_gets_one(self, hub: HubServer, tmp_path: Path) -> None:
        fill(hub)
        put(tmp_path / "mine", wanted(IMAGE))
        found = bring(settings(hub, tmp_path / "w", source="hub", checkpoint=str(tmp_path / "mine")))
        assert_whole(found.vision_tokenizer, VISION)
        assert not hub.asked(f"/{IMAGE}/")

    def test_a_hand_placed_folder_gets_a_manifest_once(self, hub: HubServer, tmp_path: Path) -> None:
        for repo in (IMAGE, VISION):
            put(tmp_path / "w" / FOLDERS[repo], wanted(repo))
        found = bring(settings(hub, tmp_path / "w"))
        assert_whole(found.model, IMAGE)
        written = (found.model / MANIFEST_FILE).stat().st_mtime_ns
        assert bring(settings(hub, tmp_path / "w")) == found
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
        found = bring(settings(hub, tmp_path / "w", source="hub"))
        assert_whole(found.model, IMAGE)
        assert hub.sent("/cdn/") == len(lost) + len(good)
        (aside,) = (tmp_path / "w").glob("Emu3.5-Image.incomplete-*")
        assert (aside / "notes.txt").read_bytes() == b"mine"

    def test_archive_completes_what_it_brought_itself(self, hub: HubServer, tmp_path: Path) -> None:
        hub.files[TAR] = tar_of()
        model = bring(settings(hub, tmp_path / "w")).model
        (model / "model-00002-of-00003.safetensors").unlink()
        hub.seen.clear()
        assert_whole(bring(settings(hub, tmp_path / "w")).model, IMAGE)
        shard = len(parts()[IMAGE]["model-00002-of-00003.safetensors"])
        assert hub.sent() < shard + len(wanted(IMAGE)["config.json"]) + 8 * 65536

    def test_a_second_name_is_not_a_problem(self, hub: HubServer, tmp_path: Path) -> None:
        """An incomplete folder at the top does not hide a complete one below."""
        put(tmp_path / "w" / FOLDERS[IMAGE], {"config.json": b"{}"})
        for repo in (IMAGE, VISION):
            put(tmp_path / "w" / "unpacked" / FOLDERS[repo], wanted(repo))
        assert bring(settings(hub, tmp_path / "w")).model == tmp_path / "w" / "unpacked" / FOLDERS[IMAGE]
        assert not hub.seen


def test_progress_is_told_and_ends_at_the_total(hub: HubServer, tmp_path: Path) -> None:
    fill(hub)
    hub.rate = 1_000_000
    told: list[tuple[int, int]] = []
    chosen = settings(hub, tmp_path / "w", source="hub")
    resolve(chosen, patience=HASTY, lock_file=NO_LOCK, on_progress=lambda done, total: told.append((done, total)))
    vision = sum(len(c) for c in wanted(VISION).values())
    assert told[-1] == (vision, vision)
    assert any(0 < done < total for done, total in told)


def test_weights_folder_that_cant_be_made(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "w").write_text("a file")
    with pytest.raises(CheckpointError, match="can't write to the weights folder .* EMU_WEIGHTS_DIR"):
        bring(settings(hub, tmp_path / "w"))
    assert not hub.seen


def put(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def test_json_of_the_manifest_is_plain(hub: HubServer, tmp_path: Path) -> None:
    fill(hub)
    model = bring(settings(hub, tmp_path / "w", source="hub")).model
    data = json.loads((model / MANIFEST_FILE).read_text())
    assert data["origin"] == f"{hub.url}/{IMAGE}"
    assert os.path.getsize(model / "config.json") == data["files"]["config.json"]["size"]
