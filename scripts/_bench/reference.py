"""Upstream's own `generate` on the native model's tensors, timed token by token."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import LogitsProcessor, Qwen3Config
from transformers.generation.streamers import BaseStreamer

from _bench.decoding import GUIDANCE, IMAGE, TEXT, Bench, prompt
from _bench.models import tensors
from _bench.report import Row
from emu_cog.ops.interface import ModelWeights
from emu_cog.prompt.tokens import ROLES, TokenIds
from emu_cog.upstream.adapter import Upstream, adopt_vocabulary
from emu_cog.upstream.clone import ensure_clone, find_clone
from emu_cog.upstream.imports import import_code

FIRST = 4
"""Image tokens that are not counted: the caches' first growth and lazy initialisation fall on them."""


def clone_folder(given: str | None, weights_dir: Path) -> Path | None:
    """The clone to use: the given folder, one in the weights folder, or a new one from EMU_UPSTREAM_URL if set."""
    if given:
        return Path(given)
    if found := find_clone(weights_dir):
        return found
    url = os.environ.get("EMU_UPSTREAM_URL")
    return ensure_clone(weights_dir, url=url) if url else None


class _Words:
    """As much of a tokenizer as upstream's `generate` and logits processor need: roles, digits and the star."""

    def __init__(self, ids: TokenIds) -> None:
        self.ids = ids
        self._known = {text: getattr(ids, role) for role, text in ROLES.items()}
        self._known |= {str(n): i for n, i in enumerate(ids.digits)} | {"*": ids.star}

    def encode(self, text: str, **_: Any) -> list[int]:
        return [self._known[text]] if text in self._known else [self._known[letter] for letter in text]

    def decode(self, ids: Any) -> str:
        names = {i: text for text, i in self._known.items()}
        return "".join(names[int(i)] for i in ids)


class _OpenImage(LogitsProcessor):
    """A random model would not begin an image, so the first token is forced."""

    def __init__(self, start: int, boi: int) -> None:
        self._start, self._boi = start, boi

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == self._start:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self._boi] = 0.0
        return scores


class _Clock(BaseStreamer):
    """The time at which each image token is known to the host."""

    def __init__(self, visual: int) -> None:
        self.times: list[float] = []
        self._visual, self._prompt = visual, True

    def put(self, value: Any) -> None:
        if not self._prompt and int(torch.as_tensor(value).flatten()[0]) >= self._visual:
            self.times.append(time.perf_counter())
        self._prompt = False

    def end(self) -> None:
        """Nothing is held back."""


def on_the_same_weights(bench: Bench, clone: Path) -> Upstream:
    """Upstream's functions over a model whose parameters are views of the native one's tensors."""
    native = bench.lm
    code = import_code(clone, dtype=native.dtype, attention="sdpa")
    adopt_vocabulary(code, native.ids)
    theirs: Any = code.model_utils.Emu3ForCausalLM
    config = type(native.config).from_dict(native.config.to_dict())
    config._attn_implementation = "sdpa"
    with init_empty_weights(include_buffers=False):
        model = theirs(config)
    for name, value in parameters(native.weights, config).items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb.to(bench.device)
    model.generation_config.eos_token_id = native.ids.eos
    words: Any = _Words(native.ids)
    held = {tensor.untyped_storage().data_ptr() for tensor in tensors(native.weights)}
    if any(value.is_meta or value.untyped_storage().data_ptr() not in held for value in model.parameters()):
        raise RuntimeError("upstream's model does not share the native one's weights")
    return Upstream(code, words, model.eval(), words, None)


def parameters(w: ModelWeights, config: Qwen3Config) -> dict[str, Tensor]:
    """The checkpoint's keys, as views of the merged weights."""
    query, kv = w.shape.heads * w.shape.head_dim, w.shape.kv_heads * w.shape.head_dim
    found = {"model.embed_tokens.weight": w.embed, "model.norm.weight": w.norm, "lm_head.weight": w.head}
    for i, layer in enumerate(w.layers):
        at, mlp, qkv, both = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp", layer.qkv.data, layer.gate_up.data
        found |= {
            f"{at}.q_proj.weight": qkv[:query],
            f"{at}.k_proj.weight": qkv[query : query + kv],
            f"{at}.v_proj.weight": qkv[query + kv :],
            f"{at}.o_proj.weight": layer.o.data,
            f"{at}.q_norm.weight": layer.q_norm,
            f"{at}.k_norm.weight": layer.k_norm,
            f"{mlp}.gate_proj.weight": both[: config.intermediate_size],
            f"{mlp}.up_proj.weight": both[config.intermediate_size :],
            f"{mlp}.down_proj.weight": layer.down.data,
            f"model.layers.{i}.input_layernorm.weight": layer.input_norm,
            f"model.layers.{i}.post_attention_layernorm.weight": layer.post_norm,
        }
    return found


def time_token(bench: Bench, up: Upstream, *, context: int, tokens: int) -> float:
    """Seconds per image token upstream, the mean over the last of `tokens`, after prompts of `context` tokens."""
    ids = bench.lm.ids
    prompts = [torch.tensor([prompt(ids, context, salt)], device=bench.device) for salt in (1, 2)]
    clock = _Clock(ids.visual)
    up.generate(
        prompts[0],
        prompts[1],
        guidance=GUIDANCE,
        image=IMAGE,
        text=TEXT,
        size=(64, 64),
        max_new_tokens=len(ids.header(64, 64)) + FIRST + tokens,
        references=0,
        seed=0,
        before=[_OpenImage(context, ids.boi)],
        streamer=clock,
    )
    counted = clock.times[FIRST - 1 :]
    if len(counted) < 2:
        raise RuntimeError(f"upstream made {len(clock.times)} image tokens, {FIRST + tokens} were expected")
    return (counted[-1] - counted[0]) / (len(counted) - 1)


def compare(bench: Bench, clone: Path, *, context: int, tokens: int, native: float | None) -> None:
    """`native`: seconds of an image token after a prompt of `context` tokens, measured before in this run."""
    up = on_the_same_weights(bench, clone)
    seconds = time_token(bench, up, context=context, tokens=tokens)
    bench.report.add(
        Row(
            part="upstream",
            what=f"upstream, one image token, {context} tokens",
            value=1e3 * seconds,
            unit="ms",
            against=f"native is {seconds / native:.2f} x as fast" if native else "",
            note="transformers' generate with upstream's logits processor and sdpa on the same tensors",
        )
    )
