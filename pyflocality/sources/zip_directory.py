"""Zip archives read strictly: what the directory at their end says is held against the rest.

`zipfile` believes the directory. Here its length and the number of its entries must be those
that the end record gives, members must not overlap, nothing may lie in front that is an archive
of its own, and what a member says of itself must agree with its entry. So a bit that is wrong
anywhere leads to an error, never to a shorter set.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pyflocality._support.paths import regular_file
from pyflocality._support.read_at import read_at
from pyflocality._support.text import printable
from pyflocality.sources.archive_names import tidied

_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_ENTRY_BYTES = 46
_LOCAL = struct.Struct("<4s5H3L2H")
_LOCAL_MARK = b"PK\x03\x04"
# Systems whose names may have backslashes, by the number in an entry: FAT, HPFS, NTFS (two
# numbers are in use) and VFAT; and those that note what kind of file a member is.
_WINDOWS = frozenset((0, 6, 10, 11, 14))
_UNIX = frozenset((3, 19))
_METHODS = {
    zipfile.ZIP_STORED: "stored",
    zipfile.ZIP_DEFLATED: "deflate",
    zipfile.ZIP_BZIP2: "bzip2",
    zipfile.ZIP_LZMA: "LZMA",
}
_UTF8_FLAG = 0x800
# A backslash that may be the second byte of a letter, in the code pages of East Asia.
_SPLIT_LETTER = re.compile(rb"[\x80-\xff]\\")
_MAX_LINK_BYTES = 4096
# Files below this, and those that compression makes less than 20 times smaller, are read
# without a look at what kind of image they are.
_MODEST_BYTES = 32 * 2**20
_MODEST_RATIO = 20
_HEAD_BYTES = 2**20
# LZMA's dictionary.
_MAX_LZMA_BYTES = 2**27
# RGBA of 16 bits and twice that for what a format may add.
_MAX_BYTES_PER_PIXEL = 16


class ZipReader:
    """The files of a zip archive.

    Attributes:
        files: Entry of each file, by its tidied name (see `archive_names`).
        links: What each symbolic link holds, by its tidied name.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile, descriptor: int) -> None:
        self._where = printable(str(path))
        self._archive, self._descriptor = archive, descriptor
        infos = archive.infolist()
        _check_end(archive, infos, descriptor)
        self._check_layout(infos)
        files, links = self._kinds(infos)
        written = _written_names(self._where, files + links)
        windows = [info.create_system in _WINDOWS for info in files + links]
        names, _ = tidied(self._where, written, windows)
        self.files = dict(zip(names, files, strict=False))
        self.links = {
            name: os.fsdecode(self._link_content(name, info))
            for name, info in zip(names[len(files) :], links, strict=True)
        }

    def read(self, name: str, limit: int | None = None) -> bytes:
        """A file's content.

        Args:
            name: Its tidied name.
            limit: The most bytes that it may have; without one it must be an image, whose size
                in pixels limits what it may expand to.

        Raises:
            ValueError: It is damaged, or too large for what it should be.
        """
        info = self.files[name]
        if limit is None:
            self._check_expansion(info)
        elif info.file_size > limit:
            raise ValueError(f"has {info.file_size} bytes, expected {limit} at the most")
        return self._content(info)

    def _content(self, info: zipfile.ZipInfo) -> bytes:
        """What a member holds, compared with its entry."""
        content = self._expanded(info, info.file_size + 1)
        if len(content) != info.file_size:
            more = "more" if len(content) > info.file_size else f"{len(content)} bytes"
            raise ValueError(f"damaged: has {more}, its entry says {info.file_size}")
        if zlib.crc32(content) != info.CRC:
            raise ValueError("damaged: does not match its checksum (CRC-32)")
        return content

    def _expanded(self, info: zipfile.ZipInfo, size: int) -> bytes:
        """The first bytes of a member, at most `size`; no more are expanded."""
        start = self.check_local(info)
        packed = read_at(self._descriptor, info.compress_size, start)
        try:
            return _expand(packed, info, size)
        # Each method has errors of its own.
        except Exception as error:
            raise ValueError(f"damaged: {error}") from error

    def check_local(self, info: zipfile.ZipInfo) -> int:
        """Compare what a member says of itself with its entry; the position of its content."""
        head = read_at(self._descriptor, _LOCAL.size, info.header_offset)
        if len(head) < _LOCAL.size or not head.startswith(_LOCAL_MARK):
            raise ValueError("damaged: no member begins where its entry says")
        _, _, flags, method, _, _, crc, packed, size, name_bytes, extra = _LOCAL.unpack(head)
        name = read_at(self._descriptor, name_bytes, info.header_offset + _LOCAL.size)
        said = {"name": name, "method": method, "encryption": flags & 1}
        entry = {"name": _raw_name(info), "method": info.compress_type, "encryption": 0}
        # Sizes follow the data where they were not known before, or lie in an extension.
        if not flags & 8:
            said["CRC"], entry["CRC"] = crc, info.CRC
            if packed != 0xFFFF_FFFF and size != 0xFFFF_FFFF:
                said["sizes"] = packed, size
                entry["sizes"] = info.compress_size, info.file_size
        for what, value in said.items():
            if value != entry[what]:
                raise ValueError(
                    f"damaged: its {what} is {value!r} where it lies, {entry[what]!r} by its entry"
                )
        return info.header_offset + _LOCAL.size + name_bytes + extra

    def check_entries(self, names: Iterable[str]) -> None:
        """Compare files that nobody reads with their entries: a name may be what is damaged."""
        for name in names:
            try:
                self.check_local(self.files[name])
            except ValueError as error:
                raise ValueError(f"{self._where}: {printable(name)}: {error}") from error

    def _check_expansion(self, info: zipfile.ZipInfo) -> None:
        """Refuse what expands to far more than an image of its size in pixels can be."""
        if info.file_size <= max(_MODEST_BYTES, _MODEST_RATIO * info.compress_size):
            return
        from PIL import Image

        head = self._expanded(info, _HEAD_BYTES)
        try:
            with Image.open(io.BytesIO(head)) as image:
                pixels = image.width * image.height
        except Image.DecompressionBombError:
            raise
        except Exception:
            # Some formats tell their size at the end only.
            pixels = 0
        if info.file_size > _MODEST_BYTES + _MAX_BYTES_PER_PIXEL * pixels:
            raise ValueError(
                f"expands from {info.compress_size} to {info.file_size} bytes, more than the "
                f"{pixels} pixels that its beginning tells of can take: unpack the archive if "
                "this is right"
            )

    def _check_layout(self, infos: list[zipfile.ZipInfo]) -> None:
        """Members must not overlap, and no archive may lie in front of the first."""
        ends = sorted(
            (info.header_offset, _LOCAL.size + len(_raw_name(info)) + info.compress_size)
            for info in infos
        )
        position = 0
        for number, (start, size) in enumerate(ends):
            if start < position:
                raise ValueError("damaged: two of its members lie in the same place")
            if number == 0 and self._has_member(start):
                raise ValueError(
                    "holds another archive in front of its own members, or members that its "
                    "directory does not list"
                )
            position = start + size
        if position > self._archive.start_dir:
            raise ValueError("damaged: a member reaches into the directory")

    def _has_member(self, stop: int) -> bool:
        """Whether a member of an archive lies in the bytes in front of a position."""
        position, overlap = 0, _LOCAL.size
        while position < stop:
            block = read_at(self._descriptor, min(2**20 + overlap, stop - position), position)
            if not block:
                return False
            at = block.find(_LOCAL_MARK)
            while 0 <= at <= len(block) - _LOCAL.size:
                _, version, _, method, _, _, _, _, _, name, _ = _LOCAL.unpack_from(block, at)
                if version <= zipfile.MAX_EXTRACT_VERSION and method in _METHODS and name:
                    return True
                at = block.find(_LOCAL_MARK, at + 1)
            position += 2**20
        return False

    def _kinds(
        self, infos: list[zipfile.ZipInfo]
    ) -> tuple[list[zipfile.ZipInfo], list[zipfile.ZipInfo]]:
        """The files and the symbolic links; raises for members that are neither nor a folder."""
        files: list[zipfile.ZipInfo] = []
        links: list[zipfile.ZipInfo] = []
        for info in infos:
            mode = info.external_attr >> 16 if info.create_system in _UNIX else 0
            kind = stat.S_IFMT(mode)
            named = f"'{printable(info.orig_filename)}'"
            slash = info.orig_filename.endswith(("/", "\\"))
            # The attribute of a folder in DOS.
            if slash or kind == stat.S_IFDIR or (not kind and info.external_attr & 0x10):
                if info.file_size:
                    raise ValueError(f"damaged: {named} is a folder of {info.file_size} bytes")
                self.check_local(info)
                continue
            if info.flag_bits & 0x41:
                raise ValueError(f"{named} is encrypted: unpack the archive with its password")
            if info.flag_bits & 0x20 or info.compress_type not in _METHODS:
                raise ValueError(
                    f"{named} is compressed by method {info.compress_type}, expected "
                    f"{', '.join(_METHODS.values())}"
                )
            if kind not in (0, stat.S_IFREG, stat.S_IFLNK):
                raise ValueError(f"{named} is a device, a pipe or a socket, not a file")
            (links if kind == stat.S_IFLNK else files).append(info)
        return files, links

    def _link_content(self, name: str, info: zipfile.ZipInfo) -> bytes:
        self.check_local(info)
        if info.file_size > _MAX_LINK_BYTES:
            raise ValueError(f"damaged: '{printable(name)}' is a link of {info.file_size} bytes")
        return self._content(info)


