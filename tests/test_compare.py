"""scripts/compare-upstream reports agreement where the two sides agree, and the place where they differ."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from _compare import differences, model_file, reference_logits
from _compare.agreement import TOLERANCES, Row, _distributions
from _compare.cases import AREA, CASES, Answer, photo
from _models.tiny import TinyFolders, make_tiny
from weights_kit import ROOT

from emu_cog.errors import CheckpointError
from emu_cog.pipeline import Pipeline
from emu_cog.prompt.geometry import reference_size
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
    return make_tiny(tmp_path_factory.mktemp("wild"), seed=11, heads=6, kv_heads=3, head_dim=12, logit_bias={})


@pytest.fixture(scope="module")
def drawer(tmp_path_factory: pytest.TempPathFactory) -> TinyFolders:
    return make_tiny(tmp_path_factory.mktemp("drawer"), seed=12, vision_ch_mult=(1, 1, 1, 1, 1), vision_attention=())


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clone(tmp_path_factory.mktemp("upstream"))


@pytest.fixture
def clone(pristine: Path, tmp_path: Path) -> Path:
    """A clone of the stand-in that a test may alter."""
    return Path(shutil.copytree(pristine, tmp_path / "clone"))


def report(
    script: ModuleType, capsys: pytest.CaptureFixture[str], folders: TinyFolders, clone: Path, **further: Any
) -> tuple[int, list[str]]:
    code = script.report("tiny", folders.model, folders.vision, clone, Settings(device="cpu"), **further)
    return code, capsys.readouterr().out.splitlines()


def part(printed: list[str], heading: str) -> list[str]:
    """The lines under `heading`."""
    first = next(i for i, line in enumerate(printed) if line.startswith(heading)) + 1
    return printed[first : printed.index("", first)]


def alter(clone: Path, file: str, old: str, new: str) -> None:
    path = clone / file
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))


def test_every_task_agrees_and_every_difference_is_listed(
    script: ModuleType, capsys: pytest.CaptureFixture[str], wild: TinyFolders, clone: Path
) -> None:
    code, printed = report(script, capsys, wild, clone, tokens=30)
    assert code == 0, "\n".join(printed)
    assert "tiny: float32 on cpu" in printed[1]
    assert "may differ: logits by 0.001" in printed[2]
    assert "not compared: upstream's own model file" in printed[3]
    for case in CASES:
        assert [line for line in printed if line.startswith(f"processed scores: {case.name} ")], case
    assert {case.task for case in CASES} == set(TASKS)
    defects, decided = part(printed, "known defects upstream"), part(printed, "decided differently")
    assert [line.rpartition(": ")[2] for line in defects].count("seen upstream, kept here") == 7
    assert all(line.endswith(": seen upstream, kept here") for line in decided)
    assert "agree, or differ as stated" in printed[-1]


def test_the_decided_sizes_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list must not repeat by hand what tasks.plan decides."""

    def decided(*sizes: tuple[int, int] | None) -> list[str]:
        planned = iter(sizes)
        plan = type("", (), {"plan": staticmethod(lambda _: type("", (), {"size": next(planned)}))})
        with monkeypatch.context() as patch:
            patch.setattr(differences, "tasks", plan)
            return [one.here for one in differences.decisions() if "size" in one.upstream]

    first, last = (reference_size(photo(n).size, AREA) for n in range(2))
    assert decided((30, 40), first) == [
        "640x480 pixels; the model's choice with aspect_ratio=model",
        "the first one's",
    ]
    assert decided(None, last) == []


