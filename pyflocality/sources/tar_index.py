"""The members of a tar archive, read strictly: where each file lies, and that nothing is hidden.

`tarfile` takes a damaged header for the end of an archive, and so does it with the end of the
file. Here an archive must end in its mark, two blocks of zeros, with nothing but zeros behind.
"""

from __future__ import annotations

import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pyflocality._support.paths import regular_file
from pyflocality._support.text import printable
from pyflocality.sources.archive_names import link_target, tidied, tidy_name
from pyflocality.storage.mapped import identity_of

_END_BYTES = 2 * tarfile.BLOCKSIZE
_OLD_GNU_MAGIC = b"ustar  \0"
_SYMBOLIC, _HARD = "a symbolic link", "a hard link"
# GNU tar's list of what a folder held, and the name of a volume: no files.
_NO_FILES = frozenset((b"D", b"V"))


# Members that hold records about the next one, or about all that follow.
_RECORDS = frozenset((tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE))
_RECORD = re.compile(rb"([0-9]{1,10}) ([^=]+)=")
# The keywords of POSIX; those of vendors have a dot.
_KEYWORDS = frozenset(
    b"atime charset comment ctime gid gname hdrcharset linkpath mtime path size uid uname".split()
)


class _Header(tarfile.TarInfo):
    """A header, by its own format: `tarfile` takes the times that GNU tar notes for a folder."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        """The header of a block."""
        header = super().frombuf(buf, encoding, errors)
        if buf[257:265] == _OLD_GNU_MAGIC:
            header.name = bytes(buf[:100]).partition(b"\0")[0].decode(encoding, errors)
            if header.isdir():
                header.name = header.name.rstrip("/")
        return header


class Extent(NamedTuple):
    """Where the content of a file lies in its archive: position and size in bytes."""

    start: int
    size: int


class _Member(NamedTuple):
    """What is kept of a header: a large archive has a million of them.

    Attributes:
        name: The name as written.
        extent: Where a file lies; None for all else.
        link: What a link holds.
        kind: What a member that is no file is, in words.
    """

    name: str
    extent: Extent | None
    link: str
    kind: str


@dataclass(frozen=True)
class TarIndex:
    """The members of a tar archive by their tidied names (see `archive_names`), without folders.

    Attributes:
        names: Names of all members, in their order.
        files: Where each file lies.
        links: For each link, symbolic or hard, the member that it means; None outside.
        others: What each member that is neither is, in words.
        identity: What the file was when it was read: device, inode, size and time.
    """

    names: list[str]
    files: dict[str, Extent]
    links: dict[str, str | None]
    others: dict[str, str]
    identity: tuple[int, ...]


def index_tar(path: Path) -> TarIndex:
    """Read the headers of a tar archive that is not compressed.

    Raises:
        ValueError: It is damaged, cut, holds two members of one name or a name that cannot be
            told; the message names it.
    """
    regular_file(path)
    where = printable(str(path))
    try:
        with open(path, "rb") as file:
            identity = identity_of(os.fstat(file.fileno()))
            members = _members(file, os.fstat(file.fileno()).st_size)
    # Damaged headers raise nearly anything.
    except Exception as error:
        raise ValueError(f"{where}: not a readable tar archive: {error}") from error
    written = [member.name for member in members]
    names, backslash = tidied(where, written)
    files: dict[str, Extent] = {}
    links: dict[str, str | None] = {}
    others: dict[str, str] = {}
    for name, member in zip(names, members, strict=True):
        if member.extent is not None:
            files[name] = member.extent
        elif member.kind == _SYMBOLIC:
            links[name] = link_target(name, member.link)
        elif member.kind == _HARD:
            links[name] = tidy_name(where, member.link, backslash)
        else:
            others[name] = member.kind
    return TarIndex(names, files, links, others, identity)


def _members(file: BinaryIO, size: int) -> list[_Member]:
    """All members but folders."""
    members = []
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as archive:
        position = -1
        while (info := archive.next()) is not None:
            # Headers may be made to lead back, and the loop would not end.
            if archive.offset <= position or info.size < 0:
                raise ValueError(f"damaged: the header at byte {info.offset} leads back")
            if not info.issparse():
                _check_extension(file, max(position, 0), info)
            position = archive.offset
            # Otherwise the archive keeps them all.
            archive.members.clear()  # type: ignore[attr-defined]  # a list that stubs leave out
            if info.isreg() and info.offset_data + info.size > size and not info.issparse():
                raise ValueError(
                    f"has {size} bytes, expected {info.offset_data + info.size} at least"
                )
            if not info.isdir() and info.type not in _NO_FILES:
                members.append(_member(info))
        _check_end(file, archive.offset, size)
    return members


def _check_extension(file: BinaryIO, start: int, info: tarfile.TarInfo) -> None:
    """What lies in front of a header: records and names that have no checksum of their own."""
    position, header = start, info.offset_data - tarfile.BLOCKSIZE
    while position < header:
        file.seek(position)
        head = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        if head.type in _RECORDS:
            _check_records(file.read(head.size), position)
        position += (1 + -(-head.size // tarfile.BLOCKSIZE)) * tarfile.BLOCKSIZE
    if start == header:
        return
    # The header has the beginning of a name that is too long for it.
    file.seek(header)
    short = file.read(100)
    given = info.name.encode("utf-8", "surrogateescape")[:100]
    if len(given) == 100 and b"\0" not in short:
        apart = int.from_bytes(short, "big") ^ int.from_bytes(given, "big")
        if apart.bit_count() == 1:
            raise ValueError(f"damaged: the header at byte {header} has another name than its own")


def _check_records(content: bytes, position: int) -> None:
    """The records of pax must fill their member, each with a name that is known."""
    at, content = 0, content.rstrip(b"\0")
    while at < len(content):
        match = _RECORD.match(content, at)
        known = match is not None and (b"." in match[2] or match[2] in _KEYWORDS)
        end = at + int(match[1]) if match is not None and known else at
        if match is None or end <= match.end() or content[end - 1 : end] != b"\n":
            raise ValueError(f"damaged: the records at byte {position} cannot be read")
        at = end


def _check_end(file: BinaryIO, position: int, size: int) -> None:
    """Nothing but the end mark may stand where the last member ends."""
    if size < position + _END_BYTES:
        raise ValueError(
            f"ends after {size} bytes without the mark of its end, {_END_BYTES} zero bytes from "
            f"byte {position} on: it was cut"
        )
    file.seek(position)
    first = True
    while block := file.read(_END_BYTES if first else 2**20):
        if block.strip(b"\0"):
            where = position if first else file.tell() - len(block)
            raise ValueError(
                f"damaged: no header is at byte {where}, nor the end of the archive"
                if first
                else f"holds data behind the mark of its end, from byte {where} on: archives that "
                "were joined must be unpacked with --ignore-zeros"
            )
        first = False


def _member(info: tarfile.TarInfo) -> _Member:
    if info.isreg() and not info.issparse():
        return _Member(info.name, Extent(info.offset_data, info.size), "", "")
    if info.issym() or info.islnk():
        return _Member(info.name, None, info.linkname, _SYMBOLIC if info.issym() else _HARD)
    kind = f"a member of type {info.type!r}"
    if info.issparse():
        kind = "a file stored with holes (sparse)"
    elif info.isfifo() or info.isdev():
        kind = "a device or a pipe"
    return _Member(info.name, None, "", kind)
