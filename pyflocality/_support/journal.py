"""What a run that was killed had begun: told by a hidden file beside its results.

A line is added where a run begins to write its results under temporary names, and another one
before these get their own. The file is gone when a run has ended, unless it was killed; what the
lines tell is only acted upon under the lock of the results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyflocality._support.paths import no_link


@dataclass
class BegunRun:
    """A run as its lines tell of it.

    Attributes:
        id: 32 hexadecimal digits that are in the names of its temporary files.
        key: Hash of all that was asked for.
        force: Whether it may replace what is there.
        renaming: Size and time of change of the results that were about to get their names.
    """

    id: str
    key: str
    force: bool
    renaming: dict[str, tuple[int, int]] = field(default_factory=dict)


class Journal:
    """The lines of the runs that write the same results.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def runs(self) -> list[BegunRun]:
        """The runs that did not end by themselves, in order; none of another user."""
        try:
            # What others may write to, and we may not, is not to be acted upon.
            with open(self.path, "r+", encoding="ascii", opener=no_link) as file:
                lines = file.read().splitlines()
        except (OSError, UnicodeDecodeError):
            return []
        runs: dict[str, BegunRun] = {}
        for line in lines:
            # One that was cut short, or is not ours, tells nothing.
            with suppress(
                ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError
            ):
                _take(json.loads(line), runs)
        return list(runs.values())

    def begin(self, run: BegunRun) -> None:
        """Note a run before its first temporary file is made."""
        self._add({"id": run.id, "key": run.key, "force": run.force})

    def rename(self, run: BegunRun, results: Mapping[str, tuple[int, int] | None]) -> None:
        """Note the results of a run before the first of them gets its name."""
        self._add({"id": run.id, "renaming": results})

    def remove(self) -> None:
        """All that the lines tell of has been dealt with."""
        self.path.unlink(missing_ok=True)

    def _add(self, line: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="ascii", opener=no_link) as file:
            # A line before it that was cut short must not swallow it.
            file.write("\n" + json.dumps(line) + "\n")


def _take(line: dict[str, Any], runs: dict[str, BegunRun]) -> None:
    if "renaming" not in line:
        if re.fullmatch(r"[0-9a-f]{32}", line["id"]) is None:
            raise ValueError
        runs[line["id"]] = BegunRun(line["id"], str(line["key"]), line["force"] is True)
        return
    results = {str(name): (int(size), int(time)) for name, (size, time) in line["renaming"].items()}
    runs[line["id"]].renaming = results
