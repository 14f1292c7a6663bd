"""The files a command writes: all of them, or none."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from pyflocality._support.journal import BegunRun, Journal
from pyflocality._support.locks import HeldError, locked
from pyflocality._support.paths import check_result
from pyflocality._support.signals import uninterrupted

# No space left, quota exceeded, file too large.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Outputs:
    """Files that appear together, when everything is done.

    Entering the `with` block refuses files that are there already, or that another process is
    writing, and proves that all can be written, before any work. Inside it, write to
    `temporary[path]`, then call `commit`. Whatever was not committed is gone after the block, and
    so are folders made for it.

    A process that is killed leaves hidden files, which the next one with the same outputs removes.
    If it was killed while it gave its files their names, the next one gives them the rest, and may
    replace them where it was asked for the same: nobody was told of them.

    Args:
        paths: Where the files go, in the order in which they appear.
        force: Whether files that are there may be replaced.
        folder: The folder that all of them are in, where it is the run's own: one process at a
            time writes into it. Without it one process at a time writes each of the files.
        run: What is asked for, as JSON has it, but for `force`; what it has no word for, as text.

    Raises:
        IsADirectoryError: A folder has the name of a file.
        FileExistsError: A pipe or a device has it.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        force: bool,
        folder: Path | None = None,
        run: object = None,
    ) -> None:
        for path in paths:
            check_result(path)
        self.paths, self.force = tuple(paths), force
        key = hashlib.sha256(json.dumps(run, sort_keys=True, default=str).encode()).hexdigest()
        self._run = BegunRun(uuid.uuid4().hex, key, force)
        self.temporary = {path: _hidden_twin(path, self._run.id) for path in self.paths}
        name = f".{self.paths[0].name}.run" if folder is None else ".pyflocality.run"
        self._journal = Journal((folder or self.paths[0].parent) / name)
        own = [path.with_name(f".{path.name}.lock") for path in self.paths]
        self._locks = [folder] if folder else own
        self._made: list[Path] = []
        # Files that a killed process had just given their names when it was asked for the same.
        self._own: set[Path] = set()
        self._has_journal = self._committed = False
        self._stack = ExitStack()

    def __enter__(self) -> Outputs:
        """Claim the files.

        Raises:
            FileExistsError: A file is there and `force` is False, or another process writes it.
            NotADirectoryError: What should be the folder of a file is none.
            OSError: A file cannot be written.
        """
        try:
            for path in self.paths:
                self._make_folder(path.parent)
            self._has_journal = all([self._lock(path) for path in self._locks])
            if self._has_journal:
                self._settle_killed_runs()
            self._refuse_what_is_there()
            if self._has_journal:
                self._begin_journal()
            for temporary in self.temporary.values():
                temporary.touch()
        except BaseException as error:
            self._clean()
            self._tell_names(error)
            raise
        return self

    def leave_out(self, path: Path) -> None:
        """Claim a file no longer: what is there stays, and there is nothing to commit."""
        self.temporary.pop(path).unlink()
        self.paths = tuple(one for one in self.paths if one != path)

    def commit(self) -> None:
        """Give every file its name.

        Raises:
            FileExistsError: A file has appeared meanwhile and `force` is False.
        """
        results = {self._name(path): _state(twin) for path, twin in self.temporary.items()}
        # Half of the files would be worth nothing.
        with uninterrupted():
            self._refuse_what_is_there()
            if self._has_journal:
                self._journal.rename(self._run, results)
            for path, temporary in self.temporary.items():
                os.replace(temporary, path)
            self._committed = True

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Remove what was not committed, and tell where a disk is full."""
        self._clean()
        self._tell_names(error)

    def _tell_names(self, error: BaseException | None) -> None:
        """Tell which file could not be written, by the name that it would have had."""
        if not isinstance(error, OSError):
            return
        # Writes to an open file that fail do not tell which.
        if error.errno in _FULL and error.filename is None:
            error.filename = str(self.paths[0].parent)
        for path, twin in self.temporary.items():
            if isinstance(error.filename, str):
                error.filename = error.filename.replace(str(twin), str(path))
            error.args = tuple(
                part.replace(str(twin), str(path)) if isinstance(part, str) else part
                for part in error.args
            )

    def _make_folder(self, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
        for path in reversed(missing):
            # Another process may have made it meanwhile.
            if os.path.lexists(path) and not path.is_dir():
                raise NotADirectoryError(f"{path} is not a folder")
            path.mkdir(exist_ok=True)
            self._made.append(path)

    def _lock(self, path: Path) -> bool:
        """Keep other processes away; whether that is possible here."""
        try:
            return self._stack.enter_context(locked(path))
        except HeldError:
            what = path if path.is_dir() else path.with_name(path.name[1 : -len(".lock")])
            raise FileExistsError(f"{what}: another process is writing it") from None
        except OSError as error:
            # A hidden name would tell nobody which option is meant.
            error.filename = str(path.parent)
            raise

    def _begin_journal(self) -> None:
        try:
            self._journal.begin(self._run)
        except PermissionError:
            # That of another user, who was killed; or else no file at all can be written here.
            self._has_journal = False

    def _refuse_what_is_there(self) -> None:
        there = [path for path in self.paths if os.path.lexists(path) and path not in self._own]
        if there and not self.force:
            listed = ", ".join(map(str, there))
            raise FileExistsError(f"{listed}: already there; pass --force to replace")

    def _settle_killed_runs(self) -> None:
        """Finish the renaming that killed processes had begun, and remove what else they left."""
        for run in self._journal.runs():
            for path, state in self._renamed(run):
                twin = _hidden_twin(path, run.id)
                if _state(twin) == state and (
                    run.force or path in self._own or not os.path.lexists(path)
                ):
                    os.replace(twin, path)
                if _state(path) == state and run.key == self._run.key:
                    self._own.add(path)
            self._remove_temporary(run.id)

    def _renamed(self, run: BegunRun) -> Iterator[tuple[Path, tuple[int, int]]]:
        """The results that a run was giving their names, and their state."""
        known = {self._name(path): path for path in self.paths}
        for name, state in run.renaming.items():
            # Beside ours, nothing but a name in this folder is taken from a file of others.
            path = known.get(name, self._journal.path.with_name(Path(name).name))
            if name == self._name(path):
                yield path, state

    def _name(self, path: Path) -> str:
        """How the journal calls a file."""
        return os.path.relpath(path, self._journal.path.parent)

    def _remove_temporary(self, run: str) -> None:
        folders = {self._journal.path.parent, *(path.parent for path in self.paths)}
        for folder in folders:
            # Those that other writers made of the temporary names, too.
            for path in glob.glob(f"{glob.escape(str(folder))}/.*{run}*"):
                _quietly(Path(path).unlink)

    def _are_results_there(self) -> bool:
        """Whether the journal tells of results that nobody has been told of."""
        renamed = (pair for run in self._journal.runs() for pair in self._renamed(run))
        return any(_state(path) == state for path, state in renamed)

    def _clean(self) -> None:
        if not self._committed:
            self._remove_temporary(self._run.id)
        if self._has_journal and (self._committed or not self._are_results_there()):
            _quietly(self._journal.remove)
        self._stack.close()
        if not self._committed:
            # A folder is left alone where somebody else has put something into it meanwhile.
            for folder in reversed(self._made):
                _quietly(folder.rmdir)


def _quietly(remove: Callable[[], Any]) -> None:
    with suppress(OSError):
        remove()


def _hidden_twin(path: Path, run: str) -> Path:
    """A hidden name beside a file, with its suffix: some writers go by that."""
    return path.with_name(f".{path.stem}.{run}{path.suffix}")


def _state(path: Path) -> tuple[int, int] | None:
    """What tells a file from another one of the same name; None where there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
