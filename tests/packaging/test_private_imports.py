"""What tests import: private rooms and names in `internals`, kernels beside their own tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PRIVATE = ("_C", "_support", "autograd", "posterior", "reference", "storage")
# What `pyflocality.backends` itself brings is for everyone.
BEHIND = ("native_build", "report", "selection")


def imported(path: Path) -> Iterator[list[str]]:
    """The names that a file imports from the library, in parts, without the library's own."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            first, *parts = name.split(".")
            if first == "pyflocality" and parts:
                yield parts


def is_private(parts: list[str]) -> bool:
    """Whether a name is for the library alone."""
    if any(part.startswith("_") and not part.startswith("__") for part in parts):
        return True
    behind = parts[0] == "backends" and parts[1:2] != [] and parts[1] in BEHIND
    return behind or parts[0] in (*PRIVATE, "kernels")


def test_private_names_are_imported_by_tests_of_internals_alone():
    found = [
        f"{path.relative_to(TESTS)}: {'.'.join(parts)}"
        for path in sorted(TESTS.rglob("*.py"))
        if path.relative_to(TESTS).parts[0] not in ("internals", "kernels")
        for parts in imported(path)
        if is_private(parts)
    ]
    assert not found, "\n".join(found)
