"""What a folder's safetensors headers say, read in one place, and what is refused before a tensor is read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from emu_cog.errors import CheckpointError
from emu_cog.model.headers import INDEX_FILE, SINGLE_FILE, read_headers, shard_files

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": np.zeros((2, 3), np.float16)}, tmp_path / FIRST)
    save_file({"b": np.zeros(4, np.float32), "c": np.zeros((), np.float32)}, tmp_path / SECOND)
    write_index(tmp_path, {"a": FIRST, "b": SECOND, "c": SECOND})
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def change(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def test_names_files_and_shapes(folder: Path) -> None:
    headers = read_headers(folder)
    assert {n: (h.file.name, h.shape) for n, h in headers.items()} == {
        "a": (FIRST, (2, 3)),
        "b": (SECOND, (4,)),
        "c": (SECOND, ()),
    }
    assert [file.name for file in shard_files(folder)] == [FIRST, SECOND]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (change(SECOND, lambda c: c[:-3]), rf"{SECOND} is damaged or cut off: .*\(\d+ bytes\)"),
        (change(SECOND, lambda c: c + b"x"), f"{SECOND} is damaged or cut off"),
        (change(SECOND, lambda c: c[:20]), f"{SECOND} is damaged or cut off"),
        (change(SECOND, lambda c: b""), rf"{SECOND} is damaged or cut off: .*\(0 bytes\)"),
        (change(SECOND, lambda c: (200_000_000).to_bytes(8, "little") + c[8:]), "header too large"),
        (change(SECOND, lambda c: b"<html>not found</html>" * 9), "header too large"),
        (change(SECOND, lambda c: c[:8] + b"x" + c[9:]), "invalid JSON in header"),
        (lambda f: (f / FIRST).unlink(), f"lacks {FIRST}: the weights are not complete"),
        (lambda f: (f / INDEX_FILE).unlink(), f"lacks {SINGLE_FILE} and has no {INDEX_FILE}"),
        (lambda f: write_index(f, {"a": FIRST, "z": SECOND}), rf"{SECOND} lacks 1 tensor\(s\) of the index, first z"),
        (lambda f: write_index(f, {"a": "../a.safetensors"}), "names a file outside its folder: '../a.safetensors'"),
        (lambda f: write_index(f, {"a": "/etc/passwd"}), "names a file outside its folder"),
        (lambda f: write_index(f, {"a": "x\\y"}), "names a file outside its folder"),
        (lambda f: write_index(f, {"a": ".."}), "names a file outside its folder"),
        (lambda f: write_index(f, {"a": 3}), "names a file outside its folder: 3"),
        (lambda f: write_index(f, {}), "has no weight_map"),
        (lambda f: write_index(f, [FIRST]), "is damaged or cut off"),
        (change(INDEX_FILE, lambda c: c[:-5]), f"{INDEX_FILE} is damaged or cut off: JSONDecodeError"),
        (change(INDEX_FILE, lambda c: b"[]"), f"{INDEX_FILE} is damaged or cut off"),
        (change(INDEX_FILE, lambda c: b'{"weight_map": null}'), f"{INDEX_FILE} is damaged or cut off"),
    ],
)
def test_refused(folder: Path, damage: Callable[[Path], object], says: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=says):
        read_headers(folder)


def test_no_torch_is_needed(folder: Path) -> None:
    """Bringing and verifying weights starts in a fraction of a second, and works where torch is not installed yet."""
    code = (
        "import sys; sys.modules['torch'] = None; from pathlib import Path; "
        "from emu_cog.model.headers import read_headers; import emu_cog.weights.pins, emu_cog.weights.store; "
        "print(len(read_headers(Path(sys.argv[1]))))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
