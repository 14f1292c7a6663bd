"""Benchmarks: a registry of cases, one runner, results as JSON.

Every case is checked against the reference before it is timed, the backend that ran is asserted,
and times are ratios to a yardstick that ran in turns with it in the same process.

In a checkout in which nothing is installed `kernels` and `csrc`, packages of pyflocality, lie
beside it: importing this package lets Python find them there.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
_BESIDE = ("pyflocality.kernels", "pyflocality.csrc")


class _PackagesBeside:
    """Finds packages of pyflocality in the checkout, where nothing before it does."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where a module is, for Python's import."""
        if name not in _BESIDE:
            return None
        folder = ROOT / name.rpartition(".")[2]
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


if (ROOT / "setup.py").is_file():
    sys.meta_path.append(_PackagesBeside)
