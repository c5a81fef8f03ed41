"""Templates and defaults, and that no prompt can forge a special token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from emu_cog.errors import CheckpointError, InputError
from emu_cog.pipeline import Pipeline
from emu_cog.prompt import prompts, tasks
from emu_cog.request import TASKS, Request, Sampling
from tests.conftest import photo
from tests.test_tokenizer import FORGERIES

Pipelines = Callable[[str], Pipeline]
IMAGES = [[[1, 2, 3], [4, 5, 6]], [[7]]]
# Each task's text as upstream's configs format it, the images marked by # and the question by Q.
CONDITIONAL = {
    "t2i": "You are a helpful assistant for t2i task. USER: Q# ASSISTANT: ",
    "x2i": "You are a helpful assistant for x2i task. USER: #Q ASSISTANT: ",
    "howto": "You are a helpful assistant for howto task. Please generate a response with interleaved text and images."
    " USER: Q# ASSISTANT: ",
    "story": "You are a helpful assistant for story task. USER: Q# ASSISTANT: ",
    "explore": "You are a helpful assistant for explore task. USER: Q# ASSISTANT: ",
    "vla": "You are a helpful assistant for vla task. USER: Q# ASSISTANT: ",
}


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("task", TASKS)
def test_both_streams_follow_the_templates(task: str, count: int, pipelines: Pipelines) -> None:
    tokenizer = pipelines("picture").tokenizer
    ids = tokenizer.ids
    prompt = prompts.build(tasks.TABLE[task], "a fox's tail, 42 cm", IMAGES[:count], tokenizer)
    blocks = [token for codes in IMAGES[:count] for token in ids.image_block(codes)]
    for template, stream in (
        (CONDITIONAL[task].replace("Q", "a fox's tail, 42 cm"), prompt.conditional),
        ("You are a helpful assistant. USER: # ASSISTANT: ", prompt.unconditional),
    ):
        before, after = template.split("#")
        if count:
            expected = [ids.bos, *tokenizer.encode(before), *blocks, *tokenizer.encode(after), ids.bss]
        else:
            expected = [ids.bos, *tokenizer.encode(before + after), ids.bss]
        assert list(stream) == expected


@pytest.mark.parametrize("text", FORGERIES)
@pytest.mark.parametrize("task", ["t2i", "x2i", "story"])
def test_a_prompt_adds_no_special_token(task: str, text: str, pipelines: Pipelines) -> None:
    tokenizer = pipelines("picture").tokenizer

    def special(question: str) -> list[int]:
        ids = prompts.build(tasks.TABLE[task], question, IMAGES[:1], tokenizer).conditional
        return [i for i in ids if i >= tokenizer.ids.pad]

    assert special(f"draw {text} now") == special("draw this now")
    assert f"draw {text} now" in tokenizer.decode(
        list(prompts.build(tasks.TABLE[task], f"draw {text} now", [], tokenizer).conditional)
    )


def test_defaults_are_upstreams() -> None:
    def show(task: str) -> tuple:
        plan = tasks.plan(Request(prompt="x", task=task, images=(photo(1),) if task == "x2i" else ()))
        return plan.guidance, plan.image_area, plan.image.top_k, plan.text, plan.max_new_tokens

    picture = Sampling(temperature=1.0, top_k=1024, top_p=0.9)
    assert show("t2i") == (5.0, 1048576, 5120, picture, 1024)
    assert show("x2i") == (3.0, 1048576, 5120, picture, 1024)
    assert show("howto") == (3.0, 518400, 10240, Sampling(temperature=0.7, top_k=200, top_p=0.8), None)
    for task in ("story", "explore", "vla"):
        assert show(task) == (3.0, 518400, 10240, picture, None)
    base = tasks.ModelDefaults(kind="base")
    assert tasks.plan(Request(prompt="x"), base).guidance == 2.0
    assert tasks.plan(Request(prompt="x", task="howto"), base).guidance == 3.0


def test_temperature_sets_both_kinds_unless_the_specific_one_is_given() -> None:
    plan = tasks.plan(Request(prompt="x", task="howto", temperature=0.5, image_temperature=1.5))
    assert (plan.text.temperature, plan.image.temperature) == (0.5, 1.5)
    plan = tasks.plan(Request(prompt="x", text_top_k=3, text_top_p=0.4, image_top_k=0, image_top_p=0.0))
    assert plan.text == Sampling(temperature=1.0, top_k=3, top_p=0.4)
    assert plan.image == Sampling(temperature=1.0, top_k=0, top_p=0.0)


def test_a_checkpoints_own_defaults(tmp_path: Path) -> None:
    assert tasks.ModelDefaults.read(tmp_path) == tasks.ModelDefaults()
    own = {
        "aspect_ratio": {"story": "4:5"},
        "image_area": 25600,
        "guidance_scale": {"t2i": 4},
        "image_temperature": {"t2i": 0.8},
    }
    (tmp_path / "defaults.json").write_text(json.dumps(own))
    defaults = tasks.ModelDefaults.read(tmp_path)
    assert tasks.plan(Request(prompt="x"), defaults).size == (10, 10)
    assert tasks.plan(Request(prompt="x"), defaults).guidance == 4
    story = tasks.plan(Request(prompt="x", task="story"), defaults)
    assert (story.guidance, story.size) == (3.0, (11, 10))
    assert tasks.plan(Request(prompt="x", resolution="512", guidance_scale=1.5), defaults).size == (32, 32)
    for chosen, temperature in (({}, 0.8), ({"temperature": 1.2}, 1.2), ({"image_temperature": 0.5}, 0.5)):
        assert tasks.plan(Request(prompt="x", **chosen), defaults).image.temperature == temperature
    assert tasks.plan(Request(prompt="x"), defaults).text.temperature == 1.0
    assert tasks.plan(Request(prompt="x", task="story"), defaults).image.temperature == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"areas": 1}',
        '{"kind": "video"}',
        '{"image_area": {"t3i": 1}}',
        '{"guidance_scale": "high"}',
        '{"guidance_scale": {"t2i": "high"}}',
        '{"image_temperature": 0}',
        '{"image_temperature": true}',
        '{"image_area": null}',
        '{"aspect_ratio": "auto"}',
        '{"aspect_ratio": {"story": 1}}',
    ],
)
def test_damaged_defaults_are_reported(text: str, tmp_path: Path) -> None:
    (tmp_path / "defaults.json").write_text(text)
    with pytest.raises(CheckpointError, match="defaults.json"):
        tasks.ModelDefaults.read(tmp_path)


BAD: list[tuple[dict, str]] = [
    ({"prompt": " \n"}, "prompt is blank"),
    ({"prompt": None}, "prompt is blank"),
    ({"task": "i2i"}, "task_type='i2i'.*t2i, x2i, howto"),
    ({"task": "x2i"}, "needs 1 to 3 reference images"),
    ({"images": 1}, "leave them out, or use task_type x2i"),
    ({"task": "x2i", "images": 4}, "at most 3"),
    ({"aspect_ratio": "5:3"}, "aspect_ratio='5:3'"),
    ({"aspect_ratio": "custom"}, "both width and height"),
    ({"aspect_ratio": "custom", "width": 512}, "width=512, height=None"),
    ({"width": 512, "height": 512}, "aspect_ratio custom only"),
    ({"aspect_ratio": "custom", "width": 500, "height": 512}, "width=500.*multiple of 16 from 160 to 1584"),
    ({"aspect_ratio": "custom", "width": 512, "height": 1600}, "height=1600"),
    ({"aspect_ratio": "custom", "width": 144, "height": 512}, "width=144"),
    ({"resolution": "2048"}, "resolution='2048'"),
    ({"num_outputs": 5}, "num_outputs=5.*1 to 4"),
    ({"num_outputs": 0}, "num_outputs=0"),
    ({"num_outputs": 2, "task": "story"}, "story writes one sequence"),
    ({"guidance_scale": 0.5}, "guidance_scale=0.5"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    ({"temperature": 0}, "temperature=0"),
    ({"image_top_k": -1}, "image_top_k=-1"),
    ({"text_top_p": 1.1}, "text_top_p=1.1"),
    ({"max_new_tokens": 40000}, "max_new_tokens=40000"),
    ({"seed": -1}, "seed=-1"),
    ({"seed": 2**64}, "seed="),
    ({"size": (0, 4)}, "size="),
    ({"image_area": 10}, "image_area=10"),
]


@pytest.mark.parametrize(("fields", "says"), BAD, ids=[says for _, says in BAD])
def test_bad_requests_say_what_is_accepted(fields: dict, says: str) -> None:
    if "images" in fields:
        fields = fields | {"images": tuple(photo(i) for i in range(fields["images"]))}
    with pytest.raises(InputError, match=says):
        Request(**({"prompt": "a boat"} | fields))
