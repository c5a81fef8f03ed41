"""The language model: Qwen3, layer by layer, over a paged cache; and where each key of a checkpoint belongs.

transformers gives the configuration and the rotary angles, and in the tests the logits to agree with. Where two
products read the same input, their weights are one matrix: queries, keys and values; gate and up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from emu_cog.errors import CheckpointError
from emu_cog.model.kv_cache import KVCache
from emu_cog.model.quantize import FORMATS, quantized
from emu_cog.ops import linear
from emu_cog.ops.interface import PAGE, Batch, Layer, ModelWeights, Ops, Shape, Span, Weight, pages_for
from emu_cog.ops.reference import TorchOps
from emu_cog.prompt.tokens import TokenIds

ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""For prompts. cuDNN's takes half of flash attention's time (2048 tokens on an H200: 141 us instead of 271), but 66 ms
more for the first chunk of each new length, for which it builds a plan: the 64 layers' attention of two streams of 200
tokens took 53 ms instead of 8, of 4231 tokens 155 instead of 143."""


def forward(ops: Ops, w: ModelWeights, batch: Batch, cache: KVCache) -> Tensor:
    """Store the batch's tokens in the cache; returns their final hidden states (M, hidden)."""
    residual, first = F.embedding(batch.tokens, w.embed), w.layers[0]
    x = ops.add_norm(None, residual, first.input_norm, w.shape.eps, first.qkv)
    x, _ = run_layers(ops, w.layers, (w.norm, None), w, x, residual, batch, cache)
    return x.to(w.embed.device)


def run_layers(
    ops: Ops,
    layers: Sequence[Layer],
    after: tuple[Tensor, Weight | None],
    w: ModelWeights,
    x: Tensor,
    residual: Tensor,
    batch: Batch,
    cache: KVCache,
    *,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Run `layers`, whose keys and values are those of the cache from layer `first` on, over the batch's tokens.

    `x` is what the first layer reads, `residual` what its norm read; both (M, hidden). `after` are the norm that
    follows the last layer and the weight that reads its result. Returns that result, and what the norm read.
    """
    rope, eps = w.rope[:, batch.positions if batch.rotary is None else batch.rotary], w.shape.eps
    following = [*((layer.input_norm, layer.qkv) for layer in layers[1:]), after]
    kept = slice(first, first + len(layers))
    for layer, (norm, into), k, v in zip(layers, following, cache.keys[kept], cache.values[kept], strict=True):
        if x.device != k.device:  # the layers are spread over several devices
            x, residual, rope, batch = x.to(k.device), residual.to(k.device), rope.to(k.device), batch.to(k.device)
        q = ops.rope_store(ops.linear(x, layer.qkv), layer, w.shape, rope, batch, k, v)
        x = ops.attend(q, k, v, batch, layer.o)
        x = ops.add_norm(ops.linear(x, layer.o), residual, layer.post_norm, eps, layer.gate_up)
        x = ops.swiglu(x, layer.gate_up)
        x = ops.add_norm(ops.linear(x, layer.down), residual, norm.to(k.device), eps, into)
    return x, residual


@dataclass(frozen=True)
class Chunk:
    """New tokens of one stream: fed at position `start`, stored in the stream's cache `pages`."""

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]


def batch_of(chunks: Sequence[Chunk]) -> Batch:
    """One pass over `chunks`, each of another stream."""
    tables = torch.zeros((len(chunks), max(len(chunk.pages) for chunk in chunks)), dtype=torch.int32)
    for table, chunk in zip(tables, chunks, strict=True):
        table[: len(chunk.pages)] = torch.tensor(chunk.pages)
    spans = tuple(Span(i, chunk.start, len(chunk.tokens)) for i, chunk in enumerate(chunks))
    return Batch(
        tokens=torch.tensor([token for chunk in chunks for token in chunk.tokens]),
        positions=torch.cat([torch.arange(span.start, span.start + span.count) for span in spans]),
        streams=torch.tensor([span.stream for span in spans]).repeat_interleave(
            torch.tensor([span.count for span in spans])
        ),
        tables=tables,
        spans=spans,
    )


class LanguageModel:
    """The decoder as the engine sees it: tokens at positions in, hidden states and half-vocabulary logits out."""

    def __init__(self, config: Qwen3Config, weights: ModelWeights, ids: TokenIds) -> None:
        check_vocabulary(config, ids)
        self.config, self.weights, self.ids = config, weights, ids
        self.context = int(config.max_position_embeddings)
        """Tokens a stream may hold; the caller may lower it to what memory allows."""
        self.device, self.dtype = weights.embed.device, weights.embed.dtype
        self.ops: Ops = TorchOps()

    @property
    def devices(self) -> list[torch.device]:
        """Where each layer is."""
        return [layer.qkv.data.device for layer in self.weights.layers]

    def new_cache(self, tokens: int) -> KVCache:
        """Room for `tokens` tokens of one stream, or somewhat fewer of several: each begins a page of its own."""
        return KVCache(self.config, pages=1 + pages_for(tokens), dtype=self.dtype, devices=self.devices)

    @torch.inference_mode()
    def feed(self, cache: KVCache, chunks: Sequence[Chunk]) -> Tensor:
        """One pass over new tokens of several streams, in order: their final hidden states (all tokens, hidden)."""
        batch = batch_of(chunks)
        with sdpa_kernel(ATTENTION, set_priority=True):
            return self.forward(batch.to(self.device), cache, self.ops.for_prompt())

    def forward(self, batch: Batch, cache: KVCache, ops: Ops | None = None) -> Tensor:
        """One pass over a batch that is on the model's device, by `ops` if not by the model's: (M, hidden)."""
        return forward(ops or self.ops, self.weights, batch, cache)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """(N, hidden) to (N, text tokens) fp32 logits over everything but the visual tokens."""
        return self._logits(hidden, self.weights.text_head)

    def visual_logits(self, hidden: Tensor) -> Tensor:
        """(N, hidden) to (N, visual_count) fp32 logits over the visual tokens; entry i is code i."""
        return self._logits(hidden, self.weights.visual_head)

    def _logits(self, hidden: Tensor, half: Tensor) -> Tensor:
        return self.ops.logits(hidden.to(half.device), half).to(self.device)


