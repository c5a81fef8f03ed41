"""One decode step over the model's own weights: a pure function of tensors, for one token per sequence.

Where two products read the same input, the weights of transformers' modules are merged: queries, keys and values in one
matrix, gate and up in another. The modules' weights then are views of the merged tensors, so nothing is in memory
twice, and prefill and text go on using the modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3ForCausalLM

from emu_cog.ops.interface import DecodeWeights, ImageState, Layer, Ops, Shape, Weight
from emu_cog.request import Sampling


def merge(model: Qwen3ForCausalLM, *, visual: int, vocabulary: int, context: int) -> DecodeWeights:
    """Merge the layers' weights, one layer at a time, and make the modules' weights views of them.

    All layers must be on one device. Peak memory is one layer more than before.
    """
    inner, config = model.model, model.config
    device = inner.embed_tokens.weight.device
    layers = []
    for block in inner.layers:
        attention, mlp = block.self_attn, block.mlp
        layers.append(
            Layer(
                qkv=_merged([attention.q_proj, attention.k_proj, attention.v_proj]),
                o=_weight(attention.o_proj),
                gate_up=_merged([mlp.gate_proj, mlp.up_proj]),
                down=_weight(mlp.down_proj),
                input_norm=block.input_layernorm.weight,
                post_norm=block.post_attention_layernorm.weight,
                q_norm=attention.q_norm.weight,
                k_norm=attention.k_norm.weight,
            )
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()  # or the old tensors, too small for the next merged one, stay allocated unused
    probe = torch.empty(0, dtype=inner.embed_tokens.weight.dtype, device=device)
    rope = torch.stack(inner.rotary_emb(probe, torch.arange(context, device=device)[None]))[:, 0]
    return DecodeWeights(
        embed=inner.embed_tokens.weight,
        layers=tuple(layers),
        norm=inner.norm.weight,
        visual_head=model.lm_head.weight[visual:vocabulary],
        text_head=model.lm_head.weight[:visual],
        visual=visual,
        rope=rope.contiguous(),
        shape=Shape(
            heads=config.num_attention_heads,
            kv_heads=int(config.num_key_value_heads or 0),
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
        ),
    )


def _weight(linear: Any) -> Weight:
    return Weight(linear.weight, getattr(linear, "scale", None))


def _merged(linears: Sequence[Any]) -> Weight:
    """One weight made of several layers' rows, in order; the layers' own become views of it."""
    merged = Weight(
        torch.cat([linear.weight for linear in linears]),
        torch.cat([linear.scale for linear in linears]) if hasattr(linears[0], "scale") else None,
    )
    at = 0
    for linear in linears:
        rows = slice(at, at + linear.weight.shape[0])
        linear.weight = nn.Parameter(merged.data[rows], requires_grad=False)
        if merged.scale is not None:
            linear.scale = merged.scale[rows]
        at = rows.stop
    return merged


def forward(
    ops: Ops, w: DecodeWeights, token: Tensor, position: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> Tensor:
    """Feed (M,) tokens at (M,) positions of the cache's slots; returns the final hidden states (M, hidden)."""
    residual, eps = F.embedding(token, w.embed), w.shape.eps
    x = ops.add_norm(None, residual, w.layers[0].input_norm, eps, w.layers[0].qkv)
    after = [(layer.input_norm, layer.qkv) for layer in w.layers[1:]] + [(w.norm, None)]
    for layer, (norm, next_weight), k, v in zip(w.layers, after, keys, values, strict=True):
        q = ops.rope_store(ops.linear(x, layer.qkv), layer, w.shape, w.rope, position, k, v)
        x = ops.attend(q, k, v, position, layer.o)
        x = ops.add_norm(ops.linear(x, layer.o), residual, layer.post_norm, eps, layer.gate_up)
        x = ops.swiglu(x, layer.gate_up)
        x = ops.add_norm(ops.linear(x, layer.down), residual, norm, eps, next_weight)
    return x


def image_step(
    ops: Ops,
    w: DecodeWeights,
    state: ImageState,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    sampling: Sampling,
) -> None:
    """Feed each image's last token to both its sequences, sample the next one and advance `state`."""
    hidden = forward(ops, w, state.token, state.position, keys, values)
    ops.sample(ops.logits(hidden, w.visual_head), state, w.visual, sampling)
