"""The schema writer: Cog's own files byte for byte, its rules one by one, and what it must refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import _openapi
import _predictor
import pytest

from tests.cog_kit import cog_data


def source(inputs: str = "", *, head: str = "", decorator: str = "", returns: str = "Iterator[Path]") -> str:
    return f"""
import cog
from cog import BasePredictor, Input, Path
from collections.abc import AsyncIterator, Iterator
from typing import Optional
{head}
class Predictor(BasePredictor):
    {decorator}
    def predict(self, {inputs}) -> {returns}:
        pass
"""


def document(tmp_path: Path, text: str) -> dict[str, Any]:
    predictor, target = tmp_path / "predict.py", tmp_path / ".cog" / "openapi_schema.json"
    predictor.write_text(text)
    _openapi.write(predictor, target)
    made: dict[str, Any] = json.loads(target.read_text())
    return made


def properties(tmp_path: Path, inputs: str, *, head: str = "") -> dict[str, Any]:
    made: dict[str, Any] = document(tmp_path, source(inputs, head=head))["components"]["schemas"]
    return made


@pytest.mark.parametrize("kind", ["", "_async"])
def test_cogs_own_files_are_written_byte_for_byte(kind: str, tmp_path: Path) -> None:
    example = cog_data() / "example"
    _openapi.write(example / f"predict{kind}.py", tmp_path / "made.json")
    assert (tmp_path / "made.json").read_bytes() == (example / f"openapi_schema{kind}.json").read_bytes()


@pytest.mark.parametrize(
    ("annotation", "schema"),
    [
        ("bool", {"type": "boolean"}),
        ("float", {"type": "number"}),
        ("int", {"type": "integer"}),
        ("str", {"type": "string"}),
        ("Path", {"type": "string", "format": "uri"}),
        ("cog.Path", {"type": "string", "format": "uri"}),
        ("dict", {"type": "object"}),
        ("list[int]", {"type": "array", "items": {"type": "integer"}}),
        ("Optional[int]", {"type": "integer", "nullable": True}),
        ("int | None", {"type": "integer", "nullable": True}),
        ("None | int", {"type": "integer", "nullable": True}),
        ("'Optional[Path]'", {"type": "string", "format": "uri", "nullable": True}),
        ("Optional[list[Path]]", {"type": "array", "items": {"type": "string", "format": "uri"}, "nullable": True}),
    ],
)
def test_types(annotation: str, schema: dict[str, Any], tmp_path: Path) -> None:
    made = properties(tmp_path, f"some_value: {annotation}")["Input"]
    assert made["properties"]["some_value"] == {"title": "Some Value", "x-order": 0} | schema
    assert made.get("required", []) == ([] if schema.get("nullable") else ["some_value"])


@pytest.mark.parametrize(
    "choices", ['["a", "b"]', "KEYS", "TYPED", "list(TABLE.keys())", "list(NAMES.values())", '["a"] + REST']
)
def test_choices_become_an_enumeration_of_their_own(choices: str, tmp_path: Path) -> None:
    head = """
