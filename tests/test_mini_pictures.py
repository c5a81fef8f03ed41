"""The trained miniature in the real pipeline: a few held-out prompts per task with fixed seeds, judged by pixels.

`scripts/mini/evaluate` runs the same with more prompts. The bounds leave room for different rounding (number of CPU
threads), which can change single pictures.
"""

from __future__ import annotations

import numpy as np
import pytest

from emu_cog.errors import InputError
from emu_cog.events import Picture
from emu_cog.pipeline import Pipeline
from emu_cog.request import Request
from emu_cog.settings import Settings
from emu_cog.vision.ibq import load_vision_tokenizer
from emu_cog.weights.store import MINIATURE, resolve
from scripts.mini.evaluate import evaluate, reconstruction_quality
from scripts.mini.judge import detect
from scripts.mini.spec import ABOVE, Relation, Spec, Wanted, mismatch
from scripts.mini.train import export

needs_model = pytest.mark.skipif(
    not (MINIATURE / "model").is_dir(), reason="no trained miniature in this package: train one with scripts/mini"
)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(MINIATURE / "model", MINIATURE / "vision", device="cpu")


@pytest.fixture(scope="module")
def flash() -> Pipeline:
    found = resolve(Settings(checkpoint="mini-flash"))
    return Pipeline.load(found.model, found.vision_tokenizer, device="cpu")


@needs_model
@pytest.mark.parametrize(
    ("task", "prompts", "right"),
    [
        ("t2i", 8, 0.75),
        ("x2i", 4, 0.5),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("t2i", 20, 0.8),
                ("x2i", 12, 0.7),
                ("vla", 3, 0.6),
                ("howto", 2, 0.5),
                ("story", 2, 0.5),
                ("explore", 2, 0.5),
            ]
        ),
    ],
)
def test_held_out_prompts_are_answered_correctly(pipeline: Pipeline, task: str, prompts: int, right: float) -> None:
    figures = evaluate(pipeline, task, count=prompts, batch=prompts)
    assert figures["right"] >= right, figures
    if task == "x2i":
        assert figures["outside_difference"] < 6


@needs_model
@pytest.mark.parametrize(
    ("task", "prompts", "right"),
    [
        ("t2i", 8, 0.5),
        ("x2i", 2, 0.5),
        pytest.param("t2i", 40, 0.7, marks=pytest.mark.slow),
        pytest.param("x2i", 20, 0.7, marks=pytest.mark.slow),
    ],
)
def test_the_flashar_miniature_answers_them_too(flash: Pipeline, task: str, prompts: int, right: float) -> None:
    figures = evaluate(flash, task, count=prompts, batch=prompts)
    assert figures["right"] >= right, figures


@needs_model
def test_the_flashar_miniature_refuses_sequences(flash: Pipeline) -> None:
    with pytest.raises(InputError, match="story"):
        flash.prepare(Request(prompt="Tell a story about a red fish.", task="story"))


@needs_model
@pytest.mark.slow
@pytest.mark.parametrize(("task", "prompts", "right"), [("t2i", 10, 0.6), ("x2i", 8, 0.6)])
def test_prompts_outside_the_grammar_are_answered_correctly(
    pipeline: Pipeline, task: str, prompts: int, right: float
) -> None:
    figures = evaluate(pipeline, task, count=prompts, batch=prompts, words="blind")
    assert figures["right"] >= right, figures


def test_the_vision_tokenizer_reconstructs_pictures() -> None:
    figures = reconstruction_quality(load_vision_tokenizer(MINIATURE / "vision"), 6)
    assert figures["psnr_db"] >= 30


@needs_model
@pytest.mark.slow
@pytest.mark.parametrize(("aspect_ratio", "wide"), [("16:9", True), ("3:4", False)])
def test_other_aspect_ratios_are_generated_correctly(pipeline: Pipeline, aspect_ratio: str, wide: bool) -> None:
    """One of four pictures may be wrong: the usual error rate is one in ten."""
    prompt = "a red star above a blue circle on a yellow background"
    request = Request(prompt=prompt, aspect_ratio=aspect_ratio, seed=3, num_outputs=4)
    images = [event.image for event in pipeline.stream(request) if isinstance(event, Picture)]
    assert [(image.width > image.height) == wide for image in images] == [True] * 4
    spec = Spec((Wanted("star", "red"), Wanted("circle", "blue")), (Relation(ABOVE, (0,), (1,)),), background="yellow")
    wrong = [mismatch(detect(np.asarray(image)), spec) for image in images]
    assert wrong.count(None) >= 3, wrong


def test_the_miniature_is_within_its_size_limit() -> None:
    sizes = {path: path.stat().st_size for path in MINIATURE.rglob("*") if path.is_file()}
    assert sum(size for path, size in sizes.items() if path.parent.name in ("model", "vision")) <= export.LIMIT
    assert sum(sizes.values()) <= 70 * 10**6, "with FlashAR weights, if there are any"
