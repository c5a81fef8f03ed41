"""scripts/download-weights as a person runs it, against the server that stands in for the hub and the CDN."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Fault, HubServer
from test_weights_kills import kill_when
from weights_kit import BASE, IMAGE, ROOT, TAR, VISION, VISION_COMMIT, assert_whole, fill, parts, tar_of, total, wanted

from emu_cog.weights.manifest import MANIFEST_FILE, Pin, read_pins, write_pins


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def environment(hub: HubServer, folder: Path, **further: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EMU_", "HF_"))}
    return kept | {
        "EMU_VENV": "none",
        "EMU_WEIGHTS_DIR": str(folder / "w"),
        "EMU_WEIGHTS_PINS": str(folder / "weights.pins.json"),
        "EMU_WEIGHTS_CDN_URL": hub.url + TAR,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf-home"),
        "OMP_NUM_THREADS": "1",
        **further,
    }


def start(hub: HubServer, folder: Path, *arguments: str, **further: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/download-weights"), *arguments],
        env=environment(hub, folder, **further),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(hub: HubServer, folder: Path, *arguments: str, **further: str) -> tuple[int, str, str]:
    child = start(hub, folder, *arguments, **further)
    out, err = child.communicate(timeout=120)
    return child.returncode, out, err


def test_brings_the_image_model_and_then_has_nothing_to_do(hub: HubServer, tmp_path: Path) -> None:
    fill(hub)
    hub.files[TAR] = tar_of()
    code, out, err = run(hub, tmp_path)
    assert code == 0, err
    assert_whole(tmp_path / "w" / "Emu3.5-Image", IMAGE)
    assert_whole(tmp_path / "w" / "Emu3.5-VisionTokenizer", VISION)
    assert str(tmp_path / "w" / "Emu3.5-Image") in out
    assert "cdn: downloading Emu3.5-Image and Emu3.5-VisionTokenizer" in err
    hub.seen.clear()
    code, again, _ = run(hub, tmp_path)
    assert (code, again) == (0, out)
    assert not hub.seen


def test_the_argument_wins_over_the_environment(hub: HubServer, tmp_path: Path) -> None:
    fill(hub)
    code, _, err = run(hub, tmp_path, "base", EMU_CHECKPOINT="image", EMU_WEIGHTS_SOURCE="hub")
    assert code == 0, err
    assert_whole(tmp_path / "w" / "Emu3.5-Base", BASE)
    assert not (tmp_path / "w" / "Emu3.5-Image").exists()


def test_killed_it_goes_on_where_it_was(hub: HubServer, tmp_path: Path) -> None:
    fill(hub)
    hub.rate = 1_500_000
    child = start(hub, tmp_path, EMU_WEIGHTS_SOURCE="hub")
    kill_when(hub, child, total() // 2)
    assert child.returncode == -signal.SIGKILL
    kept = sum(p.stat().st_size for p in (tmp_path / "w").rglob("*") if p.suffix in (".safetensors", ".ckpt"))
    hub.seen.clear()
    hub.rate = None
    code, _, err = run(hub, tmp_path, EMU_WEIGHTS_SOURCE="hub")
    assert code == 0, err
    assert kept > 0
    assert hub.sent() - hub.sent("/api/") <= total() - kept
    assert_whole(tmp_path / "w" / "Emu3.5-Image", IMAGE)


def test_failure_names_each_source_and_says_what_to_do(hub: HubServer, tmp_path: Path) -> None:
    code, out, err = run(hub, tmp_path)
    assert (code, out) == (1, "")
    last = err[err.index("error: ") :]
    assert "Emu3.5-Image could not be found or downloaded" in last
    assert "local: no folder Emu3.5-Image" in last
    assert "cdn: " in last
    assert "answered 404 (not found)" in last
    assert "hub: " in last
    assert "set EMU_WEIGHTS_DIR" in last


@pytest.mark.parametrize(
    ("arguments", "further", "says"),
    [
        ((), {"EMU_WEIGHTS_SOURCE": "ftp"}, "EMU_WEIGHTS_SOURCE='ftp' is not known, accepted are local, cdn, hub"),
        (("imgae",), {}, "EMU_CHECKPOINT=imgae is no folder"),
        (("--verify",), {}, "there is no Emu3.5-Image in"),
        (("mini", "--verify"), {}, "has no manifest to be held against"),
    ],
)
def test_what_cant_be_meant(
    hub: HubServer, tmp_path: Path, arguments: tuple[str, ...], further: dict[str, str], says: str
) -> None:
    code, _, err = run(hub, tmp_path, *arguments, **further)
    assert code == 1
    assert says in err
    assert "Traceback" not in err


class TestVerify:
    @pytest.fixture
    def brought(self, hub: HubServer, tmp_path: Path) -> Path:
        fill(hub)
        code, _, err = run(hub, tmp_path, EMU_WEIGHTS_SOURCE="hub")
        assert code == 0, err
        hub.seen.clear()
        return tmp_path / "w" / "Emu3.5-Image"

    def test_whole(self, hub: HubServer, tmp_path: Path, brought: Path) -> None:
        code, out, _ = run(hub, tmp_path, "--verify")
        assert code == 0
        assert f"{brought}: {len(wanted(IMAGE))} files" in out
        assert out.count("as its manifest has it") == 2
        assert not hub.seen

    def test_brings_nothing(self, hub: HubServer, tmp_path: Path) -> None:
        """A folder of one's own without a vision tokenizer, which a plain start would bring."""
        fill(hub)
        (tmp_path / "mine").mkdir()
        code, _, err = run(hub, tmp_path, str(tmp_path / "mine"), "--verify")
        assert code == 1
        assert "Emu3.5-VisionTokenizer could not be found or downloaded" in err
        assert not hub.seen

    def test_a_changed_bit_and_a_lost_file_are_named_and_brought_anew(
        self, hub: HubServer, tmp_path: Path, brought: Path
    ) -> None:
        shard = brought / "model-00002-of-00003.safetensors"
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        (brought / "config.json").unlink()
        code, out, _ = run(hub, tmp_path, "--verify")
        assert code == 1
        assert f"{shard.name} has SHA-256" in out
        assert "config.json is missing" in out
        shard.unlink()  # as the last line says
        code, _, err = run(hub, tmp_path, EMU_WEIGHTS_SOURCE="hub")
        assert code == 0, err
        assert_whole(brought, IMAGE)
        fetched = {s.path.rsplit("/", 1)[1] for s in hub.asked("/resolve/")}
        assert fetched == {"config.json", shard.name}

    def test_a_manifest_that_was_made_to_fit_is_caught_by_the_pins(
        self, hub: HubServer, tmp_path: Path, brought: Path
    ) -> None:
        assert run(hub, tmp_path, "--pin")[0] == 0
        code, out, _ = run(hub, tmp_path, "--verify")
        assert code == 0
        assert out.count("as weights.pins.json has it") == 2
        config = brought / "config.json"
        config.write_bytes(config.read_bytes().replace(b'"silu"', b'"gelu"'))
        manifest = json.loads((brought / MANIFEST_FILE).read_text())
        del manifest["files"]["config.json"]
        (brought / MANIFEST_FILE).write_text(json.dumps(manifest))
        code, out, _ = run(hub, tmp_path, "--verify")
        assert code == 1
        assert "config.json has SHA-256" in out
        assert "weights.pins.json says" in out


