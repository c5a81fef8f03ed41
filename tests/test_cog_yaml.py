"""cog.yaml and the two lists of pins: valid for Cog, and of one mind."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote

import jsonschema
import pytest
import yaml

from emu_cog.settings import Settings
from tests.cog_kit import cog_data
from tests.conftest import ROOT

CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "cog.yaml").read_text())
BUILD = CONFIG["build"]
COMMANDS = "\n".join(BUILD["run"])
# Names that Cog refuses in `environment`, from pkg/config/env.go of replicate/cog 0.23.
REFUSED = re.compile(
    r"PATH|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|PYTHONUNBUFFERED|R8_.*|REPLICATE_.*|LIBRARY_PATH|CUDA_.*|NVIDIA_.*"
    r"|NV_.*|PGET_.*|HF_ENDPOINT|HF_HUB_ENABLE_HF_TRANSFER|KUBERNETES_.*"
)


def pins(name: str) -> dict[str, str]:
    """Package to exact version; a line that is no exact pin fails."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line:
            package, equals, version = line.partition("==")
            assert equals, f"{name}: {line!r} is not pinned"
            assert re.fullmatch(r"[\w.]+", version), f"{name}: {line!r} is no exact version"
            found[package] = version
    return found


IMAGE, LOCAL = pins("requirements.txt"), pins("requirements-local.txt")


def test_cogs_own_schema_takes_it() -> None:
    schema = json.loads((cog_data() / "config_schema_v1.0.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.Draft7Validator(schema).validate(CONFIG)


def test_cog_knows_the_pair_of_torch_and_cuda() -> None:
    known = json.loads((cog_data() / "torch_compatibility.json").read_text())
    pairs = {(row["Torch"].partition("+")[0], row["CUDA"], python) for row in known for python in row["Pythons"]}
    assert (IMAGE["torch"], BUILD["cuda"], BUILD["python_version"]) in pairs
    images = json.loads((cog_data() / "cuda_compatibility.json").read_text())
    assert any(image["CUDA"].startswith(f"{BUILD['cuda']}.") for image in images)


def test_what_was_agreed() -> None:
    assert BUILD["gpu"] is True
    assert (BUILD["python_version"], BUILD["cuda"], IMAGE["torch"]) == ("3.12", "12.8", "2.8.0")
    assert BUILD["sdk_version"] == LOCAL["cog"] == LOCAL["coglet"] == "0.23.1"
    assert BUILD["python_requirements"] == "requirements.txt"
    assert CONFIG["predict"] == "predict.py:Predictor"
    assert "run" not in CONFIG


def test_the_flash_attention_wheel_is_for_this_python_and_torch() -> None:
    url = re.search(r"https://github\.com/Dao-AILab/flash-attention/releases/download/v(\S+?)/([^\"\s]+)", COMMANDS)
    assert url
    python = "cp" + BUILD["python_version"].replace(".", "")
    torch = ".".join(IMAGE["torch"].split(".")[:2])
    cuda = BUILD["cuda"].split(".")[0]
    wheel = f"flash_attn-{url[1]}+cu{cuda}torch{torch}cxx11abiTRUE-{python}-{python}-linux_x86_64.whl"
    assert (url[1], unquote(url[2])) == ("2.8.3", wheel)


def test_pget_is_the_release_binary_and_never_the_other_pget_of_pypi() -> None:
    assert "https://github.com/replicate/pget/releases/download/v0.11.0/pget_linux_x86_64" in COMMANDS
    assert "chmod +x /usr/local/bin/pget" in COMMANDS
    assert "pget" not in IMAGE | LOCAL
    assert not re.search(r"pip install.*\bpget\b", COMMANDS)


@pytest.mark.parametrize("entry", CONFIG["environment"])
def test_environment_names_are_ones_that_cog_takes(entry: str) -> None:
    name, equals, _ = entry.partition("=")
    assert equals
    assert not REFUSED.fullmatch(name)


def test_the_image_runs_the_image_model_and_a_plain_checkout_the_miniature() -> None:
    environment = dict(entry.split("=", 1) for entry in CONFIG["environment"])
    assert Settings.from_env(environment).checkpoint == "image"
    assert Settings.from_env({}).checkpoint == "mini"


def test_the_image_and_a_plain_machine_run_the_same_versions() -> None:
    assert LOCAL["torch"] == "2.13.0"
    assert {name: LOCAL.get(name) for name in IMAGE if name != "torch"} == {
        name: version for name, version in IMAGE.items() if name != "torch"
    }


def test_cog_itself_is_pinned_by_cog_yaml_alone() -> None:
    assert not {"cog", "coglet"} & set(IMAGE)


def test_the_package_needs_nothing_that_is_not_pinned() -> None:
    needs = re.search(r"^dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert needs
    names = set(re.findall(r'"([\w-]+)', needs[1]))
    assert names == set(IMAGE)
