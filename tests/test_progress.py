"""What is told while weights arrive: how much, how fast, how long still."""

from __future__ import annotations

import time

import pytest

from emu_cog.weights.progress import Progress, duration


def test_line_tells_share_rate_and_time_left() -> None:
    with Progress("Emu3.5-Image", 100_000_000) as progress:
        progress.found(20_000_000)  # was there already: done, but no part of the rate
        progress.add(30_000_000)
        later = time.monotonic() + 10
        assert progress.line(later) == "Emu3.5-Image: 50.0 MB of 100.0 MB (50 %), 3.0 MB/s, 17 s left"
        progress.lose(10_000_000)
        assert progress.line(later).startswith("Emu3.5-Image: 40.0 MB of 100.0 MB (40 %), 3.0 MB/s")


def test_line_without_a_total_and_without_arrivals() -> None:
    with Progress("archive", None) as progress:
        progress.add(5_000_000)
        assert progress.line(time.monotonic() + 10) == "archive: 5.0 MB, 500.0 kB/s"
    with Progress("archive", 10) as progress:
        assert progress.line(time.monotonic() + 10).endswith("nothing arrives")


@pytest.mark.parametrize(("seconds", "says"), [(7.4, "7 s"), (160, "2 min 40 s"), (7500, "2 h 05 min")])
def test_duration(seconds: float, says: str) -> None:
    assert duration(seconds) == says
