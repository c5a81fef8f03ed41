"""EMU_BACKEND and EMU_CHECKPOINT on the real path: from the environment to pictures."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from _models.tiny import STORYTELLER, TALKER, TinyFolders, make_tiny, small_defaults
from hub_server import HubServer
from weights_kit import BASE, IMAGE, VISION, assert_whole, fill, settings
from weights_kit import parts as contents

from emu_cog.errors import CheckpointError, InputError
from emu_cog.events import Event, Finished, Picture, Progress, RunStats
from emu_cog.pipeline import Pipeline
from emu_cog.prompt.segments import Text
from emu_cog.request import Request
from emu_cog.service import load
from emu_cog.settings import Settings
from emu_cog.upstream.pipeline import UpstreamPipeline
from emu_cog.weights import store
from tests.conftest import photo
from tests.upstream_kit import make_repository

BOAT = Request(prompt="a red boat", size=(3, 4), seed=3)


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="emu_cog")


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def pictures(events: list[Event]) -> list[Picture]:
    return [event for event in events if isinstance(event, Picture)]


class TestCheckpoint:
    def test_image_is_downloaded_and_loaded(self, hub: HubServer, tmp_path: Path) -> None:
        commits = fill(hub)
        pipeline = load(replace(settings(hub, tmp_path / "w", source="hub"), device="cpu"))
        assert isinstance(pipeline, Pipeline)
        assert_whole(tmp_path / "w" / "Emu3.5-Image", IMAGE)
        assert_whole(tmp_path / "w" / "Emu3.5-VisionTokenizer", VISION)
        picture = pictures(list(pipeline.stream(BOAT)))[0]
        assert picture.image.size == (64, 48)
        assert picture.settings["model"] == commits[IMAGE]
        assert picture.settings["guidance_scale"] == 5.0

    def test_base_has_the_base_models_guidance(self, hub: HubServer, tmp_path: Path) -> None:
        fill(hub)
        pipeline = load(replace(settings(hub, tmp_path / "w", source="hub", checkpoint="base"), device="cpu"))
        assert_whole(tmp_path / "w" / "Emu3.5-Base", BASE)
        assert pictures(list(pipeline.stream(BOAT)))[0].settings["guidance_scale"] == 2.0

    def test_mini_is_the_model_in_the_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = make_tiny(tmp_path / "mini", seed=4)
        monkeypatch.setattr(store, "MINIATURE", tmp_path / "mini")
        found = store.resolve(Settings(weights_dir=tmp_path / "w"))
        assert (found.model, found.vision_tokenizer) == (made.model, made.vision)
        assert (found.revision, found.kind) == ("mini", "mini")
        assert not (tmp_path / "w").exists()

    def test_another_vision_tokenizer_can_be_named(self, tmp_path: Path) -> None:
        a, b = make_tiny(tmp_path / "a"), make_tiny(tmp_path / "b")
        chosen = Settings(checkpoint=str(a.model), vision_tokenizer=str(b.vision), weights_dir=tmp_path / "w")
        assert store.resolve(chosen).vision_tokenizer == b.vision


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"backend": "vllm"}, "EMU_BACKEND='vllm' is not known, accepted are native, upstream"),
        ({"backend": "upstream", "quantize": "int8"}, "EMU_QUANTIZE=int8 with EMU_BACKEND=upstream"),
        ({"device_map": "balanced"}, "EMU_DEVICE_MAP='balanced' is not known, accepted is auto"),
        ({"checkpoint": "/nowhere"}, "EMU_CHECKPOINT=/nowhere is no folder.*mini, mini-flash, image, base"),
        ({"weights_source": "ftp"}, "EMU_WEIGHTS_SOURCE='ftp' is not known, accepted are local, cdn, hub"),
    ],
)
def test_unknown_settings_are_refused_with_what_is_accepted(tmp_path: Path, changes: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        load(replace(Settings(weights_dir=tmp_path, device="cpu"), **changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_repository(tmp_path_factory.mktemp("upstream") / "repository")


@pytest.fixture(scope="module")
def teller(tmp_path_factory: pytest.TempPathFactory) -> TinyFolders:
    folder = tmp_path_factory.mktemp("teller")
    return make_tiny(folder, seed=7, logit_bias=STORYTELLER, defaults=small_defaults(64 * 64))


def upstream_settings(folders: TinyFolders, repository: tuple[str, str], place: Path) -> Settings:
    url, commit = repository
    return Settings(
        checkpoint=str(folders.model),
        vision_tokenizer=str(folders.vision),
        weights_dir=place,
        backend="upstream",
        upstream_url=url,
        upstream_commit=commit,
        device="cpu",
    )


@pytest.fixture(scope="module")
def pipeline(
    teller: TinyFolders, repository: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> UpstreamPipeline:
    path = list(sys.path)
    loaded = load(upstream_settings(teller, repository, tmp_path_factory.mktemp("weights")))
    assert isinstance(loaded, UpstreamPipeline)
    assert sys.path == path
    assert not [name for name in sys.modules if name == "src" or name.startswith("src.")]
    return loaded


class TestUpstream:
    """The upstream backend over a repository that stands in for upstream's."""

    def test_one_picture_with_progress_and_stats(self, pipeline: UpstreamPipeline) -> None:
        reported: list[Progress] = []
        request = Request(prompt="a fox", size=(3, 4), seed=5)
        events = list(pipeline.stream(request, on_progress=reported.append))
        picture = pictures(events)[0]
        assert picture.image.size == (64, 48)
        assert str(picture.settings["model"]).endswith("upstream 8fcf1da")
        assert (len(picture.codes), len(picture.codes[0])) == (3, 4)
        done = [progress.done for progress in reported]
        assert done == sorted(set(done))
        assert (done[0], done[1], done[-1]) == (0.0, 0.02, 1.0)
        assert len(done) == 2 + 3 * 4
        assert isinstance(events[-2], Finished)
        stats = events[-1]
        assert isinstance(stats, RunStats)
        assert (stats.seed, stats.pictures, stats.size) == (5, 1, (64, 48))
        assert stats.tokens >= 12

    def test_a_seed_is_a_picture(self, pipeline: UpstreamPipeline) -> None:
        codes = [pictures(list(pipeline.stream(replace(BOAT, seed=seed))))[0].codes for seed in (1, 1, 2)]
        assert codes[0] == codes[1] != codes[2]

    def test_a_story_comes_in_reading_order(self, pipeline: UpstreamPipeline) -> None:
        reported: list[Progress] = []
        request = Request(prompt="a fox", task="story", size=(3, 4), seed=16, max_new_tokens=170)
        events = list(pipeline.stream(request, on_progress=reported.append))
        kinds = [event.kind if isinstance(event, Text) else type(event).__name__ for event in events]
        assert kinds[0] == "global_reasoning"
        assert kinds.index("image_reasoning") < kinds.index("Picture")
        assert kinds[-2:] == ["Finished", "RunStats"]
        done = [progress.done for progress in reported]
        assert done == sorted(set(done))
        assert (done[0], done[-1]) == (0.0, 1.0)

    def test_at_top_k_1_it_makes_what_native_makes(self, pipeline: UpstreamPipeline, teller: TinyFolders) -> None:
        native = Pipeline.load(teller.model, teller.vision, device="cpu")
        for request in (
            Request(prompt="a fox", size=(3, 4), image_top_k=1, text_top_k=1),
            Request(prompt="a fox", task="x2i", images=(photo(1),), image_top_k=1, text_top_k=1),
        ):
            ours, theirs = (pictures(list(p.stream(request)))[0] for p in (native, pipeline))
            assert ours.codes == theirs.codes

    @pytest.mark.parametrize(
        ("request_", "says"),
        [
            (Request(prompt="a", num_outputs=2), "num_outputs=2: upstream's code makes one"),
            (Request(prompt="a <|image end|>"), r"<\|image end\|> in it, .*=native can take it as text"),
            (Request(prompt="a <|IMAGE|>"), "IMAGE"),
            (Request(prompt="a", task="x2i", images=(photo(1),), aspect_ratio="model"), "set aspect_ratio to auto"),
            (
                Request(prompt="a", task="x2i", images=(photo(1), photo(2)), aspect_ratio="9:16"),
                "always makes the last one's size",
            ),
        ],
    )
    def test_what_upstream_cant_do_is_refused(self, pipeline: UpstreamPipeline, request_: Request, says: str) -> None:
        with pytest.raises(InputError, match=says) as refused:
            next(pipeline.stream(request_))
        assert "EMU_BACKEND=native can" in str(refused.value)

    def test_what_on_progress_raises_ends_the_request(self, pipeline: UpstreamPipeline) -> None:
        """This is how a cancel reaches it: it yields nothing before all is made."""

        def cancelled(progress: Progress) -> None:
            if progress.done > 0.5:
                raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            list(pipeline.stream(BOAT, on_progress=cancelled))
        assert pictures(list(pipeline.stream(BOAT)))

    def test_no_picture_is_an_error_not_silence(self, repository: tuple[str, str], tmp_path: Path) -> None:
        talker = make_tiny(tmp_path / "talker", logit_bias=TALKER, defaults=small_defaults(64 * 64), context=700)
        pipeline = load(upstream_settings(talker, repository, tmp_path / "w"))
        with pytest.raises(RuntimeError, match="without a whole picture"):
            list(pipeline.stream(Request(prompt="a", size=(2, 2), max_new_tokens=5)))

    def test_a_mirror_without_the_pinned_commit_is_refused(
        self, teller: TinyFolders, repository: tuple[str, str], tmp_path: Path
    ) -> None:
        chosen = Settings.from_env(
            {
                "EMU_BACKEND": "upstream",
                "EMU_UPSTREAM_URL": repository[0],
                "EMU_CHECKPOINT": str(teller.model),
                "EMU_WEIGHTS_DIR": str(tmp_path / "w"),
            }
        )
        with pytest.raises(CheckpointError, match="8fcf1da48f9c5252fe0a0b8dc842e07b6efcd745"):
            load(chosen)

    def test_the_memory_budget_is_checked_and_logged_before_anything_is_loaded(
        self, teller: TinyFolders, repository: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        chosen = upstream_settings(teller, repository, tmp_path / "w")
        with pytest.raises(InputError, match=r"not enough memory: weights .* caches .*\(1 output\(s\) of 10+ tokens\)"):
            load(replace(chosen, max_context=10**12))
        load(chosen)
        assert "memory: weights" in caplog.text

    def test_native_needs_no_clone(self, teller: TinyFolders, tmp_path: Path) -> None:
        chosen = upstream_settings(teller, ("file:///nowhere", "0" * 40), tmp_path / "w")
        load(replace(chosen, backend="native"))
        assert not (tmp_path / "w").exists()


def test_the_kits_checkpoint_has_no_defaults_of_its_own() -> None:
    """Else the test of the base model's guidance could not fail."""
    assert "defaults.json" not in contents()[BASE]
