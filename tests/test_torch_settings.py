"""Process-wide switches: set for CUDA only, undone where an argmax needs full precision; caches are kept."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from emu_cog.model import torch_settings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def switches() -> Iterator[None]:
    """Restores what `apply` sets."""
    before = (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
    )
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[1:3]


def found() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark


@pytest.mark.usefixtures("switches")
def test_a_cpu_is_left_alone_and_cuda_is_set() -> None:
    before = found()
    torch_settings.apply(CPU)
    assert found() == before == ("highest", False)
    torch_settings.apply(CUDA)
    assert found() == ("high", False)


@pytest.mark.usefixtures("switches")
def test_an_argmax_sees_plain_fp32() -> None:
    torch_settings.apply(CUDA)
    with torch_settings.exact_products(CUDA):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"


def test_caches_are_kept_in_the_given_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    torch_settings.keep_compiled(tmp_path / "cache")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache/inductor")
    assert (tmp_path / "cache/inductor").is_dir()
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"
    monkeypatch.undo()


def test_a_folder_that_cannot_be_made_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for variable in torch_settings.CACHE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING, logger="emu_cog"):
        torch_settings.keep_compiled(tmp_path / "file")
    assert "not kept for the next start" in caplog.text
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
