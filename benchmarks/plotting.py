"""Figures that are drawn in a block and written at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@contextmanager
def picture(
    path: Path, rows: int = 1, columns: int = 1, *, dpi: int = 100, **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """A figure and its axes [rows, columns], written to a path when the block ends.

    No axes are made where `rows` is 0. Options are those of `matplotlib.pyplot.subplots`; without a
    `layout` the figure is tightened.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if rows:
        figure, axes = pyplot.subplots(rows, columns, squeeze=False, **options)
    else:
        figure, axes = pyplot.figure(**options), None
    yield figure, axes
    if "layout" not in options:
        figure.tight_layout()
    figure.savefig(path, dpi=dpi)
    pyplot.close(figure)


def without_ticks(axis: Axes) -> None:
    """Take the ticks from an image's axes."""
    axis.set_xticks([])
    axis.set_yticks([])


def origin(report: Mapping[str, Any]) -> str:
    """Where a picture's figures come from: machine and date."""
    machine = report["machine"]
    told = f"{machine['cpu']}, {machine['cores']} cores; {report['date'][:10]}"
    return told + ("; QUICK: the numbers mean nothing" if report["quick"] else "")
