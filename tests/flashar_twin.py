"""The slow, obvious twin of FlashAR decoding, written from the algorithm alone.

For every diagonal it runs each stream's whole sequence, prompt and cells so far, through plain layers without a cache
and under one explicit mask; cell by cell it then takes what the neighbours give. It shares no code with the package: it
reads the checkpoint's own tensors by their own names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the tensors don't say. `visual` is the id of visual token 0, `start` the layer that the vertical ones begin
    beside."""

    heads: int
    head_dim: int
    eps: float
    theta: float
    start: int
    visual: int


@dataclass
class Drawn:
    """By stream: h and v of the prompt's last token and of every cell, row by row; the gates; and what was drawn."""

    h: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    gate: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    tokens: list[int] = field(default_factory=list)


@torch.no_grad()
def draw(state: State, shape: Shape, prompts: Sequence[Sequence[int]], size: tuple[int, int], guidance: float) -> Drawn:
    """Draw a picture at top-k 1. `prompts` are the conditional one and, with guidance, the unconditional one."""
    rows, columns = size
    codes = [0] * (rows * columns)
    logits = torch.zeros(rows * columns, len(state["horizontal_head.weight"]) - shape.visual)
    out = Drawn(gate=[torch.full(size, torch.nan) for _ in prompts])
    longest = max(map(len, prompts))
    for diagonal in range(rows + columns - 1):
        hidden = [_hidden(state, shape, list(prompt), codes, size, diagonal, longest) for prompt in prompts]
        for cell in (c for c in range(rows * columns) if c // columns + c % columns == diagonal):
            streams = []
            for (h, v), gates in zip(hidden, out.gate, strict=True):
                scores, gate = _cell(state, h, v, cell, columns)
                gates[cell // columns, cell % columns] = gate
                streams.append(scores[shape.visual :])
            guided = streams[0]
            if len(streams) == 2:
                guided = streams[1] + guidance * (streams[0] - streams[1])
            logits[cell], codes[cell] = guided, int(guided.argmax())
    for h, v in (_hidden(state, shape, list(p), codes, size, rows + columns, longest) for p in prompts):
        out.h.append(h)
        out.v.append(v)
    out.logits, out.tokens = logits, codes
    return out


def _cell(state: State, h: Tensor, v: Tensor, cell: int, columns: int) -> tuple[Tensor, float]:
    """The full-vocabulary logits of one cell, and its gate (nan where it has none). h and v hold the prompt first."""
    row, column = divmod(cell, columns)
    horizontal, vertical = state["horizontal_head.weight"], state["vertical_head.weight"]
    if not row and not column:
        gate = torch.sigmoid(state["hv_gate_corner.weight"] @ h[0] + state["hv_gate_corner.bias"])
        return gate * (horizontal @ h[0]) + (1 - gate) * (vertical @ v[0]), float(gate)
    left, above = h[1 + cell - 1], v[1 + cell - columns]
    if not row:
        return horizontal @ left, float("nan")
    if not column:
        return vertical @ above, float("nan")
    inner = torch.nn.functional.silu(state["hv_gate_mlp.0.weight"] @ torch.cat([left, above]))
    gate = torch.sigmoid(state["hv_gate_mlp.2.weight"] @ inner + state["hv_gate_mlp.2.bias"])
    return gate * (horizontal @ left) + (1 - gate) * (vertical @ above), float(gate)


def _hidden(
    state: State, shape: Shape, prompt: list[int], codes: list[int], size: tuple[int, int], diagonal: int, longest: int
) -> tuple[Tensor, Tensor]:
    """h and v (1 + cells, hidden) of the prompt's last token and of the cells; those from `diagonal` on are not drawn
    yet, and no other reads them."""
    rows, columns = size
    order = torch.tensor([r + c for r in range(rows) for c in range(columns)])
    count = len(prompt)
    tokens = torch.tensor(prompt + [shape.visual + code for code in codes])
    positions = torch.tensor([*range(count), *(longest + cell for cell in range(rows * columns))])
    sees = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    sees[:count, :count] = torch.ones(count, count).tril().bool()
    sees[count:, :count] = True
    sees[count:, count:] = order[None, :] <= order[:, None]
    x, entering = state["backbone.embed_tokens.weight"][tokens], torch.empty(0)
    layers = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("backbone.layers."))
    for i in range(layers):
        entering = x if i == shape.start else entering
        x = _layer(state, f"backbone.layers.{i}", shape, x, positions, sees)
    h = _norm(x, state["backbone.norm.weight"], shape.eps)
    y = entering[count:]
    for i in range(1 + max(int(key.split(".")[1]) for key in state if key.startswith("vertical_block."))):
        y = _layer(state, f"vertical_block.{i}", shape, y, positions[count:], sees[count:, count:])
    v = _norm(y, state["vertical_norm.weight"], shape.eps)
    return torch.cat([h[count - 1 : count], h[count:]]), torch.cat([entering[count - 1 : count], v])


def _layer(state: State, key: str, shape: Shape, x: Tensor, positions: Tensor, sees: Tensor) -> Tensor:
    def heads(name: str, norm: str | None) -> Tensor:
        y = (normed @ state[f"{key}.self_attn.{name}.weight"].T).view(len(x), -1, shape.head_dim)
        if norm is not None:
            y = _rotated(_norm(y, state[f"{key}.self_attn.{norm}.weight"], shape.eps), positions, shape)
        y = y.transpose(0, 1)
        return y.repeat_interleave(shape.heads // len(y), dim=0)

    normed = _norm(x, state[f"{key}.input_layernorm.weight"], shape.eps)
    scores = heads("q_proj", "q_norm") @ heads("k_proj", "k_norm").transpose(1, 2) / shape.head_dim**0.5
    mixed = scores.masked_fill(~sees, -torch.inf).softmax(-1) @ heads("v_proj", None)
    x = x + mixed.transpose(0, 1).reshape(len(x), -1) @ state[f"{key}.self_attn.o_proj.weight"].T
    normed = _norm(x, state[f"{key}.post_attention_layernorm.weight"], shape.eps)
    gate, up = (normed @ state[f"{key}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (torch.nn.functional.silu(gate) * up) @ state[f"{key}.mlp.down_proj.weight"].T


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def _rotated(x: Tensor, positions: Tensor, shape: Shape) -> Tensor:
    """(T, heads, D) turned by each token's position: channel i with channel i + D/2."""
    half = shape.head_dim // 2
    angle = positions[:, None, None] / shape.theta ** (torch.arange(half) * 2 / shape.head_dim)
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], -1)
