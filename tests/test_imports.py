"""The direction of imports, and that importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "emu_cog"
# Lowest first. A module may import only from rows above its own; modules of one row not from each other.
LAYERS = [
    ["config", "tokens", "cpu_linear"],
    [
        "geometry",
        "torch_settings",
        "shards",
        "sampling",
        "manifest",
        "remote",
        "memory",
        "upstream_clone",
        "quantize",
        "kernels",
        "head",
    ],
    ["tasks", "tokenizer", "vision", "fetch", "decode_ops", "draw_kernels", "kernels8", "jobs"],
    ["vision_compiled", "prompts", "segments", "pictures", "lm", "tiny_vocabulary", "layout", "progress", "decode"],
    ["tuning", "prefill", "outputs", "tiny", "loading", "local", "pget", "staging", "tarread"],
    ["triton_ops", "resources"],
    ["steps"],
    ["image_loop", "hub", "archive", "upstream_code"],
    ["engine", "quality"],
    ["weights", "upstream"],
    ["pipeline"],
    ["agreement_cases", "pins", "upstream_pipeline"],
    ["agreement_defects", "backends"],
    ["agreement", "service"],
]
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "emu_cog":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("emu_cog."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("emu_cog.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_imports_go_down_only(path: Path) -> None:
    assert path.stem in RANK, f"{path.stem} has no place in LAYERS"
    wrong = {name for name in imports(path) if RANK[name] >= RANK[path.stem]}
    assert not wrong, f"{path.stem} may not import {wrong}"


def test_the_engine_never_sees_text_or_files() -> None:
    for module in ("engine", "image_loop", "jobs", "sampling"):
        assert not imports(PACKAGE / f"{module}.py") & {"tokenizer", "segments", "pictures", "outputs", "vision"}


def test_nobody_but_the_predictor_imports_cog() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"cog", "coglet"}, path


def test_importing_does_no_work() -> None:
    code = (
        "import sys, threading, os; before = set(os.listdir('.'));"
        "import emu_cog; assert 'torch' not in sys.modules;"
        "import emu_cog.pipeline, torch;"
        "assert threading.active_count() == 1 and set(os.listdir('.')) == before;"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
