"""The members of a tar archive, read strictly: where each file lies, and that nothing is hidden.

`tarfile` takes a damaged header for the end of an archive, and so does it with the end of the
file. Here an archive must end in its mark, two blocks of zeros, with nothing but zeros behind.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pyflocality._paths import regular_file
from pyflocality._text import printable
from pyflocality.sources.archive_names import (
    backslash_separates,
    link_target,
    refuse_repeats,
    tidy_name,
)

_END_BYTES = 2 * tarfile.BLOCKSIZE
_OLD_GNU_MAGIC = b"ustar  \0"
# GNU tar's list of what a folder held, and the name of a volume: no files.
_NO_FILES = frozenset((b"D", b"V"))


class _Header(tarfile.TarInfo):
    """A header, by its own format: `tarfile` takes the times that GNU tar notes for a folder."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> _Header:
        """The header of a block."""
        header = super().frombuf(buf, encoding, errors)
        if buf[257:265] == _OLD_GNU_MAGIC:
            header.name = tarfile.nts(buf[:100], encoding, errors)
            if header.isdir():
                header.name = header.name.rstrip("/")
        return header


class Extent(NamedTuple):
    """Where the content of a file lies in its archive: position and size in bytes."""

    start: int
    size: int


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
    written = [info.name for info in members]
    backslash = backslash_separates(where, written, [False] * len(written))
    names = [tidy_name(where, name, backslash) for name in written]
    refuse_repeats(where, names, written)
    files: dict[str, Extent] = {}
    links: dict[str, str | None] = {}
    others: dict[str, str] = {}
    for name, info in zip(names, members, strict=True):
        if info.issym():
            links[name] = link_target(name, info.linkname)
        elif info.islnk():
            links[name] = tidy_name(where, info.linkname, backslash)
        elif info.isreg() and not info.issparse():
            files[name] = Extent(info.offset_data, info.size)
        else:
            others[name] = _kind(info)
    return TarIndex(names, files, links, others, identity)


def identity_of(status: os.stat_result) -> tuple[int, ...]:
    """What tells whether an open file is the one that was indexed."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _members(file: BinaryIO, size: int) -> list[tarfile.TarInfo]:
    """All members but folders."""
    members = []
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as archive:
        position = -1
        while (info := archive.next()) is not None:
            # Headers may be made to lead back, and the loop would not end.
            if archive.offset <= position or info.size < 0:
                raise ValueError(f"damaged: the header at byte {info.offset} leads back")
            position = archive.offset
            # Otherwise the archive keeps them all.
            archive.members.clear()
            if info.isreg() and info.offset_data + info.size > size and not info.issparse():
                raise ValueError(
                    f"has {size} bytes, expected {info.offset_data + info.size} at least"
                )
            if not info.isdir() and info.type not in _NO_FILES:
                members.append(info)
        _check_end(file, archive.offset, size)
    return members


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


def _kind(info: tarfile.TarInfo) -> str:
    if info.issparse():
        return "a file stored with holes (sparse)"
    if info.isfifo() or info.isdev():
        return "a device or a pipe"
    return f"a member of type {info.type!r}"
