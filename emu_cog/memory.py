"""What a model needs and what a device has, computed before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from emu_cog.errors import InputError
from emu_cog.log import log
from emu_cog.model.headers import FLASH_HEADS, TensorHeader, read_headers, vertical_blocks
from emu_cog.model.kv_cache import KVCache
from emu_cog.model.loader import read_config
from emu_cog.model.quantize import quantizable
from emu_cog.prompt import tasks
from emu_cog.prompt.tokens import block_length
from emu_cog.request import Request
from emu_cog.vision.ibq import IBQ, VisionConfig

GIB = 2**30
WORKSPACE = 1.5 * GIB
"""Besides weights and caches: the CUDA context, logits, one chunk of prefill."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes. `per_token` is one token of one output: of its conditional and its unconditional stream."""

    device: str
    available: float
    weights: float
    vision: float
    workspace: float
    per_token: float
    picture: int = 1
    """Tokens that a usual picture needs, its prompt included."""

    @property
    def cache(self) -> float:
        """Bytes left for keys and values."""
        return self.available - self.weights - self.vision - self.workspace

    def tokens(self, outputs: int = 1) -> int:
        """How many tokens of context `outputs` outputs may have."""
        return max(int(self.cache // (self.per_token * outputs)), 0)

    def outputs(self, tokens: int) -> int:
        """How many outputs of `tokens` tokens fit side by side."""
        return max(int(self.cache // (self.per_token * tokens)), 0)

    def slots(self, *, most: int) -> int:
        """How many usual pictures fit side by side, from 1 to `most`."""
        return min(max(self.outputs(self.picture), 1), most)

    def table(self, tokens: int, outputs: int) -> str:
        """The estimate in one line, with caches for `outputs` outputs of `tokens` tokens."""
        cache = self.per_token * tokens * outputs
        needed = self.weights + self.vision + self.workspace + cache
        return (
            f"weights {self.weights / GIB:.2f} GiB, vision tokenizer {self.vision / GIB:.2f}, "
            f"workspace {self.workspace / GIB:.2f}, caches {cache / GIB:.2f} ({outputs} output(s) of {tokens} tokens): "
            f"{needed / GIB:.2f} GiB of {self.available / GIB:.2f} on {self.device}"
        )

    def check(self, tokens: int, outputs: int, *, spreads: bool = True) -> None:
        """Log the estimate; InputError with the numbers where it does not fit. `spreads`: the layers of such a model
        may be on several GPUs."""
        table = self.table(tokens, outputs)
        if self.outputs(tokens) < outputs:
            raise InputError(
                f"not enough memory: {table}. Use 8-bit weights (EMU_QUANTIZE=fp8 or int8), "
                f"{'several GPUs (EMU_DEVICE_MAP=auto), ' if spreads else ''}"
                "a smaller EMU_MAX_CONTEXT or EMU_MAX_OUTPUTS, or a larger GPU"
            )
        log.info("memory: %s", table)


def available_bytes(device: torch.device, *, all_devices: bool = False) -> float:
    """Free bytes of `device`; of all GPUs together with `all_devices`."""
    if device.type != "cuda":
        return float(psutil.virtual_memory().available)
    devices = range(torch.cuda.device_count()) if all_devices else [device]
    return float(sum(torch.cuda.mem_get_info(d)[0] for d in devices))


PROMPT_TOKENS = 512
"""A long prompt, to estimate how much cache a picture needs."""


def check_memory_budget(
    folder: Path,
    vision_folder: Path,
    defaults: tasks.ModelDefaults,
    *,
    device: torch.device,
    dtype: torch.dtype,
    spread: bool,
    quantize: str | None = None,
    max_context: int | None = None,
    max_outputs: int = 1,
    compile: bool = True,
) -> Budget:
    """Estimate and log what a run needs before anything is loaded. InputError with the numbers where it is too much."""
    usual = tasks.plan(Request(prompt="-"), defaults)
    text = 0 if usual.task.diagonal else tasks.PICTURE_TEXT_TOKENS
    picture = PROMPT_TOKENS + text + block_length(*(usual.size or (64, 64)))
    budget = plan_memory(
        folder,
        vision_folder,
        device=device,
        dtype=dtype,
        spread=spread,
        area=usual.image_area,
        quantize=quantize,
        compile=compile,
    )
    budget.check(max_context or picture, max_outputs, spreads=not usual.task.diagonal)
    return replace(budget, picture=min(picture, max_context or picture))


def plan_memory(
    folder: Path,
    vision_folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    spread: bool,
    area: int,
    quantize: str | None = None,
    compile: bool = True,
) -> Budget:
    """What the two folders' headers say a run needs, pictures of `area` pixels included. Reads no weights."""
    config, vision, headers = read_config(folder), VisionConfig.read(vision_folder), read_headers(folder)
    vertical = vertical_blocks(headers)
    with torch.device("meta"):
        tokenizer = IBQ(vision)
    vision_bytes = sum(p.nbytes for p in tokenizer.parameters())
    if device.type == "cuda" and compile:  # the decoder's convolutions in fp16 beside them
        vision_bytes += sum(p.nbytes for p in tokenizer.decoder.parameters()) // 2
    # The decoder's last level holds three full-size fp32 feature maps at a time; the fourth is for what a step holds.
    workspace = 4 * vision.ch * vision.ch_mult[0] * area * torch.float32.itemsize
    return Budget(
        device=str(device) if not spread else f"{torch.cuda.device_count()} GPUs",
        available=available_bytes(device, all_devices=spread),
        weights=_weight_bytes(headers, dtype, quantize, codes=vision.n_embed),
        vision=vision_bytes,
        workspace=workspace + (WORKSPACE if device.type == "cuda" else 0),
        # FlashAR's vertical layers keep keys and values of cells; here, of all tokens.
        per_token=2 * KVCache.bytes_per_token(config, dtype) * (1 + vertical / config.num_hidden_layers),
    )


def _weight_bytes(
    headers: Mapping[str, TensorHeader], dtype: torch.dtype, quantize: str | None, *, codes: int
) -> float:
    """Bytes of the weights on the device, 8-bit ones with their scales. Of FlashAR's heads the `codes` rows of visual
    tokens are kept, of its gates fp32 numbers."""
    small = set(quantizable(headers)) if quantize else set()
    total = 0
    for name, header in headers.items():
        count = math.prod(header.shape)
        if name in small:
            total += count + 4 * header.shape[0]
        elif name in FLASH_HEADS:
            total += codes * header.shape[1] * dtype.itemsize
        else:
            total += count * (4 if name.startswith("hv_gate") else dtype.itemsize)
    return float(total)
