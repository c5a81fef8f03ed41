"""What is shown while weights arrive: how much, how fast, how long still."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from tqdm import tqdm

from emu_cog.weights import progress as module
from emu_cog.weights.progress import Progress


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is logged when every second, by a clock that moves one second with each look, is worth a line."""
    clock = iter(range(1_000_000))
    monkeypatch.setattr(module, "LOG_EVERY", 1)
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    monkeypatch.setattr("emu_cog.log.log.propagate", True)
    caplog.set_level(logging.INFO, "emu_cog")
    return caplog.messages


def test_log_without_a_terminal(caplog: pytest.LogCaptureFixture, lines: list[str]) -> None:
    with Progress("Emu3.5-Image", 100_000_000) as progress:
        progress.found(20_000_000)
        for _ in range(4):
            progress.add(10_000_000)
        assert progress.done == 60_000_000
        progress.lose(5_000_000)
        assert progress.done == 55_000_000
    for line in caplog.messages:
        assert line.startswith("Emu3.5-Image: ")
        assert "B of 100MB (" in line
        assert line.endswith(" left")
    assert "60.0MB of 100MB (60 %)" in caplog.text
    rates = [float(line.split(" %), ")[1].split("MB/s")[0]) for line in caplog.messages if "MB/s" in line]
    assert rates
    assert max(rates) <= 10  # bytes a second that arrived; those found, 20 MB at once, are no part of it


def test_log_without_a_total(caplog: pytest.LogCaptureFixture, lines: list[str]) -> None:
    with Progress("archive", None) as progress:
        for _ in range(3):
            progress.add(5_000_000)
    assert "archive: 15.0MB, " in caplog.text
    assert "left" not in caplog.text


def test_nothing_is_logged_of_what_takes_a_moment(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "emu_cog")
    with Progress("config.json", 10) as progress:
        progress.add(10)
    assert not caplog.messages


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("Emu3.5-Image", 100) as progress:
        progress.found(50)
        progress.add(50)
        assert isinstance(progress._bar, tqdm)
    assert "Emu3.5-Image: 100%" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert not caplog.messages


def test_callback_gets_the_end() -> None:
    seen: list[tuple[int, int]] = []
    with Progress("x", 10, on_progress=lambda done, total: seen.append((done, total))) as progress:
        progress.found(4)
        progress.add(6)
    assert seen[-1] == (10, 10)
