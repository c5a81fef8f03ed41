"""The language model: transformers' Qwen3 over an Emu3.5 folder, a preallocated cache, and a head in two halves.

Emu3.5 is Qwen3 layer by layer and key by key; only the config's name and defaults differ.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from emu_cog.errors import CheckpointError
from emu_cog.log import log
from emu_cog.model.kv_cache import CacheView, KVCache
from emu_cog.ops import cpu_linear, head
from emu_cog.prompt.tokens import TokenIds


def _sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention of (N, heads, T, D) queries over (N, kv_heads, L, D) keys under a boolean (N, 1, T, L) mask."""
    n, heads, length, dim = query.shape
    groups = heads // key.shape[1]
    if length == 1:
        # One query: fold the heads that share keys into the query axis, so that no key is copied or read twice.
        folded = query.view(n, key.shape[1], groups, dim)
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
        return out.reshape(n, 1, heads, dim), None
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2), None


def _flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, view: CacheView, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """The same through flash-attn's kv-cache kernel, which reads only what is filled.

    `view` takes the mask's place: the kernel needs each sequence's length, (N,) int32, after this step's tokens.
    """
    from flash_attn import flash_attn_with_kvcache

    lengths = view.positions[:, -1].to(query.device, torch.int32) + 1
    out = flash_attn_with_kvcache(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        cache_seqlens=lengths,
        softmax_scale=scaling,
        causal=True,
    )
    return out, None


def choose_attention(device: torch.device, dtype: torch.dtype) -> str:
    """ "emu_flash" on CUDA in half precision where flash-attn is importable, else "emu_sdpa"; the log says which."""
    functions: dict[str, Callable[..., Any]] = {"emu_sdpa": _sdpa, "emu_flash": _flash}
    for name, function in functions.items():
        ALL_ATTENTION_FUNCTIONS.register(name, function)
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        if importlib.util.find_spec("flash_attn") is not None:
            return "emu_flash"
        log.info("flash-attn is not installed: attention goes through PyTorch's SDPA")
    return "emu_sdpa"


class LanguageModel:
    """The decoder as the engine sees it: tokens at positions in, hidden states and half-vocabulary logits out."""

    def __init__(self, model: Qwen3ForCausalLM, ids: TokenIds) -> None:
        if model.config.vocab_size < ids.vocab_size:
            raise CheckpointError(
                f"the model knows {model.config.vocab_size} tokens but its tokenizer files name {ids.vocab_size}"
            )
        self.model, self.ids = model, ids
        self.config: Qwen3Config = model.config
        self.context = int(model.config.max_position_embeddings)
        """Tokens a sequence may hold; the caller may lower it to what memory allows."""
        if model.lm_head.weight.device.type == "cpu":
            cpu_linear.replace_linears(model)
        weight = model.lm_head.weight
        self.device, self.dtype = model.model.embed_tokens.weight.device, weight.dtype
        # The two halves of the head, as views: text never contains a visual token, an image nothing else.
        self._text_head = weight[: ids.visual]
        self._visual_head = weight[ids.visual : ids.vocab_size]

    def new_cache(self, *, rows: int, capacity: int) -> KVCache:
        devices = [layer.self_attn.k_proj.weight.device for layer in self.model.model.layers]
        return KVCache(self.config, rows=rows, capacity=capacity, dtype=self.dtype, devices=devices)

    def forward(self, tokens: Tensor, start: Tensor, cache: KVCache, *, rows: slice, filled: int) -> Tensor:
        """Feed (N, T) int64 `tokens` to the slots `rows` of `cache` at positions start..start+T-1, `start` (N,) int64.

        `filled` is at least every position fed plus one. Returns the final hidden states (N, T, hidden).
        """
        positions = start[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        view = CacheView(cache, rows, positions, filled)
        if self.config._attn_implementation == "emu_flash":
            mask: Any = view
        else:
            # A token reads what lies at or before its own position: causal, and nothing that is not written yet.
            mask = torch.arange(filled, device=tokens.device)[None, None, None, :] <= positions[:, None, :, None]
        out = self.model.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask={"full_attention": mask},
            past_key_values=view,
            use_cache=True,
        )
        return out.last_hidden_state

    def text_logits(self, hidden: Tensor) -> Tensor:
        """(N, hidden) to (N, visual) fp32 logits over everything but the visual tokens."""
        return self._logits(hidden, self._text_head)

    def visual_logits(self, hidden: Tensor) -> Tensor:
        """(N, hidden) to (N, visual_count) fp32 logits over the visual tokens; entry i is code i."""
        return self._logits(hidden, self._visual_head)

    def _logits(self, hidden: Tensor, half: Tensor) -> Tensor:
        """On the model's first device; nothing is moved unless the layers are spread over several."""
        return head.logits(hidden.to(half.device), half).to(self.device)
