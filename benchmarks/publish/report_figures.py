"""Pictures of the report: speed-ups and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..command import Record
from .summary import EAGER, size_of

# Families of yardsticks that do the same work in another way, by how their names begin.
BASELINES = {
    EAGER: "eager torch",
    "compiled": "torch.compile",
    "attention": "torch's attention",
    "keops": "KeOps",
    "faiss": "faiss",
    "torch_cov": "torch.cov",
}

# What the pictures beside results files show, by the end of their names.
CAPTIONS = {
    "samples": "Images from the same noise, a row for each network or model",
    "steps": "r2 and MSE against each network at each step",
    "why": "Exact posteriors and batch means at the same noisy images: effective sample size, r2 "
    "against the network's answer, gradient energy and variance",
}


def baselines_of(record: Record) -> dict[str, Record]:
    """The fastest yardstick of each family that a case ran beside, by family."""
    result: dict[str, Record] = {}
    for name, yardstick in record["yardsticks"].items():
        for family in BASELINES:
            if name.startswith(family):
                best = result.get(family, yardstick)
                ratio = min(best, yardstick, key=lambda one: one["ratio"]["median"])
                result[family] = ratio
    return result


def missing_of(record: Record) -> dict[str, str]:
    """Why families of yardsticks did not run beside a case."""
    return {
        family: reason
        for name, reason in record.get("missing", {}).items()
        for family in BASELINES
        if name.startswith(family)
    }


def compared(records: Sequence[Record]) -> list[Record]:
    """The cases with a yardstick that does the same work in another way."""
    return [record for record in records if baselines_of(record) or missing_of(record)]


def draw_speedups(records: Sequence[Record], path: Path) -> None:
    """A bar for every case and baseline: how many times faster the case is."""
    from matplotlib.figure import Figure

    bars = [
        (record, family, yardstick["ratio"])
        for record in compared(records)
        for family, yardstick in baselines_of(record).items()
    ]
    figure = Figure(figsize=(9, 1 + 0.24 * len(bars)), layout="constrained")
    axes = figure.subplots()
    families = list(BASELINES)
    for row, (_, family, ratio) in enumerate(bars):
        colour = f"C{families.index(family)}"
        axes.plot([ratio["p20"], ratio["p80"]], [row, row], color=colour, linewidth=5, alpha=0.3)
        axes.plot(ratio["median"], row, "o", color=colour)
    for family in dict.fromkeys(family for _, family, _ in bars):
        axes.plot([], [], "o", color=f"C{families.index(family)}", label=BASELINES[family])
    axes.set_yticks(range(len(bars)), [f"{r['op']}  {size_of(r)}" for r, _, _ in bars], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="times faster than the baseline (median, p20 to p80)")
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def draw_roofline(report: Record, path: Path) -> None:
    """Every case as a point: operations a byte against operations a second, below the roofs.

    Roofs are a float32 matmul and a copy, where the file has their rates.
    """
    import numpy as np
    from matplotlib.figure import Figure

    records = [record for record in report["results"] if record["suite"] != "scaling"]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for number, suite in enumerate(dict.fromkeys(record["suite"] for record in records)):
        chosen = [record for record in records if record["suite"] == suite]
        axes.plot(
            [intensity(record) for record in chosen],
            [record["gflops_per_second"] for record in chosen],
            "o",
            color=f"C{number}",
            label=suite.replace("_", " "),
        )
    rates = report.get("rates")
    if rates is not None:
        left = min(map(intensity, records)) / 2
        right = max(map(intensity, records)) * 2
        places = np.geomspace(left, right, 200)
        top = rates["matmul_gflops_per_second"]
        roof = np.minimum(top, rates["copy_gbytes_per_second"] * places)
        label = f"copy {rates['copy_gbytes_per_second']:.3g} GB/s, matmul {top:.3g} GFLOP/s"
        axes.plot(places, roof, color="black", linewidth=1, label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations a byte (least traffic: every input read once)",
        ylabel="GFLOP/s",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def intensity(record: Record) -> float:
    """Operations a byte."""
    return record["flops"] / record["bytes"]
