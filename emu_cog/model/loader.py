"""Load a folder as a LanguageModel or FlashModel: read its config, compare its headers, read each weight once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import infer_auto_device_map, init_empty_weights
from accelerate.utils import get_balanced_memory
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

from emu_cog.errors import CheckpointError, InputError
from emu_cog.log import log
from emu_cog.model.flashar import FlashModel, check_start, empty_flash_weights, flash_destinations, shapes
from emu_cog.model.headers import (
    CONFIG_FILE,
    FLASH_TYPE,
    MARKER,
    U0_TYPE,
    TensorHeader,
    config_json,
    read_headers,
    vertical_blocks,
)
from emu_cog.model.quantize import quantizable
from emu_cog.model.qwen3 import Destination, LanguageModel, check_vocabulary, destinations, empty_weights
from emu_cog.model.shards import READERS, check_state, read_tensors
from emu_cog.prompt.tokens import TokenIds

GIB = 2**30
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


MODEL_TYPES = ("Emu3", "qwen3", U0_TYPE)
"""Emu3 under its own name, transformers' and Xiaomi-Robotics-U0's, whose configuration file has the same defaults."""


def read_config(folder: Path) -> Qwen3Config:
    """`folder/config.json` as a Qwen3Config with Emu3's defaults. CheckpointError when it is missing or unusable."""
    path, data = folder / CONFIG_FILE, config_json(folder)
    if data.get("model_type") == FLASH_TYPE:
        nested = data.get("backbone_config")
        if not isinstance(nested, dict) or not nested:
            raise CheckpointError(f"{path}: model_type {FLASH_TYPE} needs the decoder's own config in backbone_config")
        data = nested
    if data.get("model_type", "Emu3") not in MODEL_TYPES:
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
    check_vocabulary(config, ids)
    with init_empty_weights(include_buffers=False):
        model = Qwen3ForCausalLM(config)  # for its keys and shapes
    expected = dict(model.state_dict())
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    headers = read_headers(folder)
    if MARKER in headers:
        raise CheckpointError(f"{folder} holds FlashAR weights ({MARKER}): its kind is flash or u0-flash")
    check_state(expected, headers, where=str(folder))
    places = _places(model, dtype, device, quantize) if device_map == "auto" else {"": device}

    def place(key: str) -> torch.device:
        return _place(key, places)

    weights = empty_weights(config, ids, dtype=dtype, place=place, quantize=quantize)
    _read_weights(dict(destinations(config, weights, quantize)), headers, places, dtype)
    return LanguageModel(config, weights, ids)


def load_flash_model(
    folder: Path, ids: TokenIds, *, device: torch.device, dtype: torch.dtype, quantize: str | None = None
) -> FlashModel:
    """Load a folder with FlashAR's keys, as `load_language_model` does: all of it on one device.

    The number of vertical layers and where they begin are config.json's `vertical_layers` and `vertical_start_layer`;
    else the layers are counted and taken to begin at the decoder's last ones, as Xiaomi-Robotics-U0 has it
    (xr_u0_flashar/eager_cli.py). CheckpointError names what is wrong.
    """
    config = read_config(folder)
    config.tie_word_embeddings = True  # there is no lm_head: the two heads stand in for it
    check_vocabulary(config, ids)
    headers = read_headers(folder)
    layers, start = _vertical_layers(folder, config.num_hidden_layers, headers)
    with init_empty_weights(include_buffers=False):
        decoder = Qwen3ForCausalLM(config).model  # for its keys and shapes
    expected = {f"backbone.{name}": value for name, value in decoder.state_dict().items()}
    expected |= {name: torch.empty(shape, device="meta") for name, shape in shapes(config, layers).items()}
    check_state(expected, headers, where=str(folder))
    weights = empty_flash_weights(
        config, ids, vertical=layers, start=start, dtype=dtype, device=device, quantize=quantize
    )
    _read_weights(dict(flash_destinations(config, ids, weights, quantize)), headers, {"": device}, dtype)
    return FlashModel(config, weights, ids)


