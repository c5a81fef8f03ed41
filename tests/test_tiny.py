"""Tiny checkpoints: their format, the same bytes for the same seed, and the logit biases."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from _models import tiny
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from emu_cog.model import loader
from emu_cog.prompt.tokenizer import Tokenizer
from emu_cog.vision.ibq import load_vision_tokenizer


def digest(folder: Path) -> str:
    state = load_file(folder / "model.safetensors")
    return hashlib.sha256(b"".join(state[k].numpy().tobytes() for k in sorted(state))).hexdigest()


def test_a_seed_always_gives_the_same_weights(tmp_path: Path) -> None:
    """The golden vectors depend on this. The hash was made with torch 2.13 and NumPy 2.4."""
    one = tiny.make_tiny(tmp_path / "a", seed=5, hidden=32, layers=1)
    two = tiny.make_tiny(tmp_path / "b", seed=6, hidden=32, layers=1)
    assert digest(one.model) == "be5d60fb3686eda38702440e52710499f6580a9df0643baa9120a5d7c6b85b6d"
    assert digest(two.model) != digest(one.model)


def test_shards_hold_the_same_tensors(tmp_path: Path) -> None:
    whole = tiny.make_tiny(tmp_path / "whole", dtype=torch.bfloat16)
    parts = tiny.make_tiny(tmp_path / "parts", dtype=torch.bfloat16, shards=3)
    index = json.loads((parts.model / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    expected = load_file(whole.model / "model.safetensors")
    assert expected["lm_head.weight"].dtype is torch.bfloat16
    found = {name: load_file(parts.model / file)[name] for name, file in index["weight_map"].items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert index["metadata"]["total_size"] == sum(v.numel() * v.element_size() for v in expected.values())


def test_small_vocabulary_has_the_released_order(tmp_path: Path) -> None:
    """Digits and "*" have the released vocabulary's ids, which are constants in upstream's size grammar."""
    ids = Tokenizer.load(tiny.make_tiny(tmp_path, visual_tokens=96).model).ids
    assert ids.star == 9
    assert ids.digits == tuple(range(15, 25))
    assert ids.visual_count == 96
    assert (ids.bos, ids.eos, ids.img, ids.boi, ids.eoi, ids.visual) == tuple(ids.pad + i for i in range(206, 212))


def test_released_tokenizer_files_are_used(tmp_path: Path, real_tokenizer_folder: Path) -> None:
    made = tiny.make_tiny(tmp_path, tokenizer=real_tokenizer_folder, visual_tokens=50, hidden=32, layers=1)
    ids = Tokenizer.load(made.model).ids
    assert ids.visual == 151854
    assert ids.vocab_size == 151854 + 50


def next_token(folder: Path, last: list[int]) -> int:
    model = Qwen3ForCausalLM.from_pretrained(folder, config=loader.read_config(folder))
    ids = Tokenizer.load(folder).ids
    with torch.no_grad():
        return int(model(torch.tensor([[ids.bos, *last]])).logits[0, -1, : ids.visual].argmax())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_logit_bias_controls_what_is_written(tmp_path: Path, seed: int) -> None:
    made = {
        name: tiny.make_tiny(tmp_path / name, seed=seed, logit_bias=getattr(tiny, name)).model
        for name in ("PICTURE", "TALKER", "SILENT", "STORYTELLER")
    }
    ids = Tokenizer.load(made["PICTURE"]).ids
    assert next_token(made["PICTURE"], [ids.bss]) == ids.boi
    assert next_token(made["PICTURE"], [ids.eoi]) == ids.eos
    assert next_token(made["TALKER"], [ids.bss]) < ids.pad
    assert next_token(made["SILENT"], [ids.bss]) == ids.eos
    assert next_token(made["STORYTELLER"], [ids.bss]) == ids.bog
    assert next_token(made["STORYTELLER"], [ids.bss, ids.bog]) < ids.pad
    assert next_token(made["STORYTELLER"], [ids.eoc]) == ids.boi


def test_vision_tokenizer_uses_many_codes_and_decodes_within_range(tmp_path: Path) -> None:
    model = load_vision_tokenizer(tiny.make_tiny(tmp_path).vision)
    ramp = torch.linspace(-1, 1, 128)
    picture = torch.stack([ramp.expand(128, 128), ramp[:, None].expand(128, 128), (ramp * 20).sin().expand(128, 128)])
    assert model.encode(picture[None]).unique().numel() >= 16
    decoded = model.decode(torch.arange(64).view(1, 8, 8))
    assert 0.3 < decoded.std() < 1.5
