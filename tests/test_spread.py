"""EMU_DEVICE_MAP=auto: where layers go, without GPUs; and the memory that loading needs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from _models.tiny import make_tiny
from accelerate import init_empty_weights
from transformers import Qwen3ForCausalLM
from weights_kit import ROOT

from emu_cog.errors import InputError
from emu_cog.model.loader import read_config, spread
from emu_cog.pipeline import Pipeline
from emu_cog.request import Request


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Qwen3ForCausalLM:
    folders = make_tiny(tmp_path_factory.mktemp("spread"), layers=8, hidden=128, intermediate=512)
    with init_empty_weights(include_buffers=False):
        return Qwen3ForCausalLM(read_config(folders.model))


def size(model: Qwen3ForCausalLM) -> int:
    return sum(p.numel() for p in model.parameters()) * torch.bfloat16.itemsize


@pytest.mark.parametrize("gpus", [2, 3])
def test_layers_are_spread_evenly_and_never_split(model: Qwen3ForCausalLM, gpus: int) -> None:
    places = spread(model, torch.bfloat16, {i: size(model) for i in range(gpus)})
    layers = [places[f"model.layers.{i}"] for i in range(8)]
    assert layers == sorted(layers)
    assert max(Counter(layers).values()) <= -(-8 // gpus) + 1
    assert set(layers) == set(range(gpus))
    assert places["model.embed_tokens"] == 0
    assert not [name for name in places if re.match(r"model\.layers\.\d+\.", name)]


def test_what_does_not_fit_is_refused_with_the_numbers(model: Qwen3ForCausalLM) -> None:
    says = r"weights do not fit 2 GPU\(s\) with 0\.00, 0\.00 GiB free.*minutes per token.*EMU_QUANTIZE"
    with pytest.raises(InputError, match=says):
        spread(model, torch.bfloat16, dict.fromkeys(range(2), size(model) // 4))


@pytest.mark.parametrize("form", [None, "int8"])
def test_8_bit_weights_count_one_byte(model: Qwen3ForCausalLM, form: str | None) -> None:
    """With room for 0.7 of the full weights on two devices, only 8-bit ones fit."""
    free = dict.fromkeys(range(2), int(0.35 * size(model)))
    if form is None:
        with pytest.raises(InputError, match="do not fit"):
            spread(model, torch.bfloat16, free)
    else:
        assert set(spread(model, torch.bfloat16, free, form).values()) == {0, 1}


def test_without_gpus_it_changes_nothing(tmp_path: Path) -> None:
    folders = make_tiny(tmp_path)
    request = Request(prompt="boat", size=(2, 3), seed=1)
    codes = []
    for device_map in (None, "auto"):
        pipeline = Pipeline.load(folders.model, folders.vision, device="cpu", device_map=device_map)
        codes.append([event.codes for event in pipeline.stream(request) if hasattr(event, "codes")])
    assert codes[0] == codes[1] != [[]]


_PEAK = """
import re, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from emu_cog.model.loader import load_language_model
from emu_cog.prompt.tokenizer import Tokenizer
torch.set_num_threads(1)

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

folder = Path(sys.argv[2])
ids = Tokenizer.load(folder).ids
before = peak()
lm = load_language_model(folder, ids, device=torch.device("cpu"), dtype=torch.float32)
w = lm.weights
held = w.embed.nbytes + w.head.nbytes + sum(
    x.data.nbytes for layer in w.layers for x in (layer.qkv, layer.o, layer.gate_up, layer.down)
)
print((peak() - before) / held)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_no_second_copy_of_the_weights_in_memory(tmp_path: Path) -> None:
    """What loading adds to the process's peak memory, relative to the weights: themselves, and the largest tensor as
    the file has it and converted. 1.49 measured; a second copy would make it 2."""
    folders = make_tiny(tmp_path, hidden=512, intermediate=2048, heads=8, kv_heads=4, head_dim=64, layers=4, shards=16)
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(ROOT), str(folders.model)], capture_output=True, text=True, check=True
    )
    assert 1.0 < float(done.stdout) < 1.7
