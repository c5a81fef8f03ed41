"""Load an Emu3.5 folder as a LanguageModel: read its config, compare its headers, read each weight to its device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import get_balanced_memory
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

from emu_cog.errors import CheckpointError, InputError
from emu_cog.log import log
from emu_cog.model.headers import TensorHeader, read_headers
from emu_cog.model.quantize import QuantizedLinear, replace_linears
from emu_cog.model.qwen3 import LanguageModel, choose_attention
from emu_cog.model.shards import READERS, check_state, read_tensors
from emu_cog.prompt.tokens import TokenIds

GIB = 2**30
CONFIG_FILE = "config.json"
# Defaults of fields that config.json leaves out; Qwen3's own differ. Source: upstream's Emu3Config; dropout
# (0.1 there) acts in training only.
EMU3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 184622,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 9216,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}


def read_config(folder: Path) -> Qwen3Config:
    """`folder/config.json` as a Qwen3Config with Emu3's defaults. CheckpointError when it is missing or unusable."""
    path = folder / CONFIG_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: a checkpoint folder holds {CONFIG_FILE}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(data, dict) or data.get("model_type", "Emu3") not in ("Emu3", "qwen3"):
        raise CheckpointError(f"{path}: model_type must be 'Emu3', found {data.get('model_type')!r}")
    fields = {name: data.get(name, default) for name, default in EMU3_DEFAULTS.items()}
    fields["num_key_value_heads"] = fields["num_key_value_heads"] or fields["num_attention_heads"]
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    scaling = fields.pop("rope_scaling")
    if scaling is not None:
        rope |= {"rope_type": scaling.get("type", scaling.get("rope_type")), "factor": scaling["factor"]}
    return Qwen3Config(**fields, rope_parameters=rope, attention_bias=False, use_sliding_window=False)


def load_language_model(
    folder: Path,
    ids: TokenIds,
    *,
    device: torch.device,
    dtype: torch.dtype,
    device_map: str | None = None,
    quantize: str | None = None,
) -> LanguageModel:
    """Load an Emu3.5 folder as it stands: config.json and model.safetensors, or its shards with their index.

    Names and shapes in the files' headers are compared with the config before any weight is read; then the shards are
    read in parallel, each tensor once and straight to its device. With `device_map` "auto" accelerate spreads the
    layers over all GPUs. With `quantize` ("fp8", "int8") each layer's weight is converted to 8 bits as soon as it is
    read, so that the whole model in `dtype` is never in memory. CheckpointError names what is wrong.
    """
    config = read_config(folder)
    config._attn_implementation = choose_attention(device, dtype)
    with init_empty_weights(include_buffers=False):
        model = Qwen3ForCausalLM(config)
    expected = dict(model.state_dict())
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    headers = read_headers(folder)
    check_state(expected, headers, where=str(folder))
    if quantize:
        replace_linears(model, quantize)
    places = _places(model, dtype, device) if device_map == "auto" else {"": device}
    _read_weights(model, headers, list(expected), places, dtype)
    model.tie_weights()
    model.model.rotary_emb.to(device)
    if len(set(places.values())) > 1:
        dispatch_model(model, device_map=places, main_device=device)
    return LanguageModel(model.eval(), ids)


Places = Mapping[str, torch.device]
"""Module name to device; "" is the whole model."""


def _places(model: Qwen3ForCausalLM, dtype: torch.dtype, device: torch.device) -> Places:
    """Where EMU_DEVICE_MAP=auto puts each module: over all GPUs, or on the one device that is no GPU."""
    if device.type != "cuda":
        return {"": device}
    free = {i: torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())}
    places = spread(model, dtype, free)
    log.info("the layers are on GPU %s", ", ".join(map(str, sorted(set(places.values())))))
    return {name: torch.device("cuda", place) for name, place in places.items()}


def spread(model: Qwen3ForCausalLM, dtype: torch.dtype, free: Mapping[int, int]) -> dict[str, int]:
    """Module name to GPU, by accelerate: evenly, so that the caches are too; a layer is never split.

    `free` are the bytes free on each GPU. InputError with the numbers where they are too few.
    """
    whole: dict[str, Any] = {"no_split_module_classes": ["Qwen3DecoderLayer"], "dtype": dtype}
    balanced = get_balanced_memory(model, max_memory=dict(free), **whole)
    places = infer_auto_device_map(model, max_memory=balanced, **whole)
    if any(not isinstance(place, int) for place in places.values()):
        needed = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        raise InputError(
            f"EMU_DEVICE_MAP=auto: the model's {needed / GIB:.2f} GiB of weights do not fit {len(free)} GPU(s) with "
            f"{', '.join(f'{size / GIB:.2f}' for size in free.values())} GiB free, and parts in main memory would take "
            "minutes per token: use more or larger GPUs, or 8-bit weights (EMU_QUANTIZE)"
        )
    return places


def _read_weights(
    model: Qwen3ForCausalLM, headers: Mapping[str, TensorHeader], names: list[str], places: Places, dtype: torch.dtype
) -> None:
    """Fill `model` from the files of `headers`, several files at a time."""
    jobs: dict[tuple[Path, torch.device], list[str]] = {}
    for name in names:
        jobs.setdefault((headers[name].file, _place(name, places)), []).append(name)

    def read(job: tuple[tuple[Path, torch.device], list[str]]) -> None:
        (file, device), wanted = job
        for name, tensor in read_tensors(file, wanted, device=device, dtype=dtype):
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if isinstance(module, QuantizedLinear):
                module.fill(tensor)
            else:
                setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=False))

    with (
        ThreadPoolExecutor(max_workers=READERS) as pool,
        tqdm(total=len(jobs), desc="loading weights", unit="file", disable=len(jobs) == 1) as bar,
    ):
        for _ in pool.map(read, jobs.items()):
            bar.update()


def _place(name: str, places: Places) -> torch.device:
    """The device of the longest entry of `places` that `name` lies under."""
    while name not in places and name:
        name = name.rpartition(".")[0]
    return places[name]