KEYS = ["a", "b"]
TYPED: list[str] = ["a", "b"]
TABLE = {"a": 1, "b": 2}
NAMES = {1: "a", 2: "b"}
REST = ["b"]
"""
    made = properties(tmp_path, f"kind: str = Input(choices={choices}, default='a')", head=head)
    assert made["kind"] == {"title": "kind", "description": "An enumeration.", "enum": ["a", "b"], "type": "string"}
    assert made["Input"]["properties"]["kind"] == {
        "allOf": [{"$ref": "#/components/schemas/kind"}],
        "default": "a",
        "x-order": 0,
    }


def test_keywords_defaults_and_order(tmp_path: Path) -> None:
    made = properties(
        tmp_path,
        """b: int = Input(ge=-1, le=4.5, default=-1, deprecated=True, description=WORDS),
           a: str = Input(min_length=1, max_length=9, regex=r"\\d+", default="x"),
           f: Path = Input(accept="image/*"), plain: float = 0.5, none: Optional[int] = None""",
        head='WORDS = "In words."',
    )["Input"]
    assert list(made["properties"]) == ["b", "a", "f", "plain", "none"]
    assert [p["x-order"] for p in made["properties"].values()] == [0, 1, 2, 3, 4]
    assert made["required"] == ["f"]
    b, a, f, plain, none = made["properties"].values()
    assert (b["minimum"], b["maximum"], b["default"], b["deprecated"], b["description"]) == (
        -1,
        4.5,
        -1,
        True,
        "In words.",
    )
    assert (a["minLength"], a["maxLength"], a["pattern"]) == (1, 9, r"\d+")
    assert f["x-cog-accept"] == "image/*"
    assert plain["default"] == 0.5
    assert none["default"] is None


@pytest.mark.parametrize(
    ("returns", "schema"),
    [
        ("str", {"type": "string"}),
        ("list[Path]", {"type": "array", "items": {"type": "string", "format": "uri"}}),
        ("Iterator[str]", {"type": "array", "items": {"type": "string"}, "x-cog-array-type": "iterator"}),
        (
            "cog.ConcatenateIterator[str]",
            {
                "type": "array",
                "items": {"type": "string"},
                "x-cog-array-type": "iterator",
                "x-cog-array-display": "concatenate",
            },
        ),
        ("dict[str, int]", {"type": "object", "additionalProperties": {"type": "integer"}}),
    ],
)
def test_outputs(returns: str, schema: dict[str, Any], tmp_path: Path) -> None:
    assert (
        document(tmp_path, source(returns=returns))["components"]["schemas"]["Output"] == {"title": "Output"} | schema
    )


@pytest.mark.parametrize(
    ("head", "decorator"),
    [("", "@cog.streaming"), ("import cog as c", "@c.streaming()"), ("from cog import streaming as s", "@s")],
)
def test_streaming(head: str, decorator: str, tmp_path: Path) -> None:
    post = document(tmp_path, source(head=head, decorator=decorator))["paths"]["/predictions"]["post"]
    assert post["x-cog-streaming"] is True
    assert "x-cog-streaming" not in document(tmp_path, source())["paths"]["/predictions"]["post"]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        # dropped by Cog without a word, or read as something else
        ("n: int = Input(default=4 * 1024)", "default must be a literal"),
        ("n: int = Input(default=IMPORTED)", "default must be a literal"),
        ("n: int = Input(default=None)", "must be Optional"),
        ("n: int = Input(ge=LOW, default=1)", "ge must be a literal"),
        ("n: int = Input(le=2 ** 3, default=1)", "le must be a literal"),
        ("n: int = Input(le=1_000, default=1)", "plain decimal number"),
        ("n: int = Input(le=True, default=1)", "le must be a number"),
        ('n: int = Input(description=f"{LOW} up")', "description must be a literal"),
        ('n: int = Input(description="one " "two")', "one plain string"),
        ('n: int = Input(description="one " + "two")', "description must be a literal"),
        ('n: int = Input(description="a\\tb")', "one plain string"),
        ('n: int = Input(description=u"ab")', "one plain string"),
        ("n: int = Input(1)", "keywords only"),
        ("n: int = Input(multiple_of=16)", "multiple_of is not something Cog reads"),
        ("n: str = Input(choices=[])", "choices must be a list"),
        # errors of Cog's build
        ("n: str = Input(choices=IMPORTED)", "choices must be a literal"),
        ("n: str = Input(choices=[x for x in 'ab'])", "choices must be a list"),
        ("n: str = Input(choices=('a', 'b'))", "choices must be a list"),
        ("n: str = Input(default_factory=str)", "default_factory is not"),
        ("n: int = cog.Input(default=1)", "only a literal or Input"),
        ("n: Path | str", "only `X | None`"),
        ("n: Literal['a']", "not a type that Cog takes"),
        ("n: list[Optional[int]]", "plain values only"),
        ("n=1", "no type annotation"),
        ("n: int = Input(accept='image/*')", "Path and File inputs only"),
        ("*n: int", "can't be inputs"),
        # not checked by Cog at all
        ("n: int = Input(ge=1, le=4, default=5)", "outside its own ge and le"),
        ("n: str = Input(choices=['a'], default='b')", "none of its choices"),
        ("n: int = Input(default='1')", "not of its type"),
        ("n: int = True", "not of its type"),
    ],
)  # fmt: skip
def test_what_cog_would_drop_misread_or_refuse(inputs: str, words: str, tmp_path: Path) -> None:
    predictor = tmp_path / "predict.py"
    predictor.write_text(source(inputs, head="from elsewhere import IMPORTED\nLOW = 1"))
    with pytest.raises(_predictor.PredictorError, match=r"predict\.py:\d+: ") as caught:
        _openapi.write(predictor, tmp_path / "made.json")
    assert words in str(caught.value)
    assert not (tmp_path / "made.json").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (source(decorator="@torch.inference_mode()"), "FieldInfo"),
        (source(decorator="@cog.streaming", returns="list[Path]"), "@cog.streaming needs"),
        (source(decorator="@cog.concurrent(max=2)"), "async"),
        (source(decorator="@cog.concurrent(max=N)"), "max must be a literal"),
        (source(returns="Optional[Path]"), "not an output type"),
        (source().replace(" -> Iterator[Path]", ""), "no return type"),
        (source().replace("def predict", "def other"), "must define predict()"),
        (source().replace("class Predictor", "class Other"), "no class Predictor"),
        ("def (", "predict.py:1"),
    ],
)
def test_a_predictor_that_cant_be_served(text: str, words: str, tmp_path: Path) -> None:
    predictor = tmp_path / "predict.py"
    predictor.write_text(text)
    with pytest.raises(_predictor.PredictorError) as caught:
        _predictor.read(predictor)
    assert words in str(caught.value)


def test_an_async_predictor_may_be_concurrent(tmp_path: Path) -> None:
    text = source(decorator="@cog.concurrent(max=8)", returns="AsyncIterator[Path]").replace("def", "async def")
    (tmp_path / "predict.py").write_text(text)
    assert not _predictor.read(tmp_path / "predict.py").streaming


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1.0, "1"),
        (0.9, "0.9"),
        (5e-5, "0.00005"),
        (1e-7, "1e-7"),
        (1e20, "1" + "0" * 20),
        (1e21, "1e+21"),
        (-2.5, "-2.5"),
    ],
)
def test_numbers_are_written_as_go_writes_them(number: float, text: str) -> None:
    assert _openapi._number(number) == text


def test_strings_are_escaped_as_go_escapes_them(tmp_path: Path) -> None:
    document(tmp_path, source('n: int = Input(description="1 < 2 & é", default=1)'))
    written = (tmp_path / ".cog" / "openapi_schema.json").read_text(encoding="utf-8")
    assert r'"1 \u003c 2 \u0026 é"' in written


def test_predict_py_is_read_and_never_run(tmp_path: Path) -> None:
    document(tmp_path, source(head=f"open({str(tmp_path / 'ran')!r}, 'w')"))
    assert not (tmp_path / "ran").exists()


def test_a_schema_is_current_until_the_predictor_changes(tmp_path: Path) -> None:
    predictor, target = tmp_path / "predict.py", tmp_path / ".cog" / "openapi_schema.json"
    predictor.write_text(source())
    assert not _openapi.is_current(predictor, target)
    _openapi.write(predictor, target)
    assert _openapi.is_current(predictor, target)
    predictor.write_text(source("n: int = 1"))
    assert not _openapi.is_current(predictor, target)


def test_the_file_is_replaced_whole_even_where_it_is_read_only(tmp_path: Path) -> None:
    target = tmp_path / ".cog" / "openapi_schema.json"
    target.parent.mkdir()
    target.write_text("old")
    target.chmod(0o444)
    document(tmp_path, source())
    assert json.loads(target.read_text())["openapi"] == "3.0.2"
    assert os.listdir(target.parent) == [target.name]
