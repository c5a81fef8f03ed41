"""Pictures of any mode as upright 8-bit sRGB, in strips: memory is the decoded picture, the result and little more."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageCms, TiffImagePlugin

from emu_cog.log import log

GREY = (128, 128, 128)
"""What a white logo is laid on: white and black contrast with it equally (4.0 and 5.3 to 1)."""
_STRIP_PIXELS = 1_000_000
_NEAR_WHITE = 230
"""From this value on in each channel (90 % of white), pixels are not seen on white."""
_SEEN_ALPHA = 16
"""Alpha below this is taken as invisible."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientations (CIPA DC-008, tag 0x0112) to what turns the picture upright."""


def load(image: Image.Image) -> None:
    """Decode the pixels. TIFFs, which Pillow turns upright itself, are decoded with their orientation as only tag."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        orientation = _orientation(image)  # Pillow would parse all other tags too, and fail at malformed ones
        exif = image.getexif()
        exif.load(b"")
        if orientation in _TURNS:
            exif[ExifTags.Base.Orientation] = orientation
    image.load()


def _orientation(image: Image.Image) -> int:
    """The orientation in EXIF, else in XMP; 1 where there is none or it is malformed."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # malformed EXIF raises all kinds of errors, and says nothing about the pixels
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def to_srgb(image: Image.Image) -> Image.Image:
    """Upright RGB in sRGB of a loaded picture: 16 bits scaled to 8, profiles converted, transparency on a background.

    The background is white, or `GREY` for pictures that would vanish on white (`_vanishes`).
    """
    orientation = _orientation(image)
    if image.mode == "RGB" and "transparency" not in image.info and not image.info.get("icc_profile"):
        result = image.copy() if orientation not in _TURNS else image
    elif "A" in image.getbands() or "transparency" in image.info:
        result = _flattened(image)
    else:
        convert = _converter(image)
        result = Image.new("RGB", image.size)
        for top, strip in strips(image):
            result.paste(convert(strip), (0, top))
    return result.transpose(_TURNS[orientation]) if orientation in _TURNS else result


def _flattened(image: Image.Image) -> Image.Image:
    """Alpha on white, or on grey where next to nothing would be seen on white."""
    result, seen, white = _laid_on((255, 255, 255), image)
    if _vanishes(pixels=image.width * image.height, seen=seen, white=white):
        log.info("the picture is white on transparency and would vanish on white: it is laid on grey")
        del result  # before the next one is made
        result, _, _ = _laid_on(GREY, image)
    return result


def _laid_on(background: tuple[int, int, int], image: Image.Image) -> tuple[Image.Image, int, int]:
    """The picture on a background, its number of visible pixels, and how many of these came out nearly white."""
    convert = _converter(image)
    result = Image.new("RGB", image.size)
    seen = white = 0
    for top, strip in strips(image):
        strip, alpha = _split_alpha(strip)
        flat = Image.new("RGB", strip.size, background)
        flat.paste(convert(strip), mask=alpha)
        result.paste(flat, (0, top))
        red, green, blue = flat.split()
        darkest = ImageChops.darker(ImageChops.darker(red, green), blue)
        histogram = darkest.histogram(alpha.point([0] * _SEEN_ALPHA + [255] * (256 - _SEEN_ALPHA)))
        seen, white = seen + sum(histogram), white + sum(histogram[_NEAR_WHITE:])
    return result, seen, white


def _vanishes(*, pixels: int, seen: int, white: int) -> bool:
    """Whether a picture of `pixels`, of which `seen` are visible and `white` of these nearly white, vanishes on white.

    At least a tenth must be transparent: pages with rounded corners are white too and lose nothing.
    """
    return 0 < seen <= 0.9 * pixels and white >= 0.95 * seen


def strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The picture in strips of about a million pixels, each with the row it starts at."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _split_alpha(strip: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The strip for the converter, and its alpha (mode L)."""
    if strip.mode.startswith("I"):
        return strip, Image.fromarray((np.asarray(strip) != strip.info["transparency"]).astype(np.uint8) * 255)
    # By way of RGBA, which applies "transparency"; a conversion to RGB would keep it as a key.
    rgba = strip if strip.mode == "RGBA" else strip.convert("RGBA")
    return rgba.convert("RGB"), rgba.getchannel("A")


def _converter(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """What turns a strip of `image` into RGB in sRGB, without regard to alpha."""
    if image.mode.startswith("I"):
        scale, invert = _grey_range(image)

        def deep(strip: Image.Image) -> Image.Image:
            # Pillow's own conversion clips 16-bit values to 255. A profile describes the 16-bit original: grey stays.
            values = np.clip(np.asarray(strip).astype(np.int64), 0, scale)
            grey = ((values * 255 + scale // 2) // scale).astype(np.uint8)
            return Image.fromarray(255 - grey if invert else grey).convert("RGB")

        return deep
    transparent = "A" in image.getbands() or "transparency" in image.info
    mode = "RGB" if transparent or image.mode not in ("RGB", "L", "CMYK", "LAB") else image.mode
    profile = image.info.get("icc_profile")
    transform = _transform(profile, mode) if profile and mode != "LAB" else None

    def plain(strip: Image.Image) -> Image.Image:
        strip = strip if strip.mode == mode else strip.convert(mode)
        return transform.apply(strip) if transform else strip if mode == "RGB" else strip.convert("RGB")

    return plain


def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        log.warning("the picture's colour profile can't be used (%s): its values are taken as sRGB", error)
        return None


def _grey_range(image: Image.Image) -> tuple[int, bool]:
    """The value of white in an integer grey picture, and whether 0 is white instead of black."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        return 2 ** min(bits, 16) - 1, image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    return 65535, False
