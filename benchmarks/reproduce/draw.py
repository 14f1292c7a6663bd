"""Pictures of the table: samples row by row, and figures by step."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pyflocality import pictures

from ..command import Record
from ..plotting import picture
from .runs import Run
from .scores import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

_COLUMNS = 16
_LEGEND_COLUMNS = 4
# Worse than this is out of the picture: an r2 has no lower bound.
_LOWEST_R2 = -1.0
_COLORS, _MARKERS = 10, "os^Dv*P<Xp>"


def line_style(k: int) -> Record:
    """Colour, marker and dashes of the k-th line; no two of the first 110 are alike."""
    return {
        "color": f"C{k % _COLORS}",
        "marker": _MARKERS[k % len(_MARKERS)],
        "linestyle": "-" if k < _COLORS else "--",
        "markersize": 4,
        "linewidth": 1,
        "elinewidth": 0.8,
    }


def samples(record: Record, runs: Mapping[str, Run]) -> Image.Image:
    """Images from the same noise, a row for each network and method (figure 5 of the paper)."""
    first = record["networks"][0]["name"]
    rows = []
    for row in record["table"]:
        caption = row["label"]
        if row["name"] == first:
            caption += f"   below: mean and standard error against {first} at the end"
        if first in row["against"]:
            result = row["against"][first]
            caption += f"   MSE {shown(result['mse']['final'], 4)}"
            caption += f"   r2 {shown(result['r2']['final'], 3)}"
        # The built-in font has no such sign.
        rows.append((caption.replace("±", "+-"), runs[row["name"]].x0[-1, :_COLUMNS]))
    return pictures.captioned_rows(rows)


def steps(record: Record, path: Path) -> None:
    """r2 and MSE at each step, a column for each network."""
    names = [network["name"] for network in record["networks"]]
    rows = -(-len(record["table"]) // _LEGEND_COLUMNS)
    size = (4.6 * max(2, len(names)), 6.6 + 0.2 * rows)
    options: Record = {"dpi": 80, "figsize": size, "sharex": True, "layout": "constrained"}
    handles: Record = {}
    with picture(path, 2, len(names), **options) as (figure, axes):
        for column, name in enumerate(names):
            top, bottom = axes[:, column]
            for axis, measure in ((top, "r2"), (bottom, "mse")):
                handles |= _lines(axis, record, name, measure)
            top.set_title(f"against {name}", fontsize=10)
            below = [
                row["label"]
                for row in record["table"]
                if any((step["mean"] or 0) < _LOWEST_R2 for step in _found(row, name, "r2"))
            ]
            top.set_ylabel("r2" + f" (axis ends at {_LOWEST_R2:g})" * bool(below), fontsize=9)
            if below:
                told = textwrap.fill(f"below the axis at some steps: {', '.join(below)}", 72)
                top.set_xlabel(told, fontsize=7)
            top.set_ylim(max(_LOWEST_R2, top.get_ylim()[0]), 1.02)
            bottom.set_yscale("log")
            bottom.set_ylabel("MSE", fontsize=9)
            bottom.set_xlabel("t", fontsize=9)
        # Shared by all.
        axes[0, 0].invert_xaxis()
        order = [row["label"] for row in record["table"] if row["label"] in handles]
        figure.legend(
            *([handles[label] for label in order], order),
            loc="outside lower center",
            ncols=_LEGEND_COLUMNS,
            fontsize=8,
        )
        figure.suptitle(
            f"{record['data']['name']}: each model's own run against the network's own run, "
            f"{record['settings']['samples']} samples; bars: one standard error",
            fontsize=10,
        )


def _lines(axis: Axes, record: Record, name: str, measure: str) -> Record:
    """A line for each row of the table that is held against a network; what the legend shows."""
    handles = {}
    for k, row in enumerate(record["table"]):
        steps = zip(record["settings"]["timesteps"], _found(row, name, measure), strict=False)
        known = [(t, step) for t, step in steps if step["mean"] is not None]
        if known:
            handles[row["label"]] = axis.errorbar(
                [t for t, _ in known],
                [step["mean"] for _, step in known],
                yerr=[step["standard_error"] or 0.0 for _, step in known],
                **line_style(k),
            )
    return handles


def _found(row: Record, name: str, measure: str) -> list[Record]:
    """Figures of each step of a row against a network; none of the network against itself."""
    return row["against"][name][measure]["steps"] if name in row["against"] else []
