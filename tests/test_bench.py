"""scripts/bench: its arithmetic, its report, and a whole run over a tiny model."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import _openapi
import pytest
import torch
from _bench import arrivals, decoding, flash, flash_rival, loading, models
from _bench.report import Part, Report, Row, number, run_parts, table
from _bench.sizes import SIZES, choose, floor_seconds

from emu_cog.engine.diagonals import DiagonalRunner
from emu_cog.engine.engine import Engine
from emu_cog.engine.sequence import EngineRequest
from emu_cog.model import torch_settings
from emu_cog.model.loader import load_language_model
from emu_cog.model.qwen3 import Chunk
from emu_cog.prompt.tokens import ROLES, block_length
from emu_cog.request import Sampling
from tests.conftest import ROOT
from tests.test_diagonals import codes_of
from tests.upstream_kit import STANDIN


def test_the_released_model_in_numbers() -> None:
    """Against what is published: 34.1 B parameters, 65 GB a step or 63.7 without the text half of the head."""
    size = SIZES["34b"]
    assert round(size.parameters / 1e9, 1) == 34.1
    assert round(size.step_weights(layer_bytes=2, head_bytes=2) / 1e9, 1) == 63.8
    assert size.cache_bytes(tokens=1, rows=1, item=2) == 256 * 1024
    assert floor_seconds(63.8e9, 4.3e12) == pytest.approx(0.01484, rel=1e-3)


@pytest.mark.parametrize("name", SIZES)
def test_made_models_have_the_size_they_claim(name: str) -> None:
    if SIZES[name].parameters > 1e8:
        counted = sum(shape[0] * shape[1] for shape in loading.shapes(SIZES[name]).values() if len(shape) == 2)
    else:
        lm = models.language_model(SIZES[name], device=torch.device("cpu"), dtype=torch.float32)
        counted = sum(value.numel() for value in models.tensors(lm.weights) if value.dim() == 2)
    assert counted == SIZES[name].parameters


def test_roles_are_distinct_text_ids() -> None:
    for size in SIZES.values():
        ids = size.ids()
        roles = [getattr(ids, role) for role in ROLES]
        assert len({*roles, *ids.digits, ids.star}) == len(roles) + 11
        assert max(roles) < ids.visual
        assert ids.vocab_size == size.text + size.visual


def test_the_largest_size_that_fits_is_chosen() -> None:
    assert choose(141e9, item=2, cpu=False) == "34b"
    assert choose(85e9, item=2, cpu=False) == "34b"
    assert choose(40e9, item=2, cpu=False) == "8b"
    assert choose(12e9, item=2, cpu=False) == "0.5b"
    assert choose(500e9, item=4, cpu=True) == "0.5b"
    assert choose(1e9, item=4, cpu=True) == "tiny"


def test_numbers_are_short_and_plain() -> None:
    assert [number(v) for v in (4, 0.01234567, 1.1849, 123.456, 98765.4)] == ["4", "0.0123", "1.18", "123.5", "98765"]


def test_a_table_is_aligned() -> None:
    lines = table(("what", "value"), [("a", "1"), ("longer", "2000")])
    assert len({len(line) for line in lines}) == 1
    assert lines[3] == "| longer | 2000  |"


def test_what_fails_or_comes_too_late_is_reported_and_the_rest_still_runs() -> None:
    report = Report({"device": "none"}, out=io.StringIO())

    def fails() -> None:
        raise RuntimeError("out of\nsomething")

    def works() -> None:
        report.add(Row(part="b", what="speed", value=2.0, unit="ms"))

    parts = [Part(name="a", run=fails), Part(name="late", run=fails, seconds=1e6), Part(name="b", run=works)]
    run_parts(parts, report, deadline=time.monotonic() + 60)
    found = json.loads(report.json(1.0))
    assert found["rows"] == [{"part": "b", "what": "speed", "value": 2.0, "unit": "ms"}]
    assert found["not_measured"]["a"] == "it failed: RuntimeError: out of something"
    assert "needs 1000000" in found["not_measured"]["late"]


def test_an_image_without_text_reserves_no_room_for_text() -> None:
    """No text was once counted as text without limit: the caches took 16 GiB and an H100 had no room for a step."""
    config = decoding.image_only((5, 64))
    assert config.max_new_tokens == 0
    assert config.longest(512, 32768) == 512 + block_length(5, 64)
    assert replace(config, max_new_tokens=None).longest(512, 32768) == 32768


def test_the_checkpoint_that_is_loaded_fits_the_disk() -> None:
    shape = loading.shape_for(SIZES["8b"], 6e9)
    assert 1 <= shape.layers < SIZES["8b"].layers
    assert 5e9 < 2 * shape.parameters <= 6e9


def test_the_written_checkpoint_can_be_run(tmp_path: Path) -> None:
    """Random bits taken for bfloat16 held NaN and numbers of 1e38: `arrivals --shape 8b` served nothing else."""
    size = SIZES["tiny"]
    loading.write(tmp_path, size)
    lm = load_language_model(tmp_path, size.ids(), device=torch.device("cpu"), dtype=torch.float32)
    cache = lm.new_cache(64)
    hidden = lm.feed(cache, [Chunk(list(range(7)), 0, cache.take(1))])
    logits = lm.text_logits(hidden)
    assert torch.isfinite(logits).all()
    assert 0.3 < float(logits.std()) < 3


def bench(tmp_path: Path, *arguments: str) -> tuple[str, dict[str, object]]:
    """Run scripts/bench over the tiny model on a CPU; what it printed, and its JSON line."""
    environment = os.environ | {
        "EMU_VENV": "none",
        "EMU_DEVICE": "cpu",
        "EMU_WEIGHTS_DIR": str(tmp_path / "weights"),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("EMU_UPSTREAM_URL", None)
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/bench"), "--size", "tiny", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_a_run_from_end_to_end(tmp_path: Path) -> None:
    parts = "step,many,images,upstream,sync,prefill,int8,loading"
    output, found = bench(tmp_path, "--only", parts, "--profile", "trace.json", "--clone", str(STANDIN))
    rows = {row["what"]: row for row in found["rows"]}  # type: ignore[union-attr,index]
    step = rows["step, 1 image, 128 tokens"]
    floor = float(step["against"].split(" x the floor")[0])
    assert step["value"] > 0
    assert floor > 1  # nothing is faster than reading what must be read
    assert rows["four images against one"]["value"] == pytest.approx(
        rows["step, 4 images, 128 tokens"]["value"] / step["value"]
    )
    many = rows["step in plain PyTorch, 4 pictures, streams of 300 tokens"]
    assert float(many["against"].split(" x the floor")[0]) > 1
    assert "x the tokens/s of one" in many["note"]
    assert rows["int8: the same likeliest token"]["value"] > 50
    assert rows["prefill, text"]["value"] > 0
    assert any(what.startswith("loading ") for what in rows)
    machine = found["machine"]
    assert machine["torch"] == torch.__version__  # type: ignore[index]
    assert machine["model"] == "tiny"  # type: ignore[index]
    assert rows["upstream, one image token, 128 tokens"]["value"] > 0
    assert " x as fast" in rows["upstream, one image token, 128 tokens"]["against"]
    assert set(found["not_measured"]) == {"synchronisations"}  # type: ignore[call-overload]
    assert "| what " in output
    assert (tmp_path / "trace.json").stat().st_size > 1000


Bench = Callable[..., tuple[str, dict[str, object]]]


@pytest.fixture
def bench_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """scripts/bench over the tiny model in this process; what it printed, and its JSON line."""
    for variable in ("EMU_WEIGHTS_DIR", *torch_settings.CACHE_VARIABLES):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv("EMU_DEVICE", "cpu")
    monkeypatch.delenv("EMU_UPSTREAM_URL", raising=False)
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def run(*arguments: str) -> tuple[str, dict[str, object]]:
        monkeypatch.setattr(sys, "argv", ["bench", "--size", "tiny", *arguments])
        assert runpy.run_path(str(ROOT / "scripts/bench"))["main"]() == 0
        output = capsys.readouterr().out
        return output, json.loads(output.splitlines()[-1])

    return run


@pytest.mark.slow
def test_pictures_by_diagonals_are_measured_in_every_format(bench_here: Bench) -> None:
    _, found = bench_here("--only", "flash")
    rows = {row["what"]: row for row in found["rows"] if row["part"] == "flash"}  # type: ignore[union-attr,index]
    assert list(rows) == [
        f"flash, {form}: {many} of 8 x 8, prompt to {what}"
        for form in ("float32", "fp8", "int8")
        for many, what in (("1 picture", "codes"), ("1 picture", "pixels"), ("4 pictures", "codes"))
    ]
    assert all(row["note"].startswith("15 steps of ") for what, row in rows.items() if "codes" in what)
    assert not found["not_measured"]


@pytest.fixture(params=flash_rival.CLASSES)
def flashar_clone(request: pytest.FixtureRequest) -> Path:
    """A clone of each public repository with FlashAR code, named lxazjk and u0 in EMU_TEST_FLASHAR."""
    if not (folder := os.environ.get("EMU_TEST_FLASHAR")):
        pytest.skip("EMU_TEST_FLASHAR names no folder of clones")
    return Path(folder) / str(request.param)


@pytest.mark.parametrize("size", [(5, 8), (8, 5)])
def test_public_flashar_code_draws_our_picture_from_our_tensors(flashar_clone: Path, size: tuple[int, int]) -> None:
    shape = replace(SIZES["tiny"], layers=models.VERTICAL + 2, head_dim=32, context=1024)
    lm = models.flash_model(shape, device=torch.device("cpu"), dtype=torch.float32)
    conditional, unconditional = flash.prompts(lm.ids, size)
    theirs = flash_rival.on_the_same_weights(lm, shape, flashar_clone)
    codes = flash_rival.draw(theirs, (conditional, unconditional), size, guidance=decoding.GUIDANCE, top_k=1)
    engine = Engine(DiagonalRunner.best(lm, slots=1, tokens=shape.context, compile=False))
    request = EngineRequest(conditional=conditional, unconditional=unconditional, seed=0)
    config = replace(decoding.image_only(size), image=Sampling(top_k=1))
    assert codes_of(engine, engine.submit([request], config), size) == codes
    assert len(set(codes)) > 10
    engine.close()


@pytest.mark.slow
def test_public_flashar_code_is_measured_beside_ours(flashar_clone: Path, bench_here: Bench) -> None:
    _, found = bench_here("--only", "flash", "--flashar", str(flashar_clone))
    theirs, ours, *_ = (row for row in found["rows"] if row["part"] == "flash")  # type: ignore[union-attr,index]
    name = flash_rival.NAMES[flashar_clone.name]
    assert theirs["what"] == f"flash, float32: 1 picture of 8 x 8 by {name}, prompt to codes"
    assert theirs["note"].startswith("15 passes of ")
    assert ours["against"].startswith(f"{theirs['value'] / ours['value']:.2f} x as fast as {name}, float32; ")
    assert not found["not_measured"]


@pytest.mark.parametrize("given", ["", "elsewhere"])
def test_a_folder_that_is_no_clone_of_flashar_is_refused_before_any_work(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    arguments = ["bench", "--size", "tiny", "--only", "flash", "--flashar", str(tmp_path / given)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert runpy.run_path(str(ROOT / "scripts/bench"))["main"]() == 1
    output = capsys.readouterr()
    assert "is a clone neither of lxazjk/Emu3.5-FlashAR nor of XiaomiRobotics/Xiaomi-Robotics-U0" in output.err
    assert not output.out


def test_a_clone_of_flashar_needs_the_part_that_measures_it(
    bench_here: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench_here("--only", "vq", "--flashar", "clone")
    assert "add --only flash" in capsys.readouterr().err


def test_a_budget_that_is_spent_leaves_parts_out(bench_here: Bench) -> None:
    output, found = bench_here("--budget", "0.001", "--only", "images,prefill")
    assert set(found["not_measured"]) == {"images", "prefill"}  # type: ignore[call-overload]
    assert "not measured: images" in output


def test_without_a_clone_upstream_is_not_measured(bench_here: Bench) -> None:
    _, found = bench_here("--only", "upstream")
    assert "no clone" in found["not_measured"]["upstream"]  # type: ignore[call-overload,index]


def test_an_unknown_part_is_refused(bench_here: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench_here("--only", "sped")
    assert "there is no part 'sped'" in capsys.readouterr().err


def test_arrivals_are_inputs_that_the_predictor_takes() -> None:
    """Sizes of 128 pixels, below the predictor's least, once ended the part with a refusal."""
    accepted = _openapi.inputs(ROOT / "predict.py")
    for trained in (True, False):
        requests = arrivals.mixed(small=trained, trained=trained)
        assert len(requests) == arrivals.REQUESTS
        assert len({request["task_type"] for request in requests}) == (6 if trained else 2)
        for name, value in (pair for request in requests for pair in request.items()):
            rules = accepted[name].keywords
            assert not isinstance(value, int) or rules.get("minimum", value) <= value <= rules.get("maximum", value)
            assert name not in ("width", "height") or value % 16 == 0
        assert accepted["width"].keywords["minimum"] > 128
