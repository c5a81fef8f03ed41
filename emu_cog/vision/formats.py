"""What a file is, by its first bytes, so that a refusal can name it and say what to do."""

from __future__ import annotations

from typing import IO

from PIL import TiffImagePlugin

HEAD_BYTES = 4096
"""How much of a file `foreign_format` and `accepted_format` look at."""

_SAVE = "save it as JPEG or PNG"
_EXPORT = "export it as JPEG or PNG from a photo program"
_HEIC = f"{_SAVE} (on an iPhone: Settings, Camera, Formats, Most Compatible; or share the photo as JPEG)"
_FRAME = "save one of its frames as PNG or JPEG"
RAW_ADVICE = "export it as JPEG or PNG from the camera or a photo program"
_UNPACK = "unpack it and give the picture itself"
_PAGE = "give the address of the picture itself, or save the picture and give the file"

# HEIC is named, not read: of its two packages, pi-heif 1.4.0 ended the process with a segmentation fault on a damaged
# file, and pillow-heif, which did not, ships the GPL encoder x265.
_BRANDS = (  # of ISO media files (ftyp); the first that a file lists decides
    (("heic", "heix", "heim", "heis", "hevc", "hevx", "hevm", "hevs"), "an HEIC photo", _HEIC),
    (("crx ",), "a camera's raw file (Canon CR3)", RAW_ADVICE),
    (("avif", "avis"), "", ""),
    (("mif1", "msf1", "mif2", "miaf"), "an HEIF photo", _HEIC),
    (("M4A ", "M4B "), "a sound file", "give a picture"),
)
_MAGIC = (  # offset, bytes, what it is, what to do
    (8, b"CR\x02\0", "a camera's raw file (Canon CR2)", RAW_ADVICE),
    (0, b"HEAPCCDR", "a camera's raw file (Canon CRW)", RAW_ADVICE),
    (6, b"HEAPCCDR", "a camera's raw file (Canon CRW)", RAW_ADVICE),
    (0, b"FUJIFILMCCD-RAW", "a camera's raw file (Fujifilm RAF)", RAW_ADVICE),
    (0, b"IIRO", "a camera's raw file (Olympus ORF)", RAW_ADVICE),
    (0, b"IIRS", "a camera's raw file (Olympus ORF)", RAW_ADVICE),
    (0, b"MMOR", "a camera's raw file (Olympus ORF)", RAW_ADVICE),
    (0, b"IIU\0", "a camera's raw file (Panasonic RW2)", RAW_ADVICE),
    (0, b"FOVb", "a camera's raw file (Sigma X3F)", RAW_ADVICE),
    (0, b"\0MRM", "a camera's raw file (Minolta MRW)", RAW_ADVICE),
    (0, b"\xff\x0a", "a JPEG XL picture", _SAVE),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture", _SAVE),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 picture", _SAVE),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 picture", _SAVE),
    (0, b"II\xbc", "a JPEG XR picture", _SAVE),
    (0, b"8BPS", "a Photoshop document (PSD)", _EXPORT),
    (0, b"gimp xcf", "a GIMP document (XCF)", _EXPORT),
    (0, b"v/1\x01", "an OpenEXR picture", _EXPORT),
    (0, b"#?RADIANCE", "a Radiance HDR picture", _EXPORT),
    (0, b"\0\0\1\0", "an icon file (ICO)", _SAVE),
    (0, b"icns", "an icon file (ICNS)", _SAVE),
    (0, b"DDS ", "a DDS texture", _SAVE),
    (0, b"qoif", "a QOI picture", _SAVE),
    (0, b"BPG\xfb", "a BPG picture", _SAVE),
    (0, b"AT&TFORM", "a DjVu document", "save one of its pages as PNG or JPEG"),
    (0, b"SIMPLE  =", "a FITS file", _EXPORT),
    (128, b"DICM", "a DICOM file", _EXPORT),
    (0, b"\xd7\xcd\xc6\x9a", "a WMF drawing", _EXPORT),
    (40, b" EMF", "an EMF drawing", _EXPORT),
    (0, b"%PDF", "a PDF document", "save one of its pages as PNG or JPEG"),
    (0, b"%!PS", "a PostScript file", "export it as PNG or JPEG"),
    (0, b"\xc5\xd0\xd3\xc6", "a PostScript file", "export it as PNG or JPEG"),
    (0, b"\x1a\x45\xdf\xa3", "a video (WebM or Matroska)", _FRAME),
    (8, b"AVI ", "a video (AVI)", _FRAME),
    (0, b"FLV\1", "a video (FLV)", _FRAME),
    (0, b"\0\0\1\xba", "a video (MPEG)", _FRAME),
    (0, b"\0\0\1\xb3", "a video (MPEG)", _FRAME),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a video (WMV)", _FRAME),
    (4, b"moov", "a video (QuickTime)", _FRAME),
    (4, b"mdat", "a video (QuickTime)", _FRAME),
    (4, b"wide", "a video (QuickTime)", _FRAME),
    (0, b"ID3", "a sound file", "give a picture"),
    (0, b"OggS", "a sound or video file (Ogg)", "give a picture"),
    (8, b"WAVE", "a sound file", "give a picture"),
    (0, b"PK\3\4", "a ZIP archive or an office document", _UNPACK),
    (0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
    (0, b"version https://git-lfs", "a Git LFS pointer", "fetch the file that it stands for (git lfs pull)"),
)
_ACCEPTED = (
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
    (8, b"WEBP", "WEBP"),
)

