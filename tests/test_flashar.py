"""FlashAR against the two repositories' own code (tests/golden/flashar.npz) and against its slow twin."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from _compare import flashar
from _compare.agreement import Row
from _compare.flashar_native import Picture, run_native
from _models.flashar import make_flashar

from emu_cog.errors import CheckpointError
from emu_cog.model.flashar import diagonals
from emu_cog.model.loader import read_config
from emu_cog.prompt.tokenizer import Tokenizer
from tests import flashar_twin
from tests.conftest import ROOT, FlashFolders
from tests.flashar_kit import load, state_of
from tests.golden import inputs

GOLDEN = Path(__file__).resolve().parent / "golden" / "flashar.npz"
LAYOUTS = tuple(flashar.CLONES)
NAMES = [(layout, name) for layout in LAYOUTS for name in flashar.CASES[layout]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def golden() -> Mapping[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


def of(golden: Mapping[str, np.ndarray], layout: str, name: str) -> dict[str, np.ndarray]:
    prefix = f"{layout}/{name}/"
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def disagreeing(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> list[Row]:
    rows = list(flashar.compare_picture("-", ours, theirs))
    assert len(rows) == 5
    return [row for row in rows if not row.agrees]


# -- 1. against the public code ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_checkpoint_is_the_one_that_the_vectors_were_made_with(
    layout: str, flash_folders: FlashFolders, golden: Mapping[str, np.ndarray]
) -> None:
    assert inputs.digest(flash_folders(layout)) == str(golden[f"{layout}/digest"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_are_theirs(layout: str, flash_folders: FlashFolders, golden: Mapping[str, np.ndarray]) -> None:
    tokenizer = Tokenizer.load(flash_folders(layout).model)
    texts = json.loads(str(golden[f"{layout}/prompts"]))
    assert len(texts) >= 4
    for name, theirs in texts.items():
        ours = flashar.ids_of(flashar.CASES[layout][name], layout, tokenizer)
        assert list(ours) == [flashar.encode_special(text, tokenizer) for text in theirs], name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk", [10**6, 5])
def test_hidden_states_gates_logits_and_tokens_are_theirs(
    layout: str, chunk: int, flash_folders: FlashFolders, golden: Mapping[str, np.ndarray]
) -> None:
    """All pictures of a layout side by side, of other sizes and prompts each; prompts at once and in chunks."""
    folder = flash_folders(layout).model
    made = run_native(load(folder), flashar.pictures(layout, Tokenizer.load(folder)), chunk=chunk)
    for name, ours in zip(flashar.CASES[layout], made, strict=True):
        assert not disagreeing(ours, of(golden, layout, name)), name


@pytest.mark.parametrize(("layout", "name"), NAMES)
def test_the_twin_agrees_with_theirs(
    layout: str, name: str, flash_folders: FlashFolders, golden: Mapping[str, np.ndarray]
) -> None:
    folder, case = flash_folders(layout).model, flashar.CASES[layout][name]
    at = list(flashar.CASES[layout]).index(name)
    picture = flashar.pictures(layout, Tokenizer.load(folder))[at]
    assert not disagreeing(twin(folder, picture), of(golden, layout, name))
    assert case.guidance <= 1 or len(picture.prompts[0]) != len(picture.prompts[1])


def test_guidance_is_applied() -> None:
    """lxazjk's generate_flashar.py passes no unconditional prompt, so that its guidance does nothing."""
    picture = Picture(conditional=[1], unconditional=[2], size=(1, 1), guidance=5.0)
    assert len(picture.prompts) == 2
    assert len(replace(picture, guidance=1.0).prompts) == len(replace(picture, unconditional=None).prompts) == 1


# -- 2. against the twin -----------------------------------------------------------------------------------


