"""Models of any size with random weights, made on their device: no file is read, nothing is in memory twice."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from _bench.sizes import Size
from emu_cog.model.loader import read_config
from emu_cog.model.qwen3 import LanguageModel, choose_attention
from emu_cog.vision.ibq import IBQ, VisionConfig


def language_model(size: Size, *, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """A decoder of `size`, its weights normal with a variance that keeps activations level, on `device` in `dtype`."""
    config = config_of(size)
    config._attn_implementation = choose_attention(device, dtype)
    with init_empty_weights(include_buffers=False):
        model = Qwen3ForCausalLM(config)
    generator = torch.Generator(device).manual_seed(0)
    for module, name, shape in list(_parameters(model)):
        value = torch.empty(shape, dtype=dtype, device=device)
        value.fill_(1.0) if len(shape) == 1 else value.normal_(std=shape[1] ** -0.5, generator=generator)
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    # Logits with a standard deviation of about 2, as sharp as a trained model's, so that top-k matters.
    model.lm_head.weight.mul_(2.0)
    model.model.rotary_emb.to(device)
    return LanguageModel(model.eval(), size.ids())


def config_of(size: Size) -> Qwen3Config:
    """As the loader reads it from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(size.config())), encoding="utf-8")
        return read_config(Path(folder))


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Size]]:
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            yield module, name, value.shape


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