_DNG_VERSION, _SUBFILE_TYPE, _COMPRESSION, _PHOTOMETRIC, _SUB_IFDS = 50706, 254, 259, 262, 330
_RAW_COMPRESSIONS = (32767, 34713, 65000, 65535)
"""Sony ARW, Nikon NEF, Kodak DCR and Pentax PEF."""
_RAW_PHOTOMETRICS = (32803, 34892)
"""Colour filter array and linear raw (TIFF/EP and DNG)."""


def accepted_format(head: bytes) -> str | None:
    """Pillow's name of the accepted format that `head` begins like, or None."""
    for offset, magic, name in _ACCEPTED:
        if head.startswith(magic, offset):
            return name
    return "AVIF" if _brand(head) == ("", "") else None


def foreign_format(head: bytes) -> tuple[str, str] | None:
    """What a file that is not accepted is and what to do ("a PDF document", "save one of ..."), or None."""
    for offset, magic, what, advice in _MAGIC:
        if head.startswith(magic, offset):
            return what, advice
    if found := _brand(head):
        return found if found != ("", "") else None
    text = head[:1024].replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n").lower()
    if b"<svg" in text and text.startswith(b"<"):
        return "an SVG drawing", "export it as PNG"
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page (HTML)", _PAGE
    return None


def _brand(head: bytes) -> tuple[str, str] | None:
    if head[4:8] != b"ftyp":
        return None
    size = int.from_bytes(head[:4], "big")
    brands = head[8:12] + head[16 : max(16, min(size, 256))]
    listed = {brands[i : i + 4].decode("latin-1") for i in range(0, len(brands), 4)}
    for names, what, advice in _BRANDS:
        if listed.intersection(names):
            return what, advice
    return "a video (MP4 or QuickTime)", _FRAME


def is_camera_raw(tiff: IO[bytes]) -> bool:
    """Whether a TIFF file is a camera's raw file (DNG, NEF, ARW, PEF, ...), whose first picture is a thumbnail.

    Canon's CR2 has a signature of its own (`foreign_format`). The position in the file is left anywhere.
    """
    try:
        tiff.seek(0)
        head = tiff.read(16)
        tags = TiffImagePlugin.ImageFileDirectory_v2(head[: 16 if head[2:3] == b"+" or head[3:4] == b"+" else 8])
        tiff.seek(tags.next)
        tags.load(tiff)
        thumbnail = _SUB_IFDS in tags and bool(tags.get(_SUBFILE_TYPE, 0) & 1)
        return (
            thumbnail
            or _DNG_VERSION in tags
            or tags.get(_COMPRESSION) in _RAW_COMPRESSIONS
            or tags.get(_PHOTOMETRIC) in _RAW_PHOTOMETRICS
        )
    except Exception:  # malformed tags raise all kinds of errors: the reader itself judges them
        return False