def check_vocabulary(config: Qwen3Config, ids: TokenIds) -> None:
    """CheckpointError where the model lacks tokens that its tokenizer files name."""
    if config.vocab_size < ids.vocab_size:
        raise CheckpointError(
            f"the model knows {config.vocab_size} tokens but its tokenizer files name {ids.vocab_size}"
        )


def empty_weights(
    config: Qwen3Config,
    ids: TokenIds,
    *,
    dtype: torch.dtype,
    place: Callable[[str], torch.device],
    quantize: str | None = None,
    narrow: bool = False,
) -> ModelWeights:
    """Uninitialized weights of `config`, each on the device that `place` names for its key; the angles are right.
    `narrow`: see Weight."""

    def empty(key: str, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=place(key))

    hidden = config.hidden_size
    if config.tie_word_embeddings:
        head = None
    else:
        head = linear.empty(config.vocab_size, hidden, dtype=dtype, device=place("lm_head"))
    layers = [
        empty_layer(config, dtype=dtype, device=place(f"model.layers.{i}"), quantize=quantize, narrow=narrow)
        for i in range(config.num_hidden_layers)
    ]
    embed = empty("model.embed_tokens", config.vocab_size, hidden)
    angles = Qwen3RotaryEmbedding(config).to(embed.device)
    # One page more than the context: what steps are padded with, and sequences at their end, have a position too.
    positions = torch.arange(config.max_position_embeddings + PAGE, device=embed.device)
    return ModelWeights(
        embed=embed,
        layers=tuple(layers),
        norm=empty("model.norm", hidden),
        head=embed if head is None else head,
        visual=slice(ids.visual, ids.vocab_size),
        rope=torch.stack(angles(embed[:0], positions[None]))[:, 0].contiguous(),
        shape=Shape(
            heads=config.num_attention_heads,
            kv_heads=int(config.num_key_value_heads or 0),
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
        ),
    )


def empty_layer(
    config: Qwen3Config, *, dtype: torch.dtype, device: torch.device, quantize: str | None, narrow: bool = False
) -> Layer:
    """Uninitialized weights of one layer."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv = config.num_attention_heads, int(config.num_key_value_heads or 0)

    def norm(size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def weight(n: int, k: int) -> Weight:
        if quantize is None:
            return Weight(linear.empty(n, k, dtype=dtype, device=device))
        data = torch.empty((n, k), dtype=FORMATS[quantize][0], device=device)
        return Weight(data, torch.empty(n, dtype=torch.float32, device=device), narrow)

    return Layer(
        qkv=weight((heads + 2 * kv) * dim, hidden),
        o=weight(hidden, heads * dim),
        gate_up=weight(2 * inner, hidden),
        down=weight(hidden, inner),
        input_norm=norm(hidden),
        post_norm=norm(hidden),
        q_norm=norm(dim),
        k_norm=norm(dim),
    )


Destination = Callable[[Tensor], object]
"""Takes a tensor of a checkpoint to where it belongs, converted on the way."""


def destinations(
    config: Qwen3Config, w: ModelWeights, quantize: str | None = None
) -> Iterator[tuple[str, Destination]]:
    """Every key of a checkpoint, and what takes its tensor into `w`."""
    yield "model.embed_tokens.weight", w.embed.copy_
    yield "model.norm.weight", w.norm.copy_
    if w.head is not w.embed:
        yield "lm_head.weight", w.head.copy_
    for i, layer in enumerate(w.layers):
        yield from layer_destinations(f"model.layers.{i}", config, layer, w.shape, quantize)


def layer_destinations(
    key: str, config: Qwen3Config, layer: Layer, shape: Shape, quantize: str | None
) -> Iterator[tuple[str, Destination]]:
    """The keys of the layer `key`."""

    def rows(weight: Weight, begin: int, count: int) -> Destination:
        place = slice(begin, begin + count)

        def fill(tensor: Tensor) -> None:
            if weight.scale is None or quantize is None:
                weight.data[place] = tensor
            else:
                weight.data[place], weight.scale[place] = quantized(tensor.to(weight.data.device), quantize)

        return fill

    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    at, mlp = f"{key}.self_attn", f"{key}.mlp"
    yield f"{at}.q_proj.weight", rows(layer.qkv, 0, query)
    yield f"{at}.k_proj.weight", rows(layer.qkv, query, kv)
    yield f"{at}.v_proj.weight", rows(layer.qkv, query + kv, kv)
    yield f"{at}.o_proj.weight", rows(layer.o, 0, config.hidden_size)
    yield f"{mlp}.gate_proj.weight", rows(layer.gate_up, 0, config.intermediate_size)
    yield f"{mlp}.up_proj.weight", rows(layer.gate_up, config.intermediate_size, config.intermediate_size)
    yield f"{mlp}.down_proj.weight", rows(layer.down, 0, config.hidden_size)
    yield f"{at}.q_norm.weight", layer.q_norm.copy_
    yield f"{at}.k_norm.weight", layer.k_norm.copy_
    yield f"{key}.input_layernorm.weight", layer.input_norm.copy_
    yield f"{key}.post_attention_layernorm.weight", layer.post_norm.copy_
