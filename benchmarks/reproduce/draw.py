"""Pictures of the table: samples row by row, and figures by step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyflocality import pictures

from .runs import Run
from .scores import shown

if TYPE_CHECKING:
    from PIL import Image

_COLUMNS = 16


def samples(record: dict[str, Any], runs: Mapping[str, Run]) -> Image.Image:
    """Images from the same noise, a row for each network and method (figure 5 of the paper)."""
    first = record["networks"][0]["name"]
    rows = []
    for row in record["table"]:
        caption = row["label"]
        if first in row["against"]:
            found = row["against"][first]
            caption += f"   MSE {shown(found['mse']['final'], 4)}"
            caption += f"   r2 {shown(found['r2']['final'], 3)}"
        # The built-in font has no such sign.
        rows.append((caption.replace("±", "+-"), runs[row["name"]].x0[-1, :_COLUMNS]))
    return pictures.captioned_rows(rows)


def steps(record: dict[str, Any], path: Path) -> None:
    """r2 and MSE at each step, a column for each network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [network["name"] for network in record["networks"]]
    times = record["settings"]["timesteps"]
    figure, axes = plt.subplots(
        2, len(names), figsize=(5.5 * len(names), 8), squeeze=False, sharex=True
    )
    colors = {row["name"]: f"C{k % 10}" for k, row in enumerate(record["table"])}
    for column, name in enumerate(names):
        for axis, measure in zip(axes[:, column], ("r2", "mse"), strict=True):
            for k, row in enumerate(record["table"]):
                if name not in row["against"]:
                    continue
                found = row["against"][name][measure]["steps"]
                known = [
                    (t, step)
                    for t, step in zip(times, found, strict=True)
                    if step["mean"] is not None
                ]
                axis.errorbar(
                    [t for t, _ in known],
                    [step["mean"] for _, step in known],
                    yerr=[step["standard_error"] or 0.0 for _, step in known],
                    label=row["label"],
                    color=colors[row["name"]],
                    linestyle="-" if k < 10 else "--",
                    marker="o",
                    markersize=3,
                    linewidth=1,
                )
            axis.set_ylabel(measure)
        top, bottom = axes[:, column]
        top.set_title(f"against {name}", fontsize=10)
        top.set_ylim(max(-1.0, top.get_ylim()[0]), 1.02)
        bottom.set_yscale("log")
        bottom.set_xlabel("t")
    # Shared by all.
    axes[0, 0].invert_xaxis()
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(
        f"{record['data']['name']}: each model's own run against the network's own run, "
        f"{record['settings']['samples']} samples",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
