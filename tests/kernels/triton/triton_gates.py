"""Gates for Triton kernels that need no GPU: ahead-of-time compiles, read back from the code.

Two ways to test a kernel without a GPU exclude each other in one process: Triton decides when a
kernel is defined whether it is interpreted (`TRITON_INTERPRET=1`) or compiled. Here

* tests under `tests/kernels/triton` run kernels in the interpreter of their own process, which
  their `conftest.py` switches on before anything imports Triton (on a machine with a GPU they run
  compiled, on the GPU, instead);
* `compile_ahead` compiles in one worker process, always without the interpreter. A kernel is
  handed over by name, so a test may call it whichever way its own process runs.

Compiling needs neither a GPU nor a driver, only the assembler and `cuobjdump` of Triton's wheel.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pyflocality.kernels.devices import LARGE_SHARED_BYTES, SHARED_BYTES

# Shared memory a block may have, bytes: the older tables serve every GPU that the backend takes.
SHARED_LIMIT = {80: SHARED_BYTES, 90: LARGE_SHARED_BYTES}


@dataclass(frozen=True)
class Compiled:
    """What the code of one compiled configuration shows.

    Attributes:
        ptx: PTX text.
        sass: Disassembled machine code.
        registers: Registers a thread.
        spill_bytes: Stack bytes a thread: what did not fit the registers.
        shared_bytes: Shared memory of a block, bytes.
        arch: Compute capability, 80 or 90.
    """

    ptx: str
    sass: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    arch: int

    @property
    def has_wgmma(self) -> bool:
        """Whether asynchronous warpgroup products are used (Hopper)."""
        return "wgmma.mma_async" in self.ptx

    @property
    def has_mma(self) -> bool:
        """Whether tensor cores are used in any way."""
        return self.has_wgmma or "mma.sync" in self.ptx

    @property
    def has_imma(self) -> bool:
        """Whether integer tensor cores are used."""
        return bool(re.search(r"\b(IMMA|IGMMA)\b", self.sass))

    @property
    def has_async_copies(self) -> bool:
        """Whether global memory is copied to shared memory asynchronously."""
        return "cp.async" in self.ptx

    @property
    def waits(self) -> tuple[int, ...]:
        """How many warpgroup products may be in flight at each wait; only 0 is synchronous."""
        found = re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", self.ptx)
        return tuple(sorted({int(count) for count in found}))

    def __str__(self) -> str:
        return (
            f"sm_{self.arch}: {self.registers} registers, {self.spill_bytes} bytes spilled, "
            f"{self.shared_bytes} bytes shared, wgmma {self.has_wgmma}, waits {self.waits}"
        )

    def assert_fits(self, *, wgmma: bool = False) -> None:
        """No spills, shared memory within the limit, and on Hopper `wgmma` where it is meant."""
        assert self.spill_bytes == 0, str(self)
        assert "STL" not in self.sass, str(self)
        assert self.shared_bytes <= SHARED_LIMIT[self.arch], str(self)
        if wgmma:
            assert self.has_mma, str(self)
            assert self.has_wgmma or self.arch < 90, str(self)


def compile_ahead(
    kernel: object,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    *,
    arch: int,
    num_warps: int,
    num_stages: int,
    maxnreg: int | None = None,
    divisible: Iterable[str] = (),
) -> Compiled:
    """Compile one configuration of a kernel for a GPU that need not be there.

    Args:
        kernel: The `@triton.jit` function, compiled or interpreted in this process.
        signature: Type of each argument that is no constexpr, by name: "*fp16", "*i32", "i32",
            "i64", "fp32". Pointers count as aligned to 16 bytes, as those of tensors are.
        constexprs: Values of the constexpr arguments (and of others to be compiled in).
        arch: 80 or 90.
        num_warps: Warps of a block.
        num_stages: Depth of the software pipeline.
        maxnreg: Most registers a thread may have.
        divisible: Whole-number arguments that are multiples of 16, as Triton finds at a launch.
    """
    function = kernel.fn  # type: ignore[attr-defined]
    return _compile(
        function.__module__,
        function.__name__,
        tuple(signature.items()),
        tuple(constexprs.items()),
        arch,
        num_warps,
        num_stages,
        maxnreg,
        tuple(divisible),
    )


@functools.cache
def _compile(*request: object) -> Compiled:
    return _submit(request).result()


@functools.cache
def _worker() -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_compile_only)
    atexit.register(pool.shutdown)
    return pool


def _submit(request: tuple[object, ...]) -> Future[Compiled]:
    return _worker().submit(_compile_in_worker, *request)


def _compile_only() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _compile_in_worker(
    module: str,
    name: str,
    signature: tuple[tuple[str, str], ...],
    constexprs: tuple[tuple[str, object], ...],
    arch: int,
    num_warps: int,
    num_stages: int,
    maxnreg: int | None,
    divisible: tuple[str, ...],
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(module), name)
    constants = dict(constexprs)
    types = dict(signature)
    unknown = (set(types) | set(constants)) ^ set(kernel.arg_names)
    if unknown:
        raise ValueError(f"{name}: arguments without a type, or unknown: {sorted(unknown)}")
    ordered = {key: types.get(key, "constexpr") for key in kernel.arg_names}
    aligned = [key for key, kind in ordered.items() if kind.startswith("*") or key in divisible]
    attributes = {(kernel.arg_names.index(key),): [["tt.divisibility", 16]] for key in aligned}
    source = ASTSource(kernel, ordered, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if maxnreg is not None:
        options["maxnreg"] = maxnreg
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, sass = _read_binary(compiled.asm["cubin"])
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    return Compiled(compiled.asm["ptx"], sass, registers, stack, compiled.metadata.shared, arch)


def _read_binary(binary: bytes) -> tuple[str, str]:
    """Resource usage and disassembly of machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        return tuple(
            subprocess.run([tool, option, path], check=True, capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        )
