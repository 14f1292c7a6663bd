"""How much of the set must be read: golden and certified subsets, from a checkout.

    python -m benchmarks.subsets --out benchmarks/results/NAME.json \\
        --cifar10 TRAIN.zip --cifar10-test TEST.zip --mnist TRAIN.zip --mnist-test TEST.zip

For each of the ten DDIM steps and test images with noise:

- golden subset: time of a call and difference to the whole set, optimal and PCA locality;
- certified subset: share of the set read, bound on the error and true error, time, optimal;
- the share that such bounds would leave to be read for single windows of the local score model
  and single outputs of PCA locality, beside what their exact distances cost. No certificate is
  built on these: the numbers say why.

Writes one JSON, and a picture beside it where matplotlib is installed.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyflocality as pf
from pyflocality._support.progress import progress_bar
from pyflocality.denoisers import CertifiedSubset

from .command import Record, Run, check_results, path_option, results_parser, write_json
from .kernels.runner import spread, time_in_turns
from .plotting import origin, picture
from .studies.subset_shares import (
    TOLERANCE,
    Setting,
    exact_distances,
    global_shares,
    outputs_step,
    posterior_means,
    windows_step,
)

STEPS = tuple(range(900, -1, -100))
# Published thresholds of the masks, by the option that names the set.
THRESHOLDS = {"cifar10": 0.05, "mnist": 0.005}
_QUICK_IMAGES = 2000


def golden_step(
    setting: Setting, step: int, models: Mapping[str, tuple[pf.Denoiser, pf.GoldenSubset]]
) -> Record:
    """Time of golden subset and whole set, and how far apart their answers are."""
    x, sigma, alpha = setting.noisy(step)
    x = x[: max(1, len(x) // 2)]
    record: Record = {"step": step, "batch": len(x)}
    for name, (whole, golden) in models.items():
        # The first calls build masks and pooled images.
        difference = (golden(x, sigma, alpha) - whole(x, sigma, alpha)).double()
        calls = {
            "whole": partial(whole, x, sigma, alpha),
            "golden": partial(golden, x, sigma, alpha),
        }
        seconds = time_in_turns(calls, setting.repetitions)
        record[name] = {
            "seconds_whole": spread(seconds["whole"]),
            "seconds_golden": spread(seconds["golden"]),
            "mse": float(difference.square().mean()),
            "largest": float(difference.abs().max()),
        }
        record["pool"], record["kept"] = golden.sizes(sigma, alpha)
    return record


def certified_step(setting: Setting, step: int, certified: CertifiedSubset) -> Record:
    """Share read, bound and true error of the certified subset, and times."""
    x, sigma, alpha = setting.noisy(step)
    whole = certified.denoiser
    plan = certified.plan(sigma, alpha)
    result = certified.certify(x, sigma, alpha)
    y, scale = x.double().flatten(1) / alpha, 0.5 * (alpha / sigma) ** 2
    distances = exact_distances(y, setting.data)
    truth = posterior_means(distances, scale, setting.data).reshape(x.shape)
    error = (result.x0.double() - truth).abs().flatten(1).amax(1)
    if (error > result.error_bound).any():
        raise RuntimeError(f"t = {step}: an error of {error.max():.3g} exceeds its bound")
    forward = (certified(x, sigma, alpha).double() - truth).abs().max()
    calls: dict[str, Callable[[], object]] = {
        "whole": partial(whole, x, sigma, alpha),
        "forward": partial(certified, x, sigma, alpha),
        "whole_one": partial(whole, x[:1], sigma, alpha),
        "forward_one": partial(certified, x[:1], sigma, alpha),
    }
    if float(result.share_read.max()) < 0.1:
        calls["certify"] = partial(certified.certify, x, sigma, alpha)
    seconds = time_in_turns(calls, setting.repetitions)
    return {
        "step": step,
        "plan": plan.__dict__,
        "share_read": spread(result.share_read.tolist()),
        "largest_bound": float(result.error_bound.max()),
        "largest_error": float(error.max()),
        "largest_error_forward": float(forward),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "shares": global_shares(y, distances, scale, certified.index),
    }


def measure(setting: Setting) -> Iterator[tuple[str, Record]]:
    """All records of a set, one after the other: kind and record."""
    optimal = pf.OptimalDenoiser(setting.data)
    local = pf.PCALocalityDenoiser(setting.data, THRESHOLDS[setting.name], moments=setting.moments)
    start = time.perf_counter()
    certified = CertifiedSubset(optimal, TOLERANCE, moments=setting.moments)
    index = certified.index
    yield (
        "preparation",
        {
            "index_seconds": time.perf_counter() - start,
            "index_bytes": index.nbytes,
            "set_bytes": setting.data.images.nbytes,
            "stages": list(index.stages),
        },
    )
    models: dict[str, tuple[pf.Denoiser, pf.GoldenSubset]] = {
        "optimal": (optimal, pf.GoldenSubset(optimal)),
        "pca_locality": (local, pf.GoldenSubset(local)),
    }
    for step in STEPS:
        yield "certified", certified_step(setting, step, certified)
        yield "golden", golden_step(setting, step, models)
        yield "windows", windows_step(setting, step)
        yield "outputs", outputs_step(setting, step, local)


def measure_set(
    name: str, train: Path, test: Path, *, quick: bool, batch: int, repetitions: int
) -> Record:
    """Everything about one set."""
    data = pf.TrainingSet.load(train)
    count = min(len(data), _QUICK_IMAGES) if quick else len(data)
    # Out of the memory map, so that nothing waits for a disk.
    data = pf.TrainingSet(data.images[:count].clone())
    moments = pf.Moments.from_data(data)
    start = time.perf_counter()
    moments.eigh()
    eigen_seconds = time.perf_counter() - start
    setting = Setting(name, data, pf.TrainingSet.load(test), moments, batch, repetitions)
    report: Record = {
        "name": name,
        "images": len(data),
        "shape": list(data.image_shape),
        "batch": batch,
        "tolerance": TOLERANCE,
        "mask_threshold": THRESHOLDS[name],
        "eigen_seconds": eigen_seconds,
    }
    for kind, record in progress_bar(measure(setting), description=name, total=1 + 4 * len(STEPS)):
        if kind == "preparation":
            report[kind] = record
        else:
            report.setdefault(kind, []).append(record)
    return report


def table(report: Record) -> str:
    """The main numbers of one set, for people."""
    lines = [
        f"{report['name']}: {report['images']} images, {report['batch']} noisy images a call, ms",
        "    t   share read     bound     error   whole  subset | golden optimal  PCA whole  golden"
        "     mse PCA",
    ]
    for certified, golden in zip(report["certified"], report["golden"], strict=True):
        seconds, local = certified["seconds"], golden["pca_locality"]
        lines.append(
            f"{certified['step']:5d} {certified['share_read']['median']:12.5f} "
            f"{certified['largest_bound']:9.1e} {certified['largest_error']:9.1e} "
            f"{1e3 * seconds['whole']['median']:7.1f} {1e3 * seconds['forward']['median']:7.1f} |"
            f"{1e3 * golden['optimal']['seconds_golden']['median']:15.1f} "
            f"{1e3 * local['seconds_whole']['median']:10.1f} "
            f"{1e3 * local['seconds_golden']['median']:7.1f} {local['mse']:11.2e}"
        )
    return "\n".join(lines)


def draw(report: Record, path: Path) -> None:
    """Four panels a set: times and differences of golden, shares and errors of certified."""
    sets = report["sets"]
    options: Record = {"figsize": (17, 3.9 * len(sets)), "layout": "constrained"}
    with picture(path, len(sets), 4, dpi=110, **options) as (figure, rows):
        for panels, one in zip(rows, sets, strict=True):
            _draw_golden(panels[:2], one)
            _draw_certified(panels[2:], one)
            for panel in panels:
                panel.invert_xaxis()
                panel.grid(alpha=0.3)
                panel.legend(frameon=False, fontsize=7)
                panel.set_xlabel("t (noise falls to the right)")
            title = f"{one['name']}, N = {one['images']:,}, B = {one['batch']}"
            panels[0].set_title(title, loc="left")
        figure.suptitle(origin(report), fontsize=10)


def _draw_golden(panels: Sequence[Any], one: Record) -> None:
    steps = [record["step"] for record in one["golden"]]
    for number, name in enumerate(("optimal", "pca_locality")):
        records = [record[name] for record in one["golden"]]
        for kind, style in (("whole", "-"), ("golden", "--")):
            seconds = [record[f"seconds_{kind}"]["median"] for record in records]
            label = f"{name}, {kind}"
            panels[0].plot(steps, seconds, style, color=f"C{number}", marker=".", label=label)
        errors = [math.sqrt(record["mse"]) for record in records]
        panels[1].plot(steps, errors, marker=".", color=f"C{number}", label=f"{name}, rms")
    panels[0].set(yscale="log", ylabel="seconds a call")
    panels[1].set(yscale="symlog", ylabel="golden against whole set")
    panels[1].set_yscale("symlog", linthresh=1e-6)


def _draw_certified(panels: Sequence[Any], one: Record) -> None:
    records = one["certified"]
    steps = [record["step"] for record in records]
    for name in records[0]["shares"]:
        shares = [record["shares"][name] for record in records]
        label = "exact distances" if name == "exact" else f"optimal, {name} components"
        panels[0].plot(steps, shares, marker=".", label=label)
    for kind, text in (("windows", "one window"), ("outputs", "one PCA output")):
        shares = [min(_bound_shares(record["centre"]), default=None) for record in one[kind]]
        shares = [math.nan if share is None else share for share in shares]
        panels[0].plot(steps, shares, ":", label=f"{text}, most components")
    panels[0].set(yscale="log", ylabel="share to be read, tolerance 1e-3")
    panels[1].plot(steps, [r["largest_bound"] for r in records], marker=".", label="error bound")
    panels[1].plot(steps, [r["largest_error"] for r in records], marker=".", label="true error")
    panels[1].set(yscale="log", ylabel="largest difference, range 2")


def _bound_shares(shares: dict[str, float]) -> list[float]:
    return [share for name, share in shares.items() if name not in ("exact", "inputs")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit code."""
    parser = results_parser("subsets", "Golden and certified subsets.")
    for name in THRESHOLDS:
        parser.add_argument(f"--{name}", type=path_option, help="zip or folder of training images")
        parser.add_argument(f"--{name}-test", type=path_option, help="zip or folder of test images")
    parser.add_argument("--quick", action="store_true", help="2,000 images, for a look")
    options = parser.parse_args(arguments)
    sources = {
        name: (getattr(options, name), getattr(options, f"{name}_test")) for name in THRESHOLDS
    }
    for name, (train, test) in sources.items():
        if (train is None) != (test is None):
            parser.error(f"--{name} and --{name}-test belong together")
    sources = {name: paths for name, paths in sources.items() if paths[0] is not None}
    if not sources:
        parser.error("give the training and test images of a set")
    check_results(parser, options)

    begun, (batch, repetitions) = Run(), (2, 1) if options.quick else (8, 2)
    sets = [
        measure_set(name, *paths, quick=options.quick, batch=batch, repetitions=repetitions)
        for name, paths in sources.items()
    ]
    report = begun.report(suite="subsets", quick=options.quick, sets=sets)
    write_json(report, options.out)
    print("\n\n".join(table(one) for one in sets))
    print(f"\nwritten: {options.out}")
    if importlib.util.find_spec("matplotlib") is not None:
        draw(report, options.out.with_suffix(".png"))
        print(f"drawn:   {options.out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
