"""predict.py, read as Cog's build reads it, against the package's tables and the README."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from typing import Any

import _predictor
import pytest

from emu_cog import request
from emu_cog.errors import InputError
from emu_cog.prompt.tasks import TABLE
from emu_cog.request import Request
from tests.conftest import ROOT, photo

PREDICTOR = _predictor.read(ROOT / "predict.py")
INPUTS = PREDICTOR.inputs
FILES = ("reference_image", "reference_image_2", "reference_image_3")
LIMITED = sorted(name for name, field in INPUTS.items() if "minimum" in field.keywords)


def bounds(name: str) -> tuple[Any, Any]:
    return INPUTS[name].keywords["minimum"], INPUTS[name].keywords["maximum"]


@pytest.mark.parametrize(
    ("name", "table", "default"),
    [
        ("task_type", request.TASKS, "t2i"),
        ("aspect_ratio", request.ASPECT_RATIOS, "auto"),
        ("resolution", request.RESOLUTIONS, "auto"),
        ("output_format", request.OUTPUT_FORMATS, "png"),
    ],
)
def test_choices_are_the_packages(name: str, table: tuple[str, ...], default: str) -> None:
    assert INPUTS[name].choices == table
    assert INPUTS[name].default == default


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("width", request.MIN_SIDE, request.MAX_SIDE),
        ("height", request.MIN_SIDE, request.MAX_SIDE),
        ("num_outputs", 1, request.MAX_OUTPUTS),
        ("guidance_scale", 1, request.MAX_GUIDANCE),
        ("max_new_tokens", request.MIN_NEW_TOKENS, request.MAX_NEW_TOKENS),
        ("output_quality", 1, 100),
        *((f"{kind}temperature", request.MIN_TEMPERATURE, request.MAX_TEMPERATURE) for kind in ("", "text_", "image_")),
    ],
)
def test_ranges_are_the_packages(name: str, low: float, high: float) -> None:
    assert bounds(name) == (low, high)


def request_with(name: str, value: Any) -> Request:
    custom = {"aspect_ratio": "custom", "width": 160, "height": 160} if name in ("width", "height") else {}
    return Request(**{"prompt": "x", **custom, name: value})


@pytest.mark.parametrize("name", [name for name in LIMITED if name != "output_quality"])
def test_request_accepts_the_ranges_of_the_inputs_and_no_more(name: str) -> None:
    low, high = bounds(name)
    request_with(name, low)
    request_with(name, high)
    step = request.PIXELS_PER_TOKEN if name in ("width", "height") else 1 if INPUTS[name].type == "integer" else 0.001
    with pytest.raises(InputError, match=name):
        request_with(name, high + step)
    if name != "max_new_tokens":  # a library caller may ask for less than the playground offers
        with pytest.raises(InputError, match=name):
            request_with(name, low - step)


def test_every_field_of_a_request_has_its_input() -> None:
    ours = {field.name for field in dataclasses.fields(Request)} - {"images", "image_area", "size"}
    inputs = {{"task_type": "task"}.get(name, name) for name in INPUTS} - {*FILES, "output_format", "output_quality"}
    assert inputs == ours


def test_defaults_are_the_requests() -> None:
    for field in dataclasses.fields(Request):
        given = INPUTS.get({"task": "task_type"}.get(field.name, field.name))
        if given and not given.required:
            assert given.default == field.default, field.name


def test_files_are_single_and_optional() -> None:
    """A list can't be filled by `cog predict -i reference_image=@photo.jpg`: that sends one string."""
    assert len(FILES) == request.MAX_REFERENCES
    for name in FILES:
        assert INPUTS[name].schema == {"type": "string", "format": "uri"}
        assert INPUTS[name].nullable
        assert INPUTS[name].keywords["x-cog-accept"] == "image/*"
    assert [name for name, field in INPUTS.items() if field.schema.get("format") == "uri"] == list(FILES)


def test_only_the_prompt_is_required() -> None:
    assert [name for name, field in INPUTS.items() if field.required] == ["prompt"]


def test_files_are_streamed_one_by_one() -> None:
    assert PREDICTOR.output == {
        "type": "array",
        "items": {"type": "string", "format": "uri"},
        "x-cog-array-type": "iterator",
    }
    assert PREDICTOR.streaming


def test_every_input_has_a_short_description() -> None:
    for name, field in INPUTS.items():
        text = field.keywords["description"]
        assert re.fullmatch(r"[A-Z0-9].{8,118}\.", text) or text.startswith("t2i:"), (name, text)


def test_numbers_in_descriptions_are_the_tables() -> None:
    words = INPUTS["guidance_scale"].keywords["description"]
    found = re.search(r"(\d+) for t2i, else (\d+); base model (\d+) for t2i, x2i, else (\d+)", words)
    assert found is not None
    t2i, others, base, base_others = map(float, found.groups())
    for name, task in TABLE.items():
        pictures = name in ("t2i", "x2i")
        expected = {"image": t2i if name == "t2i" else others, "base": base if pictures else base_others}
        assert task.guidance == expected, name
    sides = {name: round(task.image_area**0.5) for name, task in TABLE.items()}
    words = INPUTS["resolution"].keywords["description"]
    pictures, sequences = re.search(r"(\d+) for t2i and x2i, (\d+) for sequences", words).groups()  # type: ignore[union-attr]
    assert {sides.pop("t2i"), sides.pop("x2i")} == {int(pictures)}
    assert set(sides.values()) == {int(sequences)}


def readme_inputs() -> dict[str, str]:
    """The README's table under `name | type and default`: name to type and default. A row may hold several names."""
    lines = iter((ROOT / "README.md").read_text().splitlines())
    rows: dict[str, str] = {}
    for line in lines:
        if re.match(r"\| *name *\| *type and default *\|", line):
            next(lines)
            break
    for line in lines:
        if not line.startswith("|"):
            break
        names, text = line.strip("| ").split("|")[:2]
        for name in re.findall(r"`(\w+)`", names):
            assert name not in rows, f"{name} is in the README twice"
            rows[name] = text.strip()
    return rows


def test_the_readme_lists_every_input() -> None:
    assert set(readme_inputs()) == set(INPUTS)


@pytest.mark.parametrize("name", INPUTS)
def test_the_readme_gives_types_ranges_and_defaults(name: str) -> None:
    field, text = INPUTS[name], readme_inputs()[name]
    words = [word.strip() for word in re.split(r"[,;]", text)]
    if field.choices:
        assert text.startswith(f"{', '.join(field.choices)};")
    elif limits := re.search(r"([\d.]+) to ([\d.]+)", text):
        assert tuple(map(float, limits.groups())) == bounds(name)
    else:
        assert name not in LIMITED or name.endswith("_top_k")
    assert ("optional" in words) == field.nullable
    assert ("required" in words) == field.required
    default = re.search(r"default (\S+)$", text)
    assert (default and default[1]) == (None if field.default is None else str(field.default))


def test_predict_py_is_imported_without_a_warning() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import predict"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_x2i_takes_as_many_photos_as_there_are_inputs() -> None:
    Request(prompt="x", task="x2i", images=tuple(photo(i) for i in range(len(FILES))))
