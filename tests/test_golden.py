"""This package against vectors that upstream's own code made at the pinned commit (tests/golden/make.py).

The vectors with the small vocabulary need nothing else; those with the released one need its tokenizer files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emu_cog.engine.sequence import Tokens
from emu_cog.events import Picture
from emu_cog.pipeline import Pipeline, Prepared
from emu_cog.prompt import geometry, prompts, tasks
from emu_cog.prompt.segments import ImageCodes, Reader
from emu_cog.request import Request
from emu_cog.vision.images import decode_image, encode_image
from tests.golden import inputs
from tests.golden.inputs import Run

HERE = Path(__file__).resolve().parent / "golden"
FACTS: Mapping[str, Any] = json.loads((HERE / "facts.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-4
"""Largest difference of a processed probability, fp32. Upstream runs each stream alone with eager attention, and
guidance multiplies rounding errors by up to 5."""

Load = Callable[[str], Pipeline]
Arrays = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """`load(name)`: a Pipeline over one of the golden checkpoints, made from its seed and verified by its hash."""
    made: dict[str, Pipeline] = {}

    def load(name: str, tokenizer: Path | None = None) -> Pipeline:
        if name not in made:
            folders = inputs.make(name, tmp_path_factory.mktemp(name), tokenizer=tokenizer)
            assert inputs.digest(folders) == FACTS["digests"][name], (
                "make_tiny no longer makes the checkpoint that the vectors were made with: run tests/golden/make.py"
            )
            made[name] = Pipeline.load(folders.model, folders.vision, device="cpu", dtype="float32")
        return made[name]

    return load


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    with np.load(HERE / "runs.npz") as file:
        return dict(file)


def prepare(pipeline: Pipeline, run: Run) -> Prepared:
    """The run as a user's request. Upstream takes the last reference's size where none is given."""
    images = tuple(inputs.picture(name) for name in inputs.REFERENCES[: run.references])
    size = run.size or (geometry.reference_size(images[-1].size, run.area) if images else None)
    return pipeline.prepare(
        Request(
            prompt=inputs.QUESTIONS[run.task],
            task=run.task,
            images=images,
            image_area=run.area,
            size=size,
            aspect_ratio="model",  # where there is no size
            guidance_scale=run.guidance,
            seed=run.seed,
        )
    )


def check_prompts(pipeline: Pipeline, expected: Mapping[str, Any]) -> None:
    assert len(expected) == 24
    for name, (conditional, unconditional) in expected.items():
        task, references = name.split()
        if task == "x2i" and references == "0":
            continue  # upstream has a template for it; here x2i needs a picture
        if task == "t2i" and references != "0":  # refused as a request, so without `prepare`
            images = [encode_image(inputs.picture(r), 64 * 64, pipeline.vision) for r in inputs.REFERENCES]
            made = prompts.build(
                tasks.TABLE[task], inputs.QUESTIONS[task], images[: int(references)], pipeline.tokenizer
            )
            streams = (made.conditional, made.unconditional)
        else:
            run = Run(checkpoint="-", task=task, references=int(references), size=(2, 2), guidance=1.0, seed=0, limit=0)
            (output,) = prepare(pipeline, run).outputs
            streams = (output.conditional, output.unconditional)
        assert [list(stream) for stream in streams] == [conditional, unconditional], name


def generate(pipeline: Pipeline, run: Run, arrays: Arrays, name: str, *, greedy: bool) -> list[tuple[str, np.ndarray]]:
    """Compare our prompts and tokens with the golden ones. Returns (kind, probabilities) of every sampled token."""
    expected = arrays[f"{name}/{'greedy' if greedy else 'sampled'}"].tolist()
    prepared = prepare(pipeline, run)
    config = replace(
        prepared.config,
        image=inputs.GREEDY if greedy else run.image,
        text=inputs.GREEDY if greedy else run.text,
        max_new_tokens=None,
    )
    (output,) = prepared.outputs
    assert list(output.conditional) == arrays[f"{name}/conditional"].tolist()
    assert list(output.unconditional) == arrays[f"{name}/unconditional"].tolist()
    steps: list[tuple[str, np.ndarray]] = []
    made: list[int] = []
    for event in pipeline.engine.generate(
        [output], config, trace=lambda kind, probs: steps.append((kind, probs[0].numpy()))
    ):
        if isinstance(event, Tokens):
            made += event.ids
        if len(made) >= len(expected):
            break  # upstream's run ended at its token limit
    if config.single_image:  # ours ends with its image, upstream may continue to an EOS
        assert made[-1] == pipeline.tokenizer.ids.eoi
        expected = expected[: expected.index(pipeline.tokenizer.ids.eoi) + 1]
    assert made[: len(expected)] == expected
    return steps


def check_probabilities(pipeline: Pipeline, run: Run, arrays: Arrays, name: str) -> None:
    steps = generate(pipeline, run, arrays, name, greedy=False)
    ids = pipeline.tokenizer.ids
    offsets = np.cumsum([0, *arrays[f"{name}/kept"]])
    count = min(len(steps), len(offsets) - 1)
    assert count >= 15
    for i in range(count):
        kind, probs = steps[i]
        kept = slice(offsets[i], offsets[i + 1])
        dense = np.zeros(ids.vocab_size, dtype=np.float32)
        dense[arrays[f"{name}/kept_ids"][kept]] = arrays[f"{name}/kept_probs"][kept]
        ours = np.zeros_like(dense)
        where = {"text": slice(0, ids.visual), "visual": slice(ids.visual, None), "digit": list(ids.digits)}[kind]
        ours[where] = probs
        np.testing.assert_allclose(ours, dense, rtol=0, atol=TOLERANCE, err_msg=f"{name}: sampled token {i} ({kind})")


@pytest.mark.parametrize("name", inputs.CHECKPOINTS)
def test_prompt_ids(load: Load, name: str) -> None:
    check_prompts(load(name), FACTS["prompts"][name])


@pytest.mark.parametrize("name", inputs.CHECKPOINTS)
def test_codes_of_pictures(load: Load, name: str) -> None:
    pipeline = load(name)
    for key, expected in FACTS["codes"][name].items():
        reference, area = key.split()
        made = encode_image(inputs.picture(reference), int(area), pipeline.vision)
        assert [list(row) for row in made] == expected, key


@pytest.mark.parametrize("name", inputs.CHECKPOINTS)
def test_pixels_of_codes(load: Load, arrays: Arrays, name: str) -> None:
    """Within 1 of 255: rounding in a sum may move a value across a whole number."""
    prefix = f"pixels {name}/"
    keys = [key for key in arrays if key.startswith(prefix)]
    assert len(keys) == len(inputs.REFERENCES)
    for key in keys:
        image = decode_image(FACTS["codes"][name][key.removeprefix(prefix)], load(name).vision)
        difference = np.abs(np.asarray(image).astype(int) - arrays[key].astype(int))
        assert difference.max() <= 1, key
        assert (difference > 0).mean() < 0.001, key


def test_reference_sizes() -> None:
    checked = 0
    for width, height, area, new_width, new_height in FACTS["resizes"]:
        if max(width, height) <= geometry.MAX_RATIO * min(width, height):
            assert geometry.reference_pixels((width, height), area) == (new_width, new_height), (width, height, area)
            checked += 1
    assert checked > 90


@pytest.mark.parametrize("name", inputs.RUNS)
def test_tokens_at_top_k_1(load: Load, arrays: Arrays, name: str) -> None:
    run = inputs.RUNS[name]
    generate(load(run.checkpoint), run, arrays, name, greedy=True)


@pytest.mark.parametrize("name", inputs.RUNS)
def test_processed_probabilities_and_seeded_tokens(load: Load, arrays: Arrays, name: str) -> None:
    run = inputs.RUNS[name]
    check_probabilities(load(run.checkpoint), run, arrays, name)


def test_segments(load: Load, arrays: Arrays) -> None:
    """The segments of upstream's multimodal_decode for the same ids: kinds, texts and picture sizes, in order."""
    kinds = {"text": "text", "global_reasoning": "global_cot", "image_reasoning": "image_cot"}
    passages = inputs.passages(load("storyteller").tokenizer.ids, load("storyteller").tokenizer)
    for name, expected in FACTS["segments"].items():
        checkpoint = "storyteller" if name in passages else inputs.RUNS[name].checkpoint
        tokenizer = load(checkpoint).tokenizer
        reader = Reader(tokenizer)
        ids = passages[name] if name in passages else arrays[f"{name}/sampled"].tolist()
        made: list[list[Any]] = []
        for segment in [*reader.feed(ids), *reader.finish()]:
            if isinstance(segment, ImageCodes):
                made.append(["image", [16 * len(segment.codes[0]), 16 * len(segment.codes)]])
            else:
                made.append([kinds[segment.kind], segment.text])
        assert made == expected, name


