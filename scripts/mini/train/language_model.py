"""Qwen3 for training: same arithmetic as in transformers, with a layout that is fast on one device.

Each kind of weight is one tensor over all layers, so that the optimizer handles few large tensors. All operations
except attention take a flat list of tokens of constant length, so each is compiled only once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """Model sizes, named as in config.json."""

    vocab_size: int = 3008
    hidden_size: int = 384
    intermediate_size: int = 960
    num_hidden_layers: int = 8
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0

    @classmethod
    def read(cls, folder: Path) -> Shape:
        """The sizes in `folder`'s config.json."""
        sizes = json.loads((folder / "config.json").read_text())
        return cls(**{name: sizes[name] for name in cls.__dataclass_fields__})


NAMES = {
    "input_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "o": "self_attn.o_proj.weight",
    "post_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
"""Our stacked weights and their per-layer names in the released format."""
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding; the two halves of a head form the pairs."""
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype)


def before_attention(
    x: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, hidden) to (N, heads, head_dim) queries, keys and values, the latter two repeated for grouped-query
    attention."""
    h = _norm(x, norm)
    dim = q_norm.shape[0]
    query, key, value = (F.linear(h, w.to(h.dtype)).unflatten(-1, (-1, dim)) for w in (q, k, v))
    query, key = _rotate(_norm(query, q_norm), cos, sin), _rotate(_norm(key, k_norm), cos, sin)
    groups = query.shape[1] // key.shape[1]
    return query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)


