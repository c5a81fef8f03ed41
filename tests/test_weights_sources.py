"""Where weights come from: the order of the sources, what each gives, and what the environment chooses."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import Fault, HubServer
from weights_kit import (
    BASE,
    FOLDERS,
    HASTY,
    IMAGE,
    NO_PINS,
    TAR,
    VISION,
    VISION_COMMIT,
    assert_whole,
    fill,
    put,
    settings,
    tar_of,
    wanted,
)

from emu_cog.errors import CheckpointError, InputError
from emu_cog.settings import Settings
from emu_cog.weights.manifest import MANIFEST_FILE
from emu_cog.weights.store import Checkpoint, resolve

pytestmark = pytest.mark.usefixtures("log_captured")


@pytest.fixture
def hub(bare_hub: HubServer) -> HubServer:
    return bare_hub


def resolved(chosen: Settings, pins: Path = NO_PINS) -> Checkpoint:
    return resolve(replace(chosen, weights_pins=pins), patience=HASTY)


def test_hub_brings_both_folders_and_only_what_is_needed(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commits = fill(hub)
    found = resolved(settings(hub, tmp_path / "w", source="hub"))
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
    first = resolved(settings(hub, tmp_path / "w", source="hub"))
    hub.seen.clear()
    assert resolved(settings(hub, tmp_path / "w")) == first
    assert not hub.seen


def test_shards_come_in_parallel(hub: HubServer, tmp_path: Path) -> None:
    fill(hub)
    hub.rate = 3_000_000  # bytes per second and connection
    most = 0

    def count(sent: int) -> None:
        nonlocal most
        most = max(most, sum(0 < s.sent < int(s.headers["Range"].rpartition("-")[2]) for s in hub.asked("/cdn/")))

    hub.on_bytes = count
    resolved(settings(hub, tmp_path / "w", source="hub", vision_tokenizer=str(tmp_path)))
    assert most >= 3


@pytest.mark.parametrize("above", ["", "./", "checkpoints/"])
@pytest.mark.parametrize("ranges", [True, False])
def test_cdn_tar(hub: HubServer, tmp_path: Path, above: str, ranges: bool) -> None:
    hub.files[TAR], hub.ranges = tar_of(above=above), ranges
    found = resolved(settings(hub, tmp_path / "w"))
    assert_whole(found.model, IMAGE)
    assert_whole(found.vision_tokenizer, VISION)
    assert found.revision.startswith("cdn:")
    if ranges:  # only what is needed crosses the line, and headers
        assert hub.sent() < sum(len(c) for r in (IMAGE, VISION) for c in wanted(r).values()) + 8 * 65536
    hub.seen.clear()
    assert resolved(settings(hub, tmp_path / "w")) == found
    assert not hub.seen


def test_archive_may_hold_one_folder_only(hub: HubServer, tmp_path: Path) -> None:
    fill(hub)
    hub.files[TAR] = tar_of([IMAGE])
    found = resolved(settings(hub, tmp_path / "w"))
    assert_whole(found.model, IMAGE)
    assert_whole(found.vision_tokenizer, VISION)
    assert found.revision.startswith("cdn:")
    assert not hub.asked(f"/{IMAGE}/")
    assert hub.asked(f"/{VISION}/")


def test_vision_tokenizer_alone_is_not_worth_streaming_the_whole_archive(hub: HubServer, tmp_path: Path) -> None:
    fill(hub)
    hub.files[TAR], hub.ranges = tar_of(), False
    resolved(settings(hub, tmp_path / "w", source="hub"))
    shutil.rmtree(tmp_path / "w" / "Emu3.5-VisionTokenizer")
    hub.seen.clear()
    assert_whole(resolved(settings(hub, tmp_path / "w")).vision_tokenizer, VISION)
    assert len(hub.asked(TAR)) == 1


def test_hub_follows_when_the_cdn_fails(hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(hub)  # and no tar
    assert_whole(resolved(settings(hub, tmp_path / "w")).model, IMAGE)
    text = caplog.text
    assert text.index("cdn: downloading") < text.index("404 (not found)") < text.index("hub: downloading")


def test_when_all_fail_each_tells_why(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolved(settings(hub, tmp_path / "w"))
    lines = str(caught.value).splitlines()
    for folder in ("Emu3.5-Image", "Emu3.5-VisionTokenizer"):
        at = lines.index(f"{folder} could not be found or downloaded:")
        local, cdn, from_hub = lines[at + 1 : at + 4]
        assert local.startswith("  local: no folder")
        assert re.match("  cdn: .*404", cdn)
        assert re.match("  hub: .*does not exist there", from_hub)
    assert "EMU_WEIGHTS_DIR" in lines[-1]


@pytest.mark.parametrize(("source", "asked", "unasked"), [("cdn", TAR, "/api/"), ("hub", "/api/", TAR)])
def test_forced_source(hub: HubServer, tmp_path: Path, source: str, asked: str, unasked: str) -> None:
    with pytest.raises(CheckpointError, match=f"EMU_WEIGHTS_SOURCE={source} rules out"):
        resolved(settings(hub, tmp_path / "w", source=source))
    assert hub.asked(asked)
    assert not hub.asked(unasked)


def test_forced_local_asks_nobody(hub: HubServer, tmp_path: Path) -> None:
    fill(hub)
    with pytest.raises(CheckpointError, match="local: no folder Emu3.5-Image"):
        resolved(settings(hub, tmp_path / "w", source="local"))
    assert not hub.seen


def test_unknown_source_and_checkpoint_are_refused(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"EMU_WEIGHTS_SOURCE='ftp' .* local, cdn, hub"):
        resolved(settings(hub, tmp_path / "w", source="ftp"))
    with pytest.raises(InputError, match=r"EMU_CHECKPOINT=imgae is no folder .* mini, mini-flash, image, base"):
        resolved(settings(hub, tmp_path / "w", checkpoint="imgae"))
    with pytest.raises(InputError, match="EMU_VISION_TOKENIZER=/none is no folder"):
        resolved(settings(hub, tmp_path / "w", vision_tokenizer="/none"))
    assert not hub.seen


class TestBase:
    """Upstream's code and the base model's weights are both called Emu3.5."""

    def test_hub_puts_it_into_a_folder_of_its_own(self, hub: HubServer, tmp_path: Path) -> None:
        commits = fill(hub)
        clone = tmp_path / "w" / "Emu3.5"
        (clone / ".git").mkdir(parents=True)
        (clone / "src.py").write_text("code")
        chosen = settings(hub, tmp_path / "w", checkpoint="base", EMU_WEIGHTS_CDN_URL="")
        found = resolved(chosen)
        assert found.model == tmp_path / "w" / "Emu3.5-Base"
        assert (found.revision, found.kind) == (commits[BASE], "base")
        assert_whole(found.model, BASE)
        assert sorted(p.name for p in clone.iterdir()) == [".git", "src.py"]
        assert not hub.asked(TAR)

    def test_weights_in_a_folder_emu35_are_accepted(self, hub: HubServer, tmp_path: Path) -> None:
        for repo, folder in ((BASE, "Emu3.5"), (VISION, FOLDERS[VISION])):
            put(tmp_path / "w" / "below" / folder, wanted(repo))
        found = resolved(settings(hub, tmp_path / "w", checkpoint="base"))
        assert (found.model.name, found.kind, found.revision) == ("Emu3.5", "base", "local")
        assert not hub.seen


class TestToken:
    def test_goes_to_the_hub_and_not_to_where_it_redirects(self, hub: HubServer, tmp_path: Path) -> None:
        fill(hub)
        hub.token = "hf_secret"
        resolved(settings(hub, tmp_path / "w", source="hub", HF_TOKEN="hf_secret"))
        assert all(s.headers.get("Authorization") == "Bearer hf_secret" for s in hub.asked("/resolve/|/api/"))
        assert hub.asked("/cdn/")
        assert not [s for s in hub.asked("/cdn/") if "Authorization" in s.headers]

    def test_never_goes_to_the_cdn(self, hub: HubServer, tmp_path: Path) -> None:
        hub.files[TAR] = tar_of()
        resolved(settings(hub, tmp_path / "w", HF_TOKEN="hf_secret"))
        assert not [s for s in hub.seen if "Authorization" in s.headers]

    def test_missing_or_wrong(self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fill(hub)
        hub.token = "hf_secret"
        monkeypatch.delenv("HF_TOKEN", raising=False)
        with pytest.raises(CheckpointError, match="set HF_TOKEN"):
            resolved(settings(hub, tmp_path / "w", source="hub"))
        with pytest.raises(CheckpointError, match="HF_TOKEN is not accepted"):
            resolved(settings(hub, tmp_path / "w", source="hub", HF_TOKEN="hf_wrong"))


class TestOffline:
    def test_hub_is_not_asked(self, hub: HubServer, tmp_path: Path) -> None:
        fill(hub)
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
            resolved(settings(hub, tmp_path / "w", source="hub", HF_HUB_OFFLINE="1"))
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
        found = resolved(chosen)
        assert found.revision == found.model.name == commits[IMAGE]
        assert found.vision_tokenizer.name == VISION_COMMIT
        assert not hub.seen
        assert not (found.model / MANIFEST_FILE).exists()


def test_a_mirror_that_lists_names_only(hub: HubServer, tmp_path: Path) -> None:
    """Sizes and hashes then come from each file's headers; an altered file is still found out."""
    fill(hub)
    hub.metadata = False
    hub.faults = [Fault("/cdn/", alter=True, after=1000)]
    assert_whole(resolved(settings(hub, tmp_path / "w", source="hub")).model, IMAGE)
    assert [s for s in hub.seen if s.method == "HEAD"]


def test_progress_is_reported_and_ends_at_the_total(hub: HubServer, tmp_path: Path) -> None:
    fill(hub)
    hub.rate = 2_000_000
    reported: list[tuple[int, int]] = []
    chosen = settings(hub, tmp_path / "w", source="hub")
    resolve(chosen, patience=HASTY, on_progress=lambda done, total: reported.append((done, total)))
    vision = sum(len(c) for c in wanted(VISION).values())
    assert reported[-1] == (vision, vision)
    assert any(0 < done < total for done, total in reported)


def test_weights_folder_that_cant_be_made(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "w").write_text("a file")
    with pytest.raises(CheckpointError, match="can't write to the weights folder .* EMU_WEIGHTS_DIR"):
        resolved(settings(hub, tmp_path / "w"))
    assert not hub.seen
