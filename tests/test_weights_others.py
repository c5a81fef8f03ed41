"""Weights that others post-trained, U0's and lxazjk's: how they come, and what they can't do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import HubServer
from weights_kit import (
    FLASH,
    FOLDERS,
    HASTY,
    IMAGE,
    TAR,
    U0,
    U0_FLASH,
    VISION,
    assert_whole,
    fill,
    put,
    settings,
    wanted,
)

from emu_cog.errors import CheckpointError, InputError
from emu_cog.events import Picture
from emu_cog.pipeline import Pipeline
from emu_cog.prompt.tokenizer import FILES
from emu_cog.request import Request
from emu_cog.service import load
from emu_cog.settings import Settings
from emu_cog.weights.manifest import MANIFEST_FILE, Entry, Pin, hash_files, write_pins
from emu_cog.weights.pins import verify
from emu_cog.weights.store import Checkpoint, resolve

pytestmark = pytest.mark.usefixtures("log_captured")
EMU3_TOKENIZER, UNIS_TOKENIZER = FILES


@pytest.fixture
def hub(bare_hub: HubServer) -> HubServer:
    fill(bare_hub)
    return bare_hub


def resolved(chosen: Settings) -> Checkpoint:
    return resolve(chosen, patience=HASTY)


@pytest.mark.parametrize(("checkpoint", "repo"), [("u0", U0), ("u0-flash", U0_FLASH)])
def test_u0s_weights_come_with_their_tokenizer(hub: HubServer, tmp_path: Path, checkpoint: str, repo: str) -> None:
    """And not from the default CDN, which has the image model only."""
    chosen = settings(hub, tmp_path / "w", checkpoint=checkpoint, EMU_WEIGHTS_CDN_URL="")
    found = resolved(chosen)
    assert (found.kind, found.guidance, found.tokenizer) == (checkpoint, checkpoint, None)
    assert found.model == tmp_path / "w" / FOLDERS[repo]
    assert_whole(found.model, repo)
    assert_whole(found.vision_tokenizer, VISION)
    assert {p.name for p in found.model.iterdir()} >= set(UNIS_TOKENIZER)
    assert not hub.asked(f"{TAR}|{IMAGE}/|README|meta.json")
    hub.seen.clear()
    assert resolved(chosen) == found
    assert not hub.seen


def test_lxazjks_weights_take_the_image_models_tokenizer(hub: HubServer, tmp_path: Path) -> None:
    """Two files of 70 GB, and a second start asks nobody."""
    chosen = settings(hub, tmp_path / "w", source="hub", checkpoint="flash")
    found = resolved(chosen)
    assert (found.kind, found.model) == ("flash", tmp_path / "w" / FOLDERS[FLASH])
    assert_whole(found.model, FLASH)
    assert found.tokenizer == tmp_path / "w" / "Emu3.5-Tokenizer"
    assert {p.name for p in found.tokenizer.iterdir()} == {*EMU3_TOKENIZER, MANIFEST_FILE}
    assert not hub.asked(f"/{IMAGE}/resolve/.*safetensors")
    hub.seen.clear()
    assert resolved(chosen) == found
    assert not hub.seen


def test_an_image_model_that_is_here_lends_its_tokenizer(hub: HubServer, tmp_path: Path) -> None:
    """No manifest of two files may be written into its folder: it would count as incomplete from then on."""
    put(tmp_path / "w" / FOLDERS[IMAGE], wanted(IMAGE))
    found = resolved(settings(hub, tmp_path / "w", source="hub", checkpoint="flash"))
    assert found.tokenizer == tmp_path / "w" / FOLDERS[IMAGE]
    assert not hub.asked(f"/{IMAGE}/")
    assert not (found.tokenizer / MANIFEST_FILE).exists()
    assert resolved(settings(hub, tmp_path / "w", source="hub")).model == found.tokenizer
    assert_whole(found.tokenizer, IMAGE)
    assert not hub.asked(f"/{IMAGE}/")


def test_pins_of_the_image_model_hold_for_its_tokenizer(hub: HubServer, tmp_path: Path) -> None:
    """They name shards as well, which the tokenizer's folder does not have."""
    put(tmp_path / "pinned", wanted(IMAGE))
    files = hash_files(tmp_path / "pinned", sorted(wanted(IMAGE)))
    commit = hub.add_repo(IMAGE, wanted(IMAGE))

    def chosen(place: str, files: dict[str, Entry]) -> Settings:
        write_pins({IMAGE: Pin(commit, files=files)}, tmp_path / f"{place}.json")
        given = settings(hub, tmp_path / place, source="hub", checkpoint="flash")
        return replace(given, weights_pins=tmp_path / f"{place}.json")

    assert resolved(chosen("good", files)).tokenizer is not None
    files |= {EMU3_TOKENIZER[0]: Entry(files[EMU3_TOKENIZER[0]].size, "0" * 64)}
    with pytest.raises(CheckpointError, match=r"Emu3.5-Tokenizer could not be found.*[\s\S]*SHA-256"):
        resolved(chosen("bad", files))


