"""Models of any size with random weights, made on their device: no file is read, nothing is in memory twice."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3Config

from _bench.sizes import Size
from emu_cog.model.flashar import FlashModel, empty_flash_weights
from emu_cog.model.loader import read_config
from emu_cog.model.quantize import quantized
from emu_cog.model.qwen3 import LanguageModel, empty_weights
from emu_cog.ops import linear
from emu_cog.ops.interface import Layer, ModelWeights, Weight
from emu_cog.vision.ibq import IBQ, VisionConfig


def language_model(
    size: Size, *, device: torch.device, dtype: torch.dtype, quantize: str | None = None
) -> LanguageModel:
    """A decoder of `size`, its weights normal with a variance that keeps activations level, on `device` in `dtype`;
    with `quantize` the same weights in 8 bits, one tensor at a time."""
    config, ids = config_of(size), size.ids()
    weights = empty_weights(config, ids, dtype=dtype, place=lambda _: device, quantize=quantize)
    generator = torch.Generator(device).manual_seed(0)
    _fill_layers(weights.layers, generator, dtype, quantize)
    weights.norm.fill_(1.0)
    _fill(Weight(weights.embed), generator, dtype, quantize)
    _fill(Weight(weights.head), generator, dtype, quantize)
    # Logits with a standard deviation of about 2, as sharp as a trained model's, so that top-k matters.
    weights.head.mul_(2.0)
    return LanguageModel(config, weights, ids)


VERTICAL = 4
"""Vertical layers of both released FlashAR models."""


def flash_model(size: Size, *, device: torch.device, dtype: torch.dtype, quantize: str | None = None) -> FlashModel:
    """The same with vertical layers beside the last ones, FlashAR's gates and its two heads of visual tokens."""
    config, ids = config_of(size), size.ids()
    config.tie_word_embeddings = True
    vertical = min(VERTICAL, size.layers)
    flash = empty_flash_weights(
        config, ids, vertical=vertical, start=size.layers - vertical, dtype=dtype, device=device, quantize=quantize
    )
    generator, decoder = torch.Generator(device).manual_seed(0), flash.decoder
    _fill_layers((*decoder.layers, *flash.vertical), generator, dtype, quantize)
    decoder.norm.fill_(1.0)
    flash.vertical_norm.fill_(1.0)
    for matrix in (decoder.embed, decoder.head):
        _fill(Weight(matrix), generator, dtype, quantize)
    # Half of what each head reads is weighed away by its gate.
    decoder.head.mul_(4.0)
    for gate in (flash.gates.pair_in, flash.gates.pair_out, flash.gates.corner):
        gate.normal_(std=gate.shape[1] ** -0.5, generator=generator)
    flash.gates.pair_bias.zero_()
    flash.gates.corner_bias.zero_()
    return FlashModel(config, flash, ids)


def _fill_layers(layers: Sequence[Layer], generator: torch.Generator, dtype: torch.dtype, quantize: str | None) -> None:
    for layer in layers:
        for weight in (layer.qkv, layer.o, layer.gate_up, layer.down):
            _fill(weight, generator, dtype, quantize)
        for norm in (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm):
            norm.fill_(1.0)


def _fill(weight: Weight, generator: torch.Generator, dtype: torch.dtype, quantize: str | None) -> None:
    # Laid out alike, or the same random numbers would be other weights.
    full = weight.data
    if weight.scale is not None:
        full = linear.empty(*weight.data.shape, dtype=dtype, device=weight.data.device)
    full.normal_(std=full.shape[1] ** -0.5, generator=generator)
    if weight.scale is not None and quantize:
        data, scale = quantized(full, quantize)
        weight.data.copy_(data)
        weight.scale.copy_(scale)


def tensors(weights: ModelWeights) -> Iterator[Tensor]:
    """Every tensor of a model, the rotary angles left out."""
    yield from (weights.embed, weights.norm, *(() if weights.head is weights.embed else (weights.head,)))
    for layer in weights.layers:
        yield from (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
        for weight in (layer.qkv, layer.o, layer.gate_up, layer.down):
            yield weight.data
            if weight.scale is not None:
                yield weight.scale


def held_bytes(weights: ModelWeights) -> int:
    """Bytes of all `tensors`."""
    return sum(tensor.nbytes for tensor in tensors(weights))


def config_of(size: Size) -> Qwen3Config:
    """As the loader reads it from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(size.config())), encoding="utf-8")
        return read_config(Path(folder))


@dataclass(frozen=True)
class VisionSize:
    """A vision tokenizer's width, blocks per level, number of codes and their width."""

    ch: int
    blocks: int
    codes: int
    embed: int


# The released tokenizer's, which gives its 455 M parameters; and one for CPUs and tests.
VISION_SIZES = {"full": VisionSize(256, 4, 131072, 256), "tiny": VisionSize(32, 1, 256, 32)}


def vision_tokenizer(size: VisionSize, *, device: torch.device) -> IBQ:
    """An fp32 tokenizer whose pixels fill the range as a picture's do."""
    config = VisionConfig(
        ch=size.ch,
        out_ch=3,
        ch_mult=(1, 1, 2, 2, 4),
        num_res_blocks=size.blocks,
        attn_resolutions=(16,),
        in_channels=3,
        resolution=256,
        z_channels=size.embed,
        double_z=False,
        n_embed=size.codes,
        embed_dim=size.embed,
    )
    with torch.device(device):
        model = IBQ(config).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, value in model.named_parameters():
        if value.dim() == 4:
            value.normal_(std=1.2 * value[0].numel() ** -0.5, generator=generator)
        elif name == "quantize.embedding.weight":
            value.normal_(generator=generator)
        elif not ("norm" in name and name.endswith("weight")):
            value.zero_()
    with torch.inference_mode():
        deviation = model.decode(torch.randint(0, size.codes, (1, 10, 10), device=device, generator=generator)).std()
        model.decoder.conv_out.weight.mul_(0.5 / deviation)
    return model
