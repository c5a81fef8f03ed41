"""cog.yaml, the push to Replicate and the two lists of pins: valid, and in agreement with each other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import _predictor
import jsonschema
import pytest
import yaml

from emu_cog.errors import InputError
from emu_cog.pipeline import compile_cache
from emu_cog.prompt import geometry
from emu_cog.request import TASKS, Request
from emu_cog.settings import Settings
from tests.cog_kit import cog_data
from tests.conftest import ROOT, photo

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
        line = line.partition("#")[0].partition(";")[0].strip()  # without a comment and a platform
        if line:
            package, equals, version = line.partition("==")
            assert equals, f"{name}: {line!r} is not pinned"
            assert re.fullmatch(r"[\w.]+", version), f"{name}: {line!r} is no exact version"
            found[package] = version
    return found


IMAGE, LOCAL = pins("requirements.txt"), pins("requirements-local.txt")


def test_it_is_valid_by_cogs_own_schema() -> None:
    schema = json.loads((cog_data() / "config_schema_v1.0.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.Draft7Validator(schema).validate(CONFIG)


def test_cog_knows_the_pair_of_torch_and_cuda() -> None:
    known = json.loads((cog_data() / "torch_compatibility.json").read_text())
    pairs = {(row["Torch"].partition("+")[0], row["CUDA"], python) for row in known for python in row["Pythons"]}
    assert (IMAGE["torch"], BUILD["cuda"], BUILD["python_version"]) in pairs
    images = json.loads((cog_data() / "cuda_compatibility.json").read_text())
    assert any(image["CUDA"].startswith(f"{BUILD['cuda']}.") for image in images)


def test_versions_and_entry_point() -> None:
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
def test_environment_names_are_accepted_by_cog(entry: str) -> None:
    name, equals, _ = entry.partition("=")
    assert equals
    assert not REFUSED.fullmatch(name)


ENVIRONMENT = dict(entry.split("=", 1) for entry in CONFIG["environment"])


def test_the_image_runs_the_image_model_and_a_plain_checkout_the_miniature() -> None:
    assert Settings.from_env(ENVIRONMENT).checkpoint == "image"
    assert Settings.from_env({}).checkpoint == "mini"


def test_compiled_code_lies_where_a_host_looks_for_it() -> None:
    """It lay in `checkpoints`, which a host that keeps inductor's folder between containers does not know."""
    assert compile_cache(Settings.from_env(ENVIRONMENT)) == Path("/tmp/torchinductor_root")
    assert compile_cache(Settings.from_env(ENVIRONMENT | {"TORCHINDUCTOR_CACHE_DIR": "/kept"})) == Path("/kept")
    assert compile_cache(Settings.from_env({})) == Path("checkpoints/.compiled")


PUSH: dict[str, Any] = yaml.safe_load((ROOT / "cog-safe-push.yaml").read_text())
CASES: list[dict[str, Any]] = PUSH["predict"]["test_cases"]


def request(inputs: dict[str, Any]) -> Request:
    """What predict.py makes of a test case's inputs, with a photo for every URL."""
    known = _predictor.read(ROOT / "predict.py").inputs
    assert set(inputs) <= set(known)
    for name, value in inputs.items():
        assert not known[name].choices or value in known[name].choices
    images = tuple(photo(1) for name in inputs if name.startswith("reference_image"))
    output = ("output_format", "output_quality")
    rest = {n: v for n, v in inputs.items() if not n.startswith("reference_image") and n not in output}
    return Request(images=images, **{"task": rest.pop("task_type", "t2i"), **rest})


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.get("error_contains") or case["inputs"]["prompt"]))
def test_cases_of_the_push_are_accepted_or_refused_as_they_say(case: dict[str, Any]) -> None:
    # The keys of TestCase in cog-safe-push's config.py, which takes one kind of check.
    assert len(set(case) & {"match_prompt", "error_contains"}) == 1
    assert set(case) <= {"inputs", "match_prompt", "error_contains"}
    if "error_contains" not in case:
        request(case["inputs"])
        return
    with pytest.raises(InputError) as refused:
        request(case["inputs"])
    assert case["error_contains"] in str(refused.value)


def test_the_push_tests_every_task() -> None:
    assert {case["inputs"].get("task_type", "t2i") for case in CASES if "match_prompt" in case} == set(TASKS)
    assert set(PUSH["predict"]["fuzz"]["disabled_inputs"]) <= set(_predictor.read(ROOT / "predict.py").inputs)
    rows, columns = geometry.PRESETS_1024["16:9"]
    assert f"{16 * columns} pixels wide and {16 * rows} high" in CASES[0]["match_prompt"]


def test_the_push_workflow_installs_cog_yamls_version_and_runs_no_input_as_code() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/push.yaml").read_text())
    commands = [step.get("run", "") for step in workflow["jobs"]["push"]["steps"]]
    assert any(f"/v{BUILD['sdk_version']}/cog_Linux_x86_64" in command for command in commands)
    assert not any("${{" in command for command in commands)


def test_the_image_and_a_local_environment_have_the_same_versions() -> None:
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
