"""Big sets in one file: decode a source once, resumably, into memory-mapped bytes.

`pack` writes the format of `pyflocality.sources.packed`, which `TrainingSet.load` maps into
memory. Finished blocks of images are noted as they reach the disk: whatever ends a run, a full
disk too, the next one goes on behind the last of them.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from pyflocality._support.checks import check_flag
from pyflocality._support.json import sealed
from pyflocality._support.locks import HeldError, locked, remove_abandoned, replacing, twins_of
from pyflocality._support.paths import checked_path, no_link, regular_file
from pyflocality._support.progress import progress_bar
from pyflocality._support.text import printable_errors
from pyflocality.sources import folder, hub_dataset, tar_shards
from pyflocality.sources.base import Request
from pyflocality.sources.images import ColourFoundError, ImageFiles, decode_from, decode_job
from pyflocality.sources.npy import checksum, read_header
from pyflocality.sources.packed import (
    FORMAT,
    IMAGES,
    JOURNAL,
    LABELS,
    MANIFEST,
    VERSION,
    read_begun,
    read_manifest,
)
from pyflocality.sources.selection import SYSTEM_FILES
from pyflocality.sources.validation import as_image_tensor, check_values

# Images of a block are decoded, written and noted together.
_BLOCK_BYTES = 32 * 2**20
# In the topmost folder of a disk.
_FOUND = "lost+found"


def pack(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    resolution: int | tuple[int, int] | None = None,
    channels: int | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    sort_by_label: bool = False,
    progress: bool = True,
) -> Path:
    """Decode a set of images into a folder that `TrainingSet.load` maps into memory.

    A run that was interrupted goes on where it ended, after the blocks on the disk have been
    compared with their checksums; a finished set is compared with its checksums and left as it is.

    Args:
        source: A folder or .zip of images as `TrainingSet.load` takes them, a .tar or a folder
            of .tar shards (webdataset), or a folder with a saved dataset or parquet files of the
            library `datasets`.
        out: The folder to write; it is made if need be.
        resolution: As in `TrainingSet.load`.
        channels: As in `TrainingSet.load`.
        split: As in `TrainingSet.load`.
        image_column: For datasets of `datasets`: the column of images, where it has several.
        label_column: Likewise the column of classes, such as "fine_label".
        sort_by_label: Whether to bring the images of a class together, in their order otherwise:
            `TrainingSet.with_label` then copies none. Else they stay in the order of the source.
        progress: Whether to show progress on standard error.

    Returns:
        The folder.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: The source is damaged, empty or of mixed sizes, or has no labels to sort by;
            what is in `out` is damaged.
        FileExistsError: `out` holds something else, or another process is writing into it.
        OSError: The disk is full, or cannot be written to.
        ImportError: The source needs a package that is not installed.
    """
    request = Request.checked(resolution, channels, split, None, progress)
    request = request.with_columns(image_column, label_column)
    sort_by_label = check_flag(sort_by_label, "sort_by_label")
    path, target = checked_path(source, "source"), checked_path(out, "out")
    with printable_errors(), _open(path, request) as files:
        if sort_by_label:
            files = _sorted_by_label(files)
        # NumPy's whole numbers count as Python's.
        asked = [None if o is None else np.asarray(o).tolist() for o in (resolution, channels)]
        asked += [split] + ["sorted by label"] * sort_by_label
        wanted = {"source": files.fingerprint, "request": asked}
        key = zlib.crc32(json.dumps(wanted, default=list).encode())
        _check_target(target, key)
        with _own_folder(target):
            # Another process may have come first.
            _check_target(target, key)
            if (target / MANIFEST).is_file():
                verify(target, progress=progress)
                # Of a process that was killed when all was done.
                (target / JOURNAL).unlink(missing_ok=True)
                return target
            try:
                _write(files, request, target, key, colour=False)
            except ColourFoundError:
                # An empty journal is that of a set to be begun anew.
                os.truncate(target / JOURNAL, 0)
                _write(files, request, target, key, colour=True)
    return target


def verify(out: str | os.PathLike[str], *, progress: bool = True) -> None:
    """Compare every byte of a packed set's images with the checksums of its manifest.

    Raises:
        TypeError: `out` is no path.
        ValueError: The set is damaged; the message tells which images.
        OSError: A file cannot be read.
    """
    progress = check_flag(progress, "progress")
    target = checked_path(out, "out")
    with printable_errors():
        manifest = read_manifest(target)
        path, blocks = target / IMAGES, manifest["blocks_crc32"]
        size = regular_file(path).st_size
        if size != manifest["bytes"]:
            raise ValueError(f"{path}: damaged: has {size} bytes, expected {manifest['bytes']}")
        with open(path, "rb") as file:
            _compare(file, manifest["shape"], manifest["images_per_block"], blocks, progress)


def _open(path: Path, request: Request) -> AbstractContextManager[ImageFiles]:
    if not path.exists():
        raise ValueError(f"`source` must be the path of a folder or an archive, got {str(path)!r}")
    if not path.is_dir():
        regular_file(path)
    if tar_shards.find_shards(path):
        _refuse_columns(request, path)
        return tar_shards.open_files(path, request)
    if hub_dataset.is_dataset(path):
        return hub_dataset.open_files(path, request)
    _refuse_columns(request, path)
    if path.is_dir() or path.suffix.lower() == ".zip":
        return folder.open_files(path, request)
    raise ValueError(
        f"{path}: not a format that is packed; `source` must be a folder or .zip of images, tar "
        "shards or a dataset's folder"
    )


def _refuse_columns(request: Request, path: Path) -> None:
    for name in ("image_column", "label_column"):
        if getattr(request, name) is not None:
            raise ValueError(
                f"`{name}` must be left out: {path} is no dataset of the library `datasets`, got "
                f"{getattr(request, name)!r}"
            )


def _sorted_by_label(files: ImageFiles) -> ImageFiles:
    if files.labels is None:
        raise ValueError(f"`sort_by_label` must be left out: {files.name} has no labels")
    order = np.argsort(files.labels, kind="stable")
    names = [files.names[number] for number in order]
    return replace(files, names=names, labels=files.labels[order])


def _check_target(target: Path, key: int) -> None:
    """Refuse a folder that holds anything but this set, finished or begun."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is no folder, expected the name of one")
    # What systems leave in a folder by themselves does not fill it.
    names = {name for name in os.listdir(target) if name.lower() not in {*SYSTEM_FILES, _FOUND}}
    if not names:
        return
    if (target / MANIFEST).is_file():
        there = read_manifest(target)["key"]
    elif (begun := _read_journal(target)) is not None:
        there = begun[0]["key"]
    elif JOURNAL in names and names <= {JOURNAL, IMAGES}:
        # A run ended, on a full disk for example, before its journal had a whole line.
        return
    else:
        raise FileExistsError(f"{target} is not empty: pack into a folder of its own")
    if there != key:
        raise FileExistsError(
            f"{target} holds a set of another source or of other options: remove it first"
        )


