"""Picture files reduced to what their pixels need, so that no metadata can make a picture unreadable.

Functions over a file's bytes. Pillow refuses a whole picture for a wrong checksum in a text chunk, for text that
is too long, and for EXIF that it can't write back.
"""

from __future__ import annotations

import io
import mmap
import struct
import zlib
from collections.abc import Iterator

from PIL import PngImagePlugin

_PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_PNG_MEANING = (b"tRNS", b"iCCP", b"eXIf")
"""Ancillary chunks that change what is seen: transparency, colour, orientation. Kept where they can be read."""
_PNG_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
"""Keywords of text chunks that may hold the orientation."""

Buffer = bytes | mmap.mmap


def png_pixels(data: Buffer) -> bytes:
    """A PNG of the chunks that decide what is seen; other chunks and unreadable ancillary ones are left out.

    Animations become their default picture. A file that is cut off stays cut off.
    """
    kept = [data[:8]]
    mode, depth, colour, palette = "", 8, 2, False
    for kind, start, end in _png_chunks(data):
        if kind in _PNG_PIXELS:
            palette = palette or kind == b"PLTE"
            if kind == b"IDAT" and colour == 3 and not palette:
                continue  # Pillow would show it black
            if kind != b"PLTE" or colour == 3:  # elsewhere the palette is but a suggestion
                kept.append(data[start:end])
            if kind == b"IHDR" and end - start >= 25:
                depth, colour = data[start + 16], data[start + 17]
                mode = PngImagePlugin._MODES.get((depth, colour), ("", ""))[0]
        elif kind in _PNG_MEANING or (kind in (b"tEXt", b"zTXt", b"iTXt") and _starts(data, start + 8, _PNG_TEXTS)):
            body = data[start + 8 : end - 4]
            sound = zlib.crc32(kind + body) == int.from_bytes(data[end - 4 : end], "big")
            if sound and _png_readable(kind, body, mode):
                kept.append(_png_chunk(kind, _eight_bit_key(body, depth, colour) if kind == b"tRNS" else body))
    return b"".join(kept)


