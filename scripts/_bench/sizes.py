"""Model shapes the bench can make, the bytes a decode step must read, and which shape fits a device. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emu_cog.prompt.tokens import ROLES, TokenIds

RESERVE = 8 * 2**30
"""Bytes left free besides the weights: caches, the vision tokenizer, workspace."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A language model's shape. The vocabulary is `text` tokens, special ones included, and `visual` codes."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    text: int = 151854
    visual: int = 131072
    context: int = 32768

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """Numbers in all matrices; the norms' vectors are not counted."""
        return self.layers * self.layer_weights + 2 * self.hidden * (self.text + self.visual)

    def step_weights(self, *, layer_bytes: float, head_bytes: float) -> float:
        """Bytes of weights one step has to read: every layer, and the visual half of the head."""
        return self.layers * self.layer_weights * layer_bytes + self.hidden * self.visual * head_bytes

    def cache_bytes(self, *, tokens: float, rows: int, item: int) -> float:
        """Bytes of keys and values that `rows` sequences of `tokens` tokens have to read in one step."""
        return 2.0 * self.layers * self.kv_heads * self.head_dim * item * tokens * rows

    def config(self) -> Mapping[str, Any]:
        """The fields of config.json."""
        return {
            "model_type": "Emu3",
            "vocab_size": self.text + self.visual,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
        }

    def ids(self) -> TokenIds:
        """Roles at the released vocabulary's places, counted from the first visual token down."""
        special = ["pad", *(r for r in ROLES if r not in ("pad", "img", "boi", "eoi")), "img", "boi", "eoi"]
        roles = {role: self.text - len(special) + i for i, role in enumerate(special)}
        digits = tuple(range(15, 25))
        return TokenIds(**roles, visual=self.text, visual_count=self.visual, digits=digits, star=9)


SIZES: Mapping[str, Size] = {
    # The released model, from its config.json.
    "34b": Size(hidden=5120, intermediate=25600, layers=64, heads=64, kv_heads=8, head_dim=128),
    # The same proportions, for smaller devices; the vocabulary stays complete.
    "8b": Size(hidden=3072, intermediate=15360, layers=36, heads=32, kv_heads=8, head_dim=128),
    "0.5b": Size(hidden=640, intermediate=3200, layers=20, heads=10, kv_heads=2, head_dim=64),
    "tiny": Size(
        hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, head_dim=16, text=512, visual=256, context=4096
    ),
}


def choose(available: float, *, item: int, cpu: bool) -> str:
    """The largest size whose weights fit `available` bytes at `item` bytes per number; on a CPU at most 0.5b."""
    for name, size in SIZES.items():
        if cpu and name not in ("0.5b", "tiny"):
            continue
        if size.parameters * item + (RESERVE if not cpu else RESERVE / 4) <= available:
            return name
    return "tiny"


def floor_seconds(needed: float, bandwidth: float) -> float:
    """The least time for `needed` bytes at `bandwidth` bytes per second."""
    return needed / bandwidth