@contextmanager
def _own_folder(target: Path) -> Iterator[None]:
    """Make a folder and keep other processes out of it, where the system has locks.

    It is gone again where nothing has come into it.
    """
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with locked(target):
            yield
    except BaseException as error:
        if made:
            with suppress(OSError):
                target.rmdir()
        if isinstance(error, HeldError):
            raise FileExistsError(f"{target}: another process is writing into it") from None
        # Errors of open files do not tell where they lie.
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(target)
        raise


def _is_own(path: Path) -> bool:
    """Whether a file is there that has no other name: a link is replaced, never written through."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink <= 1


def _read_journal(target: Path) -> tuple[dict[str, Any], list[int]] | None:
    """What was begun and the checksums of its finished blocks, or None without a journal."""
    if not _is_own(target / JOURNAL):
        return None
    try:
        lines = (target / JOURNAL).read_text(encoding="ascii").splitlines(keepends=True)
    except OSError:
        return None
    # A line that was cut short tells of nothing.
    whole = [line for line in lines if line.endswith("\n")]
    try:
        return (read_begun(whole[0]), [int(line) for line in whole[1:]]) if whole else None
    except ValueError as error:
        raise ValueError(
            f"{target / JOURNAL}: damaged: {error}: remove the folder and pack again"
        ) from error


def _write(files: ImageFiles, request: Request, target: Path, key: int, colour: bool) -> None:
    """Decode what is missing, then write labels and manifest."""
    remove_abandoned(twin for name in (LABELS, MANIFEST) for twin in twins_of(target / name))
    begun = _read_journal(target)
    if os.path.lexists(target / IMAGES) and not _is_own(target / IMAGES):
        begun = None
    if begun is None:
        job = decode_job(files, request, colour=colour)
        per_block = max(1, _BLOCK_BYTES // int(np.prod(job.shape[1:])))
        (target / IMAGES).unlink(missing_ok=True)
        header = {"key": key, "shape": list(job.shape), "images_per_block": per_block}
        begun = header, []
        (target / JOURNAL).unlink(missing_ok=True)
        with open(target / JOURNAL, "xb") as journal:
            journal.write((sealed(header) + "\n").encode())
            _flush(journal)
    header, finished = begun
    _decode(files, request, target, header, finished)
    _check_values(target / IMAGES, files.name)
    labels_crc = None
    if files.labels is not None:
        with replacing(target / LABELS, 0o666) as file:
            np.save(file, files.labels)
        labels_crc = zlib.crc32((target / LABELS).read_bytes())
    with open(target / IMAGES, "rb") as file:
        size, crc = os.fstat(file.fileno()).st_size, checksum(file)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "key": key,
        "name": files.name,
        "shape": header["shape"],
        "dtype": "uint8",
        "label_names": files.label_names,
        "labels_crc32": labels_crc,
        "bytes": size,
        "checksum": crc,
        "images_per_block": header["images_per_block"],
        "blocks_crc32": finished,
    }
    with replacing(target / MANIFEST, 0o666) as file:
        file.write(sealed(manifest).encode())
    (target / JOURNAL).unlink()


def _check_values(path: Path, name: str) -> None:
    """Refuse what `TrainingSet.load` would; the first image tells, but for the darkest sets."""
    images = np.lib.format.open_memmap(path, mode="r")
    try:
        check_values(as_image_tensor(images), name)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _decode(
    files: ImageFiles,
    request: Request,
    target: Path,
    header: dict[str, Any],
    finished: list[int],
) -> None:
    """Append the missing blocks to the array; `finished` grows with them."""
    shape, per_block = header["shape"], header["images_per_block"]
    first = min(len(finished) * per_block, shape[0])
    with (
        open(target / IMAGES, "a+b", opener=no_link) as array,
        open(target / JOURNAL, "a", opener=no_link) as journal,
    ):
        start = _begin_array(array, shape)
        if finished:
            _compare(array, shape, per_block, finished, request.progress)
        size = int(np.prod(shape[1:]))
        array.truncate(start + first * size)
        _check_space(target, (shape[0] - first) * size)
        # A line cut short must not swallow the next one.
        journal.truncate((target / JOURNAL).read_bytes().rfind(b"\n") + 1)
        with closing(decode_from(files, request, tuple(shape[1:]), first)) as decoded:
            shown = progress_bar(
                decoded,
                description=f"packing {files.name}",
                total=shape[0] - first,
                enabled=request.progress,
            )
            while block := list(islice(shown, per_block)):
                content = np.stack(block).tobytes()
                array.write(content)
                _flush(array)
                crc = zlib.crc32(content)
                journal.write(f"{crc}\n")
                _flush(journal)
                finished.append(crc)


def _begin_array(array: IO[bytes], shape: list[int]) -> int:
    """Write the header where there is none; the position behind it."""
    array.seek(0)
    if array.read(6) != b"\x93NUMPY":
        array.truncate(0)
        header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(array, header)
        _flush(array)
    array.seek(0)
    told: object
    try:
        told = read_header(array)
    except ValueError as error:
        told = error
    expected = tuple(shape), False, np.dtype(np.uint8)
    if told != expected:
        raise ValueError(
            f"{array.name}: damaged: its header says {told}, expected {expected}: remove "
            "the folder and pack again"
        )
    return array.tell()


def _compare(
    array: IO[bytes], shape: list[int], per_block: int, expected: list[int], progress: bool
) -> None:
    """Compare finished blocks with their checksums."""
    array.seek(0)
    read_header(array)
    size = int(np.prod(shape[1:]))
    for number, crc in enumerate(
        progress_bar(expected, description="comparing checksums", enabled=progress)
    ):
        start, stop = number * per_block, min((number + 1) * per_block, shape[0])
        if zlib.crc32(array.read((stop - start) * size)) != crc:
            raise ValueError(
                f"{array.name}: damaged: images {start} to {stop - 1} do not match their "
                "checksum: remove the folder and pack again"
            )


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the disk is too full: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free",
            str(target),
        )


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
