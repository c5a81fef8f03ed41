"""Checkpoint folders, sharded or not: they load as they are, and errors name what is missing or wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from _models import tiny
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from emu_cog.errors import CheckpointError, InputError
from emu_cog.model.device import check_settings, choose_device, choose_dtype
from emu_cog.model.loader import read_config
from emu_cog.model.qwen3 import Chunk
from emu_cog.pipeline import Pipeline
from emu_cog.request import Request
from emu_cog.settings import Settings
from emu_cog.upstream.pipeline import UpstreamPipeline


def copy(folders: tiny.TinyFolders, target: Path) -> tiny.TinyFolders:
    shutil.copytree(folders.model, target / "model")
    shutil.copytree(folders.vision, target / "vision")
    return tiny.TinyFolders(target / "model", target / "vision")


@pytest.fixture
def folders(make_checkpoint: Callable[[str], tiny.TinyFolders], tmp_path: Path) -> tiny.TinyFolders:
    return copy(make_checkpoint("picture"), tmp_path)


def load(folders: tiny.TinyFolders) -> Pipeline:
    return Pipeline.load(folders.model, folders.vision, device="cpu")


SHAPES = {
    "wide heads": {"hidden": 96, "heads": 4, "kv_heads": 1, "head_dim": 64, "layers": 3},
    "no grouping": {"hidden": 64, "heads": 2, "kv_heads": 2, "head_dim": 32, "embed_dim": 8, "z_channels": 64},
    "more codes": {"visual_tokens": 300, "vision_blocks": 2, "vision_ch_mult": (1, 2, 2, 2, 4), "seed": 3},
    "bfloat16 in shards": {"dtype": torch.bfloat16, "shards": 3},
}


@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_load_and_agree_with_transformers(name: str, tmp_path: Path) -> None:
    folders = tiny.make_tiny(tmp_path, defaults=tiny.small_defaults(), **SHAPES[name])  # type: ignore[arg-type]
    pipeline = load(folders)
    plain = Qwen3ForCausalLM.from_pretrained(
        folders.model, config=read_config(folders.model), attn_implementation="eager", dtype=torch.float32
    ).eval()
    tokens = pipeline.tokenizer.encode("a red boat on the sea")
    with torch.inference_mode():
        hidden = pipeline.lm.feed(pipeline.lm.new_cache(len(tokens)), [Chunk(tokens, 0, [1])])
        ours = torch.cat([pipeline.lm.text_logits(hidden), pipeline.lm.visual_logits(hidden)], dim=-1)
        theirs = plain(input_ids=torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    pictures = [e for e in pipeline.stream(Request(prompt="boat", size=(2, 3), seed=1)) if hasattr(e, "image")]
    assert [p.image.size for p in pictures] == [(48, 32)]


def test_emu3_defaults_hold_where_the_config_is_silent(folders: tiny.TinyFolders) -> None:
    path = folders.model / "config.json"
    path.write_text(json.dumps({"model_type": "Emu3"}))
    config = read_config(folders.model)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (184622, 4096, 14336)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (32, 32, 8)
    assert (config.head_dim, config.max_position_embeddings) == (128, 9216)
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters["rope_theta"] == 1e6
    assert not config.tie_word_embeddings
    assert set(config.layer_types) == {"full_attention"}


def test_a_tied_head_loads(folders: tiny.TinyFolders) -> None:
    config = json.loads((folders.model / "config.json").read_text())
    (folders.model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    state = load_file(folders.model / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, folders.model / "model.safetensors")
    weights = load(folders).lm.weights
    assert weights.head is weights.embed


def _edit_state(folder: Path, change: Callable[[dict], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def _edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_vision(folder: Path, change: Callable[[dict], None]) -> None:
    state = torch.load(folder / "model.ckpt", weights_only=True)
    change(state.get("state_dict", state))
    torch.save(state, folder / "model.ckpt")


KEY = "model.layers.1.mlp.up_proj.weight"
DAMAGE: dict[str, tuple[Callable[[tiny.TinyFolders], object], str]] = {
    "no config": (lambda f: (f.model / "config.json").unlink(), "config.json is missing"),
    "config not JSON": (lambda f: (f.model / "config.json").write_text("{"), "config.json is not readable"),
    "another model": (lambda f: _edit_json(f.model / "config.json", model_type="llama"), "model_type.*'llama'"),
    "no weights": (lambda f: (f.model / "model.safetensors").unlink(), "lacks model.safetensors"),
    "weights cut off": (
        lambda f: (f.model / "model.safetensors").write_bytes((f.model / "model.safetensors").read_bytes()[:-100]),
        "model.safetensors is damaged or cut off",
    ),
    "a key less": (lambda f: _edit_state(f.model, lambda s: s.pop(KEY)), f"lacks {KEY}"),
    "a key more": (lambda f: _edit_state(f.model, lambda s: s.update(extra=torch.ones(1))), "unknown key extra"),
    "a wrong shape": (
        lambda f: _edit_state(f.model, lambda s: s.update({KEY: s[KEY][:-1].clone()})),
        rf"{KEY} has shape \[127, 64\], expected \[128, 64\]",
    ),
    "fewer layers than keys": (lambda f: _edit_json(f.model / "config.json", num_hidden_layers=1), "unknown key"),
    "a small vocabulary": (
        lambda f: _edit_json(f.model / "config.json", vocab_size=100),
        "knows 100 tokens but .* name 771",
    ),
    "no vision config": (lambda f: (f.vision / "config.yaml").unlink(), "config.yaml is missing"),
    "vision config not YAML": (lambda f: (f.vision / "config.yaml").write_text("a: [b"), "config.yaml is not readable"),
    "vision config without a key": (
        lambda f: (f.vision / "config.yaml").write_text(yaml.safe_dump({"n_embed": 64, "embed_dim": 32})),
        "ddconfig",
    ),
    "no vision weights": (lambda f: (f.vision / "model.ckpt").unlink(), "model.ckpt is missing"),
    "vision weights cut off": (
        lambda f: (f.vision / "model.ckpt").write_bytes((f.vision / "model.ckpt").read_bytes()[:-5000]),
        "model.ckpt can't be opened safely",
    ),
    "a vision key less": (
        lambda f: _edit_vision(f.vision, lambda s: s.pop("quantize.embedding.weight")),
        "lacks quantize.embedding.weight",
    ),
    "a vision key more": (lambda f: _edit_vision(f.vision, lambda s: s.update(loss=torch.ones(1))), "unknown key loss"),
    "fewer codes than visual tokens": (
        lambda f: (
            _edit_vision(
                f.vision, lambda s: s.update({"quantize.embedding.weight": s["quantize.embedding.weight"][:32].clone()})
            ),
            (f.vision / "config.yaml").write_text(
                (f.vision / "config.yaml").read_text().replace("n_embed: 64", "n_embed: 32")
            ),
        ),
        "has 32 codes but .* names 64 visual tokens",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, folders: tiny.TinyFolders) -> None:
    damage, says = DAMAGE[name]
    damage(folders)
    with pytest.raises(CheckpointError, match=says):
        load(folders)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folders = tiny.make_tiny(tmp_path, shards=3)
    shard = sorted(folders.model.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {shard.name}"):
        load(folders)


def test_an_index_may_not_point_outside_its_folder(tmp_path: Path) -> None:
    folders = tiny.make_tiny(tmp_path, shards=2)
    index = folders.model / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"][KEY] = "../../etc/passwd"
    index.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load(folders)


def test_an_unsafe_pickle_is_refused(folders: tiny.TinyFolders) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return print, ("ran",)

    torch.save({"state_dict": {"x": Evil()}}, folders.vision / "model.ckpt")
    with pytest.raises(CheckpointError, match="can't be opened safely"):
        load(folders)


def test_device_and_dtype_are_chosen_or_refused() -> None:
    assert choose_dtype(None, torch.device("cpu")) == torch.float32
    assert choose_dtype(None, torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert choose_device("cpu").type == "cpu"


@pytest.fixture
def two_a100s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


SETTINGS: dict[str, str | None] = {"device": None, "dtype": None, "device_map": None, "quantize": None}
ON_ANY = [
    ({"device": "gpu"}, "EMU_DEVICE='gpu' is not a device, accepted are cpu, cuda"),
    ({"device": "mps"}, "EMU_DEVICE='mps' is not a device, accepted are cpu, cuda"),
    ({"dtype": "fp8"}, "EMU_DTYPE='fp8'.*bfloat16, float16, float32"),
    ({"device_map": "balanced"}, "EMU_DEVICE_MAP='balanced'.*accepted is auto"),
    ({"quantize": "int4"}, "EMU_QUANTIZE='int4'.*fp8, int8"),
]
ON_TWO_A100S = [
    ({"device": "cuda:2"}, "EMU_DEVICE='cuda:2' but PyTorch sees 2 CUDA device.*cuda:1"),
    ({"quantize": "fp8"}, "EMU_QUANTIZE=fp8 needs a GPU of compute capability 8.9.*use int8"),
    ({"quantize": "fp8", "device_map": "auto"}, "EMU_QUANTIZE=fp8 needs a GPU of compute capability 8.9.*use int8"),
]


def refused_before_download(given: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=says):
        check_settings(**(SETTINGS | given))
    for module in ("emu_cog.pipeline", "emu_cog.upstream.pipeline"):
        monkeypatch.setattr(f"{module}.resolve", lambda settings: pytest.fail("weights were resolved first"))
    monkeypatch.setattr("emu_cog.upstream.pipeline.ensure_clone", lambda *_, **__: pytest.fail("cloned first"))
    with pytest.raises(InputError, match=says):
        Pipeline.from_settings(Settings(**given))  # type: ignore[arg-type]
    if "quantize" not in given:
        with pytest.raises(InputError, match=says):
            UpstreamPipeline.from_settings(Settings(**given))  # type: ignore[arg-type]


@pytest.mark.parametrize(("given", "says"), ON_ANY)
def test_settings_that_are_unknown_are_refused_before_weights_are_downloaded(
    given: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused_before_download(given, says, monkeypatch)


@pytest.mark.usefixtures("two_a100s")
@pytest.mark.parametrize(("given", "says"), ON_TWO_A100S)
def test_settings_that_the_device_cannot_do_are_refused_before_weights_are_downloaded(
    given: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EMU_QUANTIZE=fp8 on an A100 was refused after up to 70 GB had been downloaded."""
    refused_before_download(given, says, monkeypatch)
    check_settings(**(SETTINGS | {"device": "cuda:1", "quantize": "int8"}))


def test_cuda_without_a_gpu_is_refused_before_weights_are_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused_before_download({"device": "cuda"}, "PyTorch sees no CUDA device here: set EMU_DEVICE=cpu", monkeypatch)


def test_bfloat16_runs_on_the_cpu(folders: tiny.TinyFolders) -> None:
    pipeline = Pipeline.load(folders.model, folders.vision, device="cpu", dtype="bfloat16")
    events = list(pipeline.stream(Request(prompt="boat", size=(2, 2), seed=1)))
    assert pipeline.lm.dtype == torch.bfloat16
    assert any(hasattr(event, "image") for event in events)
