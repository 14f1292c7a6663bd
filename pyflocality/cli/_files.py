"""The files a command writes: all of them, or none."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

# No space left, quota exceeded, file too large.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Outputs:
    """Files that appear together, when everything is done.

    Entering the `with` block refuses files that are there already and proves that all can be
    written, before any work. Inside it, write to `temporary[path]`, then call `commit`. Whatever
    was not committed is gone after the block, and so are folders made for it.

    Args:
        paths: Where the files go, in the order in which they appear.
        force: Whether files that are there may be replaced.
    """

    def __init__(self, paths: Sequence[Path], *, force: bool) -> None:
        self.paths, self.force = tuple(paths), force
        self.temporary = {path: _hidden_twin(path) for path in self.paths}
        self._made: list[Path] = []

    def __enter__(self) -> Outputs:
        """Claim the files.

        Raises:
            FileExistsError: A file is there and `force` is False.
            NotADirectoryError: What should be the folder of a file is none.
            OSError: A file cannot be written.
        """
        there = [path for path in self.paths if os.path.lexists(path)]
        for path in there:
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder, expected the name of a file")
        if there and not self.force:
            listed = ", ".join(map(str, there))
            raise FileExistsError(f"{listed}: already there; pass --force to replace")
        try:
            for path in self.paths:
                self._make_folder(path.parent)
                self.temporary[path].touch()
        except OSError:
            self._clean()
            raise
        return self

    def commit(self) -> None:
        """Give every file its name."""
        for path, temporary in self.temporary.items():
            os.replace(temporary, path)
        self._made.clear()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove what was not committed, and tell where a disk is full."""
        self._clean()
        # Writes to an open file that fail do not tell which.
        if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
            error.filename = str(self.paths[0].parent)

    def _make_folder(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder")
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            self._made.append(path)

    def _clean(self) -> None:
        # A folder is left alone where somebody else has put something into it meanwhile.
        for remove in (
            *(temporary.unlink for temporary in self.temporary.values()),
            *(folder.rmdir for folder in reversed(self._made)),
        ):
            with suppress(OSError):
                remove()


def _hidden_twin(path: Path) -> Path:
    """A hidden name beside a file, with its suffix: some writers go by that."""
    return path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
