"""Build of pyflocality: the packages, and the native extension `pyflocality._C`.

The metadata is in pyproject.toml. The extension is plain C++17 bound by pybind11 and knows
nothing of torch, so one build serves every torch release. Where it cannot be built the
installation still succeeds, on the reference backend: the reason is printed, and kept for
`pyflocality doctor` in `pyflocality/_native_build_failure.txt`. The environment variable
PYFLOCALITY_REQUIRE_NATIVE=1 makes such a failure an error.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

# -Wno-maybe-uninitialized: GCC's own intrinsics headers trip it.
# -g0: many Python builds ask for debug symbols, which would make up nine tenths of the wheel.
COMPILE_ARGS = {
    "unix": [
        *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-pthread"),
        *("-Wall", "-Wextra", "-Wno-maybe-uninitialized"),
    ],
    "mingw32": ["-std=c++17", "-O3", "-Wall", "-Wextra"],
    "msvc": ["/std:c++17", "/O2", "/EHsc"],
}
LINK_ARGS = {"unix": ["-pthread"]}
# Folders beside `pyflocality` that are installed as its packages.
BESIDE = ("kernels", "csrc", "benchmarks")
REQUIRE_NATIVE = os.environ.get("PYFLOCALITY_REQUIRE_NATIVE") == "1"


def _compile_side_by_side(compiler: Any) -> None:  # noqa: ANN401
    """Let a compiler of setuptools work on as many sources at a time as there are cores."""
    compile_some = compiler.compile

    def compile_all(sources: list[str], *arguments: Any, **options: Any) -> list[str]:  # noqa: ANN401
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            parts = pool.map(lambda source: compile_some([source], *arguments, **options), sources)
            return [path for part in parts for path in part]

    compiler.compile = compile_all


class BuildNative(build_ext):
    """Build the extension, or record why it cannot be built."""

    failure: str | None = None

    def run(self) -> None:
        """Build; afterwards exactly one of extension and failure report is in place."""
        super().run()
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            report = target.with_name("_native_build_failure.txt")
            if self.failure is None:
                report.unlink(missing_ok=True)
                continue
            # What an earlier build left would not match the Python sources of this one.
            target.unlink(missing_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(self.failure + "\n", encoding="utf-8")
            self._warn()

    def build_extension(self, ext: Extension) -> None:
        """Build one extension, keeping the reason of a failure unless it is an error."""
        try:
            import pybind11

            ext.include_dirs.append(pybind11.get_include())
            ext.extra_compile_args = COMPILE_ARGS.get(self.compiler.compiler_type, [])
            ext.extra_link_args = LINK_ARGS.get(self.compiler.compiler_type, [])
            _compile_side_by_side(self.compiler)
            super().build_extension(ext)
        except (BaseError, CCompilerError, ImportError, OSError) as error:
            if REQUIRE_NATIVE:
                raise
            self.failure = f"{type(error).__name__}: {error}"

    def _warn(self) -> None:
        line = "*" * 88
        print(
            f"\n{line}\nWARNING: the native extension of pyflocality was NOT built:\n"
            f"  {self.failure}\n"
            "pyflocality is installed and works on the reference backend, more slowly.\n"
            "Install a C++17 compiler and reinstall to get the native kernels; "
            f"`pyflocality doctor` shows this again.\n{line}\n",
            file=sys.stderr,
            flush=True,
        )


setup(
    packages=[
        *find_packages(include=["pyflocality", "pyflocality.*"]),
        *(f"pyflocality.{name}" for name in BESIDE),
        *(f"pyflocality.{name}.{part}" for name in BESIDE for part in find_packages(name)),
    ],
    package_dir={f"pyflocality.{name}": name for name in BESIDE},
    package_data={
        "pyflocality": ["py.typed"],
        "pyflocality.csrc": ["cuda/*.cu", "include/**/*.h"],
    },
    ext_modules=[
        Extension(
            "pyflocality._C",
            sources=sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
            include_dirs=["csrc/include", "csrc/cpu"],
            language="c++",
            optional=not REQUIRE_NATIVE,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
