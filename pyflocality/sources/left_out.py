"""What a source holds and the set made from it does not: said once, by one warning."""

from __future__ import annotations

import warnings

from pyflocality._support.caller import caller_level
from pyflocality._support.text import printable


class LeftOut:
    """Counts the files, members or rows of a source that a set does not take.

    Args:
        where: The source, for the message.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._reasons: dict[str, tuple[str, int]] = {}

    def add(self, name: str, reason: str, count: int = 1) -> None:
        """Note what is not taken.

        Args:
            name: The file, member or row; of several with one reason, the first is told.
            reason: Why, in words that go on "3 left out: 3 ..", such as "hidden".
            count: How many they are, if `name` stands for more than itself.
        """
        first, before = self._reasons.get(reason, (name, 0))
        self._reasons[reason] = first, before + count

    def warn(self) -> None:
        """Tell what was noted, if anything, by one UserWarning; nothing is left to tell then."""
        if not self._reasons:
            return
        total = sum(count for _, count in self._reasons.values())
        parts = [
            f"{count} {reason} ({'first ' * (count > 1)}'{printable(name)}')"
            for reason, (name, count) in self._reasons.items()
        ]
        self._reasons.clear()
        told = f"{total} left out: {'; '.join(parts)}"
        warnings.warn(f"{printable(self._where)}: {told}", stacklevel=caller_level())
