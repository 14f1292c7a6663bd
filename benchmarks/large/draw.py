"""The picture of `python -m benchmarks.large_images`: where time goes, and what was foreseen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..command import Record
from ..plotting import origin, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(report: Record, path: Path) -> None:
    """Seconds of every run by stage; foreseen against measured seconds and memory."""
    parts = report["parts"]
    with picture(path, 1, 3, figsize=(16, 4.8)) as (figure, [axes]):
        _runs(parts, axes[0])
        sizes = parts.get("foreseen", {}).get("sizes", [])
        for axis, key, label, scale in (
            (axes[1], "seconds", "seconds of a stage", 1.0),
            (axes[2], "bytes", "largest resident memory, GB", 1e9),
        ):
            axis.set_visible(bool(sizes))
            values = []
            for size in sizes:
                pairs = [
                    (one[f"measured_{key}"] / scale, one[f"foreseen_{key}"] / scale)
                    for one in size["stages"]
                ]
                values += [value for pair in pairs for value in pair if value > 0]
                name = "x".join(map(str, size["shape"]))
                axis.plot(*zip(*pairs, strict=True), "o", label=f"{size['images']:,} x {name}")
            if values:
                ends = [0.7 * min(values), 1.4 * max(values)]
                axis.plot(ends, ends, "k-", lw=1)
                if key == "seconds":
                    band = [0.7 * end for end in ends], [1.3 * end for end in ends]
                    axis.fill_between(ends, *band, alpha=0.2)
                axis.set_xscale("log")
                axis.set_yscale("log")
                axis.legend(fontsize=8)
            axis.set_xlabel(f"measured {label}")
            axis.set_ylabel(f"foreseen {label}")
        figure.suptitle(origin(report), fontsize=9)


def _runs(parts: Record, axis: Axes) -> None:
    """A bar for each run, of masks, steps and the rest."""
    runs = [
        (f"{'x'.join(map(str, part['shape']))}, {part['images']:,}\n{name}", run)
        for part in parts.values()
        for name, run in part.get("runs", {}).items()
    ]
    names = [name for name, _ in runs]
    left = [0.0] * len(runs)
    for kind in ("masks", "steps"):
        widths = [run[f"{kind}_seconds"] for _, run in runs]
        axis.barh(names, widths, left=left, label=kind)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    rest = [max(0.0, run["seconds"] - end) for (_, run), end in zip(runs, left, strict=True)]
    axis.barh(names, rest, left=left, label="all else")
    axis.set_xlabel("seconds")
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)
    if runs:
        axis.legend(fontsize=8)
