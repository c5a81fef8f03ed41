"""Keys and values of all streams, in pages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3Config

from emu_cog.ops.interface import PAGE


class KVCache:
    """`pages` pages of PAGE tokens each, allocated once; page 0 belongs to nobody: padding is written there.

    Two tensors per layer of shape (kv_heads, pages, PAGE, head_dim). A stream's pages are those of its block table, in
    order; how much of them is valid is the stream's length, the rest is garbage and never attended to. Pages may be
    shared: each counts its users.
    """

    def __init__(self, config: Qwen3Config, *, pages: int, dtype: torch.dtype, devices: Sequence[torch.device]) -> None:
        shape = (int(config.num_key_value_heads or 0), pages, PAGE, config.head_dim)
        self.keys = [_zeros(shape, dtype, device) for device in devices]
        self.values = [_zeros(shape, dtype, device) for device in devices]
        self.pages = pages
        self._users = [0] * pages
        self._free = list(range(pages - 1, 0, -1))

    @staticmethod
    def bytes_per_token(config: Qwen3Config, dtype: torch.dtype) -> int:
        """Bytes of one token of one stream over all layers."""
        return 2 * config.num_hidden_layers * int(config.num_key_value_heads or 0) * config.head_dim * dtype.itemsize

    @property
    def free(self) -> int:
        """Pages that nobody uses."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free pages; the caller has made sure that there are as many."""
        assert count <= len(self._free)
        taken = [self._free.pop() for _ in range(count)]
        self.share(taken)
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Count one user more of each page."""
        for page in pages:
            self._users[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Count one user fewer of each page; without users it is free."""
        for page in pages:
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free.append(page)

    @torch.inference_mode()
    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole pages: for streams that go on from a shared page in their own ways."""
        for buffer in (*self.keys, *self.values):
            for source, target in zip(sources, targets, strict=True):  # not lists: their copy would wait for the device
                buffer[:, target] = buffer[:, source]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, so that what is masked is a number; on a CPU NumPy's, which take no memory before they are written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
