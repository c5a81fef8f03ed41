"""Keys and values of all sequences: a preallocated cache, and one forward pass's view of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config


class KVCache:
    """Keys and values of `rows` sequences, `capacity` tokens each, allocated once.

    Two tensors per layer of shape (rows, capacity, kv_heads, head_dim), as flash-attn's kv-cache kernel reads them; in
    memory the tokens of a head are contiguous, so that reading one head is one sequential read. The caller knows how
    much of each slot is valid; the rest is garbage and never attended to.
    """

    def __init__(
        self, config: Qwen3Config, *, rows: int, capacity: int, dtype: torch.dtype, devices: list[torch.device]
    ) -> None:
        shape = (rows, int(config.num_key_value_heads or 0), capacity, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2) for device in devices]
        self.values = [torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2) for device in devices]
        self.rows, self.capacity = rows, capacity
        self.version = object()
        """A new object whenever the buffers are replaced: captured graphs hold their addresses."""

    @staticmethod
    def bytes_per_token(config: Qwen3Config, dtype: torch.dtype) -> int:
        """Bytes of one token of one sequence over all layers."""
        return 2 * config.num_hidden_layers * int(config.num_key_value_heads or 0) * config.head_dim * dtype.itemsize

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens per slot, contents kept. If it fails half way, no capture stays valid."""
        self.version = object()
        for buffers in (self.keys, self.values):
            for i, old in enumerate(buffers):
                new = old.new_zeros((old.shape[0], old.shape[2], capacity, old.shape[3])).transpose(1, 2)
                new[:, : self.capacity] = old
                buffers[i] = new
        self.capacity = capacity

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of slot `source` to slot `target`: a shared prefill."""
        for buffer in (*self.keys, *self.values):
            buffer[target, :length] = buffer[source, :length]


@dataclass(frozen=True)
class CacheView:
    """One forward pass's view of the cache: which slots, which positions are written, how much is read.

    `rows` selects the cache's slots; `positions` (N, T) int64; `filled` bounds every position from above, so that
    attention reads no further. transformers' attention layers call `update` on it as on any cache.
    """

    cache: KVCache
    rows: slice
    positions: Tensor
    filled: int

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write (N, kv_heads, T, head_dim) keys and values at `positions`; returns all up to `filled`."""
        k, v = self.cache.keys[layer][self.rows], self.cache.values[layer][self.rows]
        positions = self.positions.to(keys.device)
        row = torch.arange(k.shape[0], device=k.device)[:, None]
        k[row, positions] = keys.transpose(1, 2)
        v[row, positions] = values.transpose(1, 2)
        return k[:, : self.filled].transpose(1, 2), v[:, : self.filled].transpose(1, 2)
