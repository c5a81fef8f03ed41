"""Pictures as files, as pixels and as codes: reading references safely, encoding and decoding them."""

from __future__ import annotations

import hashlib
import io
import mmap
import re
import warnings
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from emu_cog.errors import InputError
from emu_cog.prompt import geometry
from emu_cog.vision.containers import avif_pixels, hide_tiff_tags, jpeg_endings, jpeg_pixels, png_pixels, webp_pixels
from emu_cog.vision.formats import HEAD_BYTES, RAW_ADVICE, accepted_format, foreign_format, is_camera_raw
from emu_cog.vision.ibq import IBQ
from emu_cog.vision.srgb import load, strips, to_srgb

MAX_PIXELS = 100_000_000
"""A larger reference is refused by its header: 100 megapixels are 400 MB once decoded."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What Pillow may try on an upload; others (EPS starts Ghostscript) are kept away from strangers' files."""
MIN_REFERENCE_SIDE = 16
"""A reference must fill at least one token; smaller ones are mistakes, not pictures."""

_WANTED = "a PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF file is needed"
_AGAIN = "open it in a photo program and save it again as PNG or JPEG"


def open_reference(path: Path, *, name: str) -> Image.Image:
    """Read the picture file at `path` as upright sRGB, mode RGB, without alpha, first frame of animations.

    `name` is the input's name for the message. Pixels decide: malformed metadata is ignored. Raises InputError for
    what is no picture, is cut off, has no fixed range of values, is too large (judged before any pixel is decoded),
    too small, or too long and thin.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{name}: the file can't be opened ({_text(error)})") from None
    with warnings.catch_warnings(), file:
        warnings.simplefilter("ignore")  # about large pictures and malformed metadata
        head = file.read(HEAD_BYTES)
        if not head:
            raise InputError(f"{name}: the file is empty, it has 0 bytes ({_WANTED})")
        if foreign := _foreign(file, head):
            what, advice = foreign
            raise InputError(f"{name}: the file is {what}, not a picture that can be read ({_WANTED}); {advice}")
        stream, info = _pixels_alone(file, head)
        with _opened(stream, name=name, head=head) as image:
            _check_header(image, name)
            image.info.update(info)
            try:
                return to_srgb(_loaded(image, stream))
            except Exception as error:  # Pillow's readers raise whatever they stumble over in a damaged file
                raise InputError(f"{name}: the picture is damaged or cut off ({_text(error)}); {_AGAIN}") from None


def _foreign(file: BufferedReader, head: bytes) -> tuple[str, str] | None:
    """What the file is and what to do, if it is of a format that is not read."""
    if accepted_format(head) == "TIFF" and is_camera_raw(file):
        return "a camera's raw file", RAW_ADVICE
    return foreign_format(head)


def _pixels_alone(file: BufferedReader, head: bytes) -> tuple[IO[bytes], dict[str, bytes]]:
    """The file without the metadata that Pillow may stumble over, and what of it is looked at later."""
    file.seek(0)
    kind = accepted_format(head)
    if kind == "TIFF":
        copy = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # changes stay in memory
        hide_tiff_tags(copy)
        return cast(IO[bytes], copy), {}
    if kind not in ("PNG", "JPEG", "WEBP", "AVIF"):
        return file, {}
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if kind in ("JPEG", "WEBP"):
            pixels, info = jpeg_pixels(data) if kind == "JPEG" else webp_pixels(data)
            return io.BytesIO(pixels), info
        return io.BytesIO(png_pixels(data) if kind == "PNG" else avif_pixels(data)), {}


def _opened(stream: IO[bytes], *, name: str, head: bytes) -> Image.Image:
    Image.init()  # fills Image.OPEN with what this build of Pillow can read
    try:
        return Image.open(stream, formats=[f for f in FORMATS if f in Image.OPEN])
    except Image.DecompressionBombError as error:
        # Pillow's own, far higher limit comes first: "Image size (2500000000 pixels) exceeds limit of ...".
        found = re.search(r"\d+", str(error))
        pixels = f"{int(found[0]):,}" if found else "too many"
        raise InputError(
            f"{name}: the picture has {pixels} pixels, at most {MAX_PIXELS:,} in all are accepted; shrink it"
        ) from None
    except Exception as error:
        if kind := accepted_format(head):
            why = "" if isinstance(error, UnidentifiedImageError) else f" ({_text(error)})"
            raise InputError(
                f"{name}: the {kind} file is damaged or cut off, or of a kind that can't be read{why}; {_AGAIN}"
            ) from None
        raise InputError(f"{name}: the file is not a picture that can be read ({_WANTED})") from None


def _text(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


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
    # Older versions of Pillow open 16-bit grey PNGs as "I"; in all other files it is signed or 32-bit values.
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        values = "floating-point" if image.mode == "F" else "signed or 32-bit"
        raise InputError(
            f"{name}: the picture has {values} grey values, in which nothing says what is black and what is white; "
            "scale it to 8 or 16 bits without sign and save it again"
        )


def _loaded(image: Image.Image, stream: IO[bytes]) -> Image.Image:
    """`image` with its pixels decoded. A JPEG may lack its end marker, but no pixels."""
    try:
        load(image)
        return image
    except OSError:
        if image.format != "JPEG":
            raise
        stream.seek(0)
        whole, noisy = jpeg_endings(stream.read())
        image.close()  # frees the pixels so far
        if _digest(noisy) != _digest(whole):
            raise
        ended = Image.open(io.BytesIO(whole), formats=["JPEG"])
        ended.load()
        ended.info.update(image.info)
        return ended


def _digest(jpeg: bytes) -> bytes:
    with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
        digest = hashlib.sha256()
        for _, strip in strips(image):
            digest.update(strip.tobytes())
        return digest.digest()


@torch.inference_mode()
def encode_image(image: Image.Image, area: int, vision: IBQ) -> tuple[tuple[int, ...], ...]:
    """The codes[row][column] of an RGB picture, resized (bicubic) to about `area` pixels at its own aspect ratio."""
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
    """`decode_image` for several grids of one size in one pass."""
    pixels = vision.decode(torch.tensor(grids, device=vision.device)).float()
    pixels = ((pixels + 1.0) * 127.5).clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(each) for each in pixels.permute(0, 2, 3, 1).cpu().numpy()]
