"""Reference photos of every kind become upright sRGB; what is no picture is refused in one sentence."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw

from emu_cog.errors import InputError
from emu_cog.pipeline import Pipeline
from emu_cog.vision.images import decode_image, decode_images, encode_image, open_reference
from emu_cog.vision.srgb import GREY, to_srgb
from tests.conftest import photo

Pipelines = Callable[[str], Pipeline]


def opened(image: Image.Image, tmp_path: Path, name: str, **options: object) -> np.ndarray:
    path = tmp_path / name
    image.save(path, **options)  # type: ignore[arg-type]
    return opened_bytes(path.read_bytes(), tmp_path)


def opened_bytes(data: bytes, tmp_path: Path) -> np.ndarray:
    path = tmp_path / "upload"
    path.write_bytes(data)
    read = open_reference(path, name="reference_image")
    assert read.mode == "RGB"
    return np.asarray(read).astype(int)


def refused(data: bytes, tmp_path: Path) -> str:
    path = tmp_path / "upload"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        open_reference(path, name="reference_image_2")
    assert str(caught.value).startswith("reference_image_2: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def test_plain_pictures_stay_as_they_are(tmp_path: Path) -> None:
    source = photo(1)
    np.testing.assert_array_equal(opened(source, tmp_path, "a.png"), np.asarray(source))
    assert abs(opened(source, tmp_path, "a.webp", lossless=True) - np.asarray(source)).max() == 0
    assert abs(opened(source, tmp_path, "a.jpg", quality=95) - np.asarray(source)).mean() < 3


# Orientation

WIDE = photo(1, 64, 32)
TURNED = np.asarray(WIDE.transpose(Image.Transpose.ROTATE_270)).astype(int)  # by orientation 6


def _exif(orientation: int, *, kind: int = 3, count: int = 1, before: bytes = b"", after: bytes = b"") -> bytes:
    """An EXIF block in big-endian order whose first directory has the orientation, and entries as given."""
    value = struct.pack(">HH", orientation, 0) if kind == 3 else struct.pack(">I", orientation)
    tag = struct.pack(">HHI", 0x0112, kind, count) + value
    entries = (len(before) + len(after)) // 12 + 1
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, entries) + before + tag + after + b"\0\0\0\0"


_BAD_RESOLUTION = struct.pack(">HHII", 0x011A, 2, 4, 0x41424300)  # XResolution as text "ABC" instead of a fraction
_XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientation_is_applied(kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"lossless": True} if kind == "WEBP" else {}
    turned = opened_bytes(encoded(WIDE, kind, exif=exif, **options), tmp_path)
    assert turned.shape == TURNED.shape
    assert abs(turned - TURNED).mean() < 6


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_turned_tiffs_are_not_scrambled(compression: str, tmp_path: Path) -> None:
    """Pillow maps an uncompressed TIFF into memory with width and height exchanged: the rows came out sheared."""
    data = encoded(WIDE.convert("L"), "TIFF", compression=compression, tiffinfo={0x0112: 6})
    np.testing.assert_array_equal(opened_bytes(data, tmp_path)[..., 0], np.asarray(WIDE.convert("L")).T[:, ::-1])


MALFORMED_EXIF = {
    "malformed XResolution": (_exif(6, after=_BAD_RESOLUTION), True),
    "malformed XResolution first": (_exif(6, before=_BAD_RESOLUTION), True),
    "cut off behind the orientation": (_exif(6, after=_BAD_RESOLUTION)[:-9], True),
    "cut off before the orientation": (_exif(6)[:20], False),
    "orientation as a long": (_exif(6, kind=4), True),
    "orientation as text": (_exif(6, kind=2), False),
    "two orientations in one entry": (_exif(6, count=2), True),
    "orientation 0": (_exif(0), False),
    "orientation 9": (_exif(9), False),
    "not TIFF": (b"Exif\0\0" + bytes(40), False),
    "empty": (b"Exif\0\0", False),
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("case", MALFORMED_EXIF)
def test_malformed_exif_never_refuses_a_picture(case: str, kind: str, tmp_path: Path) -> None:
    """A JPEG with orientation 6 and a malformed XResolution was "damaged or cut off": EXIF was written back."""
    exif, turned = MALFORMED_EXIF[case]
    pixels = opened_bytes(encoded(WIDE, kind, exif=exif), tmp_path)
    expected = TURNED if turned else np.asarray(WIDE).astype(int)
    assert pixels.shape == expected.shape
    assert abs(pixels - expected).mean() < 6


def test_a_tiff_with_a_malformed_tag_is_turned(tmp_path: Path) -> None:
    data = encoded(WIDE, "TIFF", tiffinfo={0x0112: 6, 0x0131: "ABC"})
    entry = struct.pack("<HH", 0x0131, 2)  # Software, text, becomes an XResolution of the wrong type
    assert entry in data
    pixels = opened_bytes(data.replace(entry, struct.pack("<HH", 0x011A, 2)), tmp_path)
    np.testing.assert_array_equal(pixels, TURNED)


def test_a_tiff_with_a_tag_beyond_its_end_is_read(tmp_path: Path) -> None:
    """Pillow stopped at the first such tag and read the picture without the tags behind it, its palette for one."""
    image = photo(1).quantize(32)
    for big in (False, True):
        data = encoded(image, "TIFF", tiffinfo={0x0131: "software"}, big_tiff=big)
        entry = struct.pack("<HHQ" if big else "<HHI", 0x0131, 2, 9)
        assert entry in data
        damaged = data.replace(entry, struct.pack("<HHQ" if big else "<HHI", 0x0131, 2, 999_999))
        np.testing.assert_array_equal(opened_bytes(damaged, tmp_path), np.asarray(image.convert("RGB")))


def test_an_avif_with_broken_exif_is_read(tmp_path: Path) -> None:
    """Pillow merges AVIF's own orientation into its EXIF, and failed where that was malformed."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(WIDE, "AVIF", exif=exif)
    assert opened_bytes(data, tmp_path).shape == TURNED.shape
    assert opened_bytes(data.replace(b"II*\0", b"I?*\0").replace(b"MM\0*", b"M?\0*"), tmp_path).shape == TURNED.shape


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_orientation_in_xmp_counts_where_exif_has_none(kind: str, tmp_path: Path) -> None:
    data = encoded(WIDE, kind, xmp=_XMP) if kind != "PNG" else _png(WIDE, _chunk(b"iTXt", _PNG_XMP + _XMP))
    assert opened_bytes(data, tmp_path).shape == TURNED.shape


