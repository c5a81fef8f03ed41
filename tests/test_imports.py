"""The direction of imports between rooms, and that importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "emu_cog"
# Lowest first. A room is a folder of emu_cog, or a file at its top; it imports only from rooms before it.
ROOMS = [
    "errors", "log", "request", "settings",
    "prompt", "ops", "model", "vision", "engine", "weights",
    "events", "memory", "outputs", "pipeline", "upstream", "service", "serving",
]  # fmt: skip
PATHS = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(module: str) -> str:
    """`emu_cog.model.loader` is in `model`."""
    return module.split(".")[1]


def imported(path: Path) -> Iterator[str]:
    """The modules that `path` imports, anywhere in it. Only absolute imports are used in this package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "emu_cog" else (module,)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_rooms_import_downwards_only(path: Path) -> None:
    here = room(name_of(path))
    assert here in ROOMS, f"{here} has no place in ROOMS"
    below = ROOMS[: ROOMS.index(here)]
    for module in imported(path):
        if module.startswith("emu_cog."):
            assert room(module) == here or room(module) in below, f"{here} may not import {module}"


def test_no_room_has_a_circle_inside() -> None:
    """Modules of one room may import each other, but never in a circle."""
    edges = {name_of(path): {m for m in imported(path) if m.startswith("emu_cog.")} for path in PATHS}

    def walk(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        for other in edges.get(module, ()):
            walk(other, (*above, module))

    for module in edges:
        walk(module, ())


def test_the_engine_never_sees_text_or_files() -> None:
    for path in (PACKAGE / "engine").glob("*.py"):
        text_or_files = {"emu_cog.prompt.tokenizer", "emu_cog.prompt.segments", "emu_cog.prompt.prompts"}
        assert not {m for m in imported(path) if m in text_or_files or m.startswith("emu_cog.vision")}, path


def test_the_model_never_downloads() -> None:
    for path in (PACKAGE / "model").glob("*.py"):
        assert not {m for m in imported(path) if m.startswith("emu_cog.weights")}, path


def test_nobody_but_the_predictor_imports_cog_and_the_product_needs_no_tools() -> None:
    for path in PATHS:
        top = {module.split(".")[0] for module in imported(path)}
        assert not top & {"cog", "coglet", "scripts", "tests", "_bench", "_compare", "_models"}, path


def test_importing_does_no_work() -> None:
    code = (
        "import sys, threading, os; before = set(os.listdir('.'));"
        "import emu_cog; assert 'torch' not in sys.modules;"
        "import emu_cog.pipeline, torch;"
        "assert threading.active_count() == 1 and set(os.listdir('.')) == before;"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
