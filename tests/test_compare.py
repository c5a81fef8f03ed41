"""scripts/compare-upstream: agrees where the two agree, and tells where they do not."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from _compare.agreement import TOLERANCES, Row, _distributions
from _compare.cases import CASES, Answer
from _models.tiny import TinyFolders, make_tiny
from weights_kit import ROOT

from emu_cog.request import TASKS
from emu_cog.settings import UPSTREAM_COMMIT, Settings
from emu_cog.upstream.clone import find_clone
from tests.upstream_kit import make_clone, make_repository

SCRIPT = ROOT / "scripts" / "compare-upstream"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("compare_upstream", str(SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> TinyFolders:
    return make_tiny(tmp_path_factory.mktemp("wild"), seed=11, heads=6, kv_heads=3, head_dim=12, favour={})


@pytest.fixture(scope="module")
def drawer(tmp_path_factory: pytest.TempPathFactory) -> TinyFolders:
    return make_tiny(tmp_path_factory.mktemp("drawer"), seed=12, vision_ch_mult=(1, 1, 1, 1, 1), vision_attention=())


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    return make_clone(tmp_path)


def report(
    script: ModuleType, capsys: pytest.CaptureFixture[str], folders: TinyFolders, clone: Path, **further: Any
) -> tuple[int, list[str]]:
    code = script.report("tiny", folders.model, folders.vision, clone, Settings(device="cpu"), **further)
    return code, capsys.readouterr().out.splitlines()


def alter(clone: Path, file: str, old: str, new: str) -> None:
    path = clone / file
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))


def test_every_task_agrees_and_every_known_defect_is_told(
    script: ModuleType, capsys: pytest.CaptureFixture[str], wild: TinyFolders, clone: Path
) -> None:
    code, said = report(script, capsys, wild, clone, tokens=30)
    assert code == 0, "\n".join(said)
    assert "tiny: float32 on cpu" in said[1]
    assert "may differ: logits by 0.001" in said[2]
    for case in CASES:
        assert [line for line in said if line.startswith(f"processed scores: {case.name} ")], case
    assert {case.task for case in CASES} == set(TASKS)
    known = [line for line in said if " -> " in line]
    assert sum(line.endswith("seen upstream, kept here") for line in known) == 7
    assert "agree, or differ as told" in said[-1]


# What is changed upstream -> file, old and new text, the row that must tell, ids to compare
PROCESSOR = "src/utils/logits_processor.py"
ALTERED = {
    "a prompt": ("configs/example_config_t2i.py", "helpful assistant for", "able assistant for", "prompt ids, t2i", 5),
    "a default": ("src/emu3p5/configuration_emu3.py", "eps=1e-5", "eps=1e-6", "config.json's defaults", 5),
    "codes": ("src/utils/input_utils.py", "127.5 - 1.0", "127.5 - 0.9", "codes of photos", 5),
    "guidance": (PROCESSOR, "(c - u) + u\n", "(c - u) + 1.01 * u\n", "processed scores", 20),
    "top-k": (PROCESSOR, "topk(top_k)", "topk(max(1, top_k // 2))", "processed scores", 20),
    "top-k by one": (PROCESSOR, "topk(top_k)", "topk(top_k + 1)", "processed scores: t2i, 0 reference(s), 6x6", 20),
    "top-p": (PROCESSOR, "before[0] > top_p", "before[0] > 0.9 * top_p", "processed scores", 20),
    "row ends": (PROCESSOR, "else EOL]", "else EOF]", "processed scores", 20),
    "pixels": ("src/utils/generation_utils.py", "(pixels + 1) * 127.5", "(pixels + 1) * 120.0", "pixels", 40),
}


@pytest.mark.parametrize("what", ALTERED)
def test_a_difference_is_found_and_placed(
    what: str, script: ModuleType, capsys: pytest.CaptureFixture[str], drawer: TinyFolders, clone: Path
) -> None:
    file, old, new, where, tokens = ALTERED[what]
    alter(clone, file, old, new)
    code, said = report(script, capsys, drawer, clone, tokens=tokens, tasks=["t2i"])
    assert code == 1
    wrong = [line for line in said if "DIFFERS" in line and line.startswith(where)]
    assert wrong
    if where.startswith("processed scores"):
        assert "at token" in wrong[0]
    assert " DIFFER" in said[-1]


def test_the_first_step_that_differs_is_the_right_one(
    script: ModuleType, capsys: pytest.CaptureFixture[str], drawer: TinyFolders, clone: Path
) -> None:
    """BOI, `10*12`, IMG: the first visual token is the eighth id, number 7."""
    alter(clone, "src/utils/logits_processor.py", "BIAS = 0.0", "BIAS = 5.0")
    _, said = report(script, capsys, drawer, clone, tokens=12, tasks=["t2i"])
    line = next(line for line in said if line.startswith("processed scores: t2i, 0 reference(s), 10x12"))
    assert line.endswith("DIFFERS (first at token 7)")


def distributions(ours: list[float], theirs: list[float], steps: int = 10) -> Row:
    """The row of `steps` steps, of which the first is these and the others agree."""
    pairs = [(ours, theirs)] + [([0.5, 0.5], [0.5, 0.5])] * (steps - 1)
    answer = Answer(([0], [0]), [])
    answer.distributions = {i: torch.tensor(a) for i, (a, _) in enumerate(pairs)}
    seen = {i: torch.tensor(b) for i, (_, b) in enumerate(pairs)}
    return _distributions(CASES[0], answer, seen, None, TOLERANCES[torch.float32])


class TestEdge:
    """Rounding decides on which side of top-p the last token falls: rare, but not a difference."""

    def test_the_last_token_kept_by_one_side_alone_is_told_and_left_out(self) -> None:
        row = distributions([0.6, 0.4, 0.0], [0.594, 0.396, 0.01])
        assert row.agrees
        assert row.worst < 1e-6
        assert row.note == "the edge of what is kept is a token off at token 0"

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            ([0.6, 0.4, 0.0, 0.0], [0.588, 0.392, 0.01, 0.01]),  # two tokens
            ([0.6, 0.4, 0.0], [0.0, 0.4, 0.6]),  # not the last one
            ([0.6, 0.0, 0.4], [0.3, 0.5, 0.2]),
            ([0.6, 0.4, 0.0], [0.61, 0.38, 0.01]),  # and the rest differs
        ],
    )
    def test_nothing_else_is(self, ours: list[float], theirs: list[float]) -> None:
        row = distributions(ours, theirs)
        assert not row.agrees
        assert row.note == "first at token 0"

    def test_not_at_every_step(self) -> None:
        answer = Answer(([0], [0]), [])
        answer.distributions = {i: torch.tensor([0.6, 0.4, 0.0]) for i in range(50)}
        seen = {i: torch.tensor([0.594, 0.396, 0.01]) for i in range(50)}
        assert not _distributions(CASES[0], answer, seen, None, TOLERANCES[torch.float32]).agrees


def test_where_upstream_was_mended_the_table_says_so(
    script: ModuleType, capsys: pytest.CaptureFixture[str], drawer: TinyFolders, clone: Path
) -> None:
    alter(clone, "src/utils/generation_utils.py", " and tokenizer.boi_token not in piece:", ":")
    code, said = report(script, capsys, drawer, clone, tokens=20, tasks=["t2i"])
    assert code == 0
    assert [line for line in said if "unfinished image" in line and "NOT SEEN upstream, kept here" in line]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EMU_")}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=kept | {"EMU_VENV": "none", "EMU_DEVICE": "cpu", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def test_without_the_pinned_commit_nothing_is_compared(tmp_path: Path) -> None:
    url, _ = make_repository(tmp_path / "repository")
    done = run(EMU_UPSTREAM_URL=url, EMU_WEIGHTS_DIR=str(tmp_path / "w"))
    assert done.returncode == 2
    assert f"error: upstream's code could not be cloned from {url} at {UPSTREAM_COMMIT}" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_real_upstream_agrees(tmp_path: Path) -> None:
    """Where the pinned clone is at hand: in checkpoints/, or at EMU_UPSTREAM_URL."""
    url = os.environ.get("EMU_UPSTREAM_URL")
    if not url and find_clone(ROOT / "checkpoints") is None:
        pytest.skip("there is no clone of upstream here (scripts/compare-upstream makes one)")
    made = make_tiny(tmp_path, seed=2, heads=6, kv_heads=3, head_dim=12, favour={})
    weights = {"EMU_UPSTREAM_URL": url, "EMU_WEIGHTS_DIR": str(tmp_path / "w")} if url else {}
    done = run("--checkpoint", str(made.model), "--vision", str(made.vision), "--tokens", "80", **weights)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("seen upstream, kept here") == 7