def after_attention(x: Tensor, out: Tensor, o: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The rest of the layer: (N, hidden) residual and (N, hidden) attention output to (N, hidden)."""
    x = x + F.linear(out, o.to(out.dtype))
    h = _norm(x, norm)
    inner = F.silu(F.linear(h, gate.to(h.dtype))) * F.linear(h, up.to(h.dtype))
    return x + F.linear(inner, down.to(h.dtype))


def losses(x: Tensor, norm: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """(N,) cross entropies."""
    logits = F.linear(_norm(x, norm), head.to(x.dtype)).float()
    return F.cross_entropy(logits, targets, reduction="none")


class LanguageModel(nn.Module):
    """Weights in fp32; computes in `dtype`."""

    def __init__(self, shape: Shape, *, dtype: torch.dtype, compiled: bool = False) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        s, deep = shape, shape.num_hidden_layers
        wide, narrow = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
        sizes = {
            "q": (wide, s.hidden_size),
            "k": (narrow, s.hidden_size),
            "v": (narrow, s.hidden_size),
            "o": (s.hidden_size, wide),
            "gate": (s.intermediate_size, s.hidden_size),
            "up": (s.intermediate_size, s.hidden_size),
            "down": (s.hidden_size, s.intermediate_size),
        }
        self.stack = nn.ParameterDict(
            {name: nn.Parameter(0.02 * torch.randn(deep, *size)) for name, size in sizes.items()}
        )
        for name in ("o", "down"):  # layers start as the identity
            nn.init.zeros_(self.stack[name])
        for name in ("input_norm", "post_norm"):
            self.stack[name] = nn.Parameter(torch.ones(deep, s.hidden_size))
        for name in ("q_norm", "k_norm"):
            self.stack[name] = nn.Parameter(torch.ones(deep, s.head_dim))
        self.embed = nn.Parameter(0.02 * torch.randn(s.vocab_size, s.hidden_size))
        self.norm = nn.Parameter(torch.ones(s.hidden_size))
        self.head = nn.Parameter(0.005 * torch.randn(s.vocab_size, s.hidden_size))
        frequencies = s.rope_theta ** (-torch.arange(0, s.head_dim, 2).float() / s.head_dim)
        angles = torch.arange(s.max_position_embeddings).float()[:, None] * frequencies
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self._before, self._after, self._losses = before_attention, after_attention, losses
        if compiled:
            self._before, self._after, self._losses = map(torch.compile, (before_attention, after_attention, losses))

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Context in which compiled functions run eagerly; without gradients this avoids a second compilation."""
        compiled = self._before, self._after, self._losses
        self._before, self._after, self._losses = before_attention, after_attention, losses
        try:
            yield
        finally:
            self._before, self._after, self._losses = compiled

    def hidden(self, tokens: Tensor) -> Tensor:
        """(B, T) ids to (B * T, hidden), before the final norm."""
        count, length = tokens.shape
        x = F.embedding(tokens.reshape(-1), self.embed).to(self.dtype)
        cos, sin = (t[:length].repeat(count, 1)[:, None] for t in (self.cos, self.sin))
        layers = zip(*(self.stack[name].unbind(0) for name in NAMES), strict=True)
        for weights in layers:
            w = dict(zip(NAMES, weights, strict=True))
            heads = self._before(x, w["input_norm"], w["q"], w["k"], w["v"], w["q_norm"], w["k_norm"], cos, sin)
            q, k, v = (h.view(count, length, *h.shape[1:]).transpose(1, 2) for h in heads)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            flat = out.transpose(1, 2).reshape(count * length, -1)
            x = self._after(x, flat, w["o"], w["post_norm"], w["gate"], w["up"], w["down"])
        return x

    def logits(self, hidden: Tensor, *, first: int) -> Tensor:
        """(N, hidden) before the final norm to fp32 logits of tokens `first` and up."""
        return F.linear(_norm(hidden, self.norm), self.head[first:].to(hidden.dtype)).float()

    def loss(self, tokens: Tensor, learn: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy of the tokens marked in (B, T) `learn`, and the (B, T) per-token losses."""
        targets = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1).reshape(-1)
        marked = torch.cat([learn[:, 1:], torch.zeros_like(learn[:, :1])], dim=1).reshape(-1).float()
        each = self._losses(self.hidden(tokens), self.norm, self.head, targets) * marked
        return each.sum() / marked.sum().clamp(min=1), each.view(tokens.shape)

    def example(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Arguments of `loss` of the given shape, to set a step up with."""
        device = self.embed.device
        return torch.ones(count, length, dtype=torch.long, device=device), torch.ones(
            count, length, dtype=torch.uint8, device=device
        )

    def released_state(self) -> dict[str, Tensor]:
        """bf16 weights under the released format's names."""
        state = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.norm, "lm_head.weight": self.head}
        for name, own in NAMES.items():
            for i, weight in enumerate(self.stack[name].unbind(0)):
                state[f"model.layers.{i}.{own}"] = weight
        return {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in state.items()}

    def load_released(self, state: dict[str, Tensor]) -> None:
        """The inverse of `released_state`."""
        with torch.no_grad():
            self.embed.copy_(state["model.embed_tokens.weight"])
            self.norm.copy_(state["model.norm.weight"])
            self.head.copy_(state["lm_head.weight"])
            for name, own in NAMES.items():
                for i in range(self.shape.num_hidden_layers):
                    self.stack[name][i].copy_(state[f"model.layers.{i}.{own}"])

    def save(self, folder: Path, *, shard_bytes: int = 14 << 20) -> None:
        """Write config.json, safetensors shards and their index in the released layout."""
        folder.mkdir(parents=True, exist_ok=True)
        s = self.shape
        config = {
            "architectures": ["Emu3ForCausalLM"],
            "model_type": "Emu3",
            **{name: getattr(s, name) for name in s.__dataclass_fields__},
            "rms_norm_eps": EPS,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        shards: list[dict[str, Tensor]] = [{}]
        for name, value in self.released_state().items():
            if sum(v.nbytes for v in shards[-1].values()) + value.nbytes > shard_bytes:
                shards.append({})
            shards[-1][name] = value
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(v.nbytes for shard in shards for v in shard.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        for name, shard in zip(names, shards, strict=True):
            save_file(shard, folder / name, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
