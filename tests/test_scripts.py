"""scripts/predict and scripts/serve as a person runs them: files, names, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from _models import tiny
from PIL import Image

from tests.cog_kit import settings
from tests.conftest import ROOT, photo


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folders = tiny.make_tiny(
        tmp_path_factory.mktemp("scripts"),
        seed=7,
        logit_bias=tiny.STORYTELLER,
        defaults=tiny.small_defaults(),
        context=16384,
    )
    return os.environ | settings(folders) | {"EMU_VENV": "none"}


def script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / name), *arguments]


def predict(
    folder: Path, environment: dict[str, str], *arguments: str, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    command = script("predict", *arguments)
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, input=stdin, check=False, timeout=120
    )


def test_words_to_a_file(tmp_path: Path, environment: dict[str, str]) -> None:
    done = predict(tmp_path, environment, "-i", "prompt=a red boat", "-i", "seed=3", "-i", "num_outputs=2")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["output.0.png", "output.1.png"]
    assert Image.open(tmp_path / "output.0.png").size == (160, 160)
    assert "seed 3" in done.stderr
    assert "100/100 [" in done.stderr  # the progress
    assert done.stdout == ""


def test_a_photo_and_a_name(tmp_path: Path, environment: dict[str, str]) -> None:
    photo(1).save(tmp_path / "photo.jpg")
    done = predict(
        tmp_path, environment, "-i", "task_type=x2i", "-i", "prompt=make it winter", "-i", "output_format=webp",
        "-i", "reference_image=@photo.jpg", "-o", "winter.webp",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "winter.0.webp").format == "WEBP"


def test_a_sequence_as_json(tmp_path: Path, environment: dict[str, str]) -> None:
    given = json.dumps({"prompt": "a fox", "task_type": "story", "seed": 16, "max_new_tokens": 512})
    done = predict(tmp_path, environment, "--json", "@-", stdin=given)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["status"] == "succeeded"
    assert told["metrics"]["seed"] == 16
    names = [Path(name).suffix for name in told["output"]]
    assert names[-1] == ".html"
    assert {".txt", ".png"} <= set(names)
    assert all((tmp_path / name).is_file() for name in told["output"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-i", "promt=x"], "there is no input 'promt', the inputs are prompt, task_type"),
        (["-i", "prompt"], "must be NAME=VALUE"),
        (["-i", "prompt=x", "-i", "reference_image=@nowhere.jpg"], "nowhere.jpg can't be read"),
        (["-i", "prompt=x", "-o", "no/such/folder/x.png"], "not a folder that can be written to"),
    ],
)
def test_a_wrong_command_ends_before_anything_is_loaded(
    arguments: list[str], words: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    started = time.monotonic()
    done = predict(tmp_path, environment, *arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-i", "prompt= "], "error: prediction failed: prompt is blank: describe in words what to make"),
        (["-i", "prompt=x", "-i", "num_outputs=5"], "num_outputs"),
        (["-i", "task_type=story"], "prompt"),
    ],
)
def test_what_the_server_refuses_is_one_sentence(
    arguments: list[str], words: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    done = predict(tmp_path, environment, *arguments)
    assert done.returncode == 1
    assert words in done.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_broken_checkpoint_is_told(tmp_path: Path, environment: dict[str, str]) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    done = predict(tmp_path, environment | {"EMU_CHECKPOINT": str(broken)}, "-i", "prompt=x")
    assert done.returncode == 1
    assert "emu3.tiktoken is missing" in done.stderr


def test_ctrl_c_cancels(tmp_path: Path, environment: dict[str, str]) -> None:
    command = script("predict", "-i", "prompt=x", "-i", "aspect_ratio=custom", "-i", "width=1584", "-i", "height=1584")
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "row/s" in line or "seed" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(20) == 1
    assert "cancelling" in rest
    assert "prediction canceled" in rest
    assert not list(tmp_path.iterdir())


def test_serve_prints_its_address_and_goes_with_ctrl_c(tmp_path: Path, environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        script("serve"), cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    with urllib.request.urlopen(f"{address}/health-check") as answer:
        assert json.load(answer)["status"] == "READY"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