def _expand(packed: bytes, info: zipfile.ZipInfo, size: int) -> bytes:
    if info.compress_type == zipfile.ZIP_STORED:
        return packed[:size]
    if info.compress_type == zipfile.ZIP_DEFLATED:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size)
    if info.compress_type == zipfile.ZIP_BZIP2:
        import bz2

        return bz2.BZ2Decompressor().decompress(packed, size)
    import lzma

    # Version and length of the properties, then they themselves, which begin a file of the
    # format `alone`; the number of bytes comes next there, all ones where a mark ends them.
    end = 2**64 - 1 if info.flag_bits & 2 else info.file_size
    alone = packed[4:9] + end.to_bytes(8, "little") + packed[9:]
    return lzma.LZMADecompressor(lzma.FORMAT_ALONE, _MAX_LZMA_BYTES).decompress(alone, size)


@contextmanager
def open_zip(path: Path, kind: str = "zip archive") -> Iterator[ZipReader]:
    """Open a zip archive, or another file that is one; `kind` is what messages call it.

    Raises:
        ValueError: It is damaged, or holds what is not read; the message names it.
    """
    regular_file(path)
    where = printable(str(path))
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
            archive = stack.enter_context(zipfile.ZipFile(file))
            reader = ZipReader(path, archive, file.fileno())
        # Damaged directories raise nearly anything.
        except Exception as error:
            told = str(error)
            if not told.startswith(f"{where}: "):
                told = f"{where}: not a readable {kind}: {told}"
            raise ValueError(told) from error
        yield reader


