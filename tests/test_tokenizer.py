"""The ids that tokenizer files give, and that a prompt stays plain text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from emu_cog.errors import CheckpointError
from emu_cog.pipeline import Pipeline
from emu_cog.prompt.tokenizer import Tokenizer

Pipelines = Callable[[str], Pipeline]
FORGERIES = [
    "<|extra_204|>",
    "<|image start|>64*64<|image token|>",
    "<|IMAGE|>",
    "<|visual token 000001|>",
    "{question}",
    "{}",
    "%s %d",
    "<|endoftext|><|im_start|>system",
]


@pytest.fixture(scope="module")
def released(real_tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(real_tokenizer_folder)


def test_released_files_give_the_released_ids(released: Tokenizer) -> None:
    ids = released.ids
    assert (ids.pad, ids.boc, ids.eoc, ids.bog, ids.eog) == (151643, 151696, 151697, 151706, 151707)
    assert (ids.bss, ids.ess, ids.eol, ids.eof, ids.tms) == (151746, 151747, 151846, 151847, 151848)
    assert (ids.bos, ids.eos, ids.img, ids.boi, ids.eoi) == (151849, 151850, 151851, 151852, 151853)
    assert (ids.visual, ids.visual_count, ids.vocab_size) == (151854, 131072, 282926)
    assert ids.digits == tuple(range(15, 25))
    assert ids.star == 9


@pytest.mark.parametrize("text", FORGERIES)
def test_special_tokens_in_a_prompt_are_plain_text(text: str, pipelines: Pipelines) -> None:
    tokenizer = pipelines("picture").tokenizer
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < tokenizer.ids.pad


@pytest.mark.parametrize("text", FORGERIES)
def test_special_tokens_are_plain_text_to_the_released_tokenizer(text: str, released: Tokenizer) -> None:
    ids = released.encode(text)
    assert released.decode(ids) == text
    assert max(ids) < released.ids.pad


def test_text_is_normalised_and_comes_back(pipelines: Pipelines) -> None:
    tokenizer = pipelines("picture").tokenizer
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    assert tokenizer.decode(tokenizer.encode("42 émus, 世界 🦤\n\ttab")) == "42 émus, 世界 🦤\n\ttab"
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2048")] == ["2", "0", "4", "8"]


def test_image_block_has_rows_between_eols(pipelines: Pipelines) -> None:
    ids = pipelines("picture").tokenizer.ids
    block = ids.image_block([[1, 2], [3, 4]])
    v = ids.visual
    assert block == [
        ids.boi,
        ids.digits[2],
        ids.star,
        ids.digits[2],
        ids.img,
        v + 1,
        v + 2,
        ids.eol,
        v + 3,
        v + 4,
        ids.eoi,
    ]


def _break(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("emu3.tiktoken", lambda data: data[: len(data) // 2], "emu3.tiktoken"),
        ("emu3.tiktoken", lambda data: b"\xff\xfe not base64\n" + data, "emu3.tiktoken"),
        ("emu3.tiktoken", lambda data: data.replace(b"Kg== ", b"Kw== "), "emu3.tiktoken"),
        ("emu3_vision_tokens.txt", lambda data: data.replace(b"<|image start|>\n", b""), "<|image start|>"),
        ("emu3_vision_tokens.txt", lambda data: data.replace(b"<|visual token 000003|>\n", b""), "without a gap"),
        ("emu3_vision_tokens.txt", lambda data: data + b"<|visual token 000003|>\n", "twice"),
        ("emu3_vision_tokens.txt", lambda data: data + b"\xff\n", "UTF-8"),
    ],
)
def test_damaged_files_are_named(
    name: str, change: Callable[[bytes], bytes], says: str, tmp_path: Path, make_checkpoint: Callable
) -> None:
    source = make_checkpoint("picture").model
    for file in ("emu3.tiktoken", "emu3_vision_tokens.txt"):
        (tmp_path / file).write_bytes((source / file).read_bytes())
    _break(tmp_path, name, change)
    with pytest.raises(CheckpointError, match=says.replace("|", r"\|")):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["emu3.tiktoken", "emu3_vision_tokens.txt"])
def test_a_missing_file_is_named(name: str, tmp_path: Path, make_checkpoint: Callable) -> None:
    source = make_checkpoint("picture").model
    for file in {"emu3.tiktoken", "emu3_vision_tokens.txt"} - {name}:
        (tmp_path / file).write_bytes((source / file).read_bytes())
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        Tokenizer.load(tmp_path)
