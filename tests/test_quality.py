"""Agreement of two ways of decoding: equal ones agree fully, different ones are distinguished."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from _compare.decoding import FLOOR, by_chunks, by_passes, by_steps, compare
from _models import tiny

from emu_cog.engine.runner import ModelRunner
from emu_cog.engine.sequence import EngineRequest
from emu_cog.model.quantize import FORMATS
from emu_cog.pipeline import Pipeline
from emu_cog.request import Request, Sampling

Checkpoints = Callable[[str], tiny.TinyFolders]
GRIDS = [[[1, 2, 3, 4], [9, 8, 7, 6], [0, 63, 5, 5]], [[60, 2, 31, 4], [1, 1, 1, 1], [0, 3, 50, 5]]]


def two_requests(pipeline: Pipeline) -> list[EngineRequest]:
    prompts = ("a boat", "the long way")
    return [pipeline.prepare(Request(prompt=prompt, size=(3, 4), seed=0)).outputs[0] for prompt in prompts]


def test_batched_steps_agree_with_lone_passes(make_checkpoint: Checkpoints) -> None:
    folders = make_checkpoint("picture")
    pipeline = Pipeline.load(folders.model, folders.vision, device="cpu")
    requests, lm = two_requests(pipeline), pipeline.lm
    batched = list(by_steps(ModelRunner(lm, slots=2, tokens=lm.context), requests, GRIDS, guidance=3.0))
    for i, request in enumerate(requests):
        alone = list(by_chunks(lm, request, GRIDS[i], guidance=3.0))
        stepped = list(by_passes(lm, request, GRIDS[i], guidance=3.0))
        for ours, theirs, same in zip(batched, alone, stepped, strict=True):
            torch.testing.assert_close(ours[i], theirs, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(same, theirs, atol=1e-4, rtol=1e-4)
        agreement = compare(alone, (row[i] for row in batched), Sampling(top_k=9))
        assert (agreement.steps, agreement.top1) == (12, 1.0)
        assert 0 <= agreement.kl_max < 1e-6


@pytest.mark.parametrize("name", FORMATS)
def test_8_bit_weights_are_near_and_not_equal(name: str, make_checkpoint: Checkpoints) -> None:
    """On random weights, the hardest case: nothing in them is redundant."""
    folders = make_checkpoint("picture")
    plain = Pipeline.load(folders.model, folders.vision, device="cpu")
    small = Pipeline.load(folders.model, folders.vision, device="cpu", quantize=name)
    request = two_requests(plain)[0]
    agreement = compare(
        by_chunks(plain.lm, request, GRIDS[0], guidance=1.0),
        by_chunks(small.lm, request, GRIDS[0], guidance=1.0),
        Sampling(),
    )
    assert 0 < agreement.kl_mean < 0.05
    other = compare(
        by_chunks(plain.lm, request, GRIDS[0], guidance=1.0),
        by_chunks(plain.lm, two_requests(plain)[1], GRIDS[1], guidance=1.0),
        Sampling(),
    )
    assert other.kl_mean > 4 * agreement.kl_mean


def test_the_figures_are_what_they_say() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
    agreement = compare([p.log()], [q.log()], Sampling())
    assert agreement.top1 == 0.5
    assert agreement.kl_max == pytest.approx(0.25 * torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    assert agreement.kl_mean == pytest.approx(agreement.kl_max / 2)
    cut = compare([p.log()], [q.log()], Sampling(top_k=1))
    assert cut.kl_max == pytest.approx(-torch.log(torch.tensor(FLOOR)).item(), rel=1e-4)
