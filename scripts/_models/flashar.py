"""Tiny random checkpoints with FlashAR keys, in the layout of either public repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor

from _models import tiny
from emu_cog.model.headers import shard_files
from emu_cog.prompt.tokenizer import RANKS_FILE, VISION_FILE

Layout = Literal["lxazjk", "u0"]
UNIS_NAMES = {RANKS_FILE: "unis.tiktoken", VISION_FILE: "unis_vision_tokens.txt"}
"""Emu3's tokenizer files under Xiaomi-Robotics-U0's names."""


def make_flashar(
    folder: Path,
    *,
    layout: Layout,
    vertical_layers: int = 2,
    start: int | None = None,
    shards: int = 1,
    seed: int = 0,
    **shape: Any,
) -> tiny.TinyFolders:
    """Write `folder`/model with FlashAR weights and `folder`/vision. `shape` goes to `tiny.make_tiny`.

    "lxazjk": config.json names the vertical layers and nests the decoder's config (`_write_hf_checkpoint_dir` in its
    checkpoint_utils.py); `start` is free, and the tokenizer files, which the released folder lacks, are there all the
    same. "u0": a plain config.json of model_type UNIS that names neither; the vertical layers begin at the last
    `vertical_layers` layers.
    """
    folders = tiny.make_tiny(folder, seed=seed, **shape)
    state = {k: v for file in shard_files(folders.model) for k, v in load_file(file).items()}
    config = json.loads((folders.model / "config.json").read_text())
    start = config["num_hidden_layers"] - vertical_layers if start is None else start
    assert layout == "lxazjk" or start == config["num_hidden_layers"] - vertical_layers
    made = {"backbone." + k.removeprefix("model."): v for k, v in state.items() if k != "lm_head.weight"}
    made |= _added(config, seed=seed, vertical_layers=vertical_layers, start=start, head=state["lm_head.weight"])
    tiny.write_shards(folders.model, made, shards)
    if layout == "lxazjk":
        nested = {
            "model_type": "emu3_flashar",
            "architectures": ["Emuflashar"],
            "vocab_size": config["vocab_size"],
            "hidden_size": config["hidden_size"],
            "visual_token_offset": config["eoi_token_id"] + 1,
            "use_vertical_block": True,
            "vertical_layers": vertical_layers,
            "vertical_start_layer": start,
            "backbone_config": config,
        }
        (folders.model / "config.json").write_text(json.dumps(nested, indent=2))
    else:
        config |= {"model_type": "UNIS", "architectures": ["UNISForCausalLM"]}
        (folders.model / "config.json").write_text(json.dumps(config, indent=2))
        for ours, theirs in UNIS_NAMES.items():
            (folders.model / ours).rename(folders.model / theirs)
    return folders


def _added(config: dict[str, Any], *, seed: int, vertical_layers: int, start: int, head: Tensor) -> dict[str, Tensor]:
    """The keys that FlashAR adds. Gates range over most of 0 to 1; no tensor equals one of the decoder's."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    gate = max(64, hidden // 8)

    def scaled(name: str, *dims: int, gain: float = 1.0) -> Tensor:
        return tiny.noise(seed, name, *dims) * (gain / dims[-1] ** 0.5)

    made = {
        "horizontal_head.weight": head,
        "vertical_head.weight": scaled("vertical_head.weight", vocabulary, hidden, gain=3.0),
        "vertical_norm.weight": 1.0 + 0.2 * tiny.noise(seed, "vertical_norm.weight", hidden),
        "hv_gate_mlp.0.weight": scaled("hv_gate_mlp.0.weight", gate, 2 * hidden),
        "hv_gate_mlp.2.weight": scaled("hv_gate_mlp.2.weight", 1, gate, gain=3.0),
        "hv_gate_mlp.2.bias": 0.1 * tiny.noise(seed, "hv_gate_mlp.2.bias", 1),
        "hv_gate_corner.weight": scaled("hv_gate_corner.weight", 1, hidden),
        "hv_gate_corner.bias": 0.5 * tiny.noise(seed, "hv_gate_corner.bias", 1),
    }
    heads, kv, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    inner = config["intermediate_size"]
    shapes = {
        "self_attn.q_proj": (heads * dim, hidden), "self_attn.k_proj": (kv * dim, hidden),
        "self_attn.v_proj": (kv * dim, hidden), "self_attn.o_proj": (hidden, heads * dim),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden, "self_attn.q_norm": dim}
    for i in range(vertical_layers):
        for name, dims in shapes.items():
            key = f"vertical_block.{i}.{name}.weight"
            made[key] = scaled(key, *dims, gain=1.5)
        for name, size in (norms | {"self_attn.k_norm": dim}).items():
            key = f"vertical_block.{i}.{name}.weight"
            made[key] = 1.2 + 0.1 * tiny.noise(seed, key, size)
    return made