class TestModelFile:
    """Upstream's own model file in another Python. Here that is this one, and the stand-in's file is Qwen3 again."""

    @pytest.mark.parametrize("scale", ["1.0", pytest.param("1.01", marks=pytest.mark.slow)])
    def test_its_logits_are_compared(
        self, script: ModuleType, capsys: pytest.CaptureFixture[str], drawer: TinyFolders, clone: Path, scale: str
    ) -> None:
        alter(clone, "src/emu3p5/modeling_emu3.py", "SCALE = 1.0", f"SCALE = {scale}")
        wanted = {"tokens": 5, "tasks": ["t2i"], "reference_python": Path(sys.executable)}
        code, printed = report(script, capsys, drawer, clone, **wanted)
        (line,) = [line for line in printed if line.startswith("logits of upstream's own model file")]
        assert f"torch {torch.__version__}" in line
        assert not [line for line in printed if line.startswith("not compared")]
        assert not list(clone.rglob("__pycache__"))
        if scale == "1.0":
            assert (code, " agrees (" in line) == (0, True)
        else:
            assert code == 1
            assert [line for line in printed if "DIFFERS" in line] == [line]
            assert "furthest apart: " in line

    def test_prompt_and_steps_give_the_native_logits(self, drawer: TinyFolders, clone: Path, tmp_path: Path) -> None:
        """In this process, with more steps than one and a prompt longer than what is kept of it."""
        pipeline = Pipeline.load(drawer.model, drawer.vision, device="cpu")
        ids = model_file.Ids(name="-", prompt=list(range(40)), steps=[5, 6, 7])
        ours = model_file.native_logits(pipeline, ids)
        assert ours.shape == (32 + 3, pipeline.lm.ids.vocab_size)
        source, target = tmp_path / "in.npz", tmp_path / "out.npz"
        np.savez(source, **{"0/prompt": np.array(ids.prompt), "0/steps": np.array(ids.steps)})
        try:
            reference_logits.main(clone, drawer.model, source, target, "float32", "cpu")
        finally:
            for name in [name for name in sys.modules if name.split(".")[0] == "emu3p5"]:
                del sys.modules[name]
        with np.load(target) as made:
            torch.testing.assert_close(torch.from_numpy(made["0/logits"]), ours, atol=1e-4, rtol=0)

    def run(self, python: Path, clone: Path) -> None:
        model_file.run_reference(
            python,
            clone,
            clone,
            [model_file.Ids(name="-", prompt=[1])],
            dtype=torch.float32,
            device=torch.device("cpu"),
        )

    def test_a_python_without_its_packages(self, tmp_path: Path, clone: Path) -> None:
        python = tmp_path / "python"
        python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2\nexit 1\n")
        python.chmod(0o755)
        with pytest.raises(
            CheckpointError, match=r"transformers 4\.48\.2: ModuleNotFoundError: No module named 'torch'"
        ):
            self.run(python, clone)

    def test_a_python_that_is_not_there(self, tmp_path: Path, clone: Path) -> None:
        with pytest.raises(
            CheckpointError, match="can't be run .No such file or directory.: name the python of an env"
        ):
            self.run(tmp_path / "none", clone)

    def test_a_clone_made_without_that_file(self, clone: Path) -> None:
        (clone / model_file.MODEL_FILE).unlink()
        with pytest.raises(CheckpointError, match="by an earlier version, without .*: remove it"):
            self.run(Path(sys.executable), clone)


# What is altered upstream -> file, old and new text, the row that must differ, ids to compare
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
    code, printed = report(script, capsys, drawer, clone, tokens=tokens, tasks=["t2i"])
    assert code == 1
    wrong = [line for line in printed if "DIFFERS" in line and line.startswith(where)]
    assert wrong
    if where.startswith("processed scores"):
        assert "at token" in wrong[0]
    assert " DIFFER" in printed[-1]


def test_the_first_step_that_differs_is_the_right_one(
    script: ModuleType, capsys: pytest.CaptureFixture[str], drawer: TinyFolders, clone: Path
) -> None:
    """BOI, `10*12`, IMG: the first visual token is the eighth id, number 7."""
    alter(clone, "src/utils/logits_processor.py", "BIAS = 0.0", "BIAS = 5.0")
    _, printed = report(script, capsys, drawer, clone, tokens=12, tasks=["t2i"])
    line = next(line for line in printed if line.startswith("processed scores: t2i, 0 reference(s), 10x12"))
    assert line.endswith("DIFFERS (first at token 7)")


