"""The parts of `python -m benchmarks.large_images`: long commands on sets made for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pyflocality._support.rates import product_seconds

from ..command import Record, bar, read_json
from .agreement import agreement
from .crops import crops, enlarged, write_pngs
from .forecast import forecast, staged
from .watched import Watched, watched

THRESHOLD = 0.02
# Lukoianov, Yuan, Solomon and Sitzmann: AFHQ at 64x64, as published.
PUBLISHED_SECONDS, PUBLISHED_SAMPLES = 24.9, 128
PUBLISHED = {
    "set": "AFHQ, 3x64x64",
    "seconds_per_step": PUBLISHED_SECONDS,
    "samples": PUBLISHED_SAMPLES,
    "aggregation": "means of the posteriors of batches",
    "machine": "a data-centre GPU",
}


@dataclass(frozen=True)
class Work:
    """What a part has at hand.

    Attributes:
        folder: A folder of its own, empty.
        quick: Whether sizes are tiny.
        cifar10: Training images of CIFAR-10, where they were given.
    """

    folder: Path
    quick: bool
    cifar10: Path | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What children are started with: a cache of their own."""
        return {"PYFLOCALITY_CACHE_DIR": str(self.folder / "cache")}

    def command(self, *words: object) -> Watched:
        """A command of pyflocality, watched from outside."""
        return watched(["-m", "pyflocality", *words], self.environment)

    def generated(self, source: Path, name: str, *words: object) -> Record:
        """A run of `generate`: time and memory from outside, stages from its record."""
        out = self.folder / name
        seen = self.command("generate", source, "--out", out, *words)
        return told(seen, read_json(out / "run.json"))


def told(seen: Watched, run: Record) -> Record:
    """What a run of `generate` took."""
    calls = run["calls"]
    stages = {name: spent for name, spent in run["seconds"].items() if name != "total"}
    return {
        "seconds": seen.seconds,
        "peak_bytes": seen.peak_bytes,
        "stages": stages,
        "masks_seconds": sum(call.get("weights_seconds", 0.0) for call in calls),
        "steps_seconds": sum(call["seconds"] for call in calls),
        "densities": [call["density"] for call in calls if "density" in call],
        "calls": len(calls),
    }


def _wanted(samples: int, steps: int, threshold: float = THRESHOLD) -> list[object]:
    words = ["-n", samples, "--steps", steps, "--threshold", threshold, "--no-trajectory"]
    return [*words, "--spacing", "leading" if steps == 10 else "trailing"]


def pngs(work: Work) -> Record:
    """2,000 files to eight samples, nothing cached; and once more. Of one scene each, and of two.

    Masks of crops of two photographs are denser than those of as many photographs, and scans take
    as much longer.
    """
    count, side, samples, steps = (40, 12, 2, 2) if work.quick else (2000, 64, 8, 10)
    sets = {"crops of two photographs": crops(count, side)}
    if work.cifar10 is not None:
        sets["CIFAR-10, enlarged"] = enlarged(work.cifar10, count, side)
    runs: dict[str, Record] = {}
    bars = []
    for number, (name, images) in enumerate(sets.items()):
        files = work.folder / f"images {number}"
        write_pngs(images, files)
        first = work.generated(files, f"first {number}", *_wanted(samples, steps))
        again = work.generated(files, f"again {number}", *_wanted(samples, steps))
        runs |= {f"{name}: nothing cached": first, f"{name}: again": again}
        beside = again["seconds"] - again["steps_seconds"]
        bars += [
            bar(f"{name}: seconds, nothing cached", first["seconds"], 90.0),
            bar(f"{name}: peak bytes, nothing cached", first["peak_bytes"], 4e9),
            bar(f"{name}: seconds beside the scans, again", beside, 5.0),
        ]
    return {
        "images": count,
        "shape": [3, side, side],
        "samples": samples,
        "runs": runs,
        "bars": bars,
    }


def many(work: Work) -> Record:
    """15,000 images of 64x64: what comes before the first step, and ten steps."""
    count, side, samples, steps = (300, 8, 2, 2) if work.quick else (15_000, 64, 8, 10)
    np.save(work.folder / "images.npy", crops(count, side))
    run = work.generated(work.folder / "images.npy", "run", *_wanted(samples, steps))
    setup = run["seconds"] - run["steps_seconds"]
    # Each term of a mask is a multiply-add of a matrix product.
    pairs = float(count) * samples * (3 * side * side) ** 2
    sgemm = product_seconds(2 * pairs * sum(run["densities"]), torch.float32)
    most = max(150.0, 1.4 * sgemm)
    return {
        "images": count,
        "shape": [3, side, side],
        "samples": samples,
        "runs": {"nothing cached": run},
        "sgemm_seconds_of_multiply_adds": sgemm,
        "bars": [
            bar("seconds before and between steps", setup, 480.0),
            bar("seconds of ten steps", run["steps_seconds"], most),
            bar("peak bytes", run["peak_bytes"], 8e9),
        ],
        "beside": _beside(run["steps_seconds"] / run["calls"], samples),
    }


