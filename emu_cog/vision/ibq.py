"""The IBQ vision tokenizer: a picture to codes and back. Five levels, so one code covers 16x16 pixels.

The module tree mirrors the released checkpoint's keys. Layer by layer it is the VQGAN autoencoder that
upstream's `vision_tokenizer` package builds; the code of a patch is the argmax of its feature's dot product
with the codebook (not the nearest neighbour).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from emu_cog.errors import CheckpointError
from emu_cog.model.shards import check_state
from emu_cog.model.torch_settings import exact_products

CONFIG_FILE = "config.yaml"
WEIGHTS_FILE = "model.ckpt"
_ENCODE_CHUNK = 1024
"""Patches compared with the codebook at a time: 1024 x 131072 fp32 scores are 0.5 GB."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The keys of `config.yaml` that shape the network; names as in upstream's `ddconfig`."""

    ch: int
    out_ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    in_channels: int
    resolution: int
    z_channels: int
    double_z: bool
    n_embed: int
    embed_dim: int

    @classmethod
    def read(cls, folder: Path) -> VisionConfig:
        """Parse `folder/config.yaml`. Training-only keys are ignored; CheckpointError names a missing key."""
        path = folder / CONFIG_FILE
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: a vision tokenizer folder holds {CONFIG_FILE}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is not readable as YAML: {error}") from None
        if not isinstance(data, dict) or not isinstance(data.get("ddconfig"), dict):
            raise CheckpointError(f"{path} lacks the key 'ddconfig'")
        values = {"double_z": True} | data["ddconfig"] | {k: v for k, v in data.items() if k != "ddconfig"}
        try:
            return cls(**{name: _frozen(values[name]) for name in cls.__dataclass_fields__})
        except KeyError as error:
            raise CheckpointError(f"{path} lacks the key {error}") from None

    @property
    def pixels_per_code(self) -> int:
        return 2 ** (len(self.ch_mult) - 1)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_GROUPS = 32