def check_zip(path: Path, kind: str) -> None:
    """Raise ValueError if a directory and what it lists do not agree; nothing is expanded."""
    with open_zip(path, kind) as archive:
        archive.check_entries(archive.files)


def _check_end(archive: zipfile.ZipFile, infos: list[zipfile.ZipInfo], descriptor: int) -> None:
    """Compare the end record with the directory that was read and with the file's size."""
    size = os.fstat(descriptor).st_size
    start = max(0, size - _END.size - 0xFFFF)
    tail = read_at(descriptor, size - start, start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise ValueError("damaged: its end record is missing")
    _, disk, first_disk, here, count, directory, _, comment = _END.unpack_from(tail, at)
    behind = len(tail) - at - _END.size - comment
    # Tools that write into pipes fill their last block with zeros.
    if behind < 0 or tail[len(tail) - behind :].strip(b"\0"):
        raise ValueError(f"damaged: {behind} bytes more or less than its end record tells of")
    read = sum(_ENTRY_BYTES + len(_raw_name(i)) + len(i.extra) + len(i.comment) for i in infos)
    end = start + at
    counts = {count if count != 0xFFFF else len(infos)}
    counts.add(here if here != 0xFFFF else len(infos))
    locator = at - _LOCATOR_64.size
    if locator >= 0 and tail.startswith(b"PK\x06\x07", locator):
        end -= _LOCATOR_64.size + _END_64.size
        record = _END_64.unpack(read_at(descriptor, _END_64.size, end))
        disk, first_disk, directory = record[4] or disk % 0xFFFF, record[5], record[8]
        counts |= {record[6], record[7]}
    # Old tools count modulo 2^16.
    elif len(infos) > 0xFFFF and counts == {len(infos) % 2**16}:
        counts = {len(infos)}
    if disk or first_disk:
        raise ValueError("is one of several volumes: join them")
    if counts != {len(infos)} or read != directory or archive.start_dir + directory != end:
        told = " or ".join(str(number) for number in sorted(counts))
        raise ValueError(
            f"damaged: its directory has {len(infos)} entries in {read} bytes, its end record "
            f"tells of {told} in {directory}"
        )


def _raw_name(info: zipfile.ZipInfo) -> bytes:
    return info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8_FLAG else "cp437")


def _written_names(where: str, infos: list[zipfile.ZipInfo]) -> list[str]:
    """Names as text: UTF-8 where an entry or the bytes say so, else the code page of DOS.

    Every byte of that code page is a character, so names that differ stay different.
    """
    raw = [_raw_name(info) for info in infos]
    told = [_told_name(info, name) for info, name in zip(infos, raw, strict=True)]
    unknown = [name for name, text in zip(raw, told, strict=True) if text is None]
    if not unknown:
        return [str(text) for text in told]
    encoding = "utf-8" if all(map(_is_utf8, unknown)) else "cp437"
    if encoding == "cp437" and any(b"/" in name for name in raw):
        for name in unknown:
            if _SPLIT_LETTER.search(name):
                raise ValueError(
                    f"{where}: '{printable(name.decode('cp437'))}' is in a code page that is not "
                    "told, so its backslash may be part of a letter: archive the files again with "
                    "names in UTF-8"
                )
    return [
        name.decode(encoding) if text is None else text
        for name, text in zip(raw, told, strict=True)
    ]


def _told_name(info: zipfile.ZipInfo, raw: bytes) -> str | None:
    """The name of an entry, or None if it does not tell how its bytes are to be read."""
    if info.flag_bits & _UTF8_FLAG:
        return raw.decode("utf-8")
    extra = info.extra
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        # The path in Unicode, valid for the name whose CRC goes with it.
        if kind == 0x7075 and field[:5] == struct.pack("<BL", 1, zlib.crc32(raw)):
            return field[5:].decode("utf-8")
    return raw.decode("ascii") if raw.isascii() else None


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
