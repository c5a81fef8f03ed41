"""Pictures as files, as pixels and as codes: reading references safely, encoding and decoding them."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from emu_cog.errors import InputError
from emu_cog.log import log
from emu_cog.prompt import geometry
from emu_cog.vision.ibq import IBQ

MAX_PIXELS = 100_000_000
"""A larger reference is refused by its header: 100 megapixels are 300 MB once decoded."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What Pillow may try on an upload; others (EPS starts Ghostscript) are kept away from strangers' files."""
MIN_REFERENCE_SIDE = 16
"""A reference must fill at least one token; smaller ones are mistakes, not pictures."""


_WANTED = "a PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF file is needed"


def open_reference(path: Path, *, name: str) -> Image.Image:
    """Read the picture file at `path` as upright sRGB, mode RGB, alpha on white, first frame of animations.

    `name` is the input's name for the message. Raises InputError for what is no picture, is cut off, is too
    large (judged before any pixel is decoded), too small, or too long and thin.
    """
    try:
        size = path.stat().st_size
        if size == 0:
            raise InputError(f"{name}: the file is empty, it has 0 bytes ({_WANTED})")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.init()  # fills Image.OPEN with what this build of Pillow can read
            image = Image.open(path, formats=[f for f in FORMATS if f in Image.OPEN])
    except UnidentifiedImageError:
        raise InputError(f"{name}: the file is not a picture that can be read ({_WANTED})") from None
    except Image.DecompressionBombError as error:
        # Pillow's own, far higher limit comes first: "Image size (2500000000 pixels) exceeds limit of ...".
        found = re.search(r"\d+", str(error))
        pixels = f"{int(found[0]):,}" if found else "too many"
        raise InputError(
            f"{name}: the picture has {pixels} pixels, at most {MAX_PIXELS:,} in all are accepted"
        ) from None
    except InputError:
        raise
    except Exception as error:  # Pillow's readers raise whatever they stumble over in a damaged file
        raise InputError(f"{name}: the file can't be read as a picture ({error})") from None
    with image:
        _check_header(image, name)
        try:
            image.load()
            return to_srgb(image)
        except Exception as error:
            raise InputError(f"{name}: the picture is damaged or cut off ({error})") from None


def _check_header(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name}: the picture has {width}x{height} pixels, at most {MAX_PIXELS:,} in all are accepted; shrink it"
        )
    if min(width, height) < MIN_REFERENCE_SIDE:
        raise InputError(
            f"{name}: the picture has {width}x{height} pixels, each side must have at least {MIN_REFERENCE_SIDE}"
        )
    if max(width, height) > geometry.MAX_RATIO * min(width, height):
        raise InputError(
            f"{name}: the picture has {width}x{height} pixels and is too long and thin: "
            f"one side may be at most {geometry.MAX_RATIO} times the other; crop it"
        )


def to_srgb(image: Image.Image) -> Image.Image:
    """Upright RGB in sRGB: EXIF orientation applied, 16-bit scaled to 8, profiles converted, alpha on white."""
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        # Pillow's own conversion clips 16-bit values to 255; they are scaled here.
        values = np.asarray(image, dtype=np.float64)
        scale = 257.0 if image.mode != "F" or values.max(initial=0.0) > 255 else 1.0
        image = Image.fromarray(np.clip(values / scale + 0.5, 0, 255).astype(np.uint8))
        profile = None  # it describes the 16-bit original; grey stays grey
    alpha = None
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    elif image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("RGB")
    colour = _convert_profile(image, profile)
    if alpha is None:
        return colour
    white = Image.new("RGB", colour.size, "white")
    white.paste(colour, mask=alpha)
    return white


def _convert_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode == "RGBA":
        image = image.convert("RGB")  # drops the alpha channel, which the caller kept
    if profile and image.mode != "LAB":
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
            assert converted is not None  # not in place
            return converted
        except (ImageCms.PyCMSError, OSError) as error:
            log.warning("the picture's colour profile can't be used (%s): its values are taken as sRGB", error)
    return image.convert("RGB")


@torch.inference_mode()
def encode_image(image: Image.Image, area: int, vision: IBQ) -> tuple[tuple[int, ...], ...]:
    """Resize an RGB picture to about `area` pixels at its own shape (bicubic) and give its codes[row][column]."""
    resized = image.resize(geometry.reference_pixels(image.size, area), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(resized) / 127.5 - 1.0)  # in double, then rounded once, as upstream
    pixels = pixels.to(vision.device, vision.dtype).permute(2, 0, 1)[None]
    return tuple(tuple(row) for row in vision.encode(pixels)[0].tolist())


@torch.inference_mode()
def decode_image(codes: Sequence[Sequence[int]], vision: IBQ) -> Image.Image:
    """The picture of `codes[row][column]`: (y + 1) * 127.5, clamped to 0..255 and truncated, as upstream."""
    return decode_images([codes], vision)[0]


@torch.inference_mode()
def decode_images(grids: Sequence[Sequence[Sequence[int]]], vision: IBQ) -> list[Image.Image]:
    """`decode` for several grids of one size in one pass."""
    pixels = vision.decode(torch.tensor(grids, device=vision.device)).float()
    pixels = ((pixels + 1.0) * 127.5).clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(each) for each in pixels.permute(0, 2, 3, 1).cpu().numpy()]
