"""Which way up photographs come, whatever their cameras and editors wrote beside it."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, features
from source_files import encoded, load

from pyflocality.sources.orientation import without_metadata

PIXELS = np.random.default_rng(4).integers(0, 256, (16, 24, 3), dtype=np.uint8)
# EXIF's orientations 1 to 8: where the first row and the first column of the pixels belong.
TURNED = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: np.rot90(image, 1),
}


def ascii_tag(tag, text):
    return tag, 2, len(text), text.ljust(4, b"\0")[:4]


def orientation_tag(order, value):
    return 274, 3, 1, struct.pack(f"{order}HH", value, 0)


# What is found in sound photographs: numbers that no writer can put back, kinds mixed up, values
# that lie outside of the file.
DAMAGED = {
    "rational -1/0": [(282, 10, 1, "-1/0"), (283, 10, 1, "-1/0")],
    "text where a number belongs": [ascii_tag(296, b"in\0"), ascii_tag(282, b"72\0")],
    "date as rational": [(306, 5, 1, "-1/0"), (36867, 5, 1, "-1/0")],
    "outside of the file": [
        (271, 2, 9999, struct.pack("<I", 2**31)),
        (305, 2, 2**32 - 1, b"\xff" * 4),
    ],
    "unknown kind": [(270, 99, 3, b"abc\0"), (315, 0, 0, b"\0" * 4)],
    "pointers to nowhere": [ascii_tag(34665, b"x\0"), (34853, 4, 1, b"\xfe" * 4)],
    "XMP of a wrong kind": [(700, 5, 1, "-1/0")],
}


def directory(order, tags, at=8):
    """The entries of a TIFF directory that lies at a position, values of 8 bytes behind it."""
    tags = sorted(tags, key=lambda tag: tag[0])
    values = at + 2 + 12 * len(tags) + 4
    rows = b""
    for tag, kind, count, value in tags:
        if value == "-1/0":
            value = struct.pack(f"{order}I", values)
        rows += struct.pack(f"{order}HHI", tag, kind, count) + value
    return struct.pack(f"{order}H", len(tags)) + rows + bytes(4) + struct.pack(f"{order}ii", -1, 0)


def exif(order, tags):
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(f"{order}I", 8) + directory(order, tags)


def jpeg(content, tags=b"Exif\0\0"):
    plain = encoded(Image.fromarray(PIXELS), "JPEG", quality=95)
    payload = tags + content
    return plain[:2] + struct.pack(">HH", 0xFFE1, len(payload) + 2) + payload + plain[2:]


def png(content, kind=b"eXIf"):
    plain = encoded(Image.fromarray(PIXELS))
    chunk = kind + content
    chunk = struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    # Behind the pixels, where it is allowed and easily missed.
    return plain[:-12] + chunk + plain[-12:]


def webp(content):
    return encoded(Image.fromarray(PIXELS), "WEBP", lossless=True, exif=b"Exif\0\0" + content)


def avif(content):
    return encoded(Image.fromarray(PIXELS), "AVIF", quality=100, exif=b"Exif\0\0" + content)


def tiff(tags):
    """A TIFF file with more tags than it was written with."""
    order, content = "<", encoded(Image.fromarray(PIXELS), "TIFF")
    (start,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, start)
    rows = [content[start + 2 + 12 * row : start + 14 + 12 * row] for row in range(count)]
    own = [(*struct.unpack_from(f"{order}HHI", row), row[8:]) for row in rows]
    new = {tag[0] for tag in tags}
    content += bytes(len(content) % 2)
    entries = directory(order, [tag for tag in own if tag[0] not in new] + tags, len(content))
    return content[:4] + struct.pack(f"{order}I", len(content)) + content[8:] + entries


def decoded(tmp_path, name, content):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    with warnings.catch_warnings():
        # Pillow's, about tags.
        warnings.simplefilter("ignore")
        return load(folder).images.numpy()[0].transpose(1, 2, 0)


def plain_pixels(form):
    options = {"JPEG": {"quality": 95}, "AVIF": {"quality": 100}}.get(form)
    if options is None:
        return PIXELS
    content = encoded(Image.fromarray(PIXELS), form, **options)
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


WRITERS = {"JPEG": jpeg, "PNG": png, "WEBP": webp, "AVIF": avif}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("form", [*WRITERS, "TIFF"])
def test_every_orientation_of_every_format(tmp_path, form, orientation):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow does not read AVIF")
    for order in "<" if form == "TIFF" else "<>":
        tags = [orientation_tag(order, orientation)]
        content = tiff(tags) if form == "TIFF" else WRITERS[form](exif(order, tags))
        found = decoded(tmp_path, "a.png", content)
        np.testing.assert_array_equal(found, TURNED[orientation](plain_pixels(form)))


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_damaged_tags_beside_the_orientation_change_nothing(tmp_path, form, damage):
    """Such photographs were refused, as Pillow could not write the tags back."""
    tags = [*DAMAGED[damage], orientation_tag("<", 6)]
    content = tiff(tags) if form == "TIFF" else WRITERS[form](exif("<", tags))
    found = decoded(tmp_path, f"a.{form.lower()}", content)
    np.testing.assert_array_equal(found, TURNED[6](plain_pixels(form)))


@pytest.mark.parametrize(
    "tag",
    [
        ascii_tag(274, b"6\0"),
        (274, 5, 1, b"\6\0\0\0"),
        (274, 3, 9, b"\6\0\0\0"),
        (274, 3, 0, b"\6\0\0\0"),
        (274, 3, 1, b"\0\0\0\0"),
        (274, 3, 1, b"\x09\0\0\0"),
        (274, 8, 1, b"\xff\xff\0\0"),
    ],
    ids=["text", "rational", "elsewhere", "none", "0", "9", "-1"],
)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_orientation_that_makes_no_sense_is_none(tmp_path, form, tag):
    content = tiff([tag]) if form == "TIFF" else WRITERS[form](exif("<", [tag]))
    found = decoded(tmp_path, f"a.{form.lower()}", content)
    np.testing.assert_array_equal(found, plain_pixels(form))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"II",
        b"II*\0\xff\xff\xff\xff",
        b"XX*\0\x08\0\0\0",
        exif("<", DAMAGED["unknown kind"])[:-9],
    ],
)
def test_exif_that_is_cut_short_is_none(tmp_path, content):
    np.testing.assert_array_equal(decoded(tmp_path, "a.jpeg", jpeg(content)), plain_pixels("JPEG"))


def test_orientations_as_other_whole_numbers_count(tmp_path):
    for kind, count in ((1, 1), (4, 1), (9, 1), (3, 2)):
        found = decoded(tmp_path, "a.jpeg", jpeg(exif("<", [(274, kind, count, b"\6\0\0\0")])))
        np.testing.assert_array_equal(found, TURNED[6](plain_pixels("JPEG")))


@pytest.mark.parametrize(
    "xmp",
    [
        b'<x tiff:Orientation="6"/>',
        b"<tiff:Orientation>6</tiff:Orientation>",
    ],
)
def test_xmp_tells_where_exif_does_not(tmp_path, xmp):
    start = b"http://ns.adobe.com/xap/1.0/\0"
    found = decoded(tmp_path, "a.jpeg", jpeg(xmp, start))
    np.testing.assert_array_equal(found, TURNED[6](plain_pixels("JPEG")))


def test_exif_as_text_in_a_png(tmp_path):
    content = b"Exif\0\0" + exif("<", [orientation_tag("<", 6)])
    text = f"\nexif\n{len(content):8}\n{content.hex()}\n".encode()
    content = png(b"Raw profile type exif\0" + text, b"tEXt")
    np.testing.assert_array_equal(decoded(tmp_path, "a.png", content), TURNED[6](PIXELS))


def test_of_several_pictures_in_one_file_the_first_is_turned(tmp_path):
    tags = Image.Exif()
    tags[274] = 8
    first, second = Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)
    options = {"save_all": True, "append_images": [second], "exif": tags, "quality": 95}
    content = encoded(first, "MPO", **options)
    with Image.open(io.BytesIO(content)) as opened:
        assert (opened.format, opened.n_frames) == ("MPO", 2)
    found = decoded(tmp_path, "a.mpo.jpg", content)
    np.testing.assert_array_equal(found, TURNED[8](plain_pixels("JPEG")))


def test_pictures_without_their_notes():
    damaged = jpeg(exif("<", [*DAMAGED["rational -1/0"], orientation_tag("<", 6)]))
    plain = without_metadata(damaged)
    with Image.open(io.BytesIO(plain)) as opened:
        assert dict(opened.getexif()) == {274: 6}
        np.testing.assert_array_equal(np.asarray(opened), plain_pixels("JPEG"))
    assert without_metadata(damaged[:30]) is None
    assert without_metadata(encoded(PIXELS.transpose(2, 0, 1))) is None
