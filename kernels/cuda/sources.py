"""Text of a CUDA kernel: one file, with the headers it includes put in their place.

NVRTC gets no include path, so an installed wheel, a checkout and a zip archive behave alike, and
what CuPy keeps on disk is keyed by every line that was compiled.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from importlib.resources import files

PACKAGE = "pyflocality.csrc"
_INCLUDE = re.compile(r'^#include "(pyflocality/[\w/]+\.h)"$', re.MULTILINE)


@functools.cache
def kernel_source(name: str) -> str:
    """The source `csrc/cuda/<name>.cu` with every header of the package in place, once.

    Raises:
        FileNotFoundError: The package holds no such source or header.
    """
    root = files(PACKAGE)
    seen: set[str] = set()

    def expand(text: str) -> str:
        return _INCLUDE.sub(include, text)

    def include(match: re.Match[str]) -> str:
        header = match.group(1)
        if header in seen:
            return ""
        seen.add(header)
        text = root.joinpath("include", *header.split("/")).read_text(encoding="utf-8")
        return expand(text.replace("#pragma once\n", ""))

    return expand(root.joinpath("cuda", f"{name}.cu").read_text(encoding="utf-8"))


def compile_options(macros: Mapping[str, int]) -> tuple[str, ...]:
    """Options of the compiler: the language, and the constants of the kernel."""
    return ("-std=c++17", *(f"-D{name}={value}" for name, value in sorted(macros.items())))
