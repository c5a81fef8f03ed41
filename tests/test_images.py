"""Reference photos of every kind become upright sRGB; what is no picture is refused in one sentence."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from emu_cog.errors import InputError
from emu_cog.pipeline import Pipeline
from emu_cog.vision.images import decode_image, decode_images, encode_image, open_reference
from tests.conftest import photo

Pipelines = Callable[[str], Pipeline]


def opened(image: Image.Image, tmp_path: Path, name: str, **options: object) -> np.ndarray:
    path = tmp_path / name
    image.save(path, **options)  # type: ignore[arg-type]
    read = open_reference(path, name="reference_image")
    assert read.mode == "RGB"
    return np.asarray(read).astype(int)


def test_plain_pictures_stay_as_they_are(tmp_path: Path) -> None:
    source = photo(1)
    np.testing.assert_array_equal(opened(source, tmp_path, "a.png"), np.asarray(source))
    assert abs(opened(source, tmp_path, "a.webp", lossless=True) - np.asarray(source)).max() == 0
    assert abs(opened(source, tmp_path, "a.jpg", quality=95) - np.asarray(source)).mean() < 3


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    source = photo(1, 64, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by a quarter
    turned = opened(source, tmp_path, "a.png", exif=exif)
    np.testing.assert_array_equal(turned, np.asarray(source.transpose(Image.Transpose.ROTATE_270)))


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


def _png_header(width: int, height: int) -> bytes:
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (ihdr, body, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    photo(1).save(buffer, "JPEG")
    return buffer.getvalue()


BAD = {
    "text": (b"Dear Sir or Madam,", "not a picture"),
    "nothing": (b"", "0 bytes"),
    "truncated jpeg": (_jpeg()[:1500], "damaged or cut off"),
    "truncated png": (_png_header(200, 200), "damaged or cut off"),
    "one pixel": (_png_header(1, 1), "1x1 pixels"),
    "too large": (_png_header(50_000, 50_000), "2,500,000,000 pixels"),
    "large": (_png_header(12_000, 10_000), "12000x10000"),
    "too thin": (_png_header(2_000, 90), "20 times"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", "not a picture"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='90' height='90'/>", "not a picture"),
    "html": (b"<!doctype html><p>404", "not a picture"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_get_one_sentence(kind: str, tmp_path: Path) -> None:
    data, says = BAD[kind]
    path = tmp_path / "upload"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(InputError, match=f"(?s)reference_image_2: .*({says})") as caught:
        open_reference(path, name="reference_image_2")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000
    assert "\n" not in str(caught.value)


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
