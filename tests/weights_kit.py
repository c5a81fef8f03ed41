"""What the tests of weights share: a small checkpoint in the released format, settings, patience, another process."""

from __future__ import annotations

import atexit
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from _models.flashar import UNIS_NAMES, make_flashar
from _models.tiny import make_tiny
from hub_server import Fault, HubServer

from emu_cog.settings import Settings
from emu_cog.weights.http import Patience
from emu_cog.weights.manifest import MANIFEST_FILE
from emu_cog.weights.store import Checkpoint, resolve

ROOT = Path(__file__).resolve().parent.parent
IMAGE, BASE, VISION = "BAAI/Emu3.5-Image", "BAAI/Emu3.5", "BAAI/Emu3.5-VisionTokenizer"
U0, U0_FLASH = "XiaomiRobotics/Xiaomi-Robotics-U0", "XiaomiRobotics/Xiaomi-Robotics-U0-FlashAR"
FLASH = "lxazjk/Emu3.5-Image-FlashAR"
FOLDERS = {
    IMAGE: "Emu3.5-Image", BASE: "Emu3.5-Base", VISION: "Emu3.5-VisionTokenizer",
    U0: "Xiaomi-Robotics-U0", U0_FLASH: "Xiaomi-Robotics-U0-FlashAR", FLASH: "Emu3.5-Image-FlashAR",
}  # fmt: skip
VISION_COMMIT = "91789bbaa3f49b4b8882fc823d6849207bb99f13"
HASTY = Patience(attempts=3, first_wait=0.05, longest_wait=0.2, connect=2, stall=0.3, longest_asked=5)
TAR = "/weights/model.tar"
NO_PINS = Path("/nowhere/weights.pins.json")


