"""README.md and CLAUDE.md against the code: what they list is there, and what is there is listed."""

from __future__ import annotations

import os
import re

import pytest

from emu_cog.prompt import tasks
from emu_cog.settings import Settings
from scripts.mini import show
from tests.conftest import ROOT

README, GUIDE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CLAUDE.md"))
SOURCES = [*ROOT.rglob("emu_cog/**/*.py"), *(p for p in ROOT.glob("scripts/*") if p.is_file()), ROOT / "predict.py"]


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table under `heading`, without its head."""
    part = text.split(f"\n{heading}\n", 1)[1].split("\n#", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_the_readme_lists_every_variable_that_is_read() -> None:
    read = {name for path in SOURCES for name in re.findall(r"\bEMU_[A-Z_]*[A-Z]\b", path.read_text())}
    read |= {
        f"EMU_{field.upper()}" for field in Settings.__dataclass_fields__ if field not in ("environ", "upstream_commit")
    }
    listed = {name for row in rows(README, "## Settings by environment") for name in re.findall(r"EMU_[A-Z_]+", row[0])}
    assert listed == read


def test_the_readmes_task_table_is_the_codes() -> None:
    lines = re.findall(r"^\| ((?:\w+, )*\w+) \| (image|base) \| (.+?) \| (.+?) \| (\d+) \| (.+?) \|$", README, re.M)
    told = {name: line for line in lines for name in line[0].split(", ")}
    assert set(told) == set(tasks.TABLE)
    for name, (_, _, guidance, area, top_k, text) in told.items():
        task = tasks.TABLE[name]
        side = round(task.image_area**0.5)
        assert guidance == f"{task.guidance['image']:g} / {task.guidance['base']:g}"
        assert area == f"{side} x {side}"
        assert int(top_k) == task.image.top_k
        assert text == f"{task.text.top_k}, {task.text.top_p}, {task.text.temperature}"


@pytest.mark.parametrize("text", [README, GUIDE], ids=["README", "CLAUDE"])
def test_every_command_and_file_named_is_there(text: str) -> None:
    for name in set(re.findall(r"(?<![\w/])scripts/[\w./-]*\w", text)):
        path = ROOT / name
        assert path.exists(), name
        assert path.is_dir() or path.suffix or os.access(path, os.X_OK), f"{name} can't be run"
    for name in set(re.findall(r"\]\((?!http|#)([^)]+)\)", text)) | set(re.findall(r'src="(?!http)([^"]+)"', text)):
        assert (ROOT / name).exists(), name


def test_the_readme_shows_the_commands_of_its_pictures() -> None:
    for demo in show.DEMOS:
        assert f"\n{demo.command()}\n" in README, demo.name
    assert {f"docs/mini-{demo.strip}.png" for demo in show.DEMOS} == set(re.findall(r"docs/mini-\w+\.png", README))


def test_pins_are_exact_and_the_same_in_both_files() -> None:
    def pins(name: str) -> dict[str, str]:
        lines = [line.split("#")[0].split(";")[0].strip() for line in (ROOT / name).read_text().splitlines()]
        return dict(line.split("==") for line in lines if line)

    production, local = pins("requirements.txt"), pins("requirements-local.txt")
    assert production.pop("torch") == "2.8.0"
    assert production.items() <= local.items()
