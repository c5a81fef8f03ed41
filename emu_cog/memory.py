"""What a model needs and what a device has, computed before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from emu_cog.config import InputError, log

GIB = 2**30
WORKSPACE = 1.5 * GIB
"""Beside weights and caches: the CUDA context, logits, one chunk of prefill."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes. `per_token` is one token of one output: its conditional and its unconditional stream."""

    device: str
    available: float
    weights: float
    vision: float
    workspace: float
    per_token: float

    @property
    def cache(self) -> float:
        """What is left for keys and values."""
        return self.available - self.weights - self.vision - self.workspace

    def tokens(self, outputs: int = 1) -> int:
        """How many tokens of context `outputs` outputs may have."""
        return max(int(self.cache // (self.per_token * outputs)), 0)

    def outputs(self, tokens: int) -> int:
        """How many outputs of `tokens` tokens fit side by side."""
        return max(int(self.cache // (self.per_token * tokens)), 0)

    def table(self, tokens: int, outputs: int) -> str:
        """One line of the sum for caches of `outputs` outputs of `tokens` tokens."""
        cache = self.per_token * tokens * outputs
        needed = self.weights + self.vision + self.workspace + cache
        return (
            f"weights {self.weights / GIB:.2f} GiB, vision tokenizer {self.vision / GIB:.2f}, "
            f"workspace {self.workspace / GIB:.2f}, caches {cache / GIB:.2f} ({outputs} output(s) of {tokens} tokens): "
            f"{needed / GIB:.2f} GiB of {self.available / GIB:.2f} on {self.device}"
        )

    def check(self, tokens: int, outputs: int) -> None:
        """Tell the sum in the log; InputError with the numbers where it does not fit."""
        table = self.table(tokens, outputs)
        if self.outputs(tokens) < outputs:
            raise InputError(
                f"not enough memory: {table}. Use 8-bit weights (EMU_QUANTIZE=fp8 or int8), several GPUs "
                "(EMU_DEVICE_MAP=auto), a smaller EMU_MAX_CONTEXT or EMU_MAX_OUTPUTS, or a larger GPU"
            )
        log.info("memory: %s", table)


def available_bytes(device: torch.device, *, all_devices: bool = False) -> float:
    """Free bytes of `device`; of all GPUs together with `all_devices`."""
    if device.type != "cuda":
        return float(psutil.virtual_memory().available)
    devices = range(torch.cuda.device_count()) if all_devices else [device]
    return float(sum(torch.cuda.mem_get_info(d)[0] for d in devices))
