"""The tests themselves: what they import, and how they lie in their folders."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
# Folders whose tests look into modules.
INSIDE = {"internals", "kernels"}
# Rooms that no user imports from; what tests need of them, `pyflocality.backends` lists.
PRIVATE = {"autograd", "backends", "kernels", "posterior", "reference", "storage"}
LONGEST = 500


def private(module: str, name: str | None) -> bool:
    """Whether a name of a module is none of those that can be relied on."""
    parts = [*module.split(".")[1:], *([] if name is None else [name])]
    if any(part.startswith("_") for part in parts):
        return True
    if module == "pyflocality.backends" and name is not None:
        return name not in importlib.import_module(module).__all__
    return bool(parts) and parts[0] in PRIVATE


def imported(path: Path) -> Iterator[tuple[str, str | None]]:
    """Modules of the library that a file imports, each with the name that it takes of it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from ((node.module, alias.name) for alias in node.names)


def test_private_modules_are_imported_inside_alone():
    found = [
        f"{path.relative_to(TESTS)}: {module} {name or ''}"
        for path in sorted(TESTS.rglob("*.py"))
        if path.relative_to(TESTS).parts[0] not in INSIDE
        for module, name in imported(path)
        if module.split(".")[0] == "pyflocality" and private(module, name)
    ]
    assert not found, "\n".join(found)


def test_names_of_files_are_unique():
    """pytest imports them by their names."""
    names = [path.name for path in TESTS.rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


def test_files_are_of_a_length_to_be_read():
    long = {
        path.name: count
        for path in TESTS.rglob("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST
    }
    assert long == {}