# Transparency


def test_alpha_is_laid_on_white(tmp_path: Path) -> None:
    source = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    source.paste((0, 0, 255, 255), (0, 0, 16, 32))
    source.paste((0, 0, 0, 128), (16, 0, 24, 32))
    pixels = opened(source, tmp_path, "a.png")
    assert pixels[0, 0].tolist() == [0, 0, 255]
    assert pixels[0, 31].tolist() == [255, 255, 255]
    assert abs(pixels[0, 20] - 127).max() <= 1


def test_palette_with_transparency(tmp_path: Path) -> None:
    source = Image.new("P", (32, 32), 0)
    source.putpalette([0, 255, 0, 10, 20, 30] + [0] * 762)
    source.paste(1, (0, 0, 16, 32))
    pixels = opened(source, tmp_path, "a.png", transparency=0)
    assert pixels[0, 0].tolist() == [10, 20, 30]
    assert pixels[0, 31].tolist() == [255, 255, 255]


LOGO = Image.new("RGBA", (200, 100), (255, 255, 255, 0))
ImageDraw.Draw(LOGO).ellipse((50, 10, 150, 90), fill=(255, 255, 255, 255))


def test_a_white_logo_on_transparency_is_laid_on_grey(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It vanished on white."""
    with caplog.at_level(logging.INFO, logger="emu_cog"):
        pixels = opened(LOGO, tmp_path, "a.png")
    assert [record.getMessage() for record in caplog.records] == [
        "the picture is white on transparency and would vanish on white: it is laid on grey"
    ]
    assert pixels[0, 0].tolist() == list(GREY)
    assert pixels[50, 100].tolist() == [255, 255, 255]
    accented = LOGO.copy()
    ImageDraw.Draw(accented).rectangle((95, 45, 105, 55), fill=(200, 0, 0, 255))
    assert opened(accented, tmp_path, "a.webp", lossless=True)[0, 0].tolist() == list(GREY)
    indexed = LOGO.getchannel("A").point([0] * 128 + [1] * 128).convert("P")
    indexed.putpalette([255] * 6)
    assert opened(indexed, tmp_path, "a.gif", transparency=0)[0, 0].tolist() == list(GREY)


def test_what_is_seen_on_white_stays_on_white(tmp_path: Path) -> None:
    outlined, page, half = LOGO.copy(), Image.new("RGBA", (200, 100), "white"), LOGO.copy()
    ImageDraw.Draw(outlined).ellipse((50, 10, 150, 90), outline=(0, 0, 0, 255), width=4)
    page.putpixel((0, 0), (255, 255, 255, 0))  # a white page with transparent corners
    ImageDraw.Draw(half).rectangle((50, 50, 150, 90), fill=(0, 90, 0, 255))
    blank = Image.new("RGBA", (200, 100), (0, 0, 0, 0))
    for image in (outlined, page, half, blank):
        assert opened(image, tmp_path, "a.png")[0, 0].tolist() == [255, 255, 255]


def test_grey_and_grey_with_alpha(tmp_path: Path) -> None:
    assert opened(Image.new("L", (32, 32), 77), tmp_path, "a.png")[0, 0].tolist() == [77, 77, 77]
    assert opened(Image.new("LA", (32, 32), (77, 0)), tmp_path, "b.png")[0, 0].tolist() == [255, 255, 255]
    assert opened(Image.new("1", (32, 32), 1), tmp_path, "c.png")[0, 0].tolist() == [255, 255, 255]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    pixels = opened(Image.fromarray(values), tmp_path, "a.png")
    assert abs(pixels[..., 0] - values / 257).max() <= 0.51
    pixels = opened(Image.fromarray(values), tmp_path, "a.tiff")
    assert abs(pixels[..., 0] - values / 257).max() <= 0.51
    grey = Image.fromarray(values.astype(np.int32))  # as older versions of Pillow open 16-bit grey PNGs
    np.testing.assert_array_equal(np.asarray(to_srgb(grey))[..., 0], pixels[..., 0])


def _tiff(values: np.ndarray, *, bits: int = 16, photometric: int = 1, sample_format: int = 1, **more: int) -> bytes:
    """An uncompressed grey TIFF of 32x32 `values` in their own byte order; `more` are long tags (tag254=1)."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    data = values.tobytes()
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(int)
        data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    tags = {256: 32, 257: 32, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 32, 279: len(data)}
    tags |= {339: sample_format} | {int(name[3:]): value for name, value in more.items()}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    directory = b"".join(
        struct.pack(order + "HHI", tag, 3, 1) + struct.pack(order + "HH", value, 0)
        for tag, value in sorted(tags.items())
    )
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(order + "IH", 8, len(tags)) + directory + bytes(4) + data


RAMP = np.linspace(0, 65535, 32 * 32).reshape(32, 32)


def test_every_range_of_grey_is_scaled(tmp_path: Path) -> None:
    """12 bits came out at a sixteenth of their brightness, and 16 bits with white as 0 as negatives."""
    grey = np.round(RAMP / 257)
    for data, expected in (
        (_tiff(RAMP.astype("<u2")), grey),
        (_tiff(RAMP.astype(">u2")), grey),
        (_tiff(RAMP.astype("<u2"), photometric=0), 255 - grey),
        (_tiff((RAMP / 16).astype("<u2"), bits=12), grey),
    ):
        assert abs(opened_bytes(data, tmp_path)[..., 0] - expected).max() <= 1


def test_values_without_a_fixed_range_are_refused(tmp_path: Path) -> None:
    """An int32 TIFF came out white, a float one of 0..1 black."""
    for data, says in (
        (encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "signed or 32-bit grey values"),
        (encoded(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"), "floating-point grey values"),
        (_tiff(RAMP.astype("<u4"), bits=32), "signed or 32-bit grey values"),
        (_tiff((RAMP / 2).astype("<i2"), sample_format=2), "signed or 32-bit grey values"),
        (_tiff(RAMP.astype("<f8"), bits=64, sample_format=3), "of a kind that can't be read"),
    ):
        assert says in refused(data, tmp_path)


def _peak_memory(path: Path) -> float:
    """MB that reading `path` adds to a fresh process."""
    code = f"""
import resource
from pathlib import Path
from emu_cog.vision.images import open_reference
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
open_reference(Path({str(path)!r}), name="x")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024 / 1e6


@pytest.mark.slow
def test_memory_of_large_pictures_is_bounded(tmp_path: Path) -> None:
    """A 100-megapixel 16-bit grey PNG of 214 kB took 2.9 GB: Pillow's 2 bytes a pixel became float64, twice over."""
    grey = Image.new("L", (10_000, 10_000), 99)
    for image in (Image.fromarray(np.full((10_000, 10_000), 40_000, np.uint16)), grey.convert("RGBA")):
        image.save(tmp_path / "large.png", compress_level=1)
        assert _peak_memory(tmp_path / "large.png") < 900


def test_strips_give_what_the_whole_picture_gives(tmp_path: Path) -> None:
    image = photo(4, 1100, 1000)  # two strips
    profile = _swap_red_and_blue(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    expected = ImageCms.profileToProfile(
        image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert expected is not None
    np.testing.assert_array_equal(opened(image, tmp_path, "a.png", icc_profile=profile), np.asarray(expected))


def test_cmyk_is_converted(tmp_path: Path) -> None:
    pixels = opened(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), tmp_path, "a.jpg", quality=100)
    assert pixels[0, 0, 0] > 200
    assert pixels[0, 0, 1:].max() < 60


def test_animations_give_their_first_frame(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    for name in ("a.gif", "a.webp", "a.png"):
        pixels = opened(first, tmp_path, name, save_all=True, append_images=[second], duration=100)
        assert abs(pixels[16, 16] - [255, 0, 0]).max() < 12


def test_colour_profiles_are_converted_to_srgb(tmp_path: Path) -> None:
    source = photo(2)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = opened(source, tmp_path, "a.png", icc_profile=lab)
    assert abs(same - np.asarray(source)).max() <= 2
    swapped = opened(source, tmp_path, "b.png", icc_profile=_swap_red_and_blue(lab))
    assert abs(swapped - np.asarray(source)[..., ::-1]).mean() < 6  # primaries exchanged: red light is blue


def _swap_red_and_blue(profile: bytes) -> bytes:
    """The same profile with its rXYZ and bXYZ tags exchanged."""
    return profile.replace(b"rXYZ", b"tmp_").replace(b"bXYZ", b"rXYZ").replace(b"tmp_", b"bXYZ")


def test_a_broken_profile_is_ignored(tmp_path: Path) -> None:
    source = photo(3)
    np.testing.assert_array_equal(opened(source, tmp_path, "a.png", icc_profile=b"nonsense"), np.asarray(source))


# Metadata and damage


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(image: Image.Image, *chunks: bytes) -> bytes:
    """A PNG of `image` with these chunks between its header and its pixels."""
    data = encoded(image, "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def _deep_png(depth: int, colour: int, row: bytes, *chunks: bytes) -> bytes:
    """A PNG of 32 equal rows of 32 pixels."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, depth, colour, 0, 0, 0))
    pixels = _chunk(b"IDAT", zlib.compress((b"\0" + row) * 32))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + _chunk(b"IEND", b"")


_PNG_XMP = b"XML:com.adobe.xmp\0\0\0\0\0"
_ZEROS = zlib.compress(bytes(3_000_000))
PNG_METADATA = {
    "wrong checksum in a text": _chunk(b"tEXt", b"a\0b")[:-1] + b"!",
    "wrong checksum in a colour profile": _chunk(b"iCCP", b"a\0\0b")[:-1] + b"!",
    "a text that inflates to 3 MB": _chunk(b"zTXt", b"a\0\0" + _ZEROS),
    "XMP that inflates to 3 MB": _chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + _ZEROS),
    "much text": _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000))) * 70,
    "a colour profile that inflates to 3 MB": _chunk(b"iCCP", b"a\0\0" + _ZEROS),
    "a colour profile of unknown compression": _chunk(b"iCCP", b"a\0\5b"),
    "unknown colour chunks": _chunk(b"cICP", b"\1\2\0\1") + _chunk(b"mDCV", b"") + _chunk(b"cLLI", b"1"),
    "cut off chunks": b"".join(_chunk(kind, b"") for kind in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tRNS", b"tIME")),
    "a broken animation": _chunk(b"acTL", b"1") + _chunk(b"fcTL", b"2"),
    "a private chunk": _chunk(b"vpAg", b"x"),
    "a text that is not Latin-1": _chunk(b"iTXt", _PNG_XMP + b"\xff\xfe"),
}


@pytest.mark.parametrize("case", PNG_METADATA)
def test_metadata_never_refuses_a_png(case: str, tmp_path: Path) -> None:
    """Pixels decide. Pillow refused the picture for a wrong checksum or an oversized text."""
    np.testing.assert_array_equal(opened_bytes(_png(photo(1), PNG_METADATA[case]), tmp_path), np.asarray(photo(1)))


def test_pixels_still_decide_what_is_a_damaged_png(tmp_path: Path) -> None:
    data = encoded(photo(1), "PNG")
    np.testing.assert_array_equal(opened_bytes(data[:-16], tmp_path), np.asarray(photo(1)))  # lacks its end, no pixel
    header = _chunk(b"IHDR", b"")[:8] + data[16:29] + bytes(4)
    for damaged in (data[:-500], data.replace(data[8:33], header), data[:33] + data[-12:]):
        assert "damaged or cut off" in refused(damaged, tmp_path)
    assert "damaged or cut off" in refused(_deep_png(8, 3, bytes(32)), tmp_path)  # indexed, without a palette: black


def test_transparent_values_of_every_depth(tmp_path: Path) -> None:
    """PNG gives them in the file's own depth, Pillow compares them with 8 bits."""
    for depth, colour, row, key in (
        (2, 0, b"\xaa" * 4 + b"\0" * 4, b"\0\2"),
        (4, 0, b"\x33" * 8 + b"\0" * 8, b"\0\3"),
        (16, 0, b"\x12\x34" * 16 + b"\0\0" * 16, b"\x12\x34"),
        (16, 2, b"\x12\x34" * 48 + b"\0\0" * 48, b"\x12\x34" * 3),
    ):
        pixels = opened_bytes(_deep_png(depth, colour, row, _chunk(b"tRNS", key)), tmp_path)
        assert (pixels[0, 0].tolist(), pixels[0, 31].tolist()) == ([255] * 3, [0] * 3)


JPEG_METADATA = {
    "malformed multi-picture index": b"\xff\xe2\x00\x20MPF\0MM\0*" + bytes(22),
    "short JFIF header": b"\xff\xe0\x00\x07JFIF\0",
    "short Adobe header": b"\xff\xee\x00\x07Adobe",
    "short colour profile": b"\xff\xe2\x00\x0eICC_PROFILE\0",
    "missing part of a colour profile": b"\xff\xe2\x00\x14ICC_PROFILE\0\1\3data",
    "malformed Photoshop block": b"\xff\xed\x00\x18Photoshop 3.0\x008BIM\3\xed\0\0",
    "comment": b"\xff\xfe\x00\x05\xff\xd9\xff",
}


@pytest.mark.parametrize("case", JPEG_METADATA)
def test_metadata_never_refuses_a_jpeg(case: str, tmp_path: Path) -> None:
    data = _jpeg()
    expected = opened_bytes(data, tmp_path)
    np.testing.assert_array_equal(opened_bytes(data[:2] + JPEG_METADATA[case] + data[2:], tmp_path), expected)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"quality": 95}])
def test_a_jpeg_may_lack_its_end_marker_but_no_rows(options: dict[str, int], tmp_path: Path) -> None:
    """Without its last two bytes it was refused; with an end marker put there, a cut-off one would pass, half grey."""
    data = encoded(photo(1), "JPEG", **options)
    expected = opened_bytes(data, tmp_path)
    for cut in (1, 2):
        np.testing.assert_array_equal(opened_bytes(data[:-cut], tmp_path), expected)
    for cut in (5, 10, 60, 400, 1200):
        assert "damaged or cut off" in refused(data[:-cut], tmp_path)


def test_a_webp_may_lack_metadata_at_its_end(tmp_path: Path) -> None:
    data = encoded(photo(1), "WEBP", lossless=True, xmp=_XMP.replace(b"6", b"1"))
    np.testing.assert_array_equal(opened_bytes(data[:-20], tmp_path), np.asarray(photo(1)))
    assert "damaged or cut off" in refused(encoded(photo(1), "WEBP")[:-20], tmp_path)


def test_random_damage_gives_a_picture_or_one_sentence(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = photo(1, 48, 40)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"):
        data = encoded(image, kind, exif=exif)
        for _ in range(25):
            damaged = np.frombuffer(data, np.uint8).copy()
            damaged[rng.integers(0, min(len(data), 500), 4)] = rng.integers(0, 256, 4)
            (tmp_path / "upload").write_bytes(damaged[: len(data) - int(rng.integers(0, 3))].tobytes())
            with contextlib.suppress(InputError):
                assert open_reference(tmp_path / "upload", name="x").mode == "RGB"


# Refusals


def _png_header(width: int, height: int) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(b"\0" * 100)) + _chunk(b"IEND", b"")


def _jpeg() -> bytes:
    return encoded(photo(1), "JPEG")


BAD = {
    "text": (b"Dear Sir or Madam,", "not a picture"),
    "nothing": (b"", "0 bytes"),
    "truncated jpeg": (_jpeg()[:1500], "damaged or cut off"),
    "truncated png": (_png_header(200, 200), "damaged or cut off"),
    "one pixel": (_png_header(1, 1), "1x1 pixels"),
    "too large": (_png_header(50_000, 50_000), "2,500,000,000 pixels"),
    "large": (_png_header(12_000, 10_000), "12000x10000"),
    "too thin": (_png_header(2_000, 90), "20 times"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", "a PostScript file, not a picture"),
    "svg": (b"<?xml version='1.0'?>\n<svg width='90' height='90'/>", "an SVG drawing, not a picture.*export it as PNG"),
    "html": (b"<!doctype html><p>404", "a web page.*, not a picture.*the address of the picture itself"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "an HEIC photo, not a picture.*iPhone.*Most Compatible"),
    "heic of a burst": (b"\0\0\0\x18ftypmsf1\0\0\0\0msf1hevc", "an HEIC photo"),
    "heif": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1miaf", "an HEIF photo"),
    "avif": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", "the AVIF file is damaged"),
    "cr3": (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "raw file .Canon CR3"),
    "cr2": (b"II*\0\x10\0\0\0CR\2\0", "raw file .Canon CR2"),
    "raf": (b"FUJIFILMCCD-RAW 0201", "raw file .Fujifilm"),
    "dng": (_tiff(RAMP.astype("<u2"), tag50706=1), "a camera's raw file"),
    "nef": (_tiff(RAMP.astype("<u2"), tag254=1, tag330=8), "a camera's raw file"),
    "mosaic": (_tiff(RAMP.astype("<u2"), photometric=32803), "a camera's raw file"),
    "jpeg xl": (b"\xff\x0a\xfa\x7f", "a JPEG XL picture.*save it as JPEG or PNG"),
    "jpeg xl in boxes": (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture"),
    "jpeg 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 picture"),
    "psd": (b"8BPS\0\1", "a Photoshop document"),
    "pdf": (b"%PDF-1.7\n", "a PDF document.*save one of its pages"),
    "mp4": (b"\0\0\0\x18ftypisom\0\0\2\0isommp42", "a video .MP4 or QuickTime.*one of its frames"),
    "mov": (b"\0\0\0\x14ftypqt  \0\0\2\0qt  ", "a video .MP4 or QuickTime"),
    "webm": (b"\x1a\x45\xdf\xa3webm", "a video .WebM"),
    "zip": (b"PK\3\4", "a ZIP archive.*unpack it"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "damaged tiff": (b"II*\0\x08\0\0\0\0\0", "the TIFF file is damaged or cut off"),
}


def test_a_file_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="x: the file can't be opened"):
        open_reference(tmp_path / "missing.png", name="x")


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_get_one_sentence(kind: str, tmp_path: Path) -> None:
    data, says = BAD[kind]
    tracemalloc.start()
    assert re.search(says, refused(data, tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_codes_survive_the_way_to_pixels_and_back_in_shape(pipelines: Pipelines) -> None:
    vision = pipelines("picture").vision
    codes = encode_image(photo(1, 200, 150), 96 * 96, vision)
    assert (len(codes), len(codes[0])) == (5, 7)
    image = decode_image(codes, vision)
    assert (image.mode, image.size) == ("RGB", (112, 80))


def test_pictures_of_one_size_are_decoded_side_by_side_as_alone(pipelines: Pipelines) -> None:
    vision = pipelines("picture").vision
    grids = [encode_image(photo(seed, 200, 150), 96 * 96, vision) for seed in (1, 2, 3)]
    together = decode_images(grids, vision)
    assert len({image.tobytes() for image in together}) == 3
    for grid, image in zip(grids, together, strict=True):
        alone = np.asarray(decode_image(grid, vision)).astype(int)
        assert np.abs(alone - np.asarray(image)).max() <= 1  # the order of sums may change with the batch