def test_they_are_verified(hub: HubServer, tmp_path: Path) -> None:
    chosen = settings(hub, tmp_path / "w", source="hub", checkpoint="flash")
    shard = next(p for p in resolved(chosen).model.glob("*.safetensors"))
    assert [verdict.problems for verdict in verify(chosen)] == [(), ()]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert [len(verdict.problems) for verdict in verify(chosen)] == [1, 0]


@pytest.mark.parametrize(
    ("repo", "folder", "kind"),
    [
        (U0, "mine", "u0"),
        (U0_FLASH, "mine", "u0-flash"),
        (FLASH, "mine", "flash"),
        (FLASH, "Emu3.5-Image-Flash", "flash"),
        (IMAGE, "mine", "folder"),
    ],
)
def test_a_folder_is_known_by_its_name_or_by_what_made_it(
    hub: HubServer, tmp_path: Path, repo: str, folder: str, kind: str
) -> None:
    put(tmp_path / folder, wanted(repo))
    put(tmp_path / "vision", wanted(VISION))
    found = resolved(settings(hub, tmp_path / "w", source="hub", checkpoint=str(tmp_path / folder)))
    assert (found.kind, found.revision) == (kind, "local")
    assert (found.tokenizer is None) == (repo != FLASH)
    assert found.guidance == ("image" if kind == "folder" else kind)


def test_u0_draws_and_refuses_sequences_before_any_work(hub: HubServer, tmp_path: Path) -> None:
    chosen = replace(settings(hub, tmp_path / "w", source="hub", checkpoint="u0"), device="cpu")
    pipeline = load(chosen)
    assert isinstance(pipeline, Pipeline)
    request = Request(prompt="boat", size=(2, 3), seed=1, max_new_tokens=4)
    (picture,) = [event for event in pipeline.stream(request) if isinstance(event, Picture)]
    assert picture.settings["guidance_scale"] == 3.0
    with pytest.raises(InputError, match="task_type story can't be done by u0 models, which do t2i and x2i: set EMU_C"):
        pipeline.prepare(Request(prompt="boat", task="story"))


@pytest.mark.parametrize(
    ("checkpoint", "backend"),
    [("flash", "native"), ("u0-flash", "native"), ("flash", "upstream"), ("u0-flash", "upstream"), ("u0", "upstream")],
)
def test_what_cannot_be_run_is_refused_before_anything_is_downloaded(
    hub: HubServer, tmp_path: Path, checkpoint: str, backend: str
) -> None:
    chosen = replace(settings(hub, tmp_path / "w", checkpoint=checkpoint), device="cpu", backend=backend)
    says = f"EMU_CHECKPOINT={checkpoint} .*with EMU_BACKEND=upstream: "
    if backend == "native":
        chosen, says = replace(chosen, device_map="auto"), f"EMU_DEVICE_MAP=auto can't be used with {checkpoint} models"
    with pytest.raises(InputError, match=says):
        load(chosen)
    assert not hub.seen
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("checkpoint", ["flash", "u0-flash", "a folder"])
def test_weights_that_draw_by_diagonals_draw(checkpoint: str, hub: HubServer, tmp_path: Path) -> None:
    chosen = settings(hub, tmp_path / "w", source="hub", checkpoint=checkpoint)
    if checkpoint == "a folder":
        put(tmp_path / "mine", wanted(U0_FLASH))
        put(tmp_path / "vision", wanted(VISION))
        chosen = settings(hub, tmp_path / "w", source="local", checkpoint=str(tmp_path / "mine"))
    pipeline = load(replace(chosen, device="cpu"))
    events = pipeline.stream(Request(prompt="boat", size=(2, 3), seed=1))
    assert [event.image.size for event in events if isinstance(event, Picture)] == [(48, 32)]