def test_a_request_gives_the_golden_codes(load: Load, arrays: Arrays) -> None:
    """Through `Pipeline.stream`, with upstream's tokens as the codes."""
    name = "t2i fixed size"
    run, pipeline = inputs.RUNS[name], load("picture")
    request = Request(
        prompt=inputs.QUESTIONS["t2i"],
        size=run.size,
        guidance_scale=run.guidance,
        image_top_k=run.image.top_k,
        text_top_k=run.text.top_k,
        seed=run.seed,
    )
    (picture,) = [event for event in pipeline.stream(request) if isinstance(event, Picture)]
    ids = pipeline.tokenizer.ids
    golden = arrays[f"{name}/sampled"]
    assert [code for row in picture.codes for code in row] == (golden[golden >= ids.visual] - ids.visual).tolist()


def test_released_vocabulary(load: Load, arrays: Arrays, real_tokenizer_folder: Path) -> None:
    pipeline = load("real", tokenizer=real_tokenizer_folder)  # type: ignore[call-arg]
    check_prompts(pipeline, FACTS["prompts"]["real"])
    generate(pipeline, inputs.REAL_RUN, arrays, "real", greedy=True)
    check_probabilities(pipeline, inputs.REAL_RUN, arrays, "real")


def test_vectors_are_small() -> None:
    assert sum(path.stat().st_size for path in HERE.iterdir() if path.is_file()) < 2_000_000
