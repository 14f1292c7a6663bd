"""How long the first call of a kernel takes: compiled there and then, and from the disk's cache.

    python -m benchmarks.kernels.gpu_start OPERATION

runs one operation twice in a fresh process and prints the seconds of both calls as JSON.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor

from pyflocality import ops

from .. import ROOT
from .gpu_machine import pretended_gpu

# Backend by operation, a kernel of each kind: several small ones, one large one, and one that NVRTC
# compiles.
OPERATIONS = {
    "masked_posterior": "triton",
    "equivariant_posterior": "triton",
    "window_posterior": "cuda",
}
# Seconds a process may take, and must have left to start.
_SECONDS, _LEAST_SECONDS = 100, 10


def start_times(
    operations: Iterable[str] = OPERATIONS, left: Callable[[], float] = lambda: math.inf
) -> dict[str, dict[str, dict[str, object]]]:
    """First calls in a process of their own, with empty caches, then with those that it left."""
    result = {}
    for op in operations:
        with tempfile.TemporaryDirectory() as folder:
            caches = {"TRITON_CACHE_DIR": folder, "CUPY_CACHE_DIR": folder}
            result[op] = {
                name: _run(op, os.environ | caches, min(_SECONDS, left()))
                for name in ("compiled", "cached")
            }
    return result


def _run(op: str, environment: dict[str, str], seconds: float) -> dict[str, object]:
    """What a process of its own prints; whatever goes wrong there is a record."""
    if seconds < _LEAST_SECONDS:
        return {"skipped": "no time left"}
    command = [sys.executable, "-m", f"{__package__}.gpu_start", op]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=True,
        )
        result = json.loads(done.stdout.splitlines()[-1])
        return {
            "first_seconds": result["first_seconds"],
            "second_seconds": result["second_seconds"],
        }
    except subprocess.CalledProcessError as error:
        return {"failed": (error.stderr.splitlines() or [f"exit code {error.returncode}"])[-1]}
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {seconds:.0f} s"}
    except Exception as error:  # noqa: BLE001  (anything may be printed by what it imports)
        return {"failed": f"{type(error).__name__}: {error}"}


def first_calls(op: str) -> dict[str, float]:
    """Seconds of the first call of an operation in this process, and of the second."""
    there = torch.cuda.is_available()
    function = _call(op, torch.device("cuda" if there else "cpu"))
    seconds = []
    with nullcontext() if there else pretended_gpu():
        for _ in range(2):
            start = time.perf_counter()
            # The result is copied to the CPU: the call is over then.
            function().cpu()
            seconds.append(time.perf_counter() - start)
    return {"first_seconds": seconds[0], "second_seconds": seconds[1]}


def _call(op: str, device: torch.device) -> Callable[[], Tensor]:
    # Small in the interpreter, which does not compile.
    side, window = (32, 7) if device.type == "cuda" else (8, 3)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, side, side), generator=generator, dtype=torch.uint8)
    images, backend = images.to(device), OPERATIONS[op]
    x = torch.randn(1, 3, side, side, generator=generator).to(device)
    masks = torch.ones(3 * side**2, 3 * side**2, dtype=torch.bool)
    given = masks if op == "masked_posterior" else window
    mean = getattr(ops, f"{op}_mean")
    return lambda: mean(x, images, given, 0.5, backend=backend)


if __name__ == "__main__":
    print(json.dumps(first_calls(sys.argv[1])))
