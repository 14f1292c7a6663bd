"""What is known of the native extension's build, for messages that a user can act on."""

from __future__ import annotations

import os
from pathlib import Path

from pyflocality._support.native import native_module

# Written by setup.py where the extension could not be built: the compiler's last words.
FAILURE_FILE = Path(__file__).parents[1] / "_native_build_failure.txt"

_CURE = (
    "install a C++17 compiler (Debian and Ubuntu: apt install g++; macOS: xcode-select "
    "--install; Windows: Visual Studio Build Tools) and reinstall pyflocality"
)


def missing_reason(error: ImportError) -> str:
    """Why the extension `pyflocality._C` cannot be imported, and the cure."""
    if FAILURE_FILE.is_file():
        cause = FAILURE_FILE.read_text(encoding="utf-8", errors="replace").strip()
        return f"the native extension could not be built at installation ({cause}): {_CURE}"
    if (Path(__file__).resolve().parents[2] / "setup.py").is_file():
        return (
            f"the native extension is not built in the source tree that was imported ({error}): "
            "leave its folder to use an installed package, or run pip install --editable . in it, "
            "which takes a C++17 compiler"
        )
    return f"the native extension cannot be imported ({error}): {_CURE}"


def outdated_reason() -> str | None:
    """Why the extension may not be that of the sources beside it, and the cure; None if it is.

    By the rule of those who build it: none of its sources was changed after it was built. An
    installed package has no sources to change.
    """
    module = native_module()
    root = Path(__file__).resolve().parents[2]
    if module.__file__ is None or not (root / "setup.py").is_file():
        return None
    built = os.stat(module.__file__).st_mtime_ns
    changed = [
        path
        for part in ("cpu", "include")
        for path in (root / "csrc" / part).rglob("*")
        if path.is_file() and path.stat().st_mtime_ns > built
    ]
    if not changed:
        return None
    newest = max(changed, key=lambda path: path.stat().st_mtime_ns).relative_to(root)
    return (
        f"the native extension is older than its sources ({newest} was changed after it was "
        "built): run pip install --editable . again"
    )
