"""Rooms: what imports what, from the bottom to the top, and one stem for each operation.

The order is that of the layout table in CONTRIBUTING.md: a room imports those above its row alone.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from pyflocality.backends import configuration
from pyflocality.ops.operation import OPERATIONS

ROOT = Path(__file__).resolve().parents[2]
# Folders of modules by the name of their package.
TOPS = {
    "pyflocality": ROOT / "pyflocality",
    "pyflocality.kernels": ROOT / "kernels",
    "pyflocality.benchmarks": ROOT / "benchmarks",
}
# What stands for the whole library: it brings all public names, and starts the command line.
WHOLE = ("pyflocality", "pyflocality.__main__")

pytestmark = pytest.mark.skipif(
    not (ROOT / "CONTRIBUTING.md").is_file(), reason="the tests run outside a checkout"
)


def order() -> list[str]:
    """The rooms of the layout table, from the bottom."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("| rooms |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)
    paths = [path for row in rows for path in re.findall(r"`([^`]+)`", row)]
    inside = [path.removeprefix("pyflocality/").removesuffix("/") for path in paths]
    return [path.removesuffix(".py").replace("/", ".") for path in inside]


def modules() -> dict[str, Path]:
    """The files of all modules by name."""
    found = {}
    for package, folder in TOPS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the library that a module imports: anywhere in it, for types alone, too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(relative, package)
            named = {f"{base}.{alias.name}" for alias in node.names}
            found |= {module if module in known else base for module in named}
    return {module for module in found if module.split(".")[0] == "pyflocality"}


def room(module: str, rooms: list[str]) -> str:
    """The room that a module lies in: the longest name in the order that it begins with."""
    inside = module.removeprefix("pyflocality.")
    fitting = [one for one in rooms if inside == one or inside.startswith(f"{one}.")]
    assert fitting, f"{module} lies in no room of CONTRIBUTING.md's layout table"
    return max(fitting, key=len)


def test_rooms_import_those_below_them_alone():
    rooms, known = order(), modules()
    assert len(set(rooms)) == len(rooms)
    upward = []
    for name, path in known.items():
        if name in WHOLE:
            continue
        own = room(name, rooms)
        for module in sorted(imports(name, path, known)):
            if module in WHOLE:
                # A user's view of the library, for what is above all of it.
                allowed = own.split(".")[0] in ("benchmarks", "cli")
            else:
                allowed = rooms.index(room(module, rooms)) <= rooms.index(own)
            if not allowed:
                upward.append(f"{name} imports {module}")
    assert not upward, "\n".join(upward)


def test_every_room_is_there():
    known = modules()
    missing = [one for one in order() if f"pyflocality.{one}" not in known]
    assert missing == []


@pytest.mark.parametrize("op", OPERATIONS)
def test_files_of_an_operation_have_its_name(op):
    operation = OPERATIONS[op]
    files = [
        f"pyflocality/ops/{op}.py",
        f"pyflocality/reference/{op}.py",
        f"tests/ops/test_{op}.py",
    ]
    assert [name for name in files if not (ROOT / name).is_file()] == []
    for kind, variant in operation.variants.items():
        for backend in variant.backends:
            folder = ROOT / (
                "pyflocality/reference" if backend == "reference" else f"kernels/{backend}"
            )
            homes = [folder / f"{op}.py", folder / f"{op}_{kind}.py"]
            defined = [
                node.name
                for path in homes
                if path.is_file()
                for node in ast.parse(path.read_text(encoding="utf-8")).body
                if isinstance(node, ast.FunctionDef)
            ]
            assert kind in defined, f"{kind} of {op} on {backend}"


def test_stems_are_those_of_operations():
    """What is named like an operation is one: kernels, C++, references and tests."""
    stems = {f"{op}{more}" for op in OPERATIONS for more in ("", "_jvp", "_vjp")}
    places = {
        "kernels/*/*.py": lambda stem: stem,
        "csrc/cpu/*.cpp": lambda stem: stem,
        "pyflocality/reference/*.py": lambda stem: stem,
        "pyflocality/ops/*.py": lambda stem: stem,
        "tests/ops/test_*.py": lambda stem: stem.removeprefix("test_"),
    }
    words = {op.split("_")[0] for op in OPERATIONS} - {"log"}
    strangers = [
        path.relative_to(ROOT).as_posix()
        for pattern, stem in places.items()
        for path in ROOT.glob(pattern)
        if stem(path.stem).split("_")[0] in words and stem(path.stem) not in stems
    ]
    assert strangers == []


def test_what_is_declared_is_what_is_chosen_from():
    declared = {
        operation.variant_name(kind): set(variant.backends)
        for operation in OPERATIONS.values()
        for kind, variant in operation.variants.items()
    }
    assert {op: set(names) for op, names in configuration()["operations"].items()} == declared
