"""Tiny random checkpoints, made once a session, and the folders of real data where they are at hand."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

# Without a GPU test_kernels.py runs interpreted. Triton decides that on import, and some modules below import it.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import numpy as np
import pytest
from _compare import flashar
from _models import tiny
from hub_server import HubServer
from PIL import Image
from transformers import Qwen3ForCausalLM
from weights_kit import TAR, WAYS, fill, tar_of

from emu_cog.model.torch_settings import exact
from emu_cog.pipeline import Pipeline

ROOT = Path(__file__).resolve().parent.parent
FlashFolders = Callable[[str], tiny.TinyFolders]
FAVOURS = {
    "picture": tiny.PICTURE,
    "talker": tiny.TALKER,
    "silent": tiny.SILENT,
    "storyteller": tiny.STORYTELLER,
    "wild": {},
    # Writes an end of image where there is none, and then asks for one.
    "stray": {
        "any": {"special": -40.0},
        "bss": {"words/0": 80.0},
        "words/0": {"eoi": 80.0},
        "eoi": {"words/1": 80.0},
        "words/1": {"boi": 80.0},
    },
}

torch.set_num_threads(1)  # tiny tensors: threads cost more than they give


@pytest.fixture(autouse=True)
def plain_fp32() -> None:
    """A pipeline on a GPU turns TF32 on for the whole process; no test is to inherit that from the one before it."""
    exact()


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tiny.TinyFolders]:
    """`make_checkpoint(name)`: the folders of one of FAVOURS."""
    made: dict[str, tiny.TinyFolders] = {}

    def make(name: str) -> tiny.TinyFolders:
        if name not in made:
            made[name] = tiny.make_tiny(
                tmp_path_factory.mktemp(name), seed=7, logit_bias=FAVOURS[name], defaults=tiny.small_defaults()
            )
        return made[name]

    return make


@pytest.fixture(scope="session")
def flash_folders(tmp_path_factory: pytest.TempPathFactory) -> FlashFolders:
    """`flash_folders(layout)`: the FlashAR checkpoint in that repository's layout that the golden vectors were made
    with."""
    made: dict[str, tiny.TinyFolders] = {}

    def make(layout: str) -> tiny.TinyFolders:
        if layout not in made:
            made[layout] = flashar.make_checkpoint(layout, tmp_path_factory.mktemp(layout))
        return made[layout]

    return make


@pytest.fixture(scope="session")
def pipelines(make_checkpoint: Callable[[str], tiny.TinyFolders]) -> Callable[[str], Pipeline]:
    """`pipelines(name)`: a Pipeline over one of FAVOURS, loaded once."""
    loaded: dict[str, Pipeline] = {}

    def load(name: str) -> Pipeline:
        if name not in loaded:
            folders = make_checkpoint(name)
            loaded[name] = Pipeline.load(folders.model, folders.vision, device="cpu")
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def plain_models(make_checkpoint: Callable[[str], tiny.TinyFolders]) -> Callable[[str], Qwen3ForCausalLM]:
    """`plain_models(name)`: the same weights through transformers' own loading and eager attention."""
    loaded: dict[str, Qwen3ForCausalLM] = {}

    def load(name: str) -> Qwen3ForCausalLM:
        if name not in loaded:
            folder = make_checkpoint(name).model
            loaded[name] = Qwen3ForCausalLM.from_pretrained(
                folder, attn_implementation="eager", dtype=torch.float32
            ).eval()
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def real_tokenizer_folder() -> Path:
    """The released tokenizer's files: EMU_TEST_TOKENIZER, or a folder beside the checkout."""
    folder = Path(os.environ.get("EMU_TEST_TOKENIZER", ROOT.parent / "shared/data/tokenizer"))
    if not (folder / "emu3.tiktoken").exists():
        pytest.skip("the released tokenizer's files are not here (set EMU_TEST_TOKENIZER)")
    return folder


def photo(seed: int, width: int = 200, height: int = 150) -> Image.Image:
    """A smooth random RGB picture."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def bare_hub() -> Iterator[HubServer]:
    """A hub and CDN that hold nothing yet."""
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(bare_hub: HubServer) -> HubServer:
    """A hub that holds the repositories, and a CDN that holds the tar."""
    fill(bare_hub)
    bare_hub.files[TAR] = tar_of()
    return bare_hub


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, hub: HubServer) -> str:
    """How the weights come; the fault's `path` is then `address(way)`."""
    hub.ranges = request.param != "tar as a stream"
    return str(request.param)


@pytest.fixture
def log_captured(caplog: pytest.LogCaptureFixture) -> None:
    """Put what the package logs into `caplog`."""
    caplog.set_level(logging.INFO, logger="emu_cog")
