"""Scans of a memory-mapped set that is larger than the memory budget.

A synthetic set of the shape of ImageNet-64 (uint8, 3x64x64) is written to a file and scanned by
the optimal denoiser and a local one with a budget of 1 GB: time, throughput beside a plain
sequential read of the same file in the same run, and the memory of the process, its own and what
it maps of the file. "Cold" runs start with nothing of the file in the system's cache, "warm" ones
with as much as fits. The answers are checked against those of a part of the set held in memory.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import pyflocality as pf
from pyflocality._support.memory import memory_bytes
from pyflocality._support.progress import progress_bar
from pyflocality.storage import mapped as _mapped

from ..command import Record
from ..plotting import picture

NEEDS: tuple[str, ...] = ()
ACCEPTS = ("scratch",)

_SHAPE = (3, 64, 64)
# Images of ImageNet-64, and how many there are where the disk has no room for so many.
_COUNT, _FEWER = 1_281_167, 300_000
_BUDGET = 2**30
_BATCH = 2
_READ_BYTES = 8 * 2**20


def _count(scratch: Path | None) -> int:
    """How many images there is room for, with as much again to spare."""
    free = shutil.disk_usage(scratch or tempfile.gettempdir()).free
    return _COUNT if free > 2 * _COUNT * math.prod(_SHAPE) else _FEWER


def run(*, quick: bool, scratch: Path | None) -> tuple[Record, None]:
    """Records of plain reads and of scans."""
    count, checked, budget = (2_000, 200, 2**20) if quick else (_count(scratch), 10_000, _BUDGET)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="pyflocality-streaming-") as folder:
        path = Path(folder, "images.npy")
        write_images(path, count)
        data = pf.TrainingSet.load(path)
        models = {
            "optimal": (pf.OptimalDenoiser, {}, 20.0),
            "local, window 7": (pf.LocalDenoiser, {"window": 7}, 1.0),
        }
        records = [
            _measure("read", "cold", path, lambda: plain_read(path)),
            _measure("read", "warm", path, lambda: plain_read(path)),
        ]
        differences = {}
        for name, (make, options, sigma) in progress_bar(models.items(), description="scans"):
            denoiser = make(data, memory_budget=budget, **options)
            x = data.values(0, _BATCH) + sigma * torch.randn(
                _BATCH, *_SHAPE, generator=torch.Generator().manual_seed(1)
            )

            def scan(
                denoiser: pf.Denoiser = denoiser, x: torch.Tensor = x, s: float = sigma
            ) -> None:
                denoiser(x, s)

            for cache in ("cold", "warm"):
                records.append(_measure(name, cache, path, scan))
            with mock.patch.object(_mapped.MappedFile, "fetch"):
                records.append(_measure(name, "cold, not fetched ahead", path, scan))
            part = data.subset(slice(0, checked))
            resident = pf.TrainingSet(part.images.clone())
            small = make(part, memory_budget=part.images.nbytes // 4, **options)(x, sigma)
            differences[name] = float((small - make(resident, **options)(x, sigma)).abs().max())
        return {
            "images": count,
            "shape": list(_SHAPE),
            "file_bytes": path.stat().st_size,
            "memory_budget": budget,
            "batch": _BATCH,
            "records": records,
            "largest_difference_to_memory": differences,
            "checked_images": checked,
        }, None


def write_images(path: Path, count: int) -> None:
    """A file of random images, a thousand at a time, on the disk itself."""
    generator = np.random.default_rng(0)
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *_SHAPE)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in progress_bar(range(0, count, 1000), description="writing"):
            file.write(generator.bytes(min(1000, count - start) * int(np.prod(_SHAPE))))
        file.flush()
        os.fsync(file.fileno())


def plain_read(path: Path) -> None:
    """Read a file from front to back into one small buffer."""
    buffer = bytearray(_READ_BYTES)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _measure(what: str, cache: str, path: Path, work: Callable[[], None]) -> Record:
    """Time and memory of some work on a file."""
    if cache.startswith("cold"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    before = memory_bytes()
    with _peak_memory() as peak:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    return {
        "what": what,
        "cache": cache,
        "seconds": seconds,
        "gb_per_second": path.stat().st_size / seconds / 1e9,
        "peak_anonymous_bytes": peak["RssAnon"],
        "anonymous_bytes_before": before["RssAnon"],
        "peak_mapped_file_bytes": peak["RssFile"],
        "mapped_file_bytes_before": before["RssFile"],
    }


@contextmanager
def _peak_memory() -> Iterator[dict[str, int]]:
    """Largest memory by kind inside a block, looked at every five milliseconds."""
    peak, done = memory_bytes(), threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            for name, size in memory_bytes().items():
                peak[name] = max(peak[name], size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def draw(results: Record, pictures: None, path: Path) -> None:
    """Throughput and memory of every run."""

    records = results["records"]
    names = [f"{record['what']}\n({record['cache']})" for record in records]
    with picture(path, 1, 2, figsize=(11, 4.5), sharey=True) as (figure, [axes]):
        axes[0].barh(names, [record["gb_per_second"] for record in records])
        axes[0].set_xlabel("GB of the file a second")
        axes[0].invert_yaxis()
        for key, label in (
            ("peak_anonymous_bytes", "own memory"),
            ("peak_mapped_file_bytes", "pages of files"),
        ):
            axes[1].plot([record[key] / 1e6 for record in records], names, "o", label=label)
        budget, size = results["memory_budget"] / 1e6, results["file_bytes"] / 1e6
        axes[1].axvline(budget, color="grey", lw=1, label="memory budget")
        axes[1].axvline(size, color="black", lw=1, ls="--", label="size of the file")
        axes[1].set_xlabel("largest resident memory, MB")
        axes[1].set_xscale("log")
        axes[1].legend(fontsize=7)
        shape = "x".join(map(str, results["shape"]))
        figure.suptitle(f"{results['images']:,} images {shape}, batch {results['batch']}")