def _png_chunks(data: Buffer) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end (after the checksum) of each chunk; of one that is cut off only if it holds pixels."""
    start = 8
    while start + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[start : start + 8])
        end = start + 12 + length
        if end > len(data) and kind != b"IDAT":
            return
        yield kind, start, min(end, len(data))
        if kind == b"IEND":
            return
        start = end


def _starts(data: Buffer, start: int, prefixes: tuple[bytes, ...]) -> bool:
    return data[start : start + max(map(len, prefixes))].startswith(prefixes)


def _png_readable(kind: bytes, body: bytes, mode: str) -> bool:
    """Whether Pillow's own reader of this chunk takes it."""
    stream = PngImagePlugin.PngStream(io.BytesIO(body))
    stream.im_mode = mode
    try:
        stream.call(kind, 0, len(body))
    except Exception:
        return False
    return kind != b"tRNS" or mode == "P" or len(body) in (2, 6)


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _eight_bit_key(body: bytes, depth: int, colour: int) -> bytes:
    """The transparent grey or colour in the 8 bits that Pillow gives the pixels; it compares without scaling."""
    if colour == 2 and depth == 16:
        return struct.pack(">3H", *(value >> 8 for value in struct.unpack(">3H", body[:6])))
    if colour == 0 and depth in (2, 4):
        return struct.pack(">H", (struct.unpack(">H", body[:2])[0] * 255 // (2**depth - 1)) & 0xFF)
    return body


def jpeg_pixels(data: Buffer) -> tuple[bytes, dict[str, bytes]]:
    """A JPEG without its metadata segments, and what Pillow calls "exif" and "xmp", where it has them.

    Kept are the segments that decide colours (JFIF, Adobe, ICC profile) and all from the first scan on.
    """
    kept, info, start = [data[:2]], dict[str, bytes](), 2
    while start + 4 <= len(data) and data[start] == 0xFF and data[start + 1] != 0xDA:
        marker = data[start + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8:  # padding and markers without a length
            start += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(data[start + 2 : start + 4], "big")
        end = start + 2 + length
        if length < 2 or end > len(data):
            break
        if 0xE0 <= marker <= 0xEF or marker == 0xFE:
            body = data[start + 4 : end]
            if marker == 0xE1 and body.startswith(b"Exif\0\0"):
                info["exif"] = info["exif"] + body[6:] if "exif" in info else body
            elif marker == 0xE1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                info["xmp"] = body.split(b"\0", 1)[1]
            elif (
                (marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14)
                or (marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12)
                or (marker == 0xE2 and body.startswith(b"ICC_PROFILE\0") and len(body) > 14)
            ):
                kept.append(data[start:end])
        else:
            kept.append(data[start:end])
        start = end
    kept.append(data[start:])
    return b"".join(kept), info


def jpeg_endings(data: bytes) -> tuple[bytes, bytes]:
    """The JPEG `data`, which lacks its end marker, with it, and with noise before it.

    A decoder fills missing blocks from whatever follows. The two have the same pixels only if none is missing.
    """
    noise = b"".join(zlib.crc32(bytes([i])).to_bytes(4, "big") for i in range(128)).replace(b"\xff", b"\x7f")
    body = data.rstrip(b"\xff")
    return body + b"\xff\xd9", body + noise + b"\xff\xd9"


def webp_pixels(data: Buffer) -> tuple[bytes, dict[str, bytes]]:
    """A WebP without its metadata chunks, and what Pillow calls "exif" and "xmp", where it has them."""
    kept, info, start = [b"WEBP"], dict[str, bytes](), 12
    while start + 8 <= len(data):
        kind, length = struct.unpack("<4sI", data[start : start + 8])
        body = data[start + 8 : start + 8 + length]
        if kind in (b"EXIF", b"XMP "):
            info["exif" if kind == b"EXIF" else "xmp"] = body
        else:
            kept.append(data[start : start + 8] + body + b"\0" * (length % 2))
        start += 8 + length + length % 2
    return b"RIFF" + struct.pack("<I", sum(map(len, kept))) + b"".join(kept), info


def avif_pixels(data: Buffer) -> bytes:
    """An AVIF file whose EXIF is hidden by renaming its items. The orientation that counts is AVIF's own."""
    start = 0
    while start + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[start : start + 8])
        if size == 1:
            size = int.from_bytes(data[start + 8 : start + 16], "big")
        end = len(data) if size == 0 else start + size
        if kind == b"meta":
            return data[:start] + data[start:end].replace(b"Exif", b"skip") + data[end:]
        if size != 0 and size < 8:
            break
        start = end
    return data[:]


_TIFF_PIXELS = (
    *(
        256,
        257,
        258,
        259,
        262,
        266,
        273,
        277,
        278,
        279,
        284,
        292,
        293,
        317,
        320,
        322,
        323,
        324,
        325,
        332,
        338,
        339,
        347,
    ),
    *(*range(512, 522), 529, 530, 531, 532),
)
"""Size, layout, compression, colours and JPEG tables (TIFF 6.0, its technical notes and supplements)."""
_TIFF_MEANING = {274: (3, 4), 700: (1, 7), 34675: (1, 7)}
"""Orientation, XMP and colour profile, each with its types. Kept where they are well-formed."""


def hide_tiff_tags(data: mmap.mmap | bytearray) -> None:
    """Reduce the first directory of a TIFF, in place, to the tags that decide what is seen, and hide later pages.

    Pillow stops reading tags at the first malformed one, and goes on without those behind it.
    """
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")  # BigTIFF
    count_format, entry_format, offset_format = (order + each for each in ("Q HHQ8s Q" if big else "H HHI4s I").split())
    count_size, entry_size, offset_size = map(struct.calcsize, (count_format, entry_format, offset_format))
    at = 8 if big else 4
    if len(data) < at + offset_size:
        return
    (start,) = struct.unpack(offset_format, data[at : at + offset_size])
    if start + count_size > len(data):
        return
    (count,) = struct.unpack(count_format, data[start : start + count_size])
    first = start + count_size
    if first + count * entry_size + offset_size > len(data):
        return
    kept = []
    for at in range(first, first + count * entry_size, entry_size):
        entry = data[at : at + entry_size]
        tag, kind, length, value = struct.unpack(entry_format, entry)
        if tag in _TIFF_MEANING and kind in _TIFF_MEANING[tag]:
            offset = struct.unpack(offset_format, value)[0]
            if length == 1 if tag == 274 else offset_size < length <= len(data) - offset:
                kept.append(entry)
        elif tag in _TIFF_PIXELS:
            kept.append(entry)
    reduced = struct.pack(count_format, len(kept)) + b"".join(kept) + bytes(offset_size)
    data[start : start + len(reduced)] = reduced
