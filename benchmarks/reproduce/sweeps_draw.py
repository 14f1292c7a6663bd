"""Pictures of the sweeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pyflocality import pictures

from ..command import Record
from ..plotting import picture
from .runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 16


def sweeps(report: Record, path: Path) -> None:
    """r2 against each network at the end and over all steps, and its difference to exact's."""
    results = report["results"]
    kinds = list(results["sweeps"])
    widths = [max(5, len(results["sweeps"][kind])) for kind in kinds]
    options: Record = {"figsize": (sum(widths), 9.5), "sharex": "col", "width_ratios": widths}
    with picture(path, 2, len(kinds), **options) as (figure, axes):
        names = [network["name"] for network in report["networks"]]
        for column, kind in zip(axes.T, kinds, strict=True):
            result = results["sweeps"][kind]
            # Aggregations have no order that a line could follow.
            lines = kind != "aggregation"
            for k, name in enumerate(names):
                told = [record["against"][name]["r2"] for record in result.values()]
                _bars(column[0], k, name, told, [record["all_steps"] for record in told], lines)
                pairs = [record["minus_exact"][name] for record in result.values()]
                ends, means = ([pair[key] for pair in pairs] for key in ("final", "all_steps"))
                _bars(column[1], k, name, ends, means, lines)
            _ceiling(column[0], results["networks_against_each_other"])
            column[1].axhline(0.0, color="0.3", linewidth=1)
            column[1].set_xticks(range(len(result)))
            column[1].set_xticklabels([value.replace(" ", "\n") for value in result], fontsize=8)
            own = "; exact at the same threshold" if kind == "aggregation" else ""
            column[1].set_xlabel(kind + own)
            for axis in column:
                axis.grid(axis="y", alpha=0.3)
            # Differences of aggregations are far smaller than others: they keep their own scale.
            column[0].sharey(axes[0, 0])
        axes[0, 0].set_ylabel("r2 against the network")
        axes[1, 0].set_ylabel("r2 less r2 of the exact model at temperature 1, in pairs")
        axes[0, 0].legend(fontsize=7)
        samples = report["samples"] * report["seeds"]
        figure.suptitle(
            f"PCA locality on {report['data']['name']}, threshold {report['threshold']:g}: "
            f"{samples} samples of {report['seeds']} noise seeds; bars: two standard errors over "
            "the samples, black dots: means of noise seeds",
            fontsize=10,
        )


def _bars(
    axis: Axes,
    k: int,
    name: str,
    ends: list[Record],
    means: list[Record],
    lines: bool,
) -> None:
    """Means with error bars at the end and over all steps, and the means of noise seeds."""
    for told, shift, marker, style, words in (
        (ends, -0.03, "o", "-", "at the end"),
        (means, 0.03, "s", ":", "mean of all steps"),
    ):
        places = [place + 0.2 * k - 0.1 + shift for place in range(len(told))]
        axis.errorbar(
            places,
            [_number(record["mean"]) for record in told],
            yerr=_two_errors(told),
            marker=marker,
            linestyle=style if lines else "",
            color=f"C{k}",
            markerfacecolor=f"C{k}" if told is ends else "white",
            markersize=4,
            linewidth=1,
            capsize=2,
            label=f"{name}, {words}",
        )
        for place, record in zip(places, told, strict=True):
            seeds = [_number(mean) for mean in record["by_seed"]]
            axis.plot([place] * len(seeds), seeds, ".", color="k", ms=2)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _two_errors(told: list[Record]) -> list[float]:
    return [2 * (record["standard_error"] or 0.0) for record in told]


def _ceiling(axis: Axes, result: Record) -> None:
    """What the networks reach against each other, at the end and over all steps."""
    for k, record in enumerate(result.values()):
        for other in record["against"].values():
            for told, style, words in (
                (other["r2"], "--", "at the end"),
                (other["r2"]["all_steps"], ":", "mean of all steps"),
            ):
                label = f"network against network, {words}" if k == 0 else None
                height = _number(told["mean"])
                axis.axhline(height, color="0.5", linewidth=1, linestyle=style, label=label)


def why(report: Record, path: Path) -> None:
    """Effective sample size, closeness and sharpness of the aggregations by step."""
    result = report["results"]["why"]
    times, models = result["timesteps"], result["models"]
    target = models["network"]
    with picture(path, 2, 3, figsize=(16, 9)) as (figure, grid):
        *axes, empty = grid.flat
        for k, (name, steps) in enumerate((n, s) for n, s in models.items() if n != "network"):
            # Side by side, or the bars hide each other.
            shifted = [t - 7 * k for t in times]
            color = "k" if name == "exact" else f"C{k - 1}"
            style: Record = {"color": color, "marker": "osD^v"[k % 5], "markersize": 4}
            if name == "exact":
                style |= {"linestyle": "--", "zorder": 5}
            _sizes(axes[0], shifted, steps, result["batches"].get(name), style | {"label": name})
            for axis, key in ((axes[1], "r2"), (axes[2], "r2_minus_exact")):
                told = [step[key] for step in steps]
                means = [_number(record["mean"]) for record in told]
                axis.errorbar(shifted, means, yerr=_two_errors(told), capsize=2, **style)
            for axis, key in ((axes[3], "gradient_energy"), (axes[4], "variance")):
                pairs = zip(steps, target, strict=True)
                axis.plot(
                    times, [step[key]["mean"] / of[key]["mean"] for step, of in pairs], **style
                )
        titles = (
            "effective sample size: median; bars: 10 to 90 %; thin: number of batches",
            "r2 of the answer against the network's",
            "r2 less r2 of the exact answer, in pairs",
            "gradient energy over the network's",
            "variance of the image over the network's",
        )
        for axis, title, line in zip(axes, titles, (None, None, 0.0, 1.0, 1.0), strict=True):
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("t")
            axis.invert_xaxis()
            axis.grid(alpha=0.3)
            if line is not None:
                axis.axhline(line, color="0.5", linewidth=1)
        empty.axis("off")
        empty.legend(*axes[0].get_legend_handles_labels(), loc="center", fontsize=11)
        figure.suptitle(
            f"The same noisy images for all: the states of {result['samples']} runs of "
            f"{report['networks'][0]['name']}; error bars of r2: two standard errors over these "
            "runs",
            fontsize=11,
        )


def _sizes(
    axis: Axes,
    times: list[float],
    steps: list[Record],
    batches: int | None,
    style: Record,
) -> None:
    """Median and spread of the effective sample sizes, and the number of batches."""
    low, middle, high = zip(*(step["effective_sample_size"] for step in steps), strict=True)
    axis.semilogy(times, middle, **style)
    axis.vlines(times, low, high, color=style["color"], linewidth=1, alpha=0.4)
    if batches is not None:
        axis.axhline(batches, color=style["color"], linewidth=0.7, alpha=0.8)


def samples(runs: Mapping[str, Run], path: Path) -> None:
    """Images of the networks and of every aggregation from the same noise."""
    rows = [(name, run.x0[-1, :_COLUMNS]) for name, run in runs.items()]
    pictures.captioned_rows(rows).save(path)
