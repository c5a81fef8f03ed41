"""8-bit weights: each linear layer of the decoder in fp8 (e4m3) or int8, with one fp32 scale per weight row.

Activations, norms, embeddings and the head keep the model's dtype: the head decides between 131072 codes, and its
visual half is 2% of what a step reads. The scale is applied after the sum, so that a product is exact in the stored
weights. This is the arithmetic of torchao's weight-only formats; torchao itself is not used: a release of it serves two
or three releases of torch (pytorch/ao issue 2919), this package 2.8 to 2.13, and the step's own kernels read the bare
tensors.

In FlashAR models with fp8 weights the products' inputs are fp8 as well (`Weight.narrow`), each row with a scale of its
own, and tensor cores keep fewer bits than fp32 of their sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from emu_cog.errors import InputError

FORMATS: dict[str, tuple[torch.dtype, float]] = {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}
"""Name to stored dtype and the largest number it holds."""
SLICE = 2**26
"""Weights converted to fp32 at a time: 256 MiB."""


def check_format(name: str | None, device: torch.device) -> None:
    """InputError where `name` is no format, or one that `device` can't convert."""
    if name is None:
        return
    if name not in FORMATS:
        raise InputError(f"EMU_QUANTIZE={name!r} is not known, accepted are {', '.join(FORMATS)}")
    if name == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise InputError(
            f"EMU_QUANTIZE=fp8 needs a GPU of compute capability 8.9 or more ({device} has less): use int8"
        )


def quantized(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(N, K) weight to its 8-bit form and (N,) fp32 scales: data * scale is within half a step of it."""
    kind, largest = FORMATS[name]
    data = torch.empty_like(weight, dtype=kind)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    rows = max(1, SLICE // weight.shape[1])
    for at in range(0, weight.shape[0], rows):
        part = weight[at : at + rows].float()
        step = part.abs().amax(dim=1).clamp_(min=torch.finfo(torch.float32).tiny * largest) / largest
        part = part / step[:, None]  # not in place: an fp32 weight is its own fp32 form
        data[at : at + rows] = part.round_().to(kind) if kind == torch.int8 else part.clamp_(-largest, largest).to(kind)
        scale[at : at + rows] = step
    return data, scale


def quantizable(names: Iterable[str]) -> Iterator[str]:
    """The keys of a checkpoint that get 8-bit weights: every linear layer inside the decoder's layers, and inside
    FlashAR's vertical ones."""
    inside = (".layers.", "vertical_block.")
    return (name for name in names if name.endswith("_proj.weight") and any(part in name for part in inside))