class Norm(nn.GroupNorm):
    """GroupNorm of 32 groups, in fp32."""

    def __init__(self, channels: int) -> None:
        super().__init__(num_groups=_GROUPS, num_channels=channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if not torch.compiler.is_compiling():
            return super().forward(x)
        # The same by way of each channel's mean and variance: with channels last these are sums over columns, which
        # compile to fast code; sums over groups do not. Measurements: see compiled.py.
        variance, mean = torch.var_mean(x, dim=(2, 3), correction=0)
        variance, mean = (value.unflatten(1, (_GROUPS, -1)) for value in (variance, mean))
        group_mean = mean.mean(dim=2, keepdim=True)
        group_variance = (variance + (mean - group_mean).square()).mean(dim=2, keepdim=True)
        scale = (group_variance + 1e-6).rsqrt().expand_as(mean).flatten(1) * self.weight
        shift = self.bias - group_mean.expand_as(mean).flatten(1) * scale
        return x * scale[:, :, None, None] + shift[:, :, None, None]


def _silu(x: Tensor) -> Tensor:
    """SiLU of a map that nothing else uses, in place."""
    return F.silu(x, inplace=True)


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut. (N, c_in, H, W) to (N, c_out, H, W).

    Three maps are alive at a time: the input and a convolution's two ends.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = Norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = Norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        # One expression, in place: a name would keep the first convolution's output to the end of the second.
        h = self.conv2(_silu(self.norm2(self.conv1(_silu(self.norm1(x)))))).float()
        h += self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        # Not scaled_dot_product_attention: with one head of 1024 channels its kernels take three times as long as
        # plain products (14.6 ms of a decode on an H100), and the matrix is small.
        weight = (q @ k.transpose(1, 2) * x.shape[1] ** -0.5).softmax(dim=-1)
        return x + self.proj_out((weight @ v).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # By size, not by scale_factor: a float factor would add guards to symbolic sizes.
        size = 2 * x.shape[2], 2 * x.shape[3]
        return self.conv(F.interpolate(x.to(self.conv.weight.dtype), size=size, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution: residual blocks, each followed by attention where the config asks for it.

    The encoder's levels end with `downsample`, the decoder's with `upsample`; the last one of each has neither.
    """

    downsample: nn.Module | None
    upsample: nn.Module | None

    def __init__(self, c_in: int, c_out: int, *, blocks: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(blocks if attention else 0))
        self.downsample = self.upsample = None

    def layers(self) -> Iterator[nn.Module]:
        """What a map passes through, in order."""
        for i, block in enumerate(self.block):
            yield block
            if len(self.attn):
                yield self.attn[i]
        yield from (resample for resample in (self.downsample, self.upsample) if resample is not None)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers():
            x = layer(x)
        return x


def _layers(levels: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The layers of several levels: whoever calls a level keeps its input, a full map, until the level's end."""
    for level in levels:
        assert isinstance(level, Level)
        yield from level.layers()


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """(N, in_channels, H, W) pixels to (N, z, H/16, W/16)."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        widths = [c.ch * m for m in c.ch_mult]
        self.conv_in = nn.Conv2d(c.in_channels, c.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            # The config's nominal resolution, not the picture's size, decides which level attends.
            attention = c.resolution // 2**i in c.attn_resolutions
            level = Level(c.ch if i == 0 else widths[i - 1], width, blocks=c.num_res_blocks, attention=attention)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = Norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], c.z_channels * (2 if c.double_z else 1), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for layer in _layers(self.down):
            h = layer(h)
        return self.conv_out(_silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """(N, z, h, w) features to (N, out_ch, 16h, 16w) pixels; one residual block more per level than the encoder."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        widths = [c.ch * m for m in c.ch_mult]
        self.conv_in = nn.Conv2d(c.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            attention = c.resolution // 2**i in c.attn_resolutions
            c_in = widths[min(i + 1, len(widths) - 1)]
            level = Level(c_in, width, blocks=c.num_res_blocks + 1, attention=attention)
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = Norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], c.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for layer in _layers(reversed(list(self.up))):
            h = layer(h)
        return self.tail(h)

    def tail(self, h: Tensor) -> Tensor:
        return self.conv_out(_silu(self.norm_out(h)))


class Codebook(nn.Module):
    def __init__(self, n_embed: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)


class IBQ(nn.Module):
    """The vision tokenizer. `encode` and `decode` work on tensors; see `images.py` for files."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.n_embed, config.embed_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.compiled: Callable[[Tensor], Tensor] | None = None
        """A compiled version of `pixels`, which `decode` runs instead."""

    def features(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) pixels in -1..1 to (N, embed_dim, H/16, W/16), before quantization."""
        return self.quant_conv(self.encoder(pixels))

    def encode(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) floats in -1..1, H and W multiples of 16, to (N, H/16, W/16) int64 codes."""
        z = self.features(pixels)
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        book = self.quantize.embedding.weight.t()
        with exact_products(self.device):
            codes = torch.cat([(part @ book).argmax(dim=1) for part in flat.split(_ENCODE_CHUNK)])
        return codes.view(z.shape[0], z.shape[2], z.shape[3])

    def decode(self, codes: Tensor) -> Tensor:
        """(N, h, w) int64 codes to (N, 3, 16h, 16w) floats, about -1..1 and not clamped."""
        features = self.quantize.embedding(codes).permute(0, 3, 1, 2).contiguous()
        return (self.compiled or self.pixels)(features)

    def pixels(self, features: Tensor) -> Tensor:
        """(N, embed_dim, h, w) codebook vectors to (N, 3, 16h, 16w)."""
        return self.decoder(self.post_quant_conv(features))

    @property
    def device(self) -> torch.device:
        return self.quantize.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.quantize.embedding.weight.dtype


def load_vision_tokenizer(folder: Path, *, device: torch.device | str = "cpu") -> IBQ:
    """Build from `folder/config.yaml`, load `folder/model.ckpt` strictly and safely; evaluation mode, fp32.

    Raises CheckpointError naming the file, key or shape that is wrong.
    """
    config = VisionConfig.read(folder)
    if config.pixels_per_code != 16:
        raise CheckpointError(f"{folder / CONFIG_FILE}: ch_mult has {len(config.ch_mult)} levels, 5 are needed (16x)")
    with torch.device("meta"):
        model = IBQ(config)
    state = _read_state(folder / WEIGHTS_FILE)
    check_state(model.state_dict(), state, where=str(folder / WEIGHTS_FILE))
    model.load_state_dict({k: v.to(device=device, dtype=torch.float32) for k, v in state.items()}, assign=True)
    return model.eval().requires_grad_(False)


def _read_state(path: Path) -> Mapping[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: a vision tokenizer folder holds {WEIGHTS_FILE}") from None
    except Exception as error:  # torch raises many kinds for a damaged or unsafe pickle
        raise CheckpointError(f"{path} can't be opened safely as a state dict: {error}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} is not a state dict: it must map names to tensors")
    return state