def distributions(ours: list[float], theirs: list[float], steps: int = 10) -> Row:
    """The row of `steps` steps, of which the first is these and the others agree."""
    pairs = [(ours, theirs)] + [([0.5, 0.5], [0.5, 0.5])] * (steps - 1)
    answer = Answer(([0], [0]), [])
    answer.distributions = {i: torch.tensor(a) for i, (a, _) in enumerate(pairs)}
    seen = {i: torch.tensor(b) for i, (_, b) in enumerate(pairs)}
    return _distributions(CASES[0], answer, seen, None, TOLERANCES[torch.float32])


class TestEdge:
    """Rounding may decide whether top-p keeps its last token: that is not a difference."""

    def test_the_last_token_kept_by_one_side_only_is_reported_and_left_out(self) -> None:
        row = distributions([0.6, 0.4, 0.0], [0.594, 0.396, 0.01])
        assert row.agrees
        assert row.worst < 1e-6
        assert row.note == "one token more or less kept by top-k or top-p at token 0"

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

    def test_at_most_one_step_in_edges(self) -> None:
        answer = Answer(([0], [0]), [])
        answer.distributions = {i: torch.tensor([0.6, 0.4, 0.0]) for i in range(50)}
        seen = {i: torch.tensor([0.594, 0.396, 0.01]) for i in range(50)}
        assert not _distributions(CASES[0], answer, seen, None, TOLERANCES[torch.float32]).agrees


def test_a_defect_fixed_upstream_is_reported(
    script: ModuleType, capsys: pytest.CaptureFixture[str], drawer: TinyFolders, clone: Path
) -> None:
    alter(clone, "src/utils/generation_utils.py", " and tokenizer.boi_token not in piece:", ":")
    code, printed = report(script, capsys, drawer, clone, tokens=20, tasks=["t2i"])
    assert code == 0
    assert [line for line in printed if "unfinished image" in line and "NOT SEEN upstream, kept here" in line]


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


def test_without_the_pinned_commit_nothing_is_compared(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, _ = make_repository(tmp_path / "repository")
    monkeypatch.setenv("EMU_UPSTREAM_URL", url)
    monkeypatch.setenv("EMU_WEIGHTS_DIR", str(tmp_path / "w"))
    monkeypatch.setattr(sys, "argv", ["compare-upstream"])
    monkeypatch.setattr(script, "log_to_stderr", lambda: None)  # would detach the logger from pytest
    assert script.main() == 2
    printed = capsys.readouterr().err
    assert f"error: upstream's code could not be cloned from {url} at {UPSTREAM_COMMIT}" in printed
    assert "EMU_BACKEND" not in printed


def test_the_real_upstream_agrees(tmp_path: Path) -> None:
    """Where the pinned clone is available: in checkpoints/, or at EMU_UPSTREAM_URL. With EMU_REFERENCE_PYTHON, its
    model file as well."""
    url = os.environ.get("EMU_UPSTREAM_URL")
    if not url and find_clone(ROOT / "checkpoints") is None:
        pytest.skip("there is no clone of upstream here (scripts/compare-upstream makes one)")
    made = make_tiny(tmp_path, seed=2, heads=6, kv_heads=3, head_dim=12, logit_bias={})
    weights = {"EMU_UPSTREAM_URL": url, "EMU_WEIGHTS_DIR": str(tmp_path / "w")} if url else {}
    if python := os.environ.get("EMU_REFERENCE_PYTHON"):
        weights["EMU_REFERENCE_PYTHON"] = python
    done = run("--checkpoint", str(made.model), "--vision", str(made.vision), "--tokens", "80", **weights)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": seen upstream, kept here") == 7 + len(list(differences.decisions()))
