"""Renders scenes to pixels in integer arithmetic, bit-identical on CPU and GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from scripts.mini.shapes import SPRITE_NUMBER, atlas
from scripts.mini.world import COLOURS, TEXTURES, Scene

NOISE_SIGMA = 2.0
NO_NOISE = 0
"""Scene seed for no noise."""
TEXTURE_DEPTH = 20
"""Amplitude of a texture, of 255: darker on light colours, lighter on dark ones."""
FADING_DEPTH = 30
"""Amplitude at the bottom of a fading background, whose top has the plain colour."""
_COLOUR_NUMBER = {name: i for i, name in enumerate(COLOURS)}
_TEXTURE_NUMBER = {name: i for i, name in enumerate(TEXTURES)}


@dataclass(frozen=True)
class Batch:
    """Scenes of one size as arrays: `head` (N, 3) int32 background, texture, seed; `things` (N, K, 4) int32 sprite (-1:
    none), colour, left, top."""

    rows: int
    columns: int
    head: NDArray[np.int32]
    things: NDArray[np.int32]

    @classmethod
    def of(cls, scenes: Sequence[Scene]) -> Batch:
        most = max((len(s.things) for s in scenes), default=0)
        head = np.array([[_COLOUR_NUMBER[s.background], _TEXTURE_NUMBER[s.texture], s.seed] for s in scenes], np.int32)
        things = np.full((len(scenes), most, 4), -1, np.int32)
        for i, scene in enumerate(scenes):
            for k, t in enumerate(scene.things):
                left, top, _, _ = t.box
                things[i, k] = (SPRITE_NUMBER[t.shape, t.side], _COLOUR_NUMBER[t.colour], left, top)
        return cls(scenes[0].rows, scenes[0].columns, head, things)


@torch.inference_mode()
def render(batch: Batch, device: torch.device | str = "cpu") -> Tensor:
    """(N, 3, H, W) uint8 pictures with noise."""
    return with_noise(render_clean(batch, device), batch)


@torch.inference_mode()
def with_noise(clean: Tensor, batch: Batch) -> Tensor:
    """Add each scene's noise to the output of `render_clean`: (N, 3, H, W) uint8."""
    head = torch.from_numpy(batch.head).to(clean.device)
    return add_noise(clean, head, places(*clean.shape[-2:], clean.device))


@torch.inference_mode()
def render_clean(batch: Batch, device: torch.device | str = "cpu") -> Tensor:
    """(N, 3, H, W) int32 in 0..255, without noise."""
    head, things = torch.from_numpy(batch.head).to(device), torch.from_numpy(batch.things).to(device)
    return compose(head, things, *palette_and_atlas(device), batch.rows, batch.columns)


def palette_and_atlas(device: torch.device | str) -> tuple[Tensor, Tensor]:
    """The (colours, 3) palette and the (sprites, side, side) outline atlas, int32."""
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.int32, device=device)
    return palette, torch.from_numpy(atlas()).to(device).int()


def compose(head: Tensor, things: Tensor, palette: Tensor, sheet: Tensor, rows: int, columns: int) -> Tensor:
    """`render_clean` on tensors only: the arrays of a Batch and the output of `palette_and_atlas`."""
    height, width, device = rows * 16, columns * 16, head.device
    yy = torch.arange(height, device=device, dtype=torch.int32)[:, None]
    xx = torch.arange(width, device=device, dtype=torch.int32)[None, :]

    ground = palette[head[:, 0].long()]  # (N, 3)
    luma = (ground[:, 0] * 299 + ground[:, 1] * 587 + ground[:, 2] * 114) // 1000
    toward = torch.where(luma > 128, -1, 1)
    depth = textures(yy, xx, height)[head[:, 1].long()] * toward[:, None, None]
    canvas = (ground[:, :, None, None] + depth[:, None]).clamp(0, 255)
    side = sheet.shape[1]
    for k in range(things.shape[1]):
        number, colour, left, top = things[:, k].unbind(1)
        y, x = yy - top[:, None, None], xx - left[:, None, None]  # (N, H, 1), (N, 1, W)
        valid = (y >= 0) & (y < side) & (x >= 0) & (x < side) & (number >= 0)[:, None, None]
        index = (number.clamp(min=0)[:, None, None] * side + y.clamp(0, side - 1)) * side + x.clamp(0, side - 1)
        alpha = torch.where(valid, sheet.view(-1)[index], 0)[:, None]
        colours = palette[colour.clamp(min=0).long()][:, :, None, None]
        canvas = (canvas * (255 - alpha) + colours * alpha + 127) // 255
    return canvas


def add_noise(clean: Tensor, head: Tensor, place: Tensor) -> Tensor:
    """`with_noise` on tensors only; `place` is the output of `places` for that size."""
    noise = _noise(head[:, 2], place)
    return (clean + noise).clamp(0, 255).to(torch.uint8)


def textures(yy: Tensor, xx: Tensor, height: int) -> Tensor:
    """(4, H, W) int32 amplitude of every texture, in the order of TEXTURES."""
    flat = torch.zeros_like(yy + xx)
    fading = yy * FADING_DEPTH // height + flat
    striped = (yy // 16 % 2) * TEXTURE_DEPTH + flat
    checked = ((yy // 32 + xx // 32) % 2) * TEXTURE_DEPTH
    return torch.stack([flat, fading, striped, checked]).int()


def places(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """(1, 3, H, W) int64 position term of the noise hash."""
    return torch.arange(3 * height * width, device=device).view(1, 3, height, width) * 0x85EBCA6B


def _noise(seed: Tensor, place: Tensor) -> Tensor:
    """(N, 3, H, W) int32, approximately normal with NOISE_SIGMA: the sum of four bytes of a hash of (seed,
    position).
    """
    h = (seed.long()[:, None, None, None] * 0x9E3779B1 + place) & 0xFFFFFFFF
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    h = h ^ (h >> 15)
    total = (h & 255) + (h >> 8 & 255) + (h >> 16 & 255) + (h >> 24 & 255) - 510  # sigma 147.8
    noise = torch.div(total * round(NOISE_SIGMA * 1000) + 73900, 147800, rounding_mode="floor").int()
    return noise * (seed != NO_NOISE)[:, None, None, None]


@torch.inference_mode()
def resize(pictures: Tensor, height: int, width: int) -> Tensor:
    """Resize (N, 3, H, W) uint8, bicubic with antialiasing as in Pillow (up to rounding)."""
    if pictures.shape[-2:] == (height, width):
        return pictures
    sized = F.interpolate(pictures.float(), (height, width), mode="bicubic", antialias=True, align_corners=False)
    return sized.round().clamp(0, 255).to(torch.uint8)


def picture(scene: Scene) -> Image.Image:
    """One scene as an RGB image."""
    return Image.fromarray(render(Batch.of([scene]))[0].permute(1, 2, 0).numpy())
