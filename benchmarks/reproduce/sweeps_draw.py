"""Pictures of the sweeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyflocality import pictures

from .runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 16


def sweeps(report: dict[str, Any], path: Path) -> None:
    """r2 at the end and over all steps against each network, for every sweep."""
    plt = _pyplot()
    results = report["results"]
    kinds = list(results["sweeps"])
    figure, axes = plt.subplots(1, len(kinds), figsize=(5 * len(kinds), 4.6), sharey=True)
    names = [network["name"] for network in report["networks"]]
    for axis, kind in zip(axes, kinds, strict=True):
        found = results["sweeps"][kind]
        for k, name in enumerate(names):
            _bars(axis, k, name, [record["against"][name]["r2"] for record in found.values()])
        _ceiling(axis, results["networks_against_each_other"])
        axis.set_xticks(range(len(found)))
        wrapped = [value.replace(" ", "\n", 1).replace(", ", ",\n") for value in found]
        axis.set_xticklabels(wrapped, fontsize=8)
        axis.set_xlabel(kind)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("r2 against the network")
    axes[0].legend(fontsize=7)
    samples = report["samples"] * report["seeds"]
    figure.suptitle(
        f"PCA locality on {report['data']['name']}, threshold {report['threshold']:g}: {samples} "
        f"samples of {report['seeds']} seeds; bars: two standard errors, dots: seeds",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axis: Axes, k: int, name: str, found: list[dict[str, Any]]) -> None:
    """Means with error bars at the end and over all steps, and the means of seeds."""
    places = [place + 0.16 * k - 0.08 for place in range(len(found))]
    for told, marker, style, words in (
        (found, "o", "-", "at the end"),
        ([record["all_steps"] for record in found], "s", ":", "mean of all steps"),
    ):
        means = [record["mean"] for record in told]
        errors = [2 * (record["standard_error"] or 0.0) for record in told]
        axis.errorbar(
            places,
            means,
            yerr=errors,
            marker=marker,
            linestyle=style,
            color=f"C{k}",
            markersize=4,
            linewidth=1,
            capsize=2,
            label=f"{name}, {words}",
        )
    for place, record in zip(places, found, strict=True):
        axis.plot([place] * len(record["by_seed"]), record["by_seed"], ".", color="k", ms=2.5)


def _ceiling(axis: Axes, found: dict[str, Any]) -> None:
    """What the networks reach against each other."""
    for k, record in enumerate(found.values()):
        for other in record["against"].values():
            label = "network against network" if k == 0 else None
            axis.axhline(other["r2"]["mean"], color="0.5", linewidth=1, dashes=(4, 2), label=label)


def why(report: dict[str, Any], path: Path) -> None:
    """Effective sample size, closeness and sharpness of the aggregations by step."""
    plt = _pyplot()
    found = report["results"]["why"]
    times, models = found["timesteps"], found["models"]
    figure, axes = plt.subplots(1, 4, figsize=(19, 4.4))
    target = models["network"]
    for k, (name, steps) in enumerate((n, s) for n, s in models.items() if n != "network"):
        style = {"color": f"C{k}", "marker": "osD^v"[k % 5], "markersize": 3, "label": name}
        low, middle, high = zip(*(step["effective_sample_size"] for step in steps), strict=True)
        axes[0].semilogy(times, middle, **style)
        axes[0].fill_between(times, low, high, color=f"C{k}", alpha=0.12)
        axes[1].errorbar(
            times,
            [step["r2"]["mean"] for step in steps],
            yerr=[2 * (step["r2"]["standard_error"] or 0.0) for step in steps],
            capsize=2,
            **style,
        )
        for axis, figure_of in zip(axes[2:], ("gradient_energy", "variance"), strict=True):
            ratios = [
                step[figure_of]["mean"] / of_network[figure_of]["mean"]
                for step, of_network in zip(steps, target, strict=True)
            ]
            axis.plot(times, ratios, **style)
    axes[0].set_title("effective sample size (median, 10 to 90 %)", fontsize=9)
    axes[1].set_title("r2 of the answer against the network's, same input", fontsize=9)
    axes[2].set_title("gradient energy over the network's", fontsize=9)
    axes[3].set_title("variance of the image over the network's", fontsize=9)
    for axis in axes:
        axis.set_xlabel("t")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    for axis in axes[2:]:
        axis.axhline(1.0, color="0.5", linewidth=1)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def samples(runs: Mapping[str, Run], path: Path) -> None:
    """Images of the networks and of every aggregation from the same noise."""
    rows = [(name, run.x0[-1, :_COLUMNS]) for name, run in runs.items()]
    pictures.captioned_rows(rows).save(path)


def _pyplot() -> Any:  # noqa: ANN401
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