def twin(folder: Path, picture: Picture, *, start: int | None = None) -> dict[str, np.ndarray]:
    config, data = read_config(folder), json.loads((folder / "config.json").read_text())
    state = state_of(folder)
    vertical = len({key.split(".")[1] for key in state if key.startswith("vertical_block.")})
    shape = flashar_twin.Shape(
        heads=config.num_attention_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
        theta=config.rope_parameters["rope_theta"],
        start=data.get("vertical_start_layer", config.num_hidden_layers - vertical),
        visual=Tokenizer.load(folder).ids.visual,
    )
    made = flashar_twin.draw(state, shape, picture.prompts, picture.size, picture.guidance)
    return {
        "h": torch.stack(made.h).numpy(),
        "v": torch.stack(made.v).numpy(),
        "gate": torch.stack(made.gate).numpy(),
        "logits": made.logits.numpy(),
        "tokens": np.array(made.tokens),
    }


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "one layer each, one key-value head": {"layers": 1, "vertical_layers": 1, "heads": 4, "kv_heads": 1},
    "the branch from the embeddings on": {"layers": 3, "vertical_layers": 2, "start": 0},
    "the branch from the middle on": {"layers": 4, "vertical_layers": 1, "start": 2, "head_dim": 8},
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("size", [(7, 10), (10, 7)])
def test_other_shapes_and_more_pages_agree_with_the_twin(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    """70 cells fill more than one page of either cache."""
    folder = make_flashar(tmp_path, layout="lxazjk", seed=5, hidden=32, logit_bias={}, **SHAPES[name]).model
    ids = Tokenizer.load(folder).ids
    header = ids.header(*size)
    picture = Picture(
        conditional=[*range(40, 101), *header], unconditional=[*range(50, 60), *header], size=size, guidance=2.0
    )
    (ours,) = run_native(load(folder), [picture])
    assert not disagreeing(ours, twin(folder, picture))


def test_a_picture_does_not_see_those_beside_it(flash_folders: FlashFolders) -> None:
    folder = flash_folders("lxazjk").model
    pictures, model = flashar.pictures("lxazjk", Tokenizer.load(folder)), load(folder)
    together = run_native(model, pictures)
    for picture, made in zip(pictures, together, strict=True):
        assert not disagreeing(run_native(model, [picture])[0], made)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (5, 1), (3, 5), (5, 3), (4, 4)])
def test_diagonals_hold_every_cell_once_and_know_their_neighbours(rows: int, columns: int) -> None:
    seen: list[int] = []
    before: list[int] = []
    every = list(diagonals(rows, columns))
    assert len(every) == rows + columns - 1
    for diagonal in every:
        assert len(diagonal.cells) == diagonal.count <= min(rows, columns)
        for cell, left, above in zip(diagonal.cells, diagonal.left, diagonal.above, strict=True):
            row, column = divmod(cell, columns)
            assert row + column == diagonal.number
            assert (left >= 0) == (column > 0)
            assert left < 0 or before[left] == cell - 1
            assert (above >= 0) == (row > 0)
            assert above < 0 or before[above] == cell - columns
        before = diagonal.cells
        seen += before
    assert sorted(seen) == list(range(rows * columns))


# -- 3. scripts/compare-upstream --flashar -----------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("compare_upstream", str(ROOT / "scripts" / "compare-upstream"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def clone(tmp_path: Path, golden: Mapping[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is recognized as lxazjk's repository; its code's answers are the golden ones."""
    (tmp_path / flashar.CLONES["lxazjk"]).parent.mkdir(parents=True)
    (tmp_path / flashar.CLONES["lxazjk"]).touch()
    (tmp_path / "generate_flashar.py").write_text("grid = wrapper.generate(cfg_scale=args.cfg_scale)")
    arrays = {key.removeprefix("lxazjk/"): value.copy() for key, value in golden.items() if key.startswith("lxazjk/")}
    answer = flashar.Reference(arrays=arrays, prompts=json.loads(str(arrays["prompts"])), versions="")
    monkeypatch.setattr(flashar, "run_reference", lambda *_: answer)
    return tmp_path


def test_the_script_reports_agreement(script: ModuleType, clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.report_flashar(clone, Path("python")) == 0
    printed = capsys.readouterr().out
    assert "guidance is applied: seen upstream, kept here" in printed
    assert "all 32 agree, or differ as stated" in printed


def test_the_script_names_what_differs(script: ModuleType, clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays: Any = flashar.run_reference(Path(), Path(), Path(), None).arrays  # type: ignore[arg-type]
    arrays["one row/v"][0, 2, 5] += 0.01
    assert script.report_flashar(clone, Path("python")) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "DIFFER" in line]
    assert lines[0].startswith("vertical hidden states: one row")
    assert len(lines) == 2


def test_another_folder_is_no_clone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a clone neither of lxazjk/Emu3.5-FlashAR nor of Xiaomi"):
        flashar.layout_of(tmp_path)


def test_a_reference_python_that_is_none_is_named(
    flash_folders: FlashFolders, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    folder = flash_folders("lxazjk").model
    with pytest.raises(CheckpointError, match="--reference-python /no/python can't be run"):
        flashar.run_reference(Path("/no/python"), clone, folder, Tokenizer.load(folder))
    with pytest.raises(CheckpointError, match="must have torch, .+ and transformers 4.48.2: exit code 1"):
        flashar.run_reference(Path("/bin/false"), clone, folder, Tokenizer.load(folder))
