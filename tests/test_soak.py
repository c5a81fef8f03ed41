"""Mixed requests from several threads over the tiny model: see scripts/_bench/soak.py, which says what is compared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from _bench.soak import KINDS, catalogue, photos, soak
from _models.tiny import TinyFolders

from emu_cog.engine.runner import ModelRunner
from emu_cog.pipeline import Pipeline

Checkpoints = Callable[[str], TinyFolders]


@pytest.fixture
def pipeline(make_checkpoint: Checkpoints) -> Pipeline:
    """Of its own: the soak looks at all pages of the cache."""
    folders = make_checkpoint("storyteller")
    return Pipeline.load(folders.model, folders.vision, device="cpu", max_outputs=4)


def test_nothing_is_lost_mixed_up_or_left_behind(pipeline: Pipeline) -> None:
    found = soak(pipeline, catalogue(photos()), count=60)
    assert found.wrong == []
    assert sum(found.ended.values()) == 60
    assert set(found.ended) == set(KINDS)
    assert found.pictures > 30


def test_streams_that_are_mixed_up_are_noticed(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The soak itself can fail: here slots get each other's guidance once several are in progress."""
    begin = ModelRunner.begin

    def wrong(self: ModelRunner, s: object) -> None:
        begin(self, s)  # type: ignore[arg-type]
        if s.slot:  # type: ignore[attr-defined]
            self.state.cfg_scale[s.slot] += 20.0  # type: ignore[attr-defined]

    requests = [one for one in catalogue(photos()) if one.num_outputs == 1][:2]
    monkeypatch.setattr(ModelRunner, "begin", wrong)
    assert any("differs from the same request alone" in line for line in soak(pipeline, requests, count=30).wrong)
