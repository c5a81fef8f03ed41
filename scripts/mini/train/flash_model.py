"""FlashAR for training: the decoder under the mask of diagonals, the vertical branch, the gate and the fused loss.

Recipe: lxazjk/Emu3.5-FlashAR at 2d4a74e, flashar/model/modeling_emu_flashar.py. All cells of a picture are predicted in
one pass (teacher forcing), each from its left neighbour's h and its upper neighbour's v, exactly as
emu_cog/model/flashar.py generates them.
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
from torch.nn.attention import SDPBackend, sdpa_kernel

from emu_cog.model.headers import FLASH_HEADS, U0_TYPE
from scripts.mini.train.language_model import EPS, NAMES, LanguageModel, Shape, _norm

VERTICAL_LOSS = 0.05
"""Weight of the vertical head's own loss: `aux_loss_v_weight` in their configs/train_flashar.default.json."""
KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
_CELLS, _PADDING = 1 << 20, 1 << 21
"""Above all prompt positions: where the numbers of diagonals begin, and padding."""
GATES = (
    "hv_gate_mlp.0.weight",
    "hv_gate_mlp.2.weight",
    "hv_gate_mlp.2.bias",
    "hv_gate_corner.weight",
    "hv_gate_corner.bias",
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Of (B, T) tokens: prompt, cells row by row, padding. All (B, T)."""

    order: Tensor
    """A token attends to all tokens whose `order` is at most its own: prompts are causal, diagonals are open."""
    cell: Tensor
    """Whether it is a cell."""
    row: Tensor
    column: Tensor
    position: Tensor
    """RoPE position: of a cell, the longer stream's prompt length + row * columns + column."""
    above: Tensor
    """How many tokens before it is its upper neighbour; of the corner the prompt's last token, 1."""

    @classmethod
    def of(cls, grid: Tensor, length: int) -> Layout:
        """`grid`: (B, 4), see `sequences.flash_sequence`."""
        prompt, longest, rows, columns = grid.long()[:, :, None].unbind(1)
        tokens = torch.arange(length, device=grid.device)[None]
        at = tokens - prompt
        cell = (at >= 0) & (at < rows * columns)
        inside = torch.where(cell, at, 0)
        row, column = inside // columns, inside % columns
        order = torch.where(at < 0, tokens, torch.where(cell, _CELLS + row + column, _PADDING))
        return cls(
            order=order,
            cell=cell,
            row=row,
            column=column,
            position=torch.where(cell, longest + inside, tokens),
            above=torch.where(cell & (row > 0), columns, 1),
        )

    def masks(self) -> tuple[Tensor, Tensor]:
        """What the decoder's and the vertical layers' queries see, (B, 1, T, T) each. Cells see no prompt in the
        latter; what other tokens see there is never used."""
        seen = self.order[:, :, None] >= self.order[:, None, :]
        image = seen & (self.cell[:, None, :] | ~self.cell[:, :, None])
        return seen[:, None], image[:, None]


def predict(
    x: Tensor, y: Tensor, entering: Tensor, norms: tuple[Tensor, Tensor], gates: tuple[Tensor, ...],
    heads: tuple[Tensor, Tensor], cell: Tensor, row: Tensor, column: Tensor, above: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(N, visual tokens) logits, fused and the vertical head's alone; they are right where `cell` (N,) is.

    x, y, entering: (N, hidden) after the decoder's and the vertical layers, without their norms, and what entered the
    layer where the latter begin.
    """
    h = _norm(x, norms[0])
    v = torch.where(cell[:, None], _norm(y, norms[1]), entering)
    at = torch.arange(len(x), device=x.device)
    h, v = h[(at - 1).clamp(min=0)], v[(at - above).clamp(min=0)]
    pair_in, pair_out, pair_bias, corner, corner_bias = gates
    pair = torch.cat([h, v], dim=-1).float()
    gate = torch.sigmoid(F.linear(F.silu(F.linear(pair, pair_in)), pair_out, pair_bias))
    leftmost, top = (column == 0)[:, None], (row == 0)[:, None]
    gate = gate.masked_fill(leftmost, 0.0).masked_fill(top, 1.0)
    gate = torch.where(leftmost & top, torch.sigmoid(F.linear(h.float(), corner, corner_bias)), gate)
    horizontal, vertical = F.linear(h, heads[0].to(h.dtype)), F.linear(v, heads[1].to(v.dtype))
    return gate * horizontal + (1 - gate) * vertical, vertical.float()


def fused_losses(targets: Tensor, *inputs: object) -> tuple[Tensor, Tensor]:
    """(N,) cross entropies of the logits of `predict`."""
    fused, vertical = predict(*inputs)  # type: ignore[arg-type]
    return (
        F.cross_entropy(fused.float(), targets, reduction="none"),
        F.cross_entropy(vertical, targets, reduction="none"),
    )


class FlashModel(nn.Module):
    """Weights in fp32; computes in `dtype`. `vertical` layers read what enters the decoder's layer `start`."""

    def __init__(self, shape: Shape, *, visual: int, vertical: int, dtype: torch.dtype, compiled: bool = False) -> None:
        """`visual`: the id of visual token 0."""
        super().__init__()
        if not 1 <= vertical <= shape.num_hidden_layers:
            raise ValueError(
                f"{vertical} vertical layers for {shape.num_hidden_layers} layers: at least 1, at most all"
            )
        self.shape, self.visual, self.dtype = shape, visual, dtype
        self.start = shape.num_hidden_layers - vertical
        self.decoder = LanguageModel(shape, dtype=dtype, compiled=compiled)
        self.decoder.head.requires_grad_(False)  # only its text rows are left, for the export
        hidden, gate = shape.hidden_size, max(64, shape.hidden_size // 8)
        self.stack = nn.ParameterDict(
            {name: nn.Parameter(self.decoder.stack[name].detach()[self.start :].clone()) for name in NAMES}
        )
        self.norm = nn.Parameter(torch.ones(hidden))
        self.heads = nn.ParameterList([nn.Parameter(self.decoder.head.detach()[visual:].clone()) for _ in FLASH_HEADS])
        # Gates begin at one half, as theirs do.
        self.gates = nn.ParameterList(
            [
                nn.Linear(2 * hidden, gate).weight.detach(),
                torch.zeros(1, gate),
                torch.zeros(1),
                torch.zeros(1, hidden),
                torch.zeros(1),
            ]
        )
        self.neurons: list[Tensor] | None = None
        """While it is a list: every decoder layer's mean squared neurons are appended, (intermediate,) each."""
        self._losses = torch.compile(fused_losses) if compiled else fused_losses

    @property
    def embed(self) -> Tensor:
        return self.decoder.embed

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """As in LanguageModel."""
        compiled, self._losses = self._losses, fused_losses
        try:
            with self.decoder.uncompiled():
                yield
        finally:
            self._losses = compiled

    # -- 1. forward ------------------------------------------------------------------------------------------

    def _layer(self, w: dict[str, Tensor], x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B * T, hidden) through one layer."""
        count, length = mask.shape[0], mask.shape[-1]
        heads = self.decoder._before(x, w["input_norm"], w["q"], w["k"], w["v"], w["q_norm"], w["k_norm"], cos, sin)
        q, k, v = (h.view(count, length, *h.shape[1:]).transpose(1, 2) for h in heads)
        with sdpa_kernel(KERNELS):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        flat = out.transpose(1, 2).reshape(count * length, -1)
        if self.neurons is not None:
            h = _norm(x + F.linear(flat, w["o"].to(flat.dtype)), w["post_norm"])
            inner = F.silu(F.linear(h, w["gate"].to(h.dtype))) * F.linear(h, w["up"].to(h.dtype))
            self.neurons.append(inner.float().square().mean(0))
        after: Tensor = self.decoder._after(x, flat, w["o"], w["post_norm"], w["gate"], w["up"], w["down"])
        return after

    def _inputs(self, tokens: Tensor, layout: Layout) -> tuple[object, ...]:
        """The arguments of `predict`."""
        seen, image = layout.masks()
        cos, sin = (table[layout.position.flatten()][:, None] for table in (self.decoder.cos, self.decoder.sin))
        x = F.embedding(tokens.reshape(-1), self.decoder.embed).to(self.dtype)
        entering = x
        for i, w in enumerate(_layers(self.decoder.stack)):
            entering = x if i == self.start else entering
            x = self._layer(w, x, seen, cos, sin)
        y, neurons, self.neurons = entering, self.neurons, None
        for w in _layers(self.stack):
            y = self._layer(w, y, image, cos, sin)
        self.neurons = neurons
        places = (layout.cell, layout.row, layout.column, layout.above)
        return (
            x,
            y,
            entering,
            (self.decoder.norm, self.norm),
            tuple(self.gates),
            tuple(self.heads),
            *(place.flatten() for place in places),
        )

    def logits(self, tokens: Tensor, grid: Tensor) -> Tensor:
        """(B, T, visual tokens) fp32, right at the cells, of (B, T) ids and (B, 4) grids."""
        fused, _ = predict(*self._inputs(tokens, Layout.of(grid, tokens.shape[1])))  # type: ignore[arg-type]
        return fused.float().view(*tokens.shape, -1)

    def loss(self, tokens: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """The training loss, and the (B, T) fused cross entropies of cells, zero elsewhere."""
        layout = Layout.of(grid, tokens.shape[1])
        targets = (tokens.reshape(-1) - self.visual).clamp(min=0)
        fused, vertical = self._losses(targets, *self._inputs(tokens, layout))
        cells, lower = layout.cell.flatten().float(), (layout.cell & (layout.row > 0)).flatten().float()
        fused = fused * cells
        loss = fused.sum() / cells.sum().clamp(min=1)
        loss = loss + VERTICAL_LOSS * (vertical * lower).sum() / lower.sum().clamp(min=1)
        return loss, fused.view(tokens.shape)

    def example(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Arguments of `loss` of the given shape, to set a step up with."""
        device = self.embed.device
        tokens = torch.full((count, length), self.visual, dtype=torch.long, device=device)
        return tokens, torch.tensor([[8, 8, 4, 4]] * count, dtype=torch.int16, device=device)

    # -- 2. weights ------------------------------------------------------------------------------------------

    def load_decoder(self, state: dict[str, Tensor]) -> None:
        """Begin with a plain model's weights, in the released format: the vertical layers are copies of the last ones,
        both heads of lm_head."""
        self.decoder.load_released(state)
        with torch.no_grad():
            for name in NAMES:
                self.stack[name].copy_(self.decoder.stack[name][self.start :])
            for head in self.heads:
                head.copy_(self.decoder.head[self.visual :])

    @torch.no_grad()
    def narrowed(self, inner: int, tokens: Tensor, grid: Tensor) -> dict[str, Tensor]:
        """The decoder's released weights with `inner` neurons a layer: those that contribute most to its output on the
        given sequences."""
        self.neurons = []
        self._inputs(tokens, Layout.of(grid, tokens.shape[1]))
        neurons, self.neurons = self.neurons, None
        state = self.decoder.released_state()
        for i, square in enumerate(neurons):
            gate, up, down = (f"model.layers.{i}.{NAMES[name]}" for name in ("gate", "up", "down"))
            weight = square * self.decoder.stack["down"][i].square().sum(0)
            keep = weight.topk(inner).indices.sort().values.cpu()
            state |= {gate: state[gate][keep], up: state[up][keep], down: state[down][:, keep]}
        return state

    def flash_state(self) -> dict[str, Tensor]:
        """bf16 weights under FlashAR's names."""
        plain = self.decoder.released_state()
        text = plain.pop("lm_head.weight")[: self.visual]
        state = {"backbone." + name.removeprefix("model."): value for name, value in plain.items()}
        own: dict[str, Tensor] = {"vertical_norm.weight": self.norm, **dict(zip(GATES, self.gates, strict=True))}
        own |= {
            name: torch.cat([text.to(head), head.detach()]) for name, head in zip(FLASH_HEADS, self.heads, strict=True)
        }
        for name, theirs in NAMES.items():
            for i, weight in enumerate(self.stack[name].unbind(0)):
                own[f"vertical_block.{i}.{theirs}"] = weight
        return state | {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in own.items()}

    def load_flash(self, state: dict[str, Tensor]) -> None:
        """The inverse of `flash_state`."""
        plain = {"model." + k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
        self.decoder.load_released(plain | {"lm_head.weight": state[FLASH_HEADS[0]]})
        with torch.no_grad():
            self.norm.copy_(state["vertical_norm.weight"])
            for own, name in zip((*self.gates, *self.heads), (*GATES, *FLASH_HEADS), strict=True):
                own.copy_(state[name][self.visual :] if name in FLASH_HEADS else state[name])
            for name, theirs in NAMES.items():
                for i, weight in enumerate(self.stack[name].unbind(0)):
                    weight.copy_(state[f"vertical_block.{i}.{theirs}"])

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors as Xiaomi-Robotics-U0-FlashAR has them."""
        folder.mkdir(parents=True, exist_ok=True)
        s = self.shape
        config = {
            "architectures": ["UNISForCausalLM"],
            "model_type": U0_TYPE,
            **{name: getattr(s, name) for name in s.__dataclass_fields__},
            "rms_norm_eps": EPS,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vertical_layers": s.num_hidden_layers - self.start,
            "vertical_start_layer": self.start,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(self.flash_state(), folder / "model.safetensors", metadata={"format": "pt"})


def begin(model: FlashModel, state: dict[str, Tensor], shape: Shape, sample: tuple[Tensor, Tensor]) -> None:
    """Let `model` begin with a plain model's released weights of `shape`; where it has fewer neurons a layer, those are
    chosen on `sample`, (ids, grids)."""
    inner = model.shape.intermediate_size
    if inner != shape.intermediate_size:
        vertical = model.shape.num_hidden_layers - model.start
        wide = FlashModel(shape, visual=model.visual, vertical=vertical, dtype=model.dtype).to(model.embed.device)
        wide.load_decoder(state)
        state = wide.narrowed(inner, *sample)
    model.load_decoder(state)


def _layers(stack: nn.ParameterDict) -> Iterator[dict[str, Tensor]]:
    for weights in zip(*(stack[name].unbind(0) for name in NAMES), strict=True):
        yield dict(zip(NAMES, weights, strict=True))
