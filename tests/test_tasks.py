"""What models of each kind do, and how: TABLES in prompt/tasks.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from emu_cog.errors import CheckpointError, InputError
from emu_cog.prompt import tasks
from emu_cog.prompt.tasks import ModelDefaults
from emu_cog.request import TASKS, Request

U0 = ModelDefaults(kind="u0")
FLASH = ModelDefaults(kind="flash")
DIAGONAL = [kind for kind, table in tasks.TABLES.items() if all(task.diagonal for task in table.values())]
PHOTO = Image.new("RGB", (400, 300))


def test_every_kind_has_guidance_for_all_that_it_does() -> None:
    assert DIAGONAL == ["flash", "u0-flash"]
    for kind, table in tasks.TABLES.items():
        assert set(table) <= set(TASKS)
        for name, task in table.items():
            assert (task.name, task.guidance[kind] >= 2.0) == (name, True)
            assert task.diagonal == (kind in DIAGONAL)
    assert list(tasks.TABLES["u0"]) == list(tasks.TABLES["u0-flash"]) == ["t2i", "x2i"]
    assert list(tasks.TABLES["flash"]) == ["t2i"]


def test_u0s_prompts() -> None:
    """Source: xr_u0_ar/task_prompts.py. Without the question, t2i keeps its own sentence and x2i names no task."""
    t2i, x2i = tasks.task_of("t2i", "u0"), tasks.task_of("x2i", "u0")
    assert t2i.before() == "You are a helpful assistant for t2i task. USER: "
    assert t2i.unconditional == (t2i.before(), " ASSISTANT: ")
    assert x2i.before() == x2i.unconditional[0] == "You are a helpful assistant. USER: "
    assert x2i.images_first


def test_emu35s_prompts_are_as_they_were() -> None:
    assert all(task.unconditional == tasks.UNCONDITIONAL and task.named for task in tasks.TABLE.values())
    assert tasks.task_of("x2i", "image").before() == "You are a helpful assistant for x2i task. USER: "


def test_defaults_by_kind() -> None:
    drawn, edited = (
        tasks.plan(Request(prompt="-"), U0),
        tasks.plan(Request(prompt="-", task="x2i", images=(PHOTO,)), U0),
    )
    assert (drawn.guidance, drawn.size, drawn.image.top_k) == (3.0, (64, 64), 5120)
    assert (edited.guidance, edited.size) == (3.0, (55, 74))
    fast = tasks.plan(Request(prompt="-"), FLASH)
    assert (fast.guidance, fast.size, fast.image.top_k) == (5.0, (32, 32), 5120)
    assert tasks.plan(Request(prompt="-", guidance_scale=2.5), FLASH).guidance == 2.5


@pytest.mark.parametrize(
    ("task", "kind", "does"),
    [("story", "u0", "t2i and x2i"), ("x2i", "flash", "t2i"), ("vla", "u0-flash", "t2i and x2i")],
)
def test_what_a_kind_does_not_do_is_refused(task: str, kind: str, does: str) -> None:
    request = Request(prompt="-", task=task, images=(PHOTO,))
    with pytest.raises(InputError, match=f"task_type {task} can't be done by {kind} models, which do {does}: set EMU_"):
        tasks.plan(request, ModelDefaults(kind=kind))


@pytest.mark.parametrize("kind", DIAGONAL)
def test_a_picture_by_diagonals_has_a_size_from_the_start(kind: str) -> None:
    with pytest.raises(InputError, match=f"aspect_ratio model can't be used with {kind} models"):
        tasks.plan(Request(prompt="-", aspect_ratio="model"), ModelDefaults(kind=kind))
    assert tasks.plan(Request(prompt="-", aspect_ratio="model"), U0).size is None


def test_another_size_than_the_trained_one_is_warned_of() -> None:
    assert "other sizes" not in tasks.plan(Request(prompt="-"), FLASH).summary()
    other = tasks.plan(Request(prompt="-", resolution="1024"), FLASH)
    assert other.size == (64, 64)
    assert "trained on 512x512 pixels alone: other sizes may look worse" in other.summary()
    assert "other sizes" not in tasks.plan(Request(prompt="-", resolution="512"), U0).summary()


def test_a_folder_names_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "defaults.json"
    path.write_text(json.dumps({"kind": "u0-flash"}))
    assert ModelDefaults.read(tmp_path, kind="image").kind == "u0-flash"
    path.write_text(json.dumps({"kind": "u1"}))
    with pytest.raises(CheckpointError, match="kind is 'u1', accepted are image, base, flash, u0, u0-flash"):
        ModelDefaults.read(tmp_path)