@functools.cache
def parts() -> dict[str, dict[str, bytes]]:
    """Repository name to file name to content: tiny random weights, three shards."""
    folder = Path(tempfile.mkdtemp(prefix="emu-weights-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = make_tiny(folder, seed=3, shards=3, vision_ch_mult=(1, 1, 1, 1, 1), vision_attention=())
    model = {p.name: p.read_bytes() for p in sorted(made.model.iterdir())}
    vision = {p.name: p.read_bytes() for p in sorted(made.vision.iterdir())}
    other = {"README.md": b"# a card\n", "tokenization_emu3.py": b"raise SystemExit('not to be fetched')\n"}
    u0 = {UNIS_NAMES.get(name, name): content for name, content in model.items()}
    u0["config.json"] = model["config.json"].replace(b'"Emu3"', b'"UNIS"')
    fast = {
        layout: {p.name: p.read_bytes() for p in sorted(made.model.iterdir())}
        for layout, made in (
            (layout, make_flashar(folder / layout, layout=layout, shards=2, hidden=32, logit_bias={}))
            for layout in ("lxazjk", "u0")
        )
    }
    # What lxazjk's training saves (`_write_hf_checkpoint_dir`): no tokenizer.
    flash = {name: content for name, content in fast["lxazjk"].items() if name not in UNIS_NAMES}
    flash["checkpoint_meta.json"] = b"{}"
    return {
        IMAGE: model | other, BASE: model | other, VISION: vision | other,
        U0: u0 | other, U0_FLASH: fast["u0"] | other, FLASH: flash | other,
    }  # fmt: skip


def wanted(repo: str) -> dict[str, bytes]:
    """The files of `repo` that a checkpoint needs."""
    others = ("README.md", "tokenization_emu3.py", "checkpoint_meta.json")
    return {n: c for n, c in parts()[repo].items() if n not in others}


def fill(hub: HubServer) -> dict[str, str]:
    """Put all repositories on the server; returns repository name to commit."""
    return {
        name: hub.add_repo(name, files, commit=VISION_COMMIT if name == VISION else None)
        for name, files in parts().items()
    }


def tar_of(names: Iterable[str] = (IMAGE, VISION), *, above: str = "", extra: Iterable[tarfile.TarInfo] = ()) -> bytes:
    """A tar of checkpoint folders, below the folder `above` where given, and then the members `extra`."""
    return _tar_of(tuple(names), above, tuple(extra))


@functools.lru_cache(maxsize=8)
def _tar_of(names: tuple[str, ...], above: str, extra: tuple[tarfile.TarInfo, ...]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for repo in names:
            for name, content in parts()[repo].items():
                info = tarfile.TarInfo(f"{above}{FOLDERS[repo]}/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        for info in extra:
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    return out.getvalue()


def settings(hub: HubServer, weights: Path, *, source: str | None = None, **fields: str) -> Settings:
    """Settings whose hub, and CDN, is the test's server; `HF_HOME` keeps this machine's own cache out."""
    environ = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(weights.parent / "hf-home"),
        "EMU_WEIGHTS_CDN_URL": hub.url + TAR,
        **{key: value for key, value in fields.items() if key.isupper()},
    }
    given = {"checkpoint": "image", "weights_pins": NO_PINS} | {
        key: value for key, value in fields.items() if not key.isupper()
    }
    return Settings(weights_dir=weights, weights_source=source, environ=environ, **given)  # type: ignore[arg-type]


def assert_whole(folder: Path, repo: str) -> None:
    """`folder` holds exactly what `repo` needs, with a manifest, and nothing is left in staging."""
    held = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != MANIFEST_FILE}
    assert held == wanted(repo)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    assert {n: e["size"] for n, e in manifest["files"].items()} == {n: len(c) for n, c in wanted(repo).items()}


_CHILD = """
import json, logging, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from emu_cog.settings import Settings
from emu_cog.weights.http import Patience
from emu_cog.weights.store import resolve
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
order = json.loads(sys.argv[2])
for name in ("weights_dir", "weights_pins"):
    order["settings"][name] = Path(order["settings"][name])
try:
    found = resolve(Settings(**order["settings"]), patience=Patience(**order["patience"]))
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(json.dumps([str(found.model), str(found.vision_tokenizer), found.revision]))
"""


def start(chosen: Settings, *, patience: Patience = HASTY, preexec: object = None, **env: str) -> subprocess.Popen[str]:
    """Another process, with `env` added, that resolves `chosen`: prints JSON, or ends with the error on stderr."""
    order: Mapping[str, object] = {
        "settings": {
            **vars(chosen),
            "weights_dir": str(chosen.weights_dir),
            "weights_pins": str(chosen.weights_pins),
            "environ": dict(chosen.environ),
        },
        "patience": vars(patience),
    }
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(ROOT), json.dumps(order)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env},
        preexec_fn=preexec,  # type: ignore[arg-type]
    )


HALF = 250_000  # bytes; about half of the first shard
HEADERS = 8 * 65536  # bytes; what reading a tar's headers may cost
WAYS = ["hub", "tar by ranges", "tar as a stream"]


def total() -> int:
    """Bytes of all files that the image model and the vision tokenizer need."""
    return sum(len(content) for repo in (IMAGE, VISION) for content in wanted(repo).values())


def bring(hub: HubServer, weights: Path, way: str, patience: Patience = HASTY, pins: Path = NO_PINS) -> Checkpoint:
    """Resolve the image checkpoint from the hub, or from the CDN's tar."""
    source = "hub" if way == "hub" else "cdn"
    return resolve(replace(settings(hub, weights, source=source), weights_pins=pins), patience=patience)


def put(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def assert_complete(found: Checkpoint) -> None:
    assert_whole(found.model, IMAGE)
    assert_whole(found.vision_tokenizer, VISION)


def nothing_half(weights: Path) -> bool:
    """No folder that a start could take for weights is there."""
    return not [p for p in weights.iterdir() if not p.name.startswith(".")]


def body(way: str, **what: object) -> Fault:
    """A fault in the bytes of the largest file, model.ckpt, or, where the tar comes as one stream, of the tar."""
    return Fault("/cdn/" if way == "hub" else TAR, minimum=1_000_000, **what)  # type: ignore[arg-type]
