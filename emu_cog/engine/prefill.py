"""Prompts into the cache, chunk by chunk: both streams of a request together, equal prompts only once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emu_cog.engine.sequence import EngineRequest
from emu_cog.model.kv_cache import KVCache
from emu_cog.model.qwen3 import LanguageModel

PREFILL_CHUNK = 1024
"""Tokens per stream and pass: enough to keep a GPU's compute units busy, few enough to keep activations small."""


def prefill(lm: LanguageModel, cache: KVCache, requests: Sequence[EngineRequest]) -> Tensor:
    """Fill every request's two cache slots. Equal prompts are computed once and copied. Returns (requests, hidden)."""
    done: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    hidden: list[Tensor] = []
    for i, request in enumerate(requests):
        key = (request.conditional, request.unconditional)
        if key in done:
            source = done[key]
            for row, stream in enumerate(key):
                cache.copy_row(2 * source + row, 2 * i + row, len(stream))
            hidden.append(hidden[source])
        else:
            done[key] = i
            hidden.append(_prefill_pair(lm, cache, i, request))
    return torch.stack(hidden)


def _prefill_pair(lm: LanguageModel, cache: KVCache, i: int, request: EngineRequest) -> Tensor:
    """Both prompts of request `i`, one pass per chunk, the shorter prompt padded at its end. Returns (hidden,).

    The padding's keys lie beyond the slot's length, where nothing reads before real tokens overwrite them.
    """
    streams = (request.conditional, request.unconditional)
    last = torch.empty(0)
    for begin in range(0, max(map(len, streams)), PREFILL_CHUNK):
        end = min(begin + PREFILL_CHUNK, max(map(len, streams)))
        both = all(len(stream) > begin for stream in streams)
        used = streams if both else streams[: 1 if len(streams[0]) > begin else 2]
        rows = slice(2 * i, 2 * i + len(used))
        padded = [[*stream[begin:end], *[lm.ids.pad] * (end - max(begin, len(stream)))] for stream in used]
        tokens = torch.tensor([row[: end - begin] for row in padded], device=lm.device)
        start = torch.full((len(used),), begin, device=lm.device)
        hidden = lm.forward(tokens, start, cache, rows=rows, filled=end)
        if begin < len(streams[0]) <= end:
            last = hidden[0, len(streams[0]) - 1 - begin]
    return last