def _vertical_layers(folder: Path, layers: int, headers: Mapping[str, TensorHeader]) -> tuple[int, int]:
    """How many vertical layers there are, and the decoder's layer at which they begin."""
    data, where = config_json(folder), str(folder / CONFIG_FILE)

    def number(name: str, default: int) -> int:
        value = data.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{where}: {name} must be a whole number, found {value!r}")
        return value

    count = number("vertical_layers", vertical_blocks(headers))
    if count < 1:
        raise CheckpointError(f"{folder} has no vertical_block: FlashAR weights need their vertical branch")
    start = number("vertical_start_layer", layers - count)
    check_start(start, layers=layers, vertical=count, where=where)
    return count, start


Places = Mapping[str, torch.device]
"""Module name to device; "" is the whole model."""


def _places(model: Qwen3ForCausalLM, dtype: torch.dtype, device: torch.device, quantize: str | None) -> Places:
    """Where EMU_DEVICE_MAP=auto puts each module: over all GPUs, or on the one device that is no GPU."""
    if device.type != "cuda":
        return {"": device}
    free = {i: torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())}
    places = spread(model, dtype, free, quantize)
    log.info("the layers are on GPU %s", ", ".join(map(str, sorted(set(places.values())))))
    return {name: torch.device("cuda", place) for name, place in places.items()}


def spread(
    model: Qwen3ForCausalLM, dtype: torch.dtype, free: Mapping[int, int], quantize: str | None = None
) -> dict[str, int]:
    """Module name to GPU, by accelerate: evenly, so that the caches are too; a layer is never split.

    `free` are the bytes free on each GPU. InputError with the numbers where they are too few.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    small = {name: torch.int8 for name in quantizable(sizes)} if quantize else {}
    whole: dict[str, Any] = {"no_split_module_classes": ["Qwen3DecoderLayer"], "dtype": dtype, "special_dtypes": small}
    balanced = get_balanced_memory(model, max_memory=dict(free), **whole)
    places = infer_auto_device_map(model, max_memory=balanced, **whole)
    if any(not isinstance(place, int) for place in places.values()):
        needed = sum(count * small.get(name, dtype).itemsize for name, count in sizes.items())
        raise InputError(
            f"EMU_DEVICE_MAP=auto: the model's {needed / GIB:.2f} GiB of weights do not fit {len(free)} GPU(s) with "
            f"{', '.join(f'{size / GIB:.2f}' for size in free.values())} GiB free, and parts in main memory would take "
            "minutes per token: use more or larger GPUs, or 8-bit weights (EMU_QUANTIZE)"
        )
    return places


def _read_weights(
    wanted: Mapping[str, Destination], headers: Mapping[str, TensorHeader], places: Places, dtype: torch.dtype
) -> None:
    """Fill every destination from the files of `headers`, several files at a time."""
    started = time.perf_counter()
    jobs: dict[tuple[Path, torch.device], list[str]] = {}
    for name in wanted:
        jobs.setdefault((headers[name].file, _place(name, places)), []).append(name)

    def read(job: tuple[tuple[Path, torch.device], list[str]]) -> None:
        (file, device), names = job
        for name, tensor in read_tensors(file, names, device=device, dtype=dtype):
            wanted[name](tensor)

    with (
        # A file that is read stays mapped meanwhile: on a CPU that is memory beside the weights, so one at a time.
        ThreadPoolExecutor(max_workers=1 if all(d.type == "cpu" for _, d in jobs) else READERS) as pool,
        tqdm(total=len(jobs), desc="loading weights", unit="file", disable=len(jobs) == 1) as bar,
    ):
        for _ in pool.map(read, jobs.items()):
            bar.update()
    log.info("weights read in %.1f s", time.perf_counter() - started)


def _place(name: str, places: Places) -> torch.device:
    """The device of the longest entry of `places` that `name` lies under."""
    while name not in places and name:
        name = name.rpartition(".")[0]
    return places[name]
