"""Scaling curves of a results file: seconds a call along one axis, a line per operation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..command import Record

_TITLES = {
    "masked_posterior": "masked (PCA locality)",
    "window_posterior": "window 7 (local score)",
    "global_posterior": "global (optimal)",
    "covariance": "covariance",
}
_AXES = {
    "images": "training images N",
    "batch": "noisy images B",
    "values": "values of an image D",
    "window": "side k of the window",
    "threads": "threads",
}
_FIXED = {"images": "N = {:,}", "batch": "B = {}", "threads": "{} threads"}
_COLUMNS = 3


def curves(records: Sequence[Record], axis: str) -> dict[str, list[Record]]:
    """The records of the scaling suite that differ along one axis only, by operation.

    The other axes stay where most records are; a line of one point is none. Windows differ in the
    suite of the local score model.
    """
    suite = "local_score" if axis == "window" else "scaling"
    scaling = [record for record in records if record["suite"] == suite]
    others = [name for name in _AXES if name != axis]
    result = {}
    for op in dict.fromkeys(record["op"] for record in scaling):
        lines: dict[tuple[int | None, ...], list[Record]] = {}
        for record in scaling:
            if record["op"] == op:
                # Older files are of one D, and do not name it.
                key = tuple(record.get(name) for name in others)
                lines.setdefault(key, []).append(record)
        longest = max(lines.values(), key=len)
        if len(longest) > 1:
            result[op] = sorted(longest, key=lambda record: record[axis])
    return result


def draw(results: Path, picture: Path | None = None) -> Path | None:
    """Draw the curves of a results file, beside it unless a picture is named.

    Returns the picture's path, or None without curves.
    """
    report = json.loads(results.read_text(encoding="utf-8"))
    by_axis = {axis: curves(report["results"], axis) for axis in _AXES}
    by_axis = {axis: lines for axis, lines in by_axis.items() if lines}
    if not by_axis:
        return None
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(by_axis))
    rows = -(-len(by_axis) // columns)
    figure = Figure(figsize=(4.3 * columns, 3.8 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for panel, (axis, lines) in zip(panels, by_axis.items(), strict=False):
        _draw_panel(panel, axis, lines)
    for panel in panels[len(by_axis) :]:
        panel.set_visible(False)
    for panel in panels[::columns]:
        panel.set_ylabel("seconds a call (median, p20 to p80)")
    panels[0].legend(frameon=False)
    machine, data = report["machine"], report["data"]
    shape = "x".join(map(str, data["shape"]))
    figure.suptitle(
        f"{data['name']}, {shape}; {machine['cpu']}, {machine['cores']} cores; "
        f"{report['date'][:10]}" + ("; QUICK: the numbers mean nothing" if report["quick"] else ""),
        fontsize=10,
    )
    picture = picture or results.with_suffix(".png")
    figure.savefig(picture, dpi=100)
    return picture


def _draw_panel(panel: Any, axis: str, lines: dict[str, list[Record]]) -> None:
    """The lines of an axis; an operation has the same colour in all panels."""
    for op, records in lines.items():
        _draw_line(panel, axis, records, _TITLES[op], f"C{list(_TITLES).index(op)}")
    panel.set(xscale="log", yscale="log", xlabel=_label(axis, lines))
    ticks = sorted({record[axis] for records in lines.values() for record in records})
    panel.set_xticks(ticks, [f"{tick / 1000:.2g}k" if tick >= 1000 else tick for tick in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.3)


def _label(axis: str, lines: dict[str, list[Record]]) -> str:
    """The axis, and where the others stay."""
    record = next(iter(lines.values()))[0]
    fixed = [text.format(record[name]) for name, text in _FIXED.items() if name != axis]
    return f"{_AXES[axis]}   ({', '.join(fixed)})"


def _draw_line(panel: Any, axis: str, records: Sequence[Record], label: str, colour: str) -> None:
    places = [record[axis] for record in records]
    seconds = {key: [r["seconds"][key] for r in records] for key in ("median", "p20", "p80")}
    panel.plot(places, seconds["median"], marker="o", markersize=4, label=label, color=colour)
    panel.fill_between(
        places, seconds["p20"], seconds["p80"], color=colour, alpha=0.25, linewidth=0
    )
