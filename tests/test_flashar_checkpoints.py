"""How FlashAR checkpoints are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _compare import flashar
from _compare.flashar_native import run_native
from safetensors.torch import load_file, save_file

from emu_cog.errors import CheckpointError
from emu_cog.memory import plan_memory
from emu_cog.model.loader import load_language_model
from emu_cog.model.quantize import quantizable
from emu_cog.prompt.tokenizer import Tokenizer
from tests.conftest import FlashFolders
from tests.flashar_kit import CPU, load, state_of


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_8_bit_weights_come_near_the_full_ones(form: str, flash_folders: FlashFolders) -> None:
    """The vertical layers' weights are in 8 bits, too; the heads, the gates and the norms are not."""
    folder = flash_folders("u0").model
    pictures = flashar.pictures("u0", Tokenizer.load(folder))[:1]
    full, small = load(folder), load(folder, quantize=form)
    layers = (*small.flash.decoder.layers, *small.flash.vertical)
    assert all(w.scale is not None for layer in layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down))
    assert torch.equal(small.flash.decoder.head, full.flash.decoder.head)
    assert small.flash.bytes_read < full.flash.bytes_read
    (exact,) = run_native(full, pictures)
    (near,) = run_native(small, pictures, follow=[exact["tokens"]])
    for key in ("h", "v"):
        error = np.linalg.norm(near[key] - exact[key]) / np.linalg.norm(exact[key])
        assert 1e-4 < error < {"fp8": 0.15, "int8": 0.08}[form], key


def test_8_bit_weights_are_those_of_the_layers(flash_folders: FlashFolders) -> None:
    names = set(quantizable(state_of(flash_folders("u0").model)))
    assert len(names) == 7 * (3 + 3)
    assert {name.split(".")[0] for name in names} == {"backbone", "vertical_block"}


def test_bfloat16_follows_float32(flash_folders: FlashFolders) -> None:
    folder = flash_folders("lxazjk").model
    pictures = flashar.pictures("lxazjk", Tokenizer.load(folder))
    alone = [replace(picture, guidance=1.0) for picture in pictures[:3]]
    full = run_native(load(folder), alone)
    bfloat = load(folder, dtype=torch.bfloat16)
    half = run_native(bfloat, alone, follow=[one["tokens"] for one in full])
    for exact, near in zip(full, half, strict=True):
        error = np.linalg.norm(near["logits"] - exact["logits"]) / np.linalg.norm(exact["logits"])
        assert 1e-4 < error < 0.05


def test_only_visual_rows_of_the_heads_are_kept(flash_folders: FlashFolders) -> None:
    folder = flash_folders("lxazjk").model
    ids, state, w = Tokenizer.load(folder).ids, state_of(folder), load(folder).flash
    both = torch.cat([state["horizontal_head.weight"], state["vertical_head.weight"]], dim=1)
    assert torch.equal(w.decoder.head, both[ids.visual :])
    assert w.decoder.visual_head.shape == (ids.visual_count, 64)


def test_weights_in_flashar_safetensors_are_taken_first(flash_folders: FlashFolders, tmp_path: Path) -> None:
    """As both repositories do. Emu3.5's own weights may lie beside them."""
    folder = copy(flash_folders("lxazjk").model, tmp_path)
    (folder / "model.safetensors").rename(folder / "flashar.safetensors")
    save_file({"lm_head.weight": torch.zeros(1)}, folder / "model.safetensors")
    assert torch.equal(load(folder).flash.decoder.head, load(flash_folders("lxazjk").model).flash.decoder.head)


