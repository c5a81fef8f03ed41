"""Every kernel compiles for the cards that users have, at the released model's shapes, and fits their shared memory.

Ahead of time, so that it needs no GPU (kernels_kit.py). What only a GPU finds out is left to `pytest -m gpu`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from emu_cog.errors import InputError
from emu_cog.model.quantize import FORMATS, check_format
from emu_cog.ops.autotune import ROWS
from tests.conftest import ROOT
from tests.kernels_kit import SHARED

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
OTHERS = {"add_norm", "linear", "rope_store", "attend", "guide", "count", "pick", "accept"} | {
    "gather",
    "weigh",
    "store",
    "keep",
}
QUICK = {90: ROWS[0], 80: ROWS[-1]}
"""Capability to rows of a pass; all of ROWS are compiled by the slow test."""


def compile_for(capability: int, cache: Path, rows: int | str) -> dict[str, Any]:
    """In a process of its own: kernels that were imported for the interpreter can't be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels_kit", str(capability), str(rows)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict[str, Any], capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each format that is accepted on the card compiles, each that is refused does not; each kernel fits."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(capability, 10))
    forms = {"bfloat16": None, "narrow": "fp8"} | {name: name for name in FORMATS}
    for name, form in forms.items():
        try:
            check_format(form, torch.device("cuda"))
        except InputError:
            assert re.search("sm_89|fp8e4nv not supported", found[name]), f"{name} is refused for no reason"
            continue
        assert isinstance(found[name], dict), found[name]
        names = {kernel.removesuffix("_kernel") for kernel in found[name]}
        own = {"bfloat16": {"combine"}, "narrow": {"combine", "narrow"}}.get(name, {"combine", "linear8"})
        assert names == OTHERS | own
        for kernel, needed in found[name].items():
            assert needed <= SHARED[capability] * 1024, f"{kernel} with {name} weights"


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_the_default_configurations_compile(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(compile_for(capability, tmp_path, QUICK[capability]), capability, monkeypatch)


@pytest.mark.parametrize("capability", [90, *(pytest.param(c, marks=pytest.mark.slow) for c in SHARED if c != 90)])
def test_attention_divides_its_products_alike_at_any_width(capability: int, tmp_path: Path) -> None:
    """Else a token's bits would depend on what is drawn beside it (see `window_queries` and `open_queries`)."""
    found = compile_for(capability, tmp_path, "layouts")
    for dim, layouts in found["windows"].items():
        assert layouts[0] == layouts[1] == layouts[2] != [], f"heads of {dim}"
    for dim, (narrow, wide) in found["diagonals"].items():
        if capability == 90:  # warps beyond the first four take further rows
            wide = [layout.replace("warpsPerCTA = [8, 1]", "warpsPerCTA = [4, 1]") for layout in wide]
            assert narrow != []
        assert narrow == wide, f"heads of {dim}"


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_autotuning_skips_what_does_not_fit(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all of ROWS: defaults always fit; the largest candidates need more shared memory than most cards have."""
    found = compile_for(capability, tmp_path, "all")
    check(found, capability, monkeypatch)
    limit, too_large = SHARED[capability] * 1024, 0
    for name in ("bfloat16", "narrow", *FORMATS):
        if isinstance(found[name], str):  # refused, as `check` has seen
            continue
        for at, tuning in found[f"{name} candidates"].items():
            needed = {tuple(tiles): shared for *tiles, shared in tuning["tried"]}
            assert tuning["tried"][0][-1] <= limit, f"the default for {at} with {name} weights"
            assert needed[tuple(tuning["chosen"])] <= limit
            too_large += sum(shared > limit for shared in needed.values())
    assert too_large