class TestPin:
    def test_pins_every_file_of_all_repositories(self, hub: HubServer, tmp_path: Path) -> None:
        commits = fill(hub)
        code, out, err = run(hub, tmp_path, "--pin")
        assert code == 0, err
        pins = read_pins(tmp_path / "weights.pins.json")
        assert set(pins) == set(parts())
        for name, pin in pins.items():
            assert pin.commit == commits[name]
            assert {n: e.size for n, e in pin.files.items()} == {n: len(c) for n, c in wanted(name).items()}
            assert f"{name}: commit {commits[name]}" in out
        assert hub.sent("/cdn/") == 0  # no large file was fetched
        # and it is held to: the branch moves on, the pinned commit is what comes
        hub.add_repo(IMAGE, parts()[IMAGE] | {"config.json": b'{"vocab_size": 1}'})
        code, _, err = run(hub, tmp_path, EMU_WEIGHTS_SOURCE="hub")
        assert code == 0, err
        assert_whole(tmp_path / "w" / "Emu3.5-Image", IMAGE)
        code, out, _ = run(hub, tmp_path, "--verify")
        assert code == 0
        assert out.count("as weights.pins.json has it") == 2

    def test_a_repository_that_moved_on_is_told(self, hub: HubServer, tmp_path: Path) -> None:
        commits = fill(hub)
        write_pins({IMAGE: Pin(seen="0000000"), BASE: Pin(seen=commits[BASE][:7])}, tmp_path / "weights.pins.json")
        _, _, err = run(hub, tmp_path, "--pin")
        assert f"{IMAGE} has moved on: 0000000 before, {commits[IMAGE]} now" in err
        assert f"{BASE} has moved on" not in err

    def test_all_or_nothing(self, hub: HubServer, tmp_path: Path) -> None:
        fill(hub)
        hub.faults = [Fault(f"/api/models/{VISION}", times=None, status=404)]
        (tmp_path / "weights.pins.json").write_text('{"repositories": {}}')
        code, _, err = run(hub, tmp_path, "--pin")
        assert code == 1
        assert VISION in err
        assert (tmp_path / "weights.pins.json").read_text() == '{"repositories": {}}'


def test_the_committed_pins_names_all_repositories() -> None:
    pins = read_pins(ROOT / "weights.pins.json")
    assert set(pins) == set(parts())
    assert pins[VISION].commit == VISION_COMMIT
    for name in (IMAGE, BASE):
        assert pins[name].commit or pins[name].seen
