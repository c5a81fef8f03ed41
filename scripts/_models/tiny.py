"""Tiny random checkpoints in Emu3.5's format, for tests and for measuring loading.

Every weight comes from the raw bits of NumPy's PCG64, keyed by (seed, tensor name). NumPy's compatibility policy fixes
that stream and the arithmetic on it is exact, so a seed gives the same file on every machine and torch version.

`logit_bias` controls what a model writes: `{"bss": {"boi": 20.0}}` raises BOI's logit by about 20 after BSS. Hidden
channel 0 is constant, and one more channel per entry holds a level where the last token is in the entry's group. No
layer writes to these channels; the head turns them into logits.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from _models.vocabulary import write_vocabulary
from emu_cog.prompt.tokenizer import Tokenizer
from emu_cog.prompt.tokens import ROLES
from emu_cog.request import TASKS
from emu_cog.vision.ibq import IBQ, VisionConfig

LogitBias = Mapping[str, Mapping[str, float]]
"""Group of the last token -> group of the next token -> approximate logit bias.

A group is a role of `tokens.ROLES` ("boi"), "text" (all byte-pair tokens), "special" (all special tokens but the
visual ones), "visual", "words/0" to "words/2" (disjoint thirds of the tokens that are ASCII words, one for each kind of
text), or the text of one token ("1"). "any" matches every last token.
"""

_NO_SPECIAL: dict[str, float] = {"special": -40.0}
# 10 to 19 rows and columns where the model chooses the size.
_SMALL_SIZES: dict[str, Mapping[str, float]] = {"boi": {"1": 20.0}, "*": {"1": 20.0}, "1": {"0": 3.0, "2": 3.0}}

PICTURE: LogitBias = {"any": _NO_SPECIAL, "bss": {"boi": 80.0}, "eoi": {"eos": 80.0}, **_SMALL_SIZES}
"""One image, then the end."""
TALKER: LogitBias = {"any": {**_NO_SPECIAL, "text": 40.0}}
"""Text without an image or an end."""
SILENT: LogitBias = {"any": {"eos": 80.0}}
"""Nothing: EOS is the first token."""
STORYTELLER: LogitBias = {
    "any": _NO_SPECIAL,
    "bss": {"bog": 80.0},
    "bog": {"words/0": 40.0},
    "words/0": {"words/0": 40.0, "eog": 86.0},
    "eog": {"words/1": 40.0},
    "words/1": {"words/1": 40.0, "boc": 86.0},
    "boc": {"words/2": 40.0},
    "words/2": {"words/2": 40.0, "eoc": 86.0},
    "eoc": {"boi": 80.0},
    "eoi": {"words/1": 40.0, "eos": 86.0},
    **_SMALL_SIZES,
}
"""Global reasoning, then text, image reasoning and an image in turn; may end after each image."""

_LEVEL = 2.0  # of a bias channel; the other channels of an embedding have variance 1
_LAYER_VARIANCE = 3.5  # that one layer adds to the other channels, approximately; measured


@dataclass(frozen=True)
class TinyFolders:
    """The two folders of a checkpoint: the language model with its tokenizer, and the vision tokenizer."""

    model: Path
    vision: Path


def make_tiny(
    folder: Path,
    *,
    seed: int = 0,
    visual_tokens: int = 64,
    merges: int = 240,
    tokenizer: Path | None = None,
    hidden: int = 64,
    intermediate: int | None = None,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    context: int = 4096,
    rms_norm_eps: float = 1e-6,
    rope_theta: float = 1e6,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    sharpness: float = 3.0,
    logit_bias: LogitBias = PICTURE,
    defaults: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    vision_ch: int = 32,
    vision_ch_mult: tuple[int, ...] = (1, 1, 1, 2, 2),
    vision_blocks: int = 1,
    vision_attention: tuple[int, ...] = (16,),
    z_channels: int = 32,
    embed_dim: int = 32,
) -> TinyFolders:
    """Write `folder`/model and `folder`/vision, over what is there.

    The vocabulary is byte-level, with 256 bytes and up to `merges` merges; or it is the one in the folder `tokenizer`,
    with only `visual_tokens` visual tokens. `sharpness` is approximately the standard deviation of the logits.
    `defaults` becomes `defaults.json`; `config` adds keys to `config.json`, or removes those whose value is None.
    Language-model weights are written in `dtype`, in `shards` files; the vision tokenizer's are fp32.
    `vision_ch` times each of the five `vision_ch_mult` must be a multiple of 32.
    """
    folders = TinyFolders(folder / "model", folder / "vision")
    for path in (folders.model, folders.vision):
        path.mkdir(parents=True, exist_ok=True)
    write_vocabulary(folders.model, visual_tokens=visual_tokens, merges=merges, source=tokenizer)
    vocabulary = Tokenizer.load(folders.model)
    shape = _Shape(
        hidden=hidden,
        intermediate=intermediate or 2 * hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )
    state = _language_model(shape, vocabulary, logit_bias, seed=seed, sharpness=sharpness)
    write_shards(folders.model, {name: value.to(dtype) for name, value in state.items()}, shards)
    settings = _config_json(shape, vocabulary, context, rms_norm_eps, rope_theta, dtype) | dict(config or {})
    _write_json(folders.model / "config.json", {k: v for k, v in settings.items() if v is not None})
    ids = vocabulary.ids
    _write_json(
        folders.model / "generation_config.json",
        {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad},
    )
    if defaults is not None:
        _write_json(folders.model / "defaults.json", defaults)
    vision = VisionConfig(
        ch=vision_ch,
        out_ch=3,
        ch_mult=vision_ch_mult,
        num_res_blocks=vision_blocks,
        attn_resolutions=vision_attention,
        in_channels=3,
        resolution=256,
        z_channels=z_channels,
        double_z=False,
        n_embed=visual_tokens,
        embed_dim=embed_dim,
    )
    _write_vision(folders.vision, vision, seed)
    return folders


def small_defaults(area: int = 160 * 160) -> dict[str, Any]:
    """A `defaults.json` that lets every task draw `area` pixels, so that a tiny model answers in seconds."""
    return {"kind": "image", "aspect_ratio": "1:1", "image_area": dict.fromkeys(TASKS, area)}


@dataclass(frozen=True, kw_only=True)
class _Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


def noise(seed: int, name: str, *shape: int) -> Tensor:
    """Uniform fp32 numbers of mean 0 and variance 1: an affine map of 24 raw bits each."""
    count = int(np.prod(shape))
    raw = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(name.encode())])).random_raw((count + 1) // 2)
    bits = raw.view(np.uint32)[:count] >> np.uint32(8)
    centred = bits.astype(np.float32) * np.float32(2**-23) + np.float32(2**-24 - 1)  # exact, in -1..1
    return torch.from_numpy(centred * np.float32(3**0.5)).reshape(shape)


def _language_model(
    shape: _Shape, vocabulary: Tokenizer, logit_bias: LogitBias, *, seed: int, sharpness: float
) -> dict[str, Tensor]:
    h, size = shape.hidden, vocabulary.ids.vocab_size
    biases: dict[str, Mapping[str, float]] = {"any": {}, **logit_bias}
    channels = len(biases)
    if channels > h // 2:
        raise ValueError(f"logit_bias has {channels} entries, at most {h // 2} fit into {h} hidden channels")

    def scaled(name: str, *dims: int, gain: float = 1.0) -> Tensor:
        return noise(seed, name, *dims) * (gain / dims[-1] ** 0.5)

    embedding = noise(seed, "model.embed_tokens.weight", size, h)
    head = scaled("lm_head.weight", size, h, gain=sharpness)
    left = _LEVEL / (1 + _LAYER_VARIANCE * shape.layers) ** 0.5  # the level after the final norm
    embedding[:, :channels] = 0.0
    head[:, :channels] = 0.0
    for channel, (last, raised) in enumerate(sorted(biases.items(), key=lambda item: item[0] != "any")):
        embedding[_group(last, vocabulary), channel] = _LEVEL
        for group, amount in raised.items():
            head[_group(group, vocabulary), channel] += amount / left
    state = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    queries, keys, inner = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.intermediate
    for i in range(shape.layers):
        p = f"model.layers.{i}."
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            state[f"{p}self_attn.{name}_proj.weight"] = scaled(f"{p}self_attn.{name}_proj.weight", rows, h, gain=1.5)
        state[f"{p}self_attn.o_proj.weight"] = scaled(f"{p}self_attn.o_proj.weight", h, queries, gain=1.5)
        for name in ("gate", "up"):
            state[f"{p}mlp.{name}_proj.weight"] = scaled(f"{p}mlp.{name}_proj.weight", inner, h, gain=1.5)
        state[f"{p}mlp.down_proj.weight"] = scaled(f"{p}mlp.down_proj.weight", h, inner, gain=1.0)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            state[f"{p}{name}.weight"][:channels] = 0.0
        for name, dims, level in (
            ("input_layernorm", h, 1.0),
            ("post_attention_layernorm", h, 1.0),
            ("self_attn.q_norm", shape.head_dim, 1.5),
            ("self_attn.k_norm", shape.head_dim, 1.5),
        ):
            state[f"{p}{name}.weight"] = level + 0.1 * noise(seed, f"{p}{name}.weight", dims)
    state["model.norm.weight"] = 1.0 + 0.1 * noise(seed, "model.norm.weight", h)
    state["model.norm.weight"][:channels] = 1.0
    return state


def _group(name: str, vocabulary: Tokenizer) -> list[int] | slice:
    """The ids of a group of `LogitBias`."""
    ids = vocabulary.ids
    if name == "any":
        return slice(None)
    if name in ROLES:
        return [getattr(ids, name)]
    if name == "visual":
        return slice(ids.visual, ids.vocab_size)
    if name == "text":
        return slice(0, ids.pad)
    if name == "special":
        return slice(ids.pad, ids.visual)
    if name.startswith("words/"):
        words = [i for i in range(ids.pad) if re.fullmatch(rb" ?[A-Za-z]{2,}", vocabulary.token_bytes(i))]
        return words[int(name.removeprefix("words/")) :: 3]
    encoded = vocabulary.encode(name)
    if len(encoded) != 1:
        raise ValueError(f"{name!r} is neither a group nor one token")
    return encoded


def _config_json(
    shape: _Shape, vocabulary: Tokenizer, context: int, eps: float, rope_theta: float, dtype: torch.dtype
) -> dict[str, Any]:
    """Fields and names as upstream's Emu3Config writes them."""
    ids = vocabulary.ids
    return {
        "architectures": ["Emu3ForCausalLM"],
        "model_type": "Emu3",
        "attention_dropout": 0.1,
        "vocab_size": ids.vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": context,
        "rms_norm_eps": eps,
        "rope_theta": rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "image_area": 518400,
        "pad_token_id": ids.pad,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "img_token_id": ids.img,
        "boi_token_id": ids.boi,
        "eoi_token_id": ids.eoi,
        "eol_token_id": ids.eol,
        "eof_token_id": ids.eof,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def write_shards(folder: Path, state: Mapping[str, Tensor], shards: int) -> None:
    """One `model.safetensors`, or numbered shards with an index, in the layout of `save_pretrained`."""
    for old in (*folder.glob("model*.safetensors"), *folder.glob("*.index.json")):
        old.unlink()
    names = sorted(state)
    if shards == 1:
        save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
    for file in files:
        part = {name: state[name] for name in names if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    total = sum(value.numel() * value.element_size() for value in state.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_vision(folder: Path, config: VisionConfig, seed: int) -> None:
    keys = ("n_embed", "embed_dim")
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()}
    document: dict[str, Any] = {"ddconfig": {k: v for k, v in values.items() if k not in keys} | {"dropout": 0.0}}
    document |= {k: values[k] for k in keys} | {"beta": 0.25, "use_entropy_loss": False}
    (folder / "config.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in IBQ(config).state_dict().items()}
    torch.save(dict(_vision_weights(shapes.items(), seed)), folder / "model.ckpt")


def _vision_weights(shapes: Iterable[tuple[str, tuple[int, ...]]], seed: int) -> Iterable[tuple[str, Tensor]]:
    for name, shape in shapes:
        value = noise(seed, f"vision.{name}", *shape)
        if name == "quantize.embedding.weight":
            # Equal norms, so that every code can have the largest dot product; computed in double precision, so that
            # the last bit does not depend on the order of summation.
            value = (value / value.double().norm(dim=1, keepdim=True)).float()
        elif len(shape) == 4:
            value = value * (1.2 / (shape[1] * shape[2] * shape[3]) ** 0.5)
        elif "norm" in name and name.endswith("weight"):
            value = 1.0 + 0.1 * value
        else:
            value = 0.05 * value
        yield name, value


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
