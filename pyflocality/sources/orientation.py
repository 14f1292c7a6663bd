"""Which way up a photograph is, by what the camera noted.

The orientation is tag 274 of EXIF, or of XMP where EXIF has none. Nothing else of EXIF is looked
at: cameras and editors leave damaged tags in sound photographs, and Pillow, which reads all tags
and writes them back, then refuses the picture or loses the orientation behind the damage.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

_TAG = 274
# Codes of struct for TIFF's types of whole numbers.
_WHOLE = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}
# Tags of TIFF that tell how pixels are stored; all others tell about them.
_PIXEL_TAGS = frozenset(
    [254, 255, 256, 257, 258, 259, 262, 263, 266, 273, 274, 277, 278, 279, 280, 281, 284, 292, 293]
    + [317, 318, 319, 320, 322, 323, 324, 325, 332, 333, 334, 336, 338, 339, 340, 341, 347]
    + [*range(512, 522), *range(529, 533)]
)
_XMP = re.compile(rb"""tiff:Orientation(?:\s*=\s*["']|>)\s*([1-8])\s*["'<]""")


def upright(image: Image.Image) -> Image.Image:
    """The image turned and mirrored as its orientation says."""
    from PIL.Image import Transpose

    methods = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    # A PNG may have its EXIF behind the pixels.
    image.load()
    method = methods.get(_orientation(image))
    return image if method is None else image.transpose(method)


def without_metadata(content: bytes) -> bytes | None:
    """A JPEG or TIFF file with its pixels and its orientation alone; None for other files.

    For files that Pillow cannot open: it looks at the resolution that they note, for example.
    """
    try:
        if content.startswith(b"\xff\xd8\xff"):
            return _plain_jpeg(content)
        if content[:4] in (b"II*\x00", b"MM\x00*"):
            return _plain_tiff(content)
    except (struct.error, IndexError):
        # Cut short: nothing that can be helped.
        pass
    return None


def _plain_jpeg(content: bytes) -> bytes:
    segments, position, orientation = [content[:2]], 2, 1
    # Segments up to the start of the scan; what follows it is pixels.
    while content[position] == 0xFF and content[position + 1] not in (0xDA, 0xD9):
        (length,) = struct.unpack_from(">H", content, position + 2)
        segment = content[position : position + 2 + length]
        if segment[1] != 0xE1:
            segments.append(segment)
        elif segment[4:10] == b"Exif\x00\x00":
            orientation = _of_exif(segment[4:]) or orientation
        position += 2 + length
    exif = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, _TAG, 3, 1, orientation, 0)
    start = struct.pack(">HH", 0xFFE1, 8 + len(exif)) + b"Exif\x00\x00" + exif
    return b"".join([segments[0], start, *segments[1:], content[position:]])


def _plain_tiff(content: bytes) -> bytes:
    order = "<" if content.startswith(b"II") else ">"
    (start,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, start)
    entries = [content[start + 2 + 12 * row : start + 14 + 12 * row] for row in range(count)]
    rows = [row for row in entries if struct.unpack_from(f"{order}H", row)[0] in _PIXEL_TAGS]
    directory = struct.pack(f"{order}H", len(rows)) + b"".join(rows) + bytes(4)
    return content[:start] + directory + content[start + len(directory) :]


def _orientation(image: Image.Image) -> int:
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        # A TIFF file has no other EXIF; releases of Pillow that turn it while it is decoded have
        # taken the tag out by now.
        orientation = _of_tiff(tags)
    else:
        orientation = _of_exif(_exif(image.info))
    return _of_xmp(image.info) if orientation is None else orientation


def _of_tiff(tags: Mapping[int, object]) -> int | None:
    try:
        value = tags.get(_TAG)
    # Values are decoded when they are asked for, and the file may hold anything.
    except Exception:
        return 1
    return value if value is None or isinstance(value, int) else 1


def _exif(info: dict) -> bytes:
    """EXIF as a file holds it: bytes, or hexadecimal digits in the text of a PNG."""
    content = info.get("exif")
    if isinstance(content, bytes):
        return content
    profile = info.get("Raw profile type exif")
    if not isinstance(profile, str):
        return b""
    # An empty line, the name, the length, then the digits.
    try:
        return bytes.fromhex("".join(profile.split("\n")[3:]))
    except ValueError:
        return b""


def _of_exif(content: bytes) -> int | None:
    """The orientation by EXIF: None without the tag, 1 where it makes no sense."""
    content = re.sub(rb"\A(?:Exif\x00\x00)+", b"", content)
    order = {b"II": "<", b"MM": ">"}.get(content[:2])
    if order is None or len(content) < 8:
        return None
    (start,) = struct.unpack_from(f"{order}I", content, 4)
    if start + 2 > len(content):
        return None
    (count,) = struct.unpack_from(f"{order}H", content, start)
    for position in range(start + 2, min(start + 2 + 12 * count, len(content) - 11), 12):
        tag, kind, values = struct.unpack_from(f"{order}HHI", content, position)
        if tag == _TAG:
            code = _WHOLE.get(kind, "")
            # More values than there is room for lie elsewhere; of several the first counts.
            if not 0 < values * struct.calcsize(order + code) <= 4:
                return 1
            return struct.unpack_from(order + code, content, position + 8)[0]
    return None


def _of_xmp(info: dict) -> int:
    content = info.get("XML:com.adobe.xmp") or info.get("xmp")
    if isinstance(content, str):
        content = content.encode("utf-8", "replace")
    match = _XMP.search(content) if isinstance(content, bytes) else None
    return 1 if match is None else int(match[1])