def copy(folder: Path, to: Path) -> Path:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def edit_state(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def pickled(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def without_branch(state: dict[str, torch.Tensor]) -> None:
    for key in [key for key in state if key.startswith("vertical_block.")]:
        del state[key]


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a gate less": (lambda f: edit_state(f, lambda s: s.pop("hv_gate_corner.bias")), "lacks hv_gate_corner.bias"),
    "a head of another shape": (
        lambda f: edit_state(f, lambda s: s.update({"vertical_head.weight": s["vertical_head.weight"][1:].clone()})),
        r"vertical_head.weight has shape \[\d+, 32\], expected \[\d+, 32\]",
    ),
    "an lm_head": (
        lambda f: edit_state(f, lambda s: s.update({"lm_head.weight": torch.ones(1)})),
        "key lm_head.weight",
    ),
    "a vertical layer less": (
        lambda f: edit_state(f, lambda s: s.pop("vertical_block.1.mlp.up_proj.weight")),
        "lacks vertical_block.1.mlp.up_proj.weight",
    ),
    "a vertical layer more": (lambda f: edit_config(f, vertical_layers=1), "unknown key vertical_block.1"),
    "a branch that begins too late": (
        lambda f: edit_config(f, vertical_start_layer=3),
        "vertical_start_layer is 3, but it must be from 0 to 2",
    ),
    "a branch that begins nowhere": (lambda f: edit_config(f, vertical_start_layer=-1), "vertical_start_layer is -1"),
    "no number": (lambda f: edit_config(f, vertical_layers="two"), "vertical_layers must be a whole number.*'two'"),
    "no branch": (
        lambda f: (edit_state(f, without_branch), edit_config(f, vertical_layers=None)),
        "has no vertical_block",
    ),
    "no config inside": (lambda f: edit_config(f, backbone_config=None), "needs the decoder's own config"),
    "a pickle": (pickled("flashar.pt"), "flashar.pt is a pickle, which can run code when it is opened"),
    "another pickle": (pickled("pytorch_model.bin"), "pytorch_model.bin is a pickle"),
    "no weights": (pickled("elsewhere"), "lacks model.safetensors"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, flash_folders: FlashFolders, tmp_path: Path) -> None:
    damage, says = DAMAGE[name]
    folder = copy(flash_folders("lxazjk").model, tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=says):
        load(folder)


def test_a_config_that_names_no_branch_has_it_at_the_last_layers(flash_folders: FlashFolders, tmp_path: Path) -> None:
    assert load(flash_folders("u0").model).flash.start == 0
    folder = copy(flash_folders("lxazjk").model, tmp_path)
    assert load(folder).flash.start == 1
    edit_config(folder, vertical_layers=None, vertical_start_layer=None)
    assert load(folder).flash.start == 2


def test_it_is_not_loaded_as_a_plain_decoder(flash_folders: FlashFolders) -> None:
    folder = flash_folders("lxazjk").model
    with pytest.raises(CheckpointError, match=r"holds FlashAR weights \(horizontal_head.weight\)"):
        load_language_model(folder, Tokenizer.load(folder).ids, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize(("dtype", "form"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8")])
def test_memory_is_estimated_for_what_is_kept(
    dtype: torch.dtype, form: str | None, flash_folders: FlashFolders
) -> None:
    """Without the heads' text rows, 3 GB of the released weights; and with the vertical layers' keys and values."""
    made = flash_folders("lxazjk")
    w = load(made.model, dtype=dtype, quantize=form).flash
    gates = w.gates.tensors
    tensors = [w.decoder.embed, w.decoder.norm, w.decoder.head, w.vertical_norm, *gates]
    for layer in (*w.decoder.layers, *w.vertical):
        for part in vars(layer).values():
            tensors += (
                [part]
                if isinstance(part, torch.Tensor)
                else [t for t in vars(part).values() if isinstance(t, torch.Tensor)]
            )
    given = {"device": CPU, "dtype": dtype, "spread": False, "area": 160 * 160, "quantize": form}
    budget = plan_memory(made.model, made.vision, **given)  # type: ignore[arg-type]
    assert budget.weights == sum(tensor.nbytes for tensor in tensors)
    kv = 2 * (4 + 2) * 2 * 12 * dtype.itemsize  # keys and values, layers, heads, channels
    assert budget.per_token == 2 * kv