def _beside(seconds: float, samples: int) -> Record:
    """Seconds a step and an image, beside the published ones."""
    here = seconds / samples
    there = PUBLISHED_SECONDS / PUBLISHED_SAMPLES
    return {
        "published": PUBLISHED | {"seconds_per_step_and_image": there},
        "here": {
            "set": "crops of two photographs, 3x64x64",
            "seconds_per_step": seconds,
            "samples": samples,
            "aggregation": "the exact posterior over the whole set",
            "machine": "the processor of this file",
            "seconds_per_step_and_image": here,
        },
        "differs": [
            "the images: crops of two photographs are no faces, and their masks have another share",
            "the batch: fixed costs of a step are shared by fewer images here",
            "the aggregation: exact here, means over batches there",
            "the machine: two cores here, a data-centre GPU there",
        ],
        "less_time_per_image": here < there,
    }


def side_128(work: Work) -> Record:
    """2,000 images of 128x128, eight samples in ten steps; enlarged photographs where given."""
    count, side, samples, steps = (30, 16, 2, 2) if work.quick else (2000, 128, 8, 10)
    given = work.cifar10
    images = crops(count, side) if given is None else enlarged(given, count, side)
    np.save(work.folder / "images.npy", images)
    run = work.generated(work.folder / "images.npy", "run", *_wanted(samples, steps))
    return {
        "set": "crops of two photographs" if given is None else "CIFAR-10, enlarged",
        "images": count,
        "shape": [3, side, side],
        "samples": samples,
        "runs": {"nothing cached": run},
        "bars": [
            bar("seconds", run["seconds"], 1800.0),
            bar("peak bytes", run["peak_bytes"], 8e9),
        ],
    }


def side_256(work: Work) -> Record:
    """200 images of 256x256: one whole step for one image, and the plan of a run of ten."""
    count, side = (12, 20) if work.quick else (200, 256)
    source = work.folder / "images.npy"
    np.save(source, crops(count, side))
    # The middle of ten levels.
    step = staged(source, samples=1, steps=10, only=5, environment=work.environment)
    plan = work.command("plan", source, *_wanted(8, 10)[:6], "--json")
    return {
        "images": count,
        "shape": [3, side, side],
        "samples": 1,
        "one_step": step,
        "plan_of_eight_samples": json.loads(plan.output),
        "bars": [bar("peak bytes of one step", step["peak_bytes"], 8e9)],
    }


def cached(work: Work) -> Record:
    """CIFAR-10, packed, all masks cached: what comes before the first step."""
    count, samples, steps = (1200, 2, 2) if work.quick else (50_000, 8, 10)
    source: Path | None = work.cifar10
    if source is None:
        generator, source = np.random.default_rng(0), work.folder / "images"
        side = 20 if work.quick else 32
        write_pngs(generator.integers(0, 256, (count, 3, side, side), dtype=np.uint8), source)
    packed = work.folder / "packed"
    work.command("pack", source, packed)
    words = _wanted(samples, steps, 0.05)
    first = work.generated(packed, "first", *words)
    torch_seconds = min(watched(["-c", "import torch"], {}).seconds for _ in range(3))
    out = work.folder / "again"
    seen = work.command("generate", packed, "--out", out, *words)
    run = read_json(out / "run.json")
    began = next(when for when, line in seen.marks if line.startswith("sampling"))
    before = began - torch_seconds + run["calls"][0].get("weights_seconds", 0.0)
    return {
        "set": "random bytes" if work.cifar10 is None else "CIFAR-10",
        "images": run["data"]["images"],
        "shape": run["data"]["image_shape"],
        "samples": samples,
        "runs": {"nothing cached": first, "again": told(seen, run)},
        "torch_import_seconds": torch_seconds,
        "seconds_before_first_step": before,
        "bars": [bar("seconds before the first step, import of torch apart", before, 2.0)],
    }


def foreseen(work: Work) -> Record:
    """What the planner foresees beside what is measured, at three sizes."""
    settings = [(5000, 32, 4, 10), (2000, 64, 4, 10), (1000, 128, 2, 2)]
    if work.quick:
        settings = [(300, 8, 2, 2), (60, 12, 2, 2)]
    return {"sizes": [forecast(work.folder, *one) for one in settings]}


def ways(work: Work) -> Record:
    """Masks by the three ways, and how many entries lie at the threshold."""
    settings = [(60, 8), (400, 8)] if work.quick else [(1500, 32), (2500, 32), (5000, 32)]
    return {"sets": [agreement(*one, THRESHOLD) for one in settings]}


# In the order in which they run: quick ones first.
PARTS: dict[str, Callable[[Work], Record]] = {
    "pngs": pngs,
    "ways": ways,
    "foreseen": foreseen,
    "cached": cached,
    "many": many,
    "side-128": side_128,
    "side-256": side_256,
}
