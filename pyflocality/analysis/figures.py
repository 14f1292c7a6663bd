"""Figures of what the analysis finds, by matplotlib (the extra `plot`).

Every function draws on a figure of its own and returns it; nothing is shown or written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyflocality._support.checks import check_instance, check_text, describe
from pyflocality.analysis.memorization import MemorizationCurve
from pyflocality.analysis.sensitivity import SensitivityRun
from pyflocality.analysis.spectrum import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# At most this many levels or eigenvectors side by side.
_COLUMNS = 10


def sensitivity_figure(runs: Mapping[str, SensitivityRun]) -> Figure:
    """Sensitivity fields over noise levels, a row for each model and pixel.

    Fields are averaged over the input channels and scaled to their largest value; a small cross
    marks the output pixel.

    Args:
        runs: Runs of the same steps, by name of the model.

    Raises:
        ValueError: There are no runs, or they have different numbers of levels.
        ImportError: matplotlib is not installed.
    """
    _check_all(runs, "runs", SensitivityRun)
    if not runs or len({len(run.timesteps) for run in runs.values()}) != 1:
        raise ValueError("`runs` must hold one or more runs with the same number of levels")
    rows = [(name, run, p) for name, run in runs.items() for p in range(len(run.pixels))]
    levels = _spread(len(rows[0][1].timesteps))
    figure, axes = _grid(len(rows), len(levels))
    for line, (name, run, p) in zip(axes, rows, strict=True):
        for axis, level in zip(line, levels, strict=True):
            field = run.fields[level, p].mean(0)
            axis.imshow((field / field.max().clamp(min=1e-30)).cpu().numpy(), cmap="magma", vmin=0)
            _, row, column = run.pixels[p]
            axis.plot(column, row, "+", color="w", ms=4, mew=0.7)
            axis.set_title(f"t = {float(run.timesteps[level]):g}", fontsize=7)
        line[0].set_ylabel(f"{name}\n{run.pixels[p]}", fontsize=7)
    return figure


def spectrum_figure(spectra: Mapping[str, Spectrum]) -> Figure:
    """Shrinkage factors against their rank, above the leading eigenvectors of each spectrum.

    Args:
        spectra: Spectra by name; of complex eigenvectors the real parts are drawn.

    Raises:
        ValueError: There are no spectra.
        ImportError: matplotlib is not installed.
    """
    _check_all(spectra, "spectra", Spectrum)
    if not spectra:
        raise ValueError("`spectra` must hold one or more spectra")
    from matplotlib.figure import Figure

    shown = min(_COLUMNS, *(len(spectrum.values) for spectrum in spectra.values()))
    figure = Figure(figsize=(1.1 * shown + 1, 3 + 1.3 * len(spectra)), layout="constrained")
    panels: Any = figure.subfigures(2, 1, height_ratios=[2.6, 1.3 * len(spectra)])
    top, bottom = panels
    axis = top.subplots()
    for name, spectrum in spectra.items():
        values = spectrum.values.real if spectrum.values.is_complex() else spectrum.values
        axis.plot(range(1, len(values) + 1), values.numpy(), "o-", ms=3, label=name)
    axis.set_xlabel("rank")
    axis.set_ylabel("eigenvalue")
    axis.legend(fontsize=7)
    axes = bottom.subplots(len(spectra), shown, squeeze=False)
    for line, (name, spectrum) in zip(axes, spectra.items(), strict=True):
        for k, axis in enumerate(line):
            _show_signed(axis, spectrum.vectors[k])
            axis.set_title(f"{complex(spectrum.values[k]).real:.3f}", fontsize=7)
        line[0].set_ylabel(name, fontsize=7)
    return figure


def memorization_figure(curves: Mapping[str, MemorizationCurve]) -> Figure:
    """Similarities against the size of the training sets, a panel for each model.

    Lines are means over the samples; dots are the samples.

    Args:
        curves: Curves by name of the model.

    Raises:
        ValueError: There are no curves.
        ImportError: matplotlib is not installed.
    """
    _check_all(curves, "curves", MemorizationCurve)
    if not curves:
        raise ValueError("`curves` must hold one or more curves")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(curves), 3.4), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axis, (name, curve) in zip(axes, curves.items(), strict=True):
        lines = (
            (curve.between, "the two models' samples", "C0"),
            (curve.nearest, "sample and its nearest training image", "C1"),
        )
        for values, label, color in lines:
            axis.semilogx(curve.sizes, values.mean(1).numpy(), "o-", color=color, label=label)
            axis.semilogx(curve.sizes, values.numpy(), ".", color=color, ms=2, alpha=0.5)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("training images N of each model")
    axes[0].set_ylabel("cosine similarity")
    axes[0].legend(fontsize=7)
    return figure


def _check_all(values: object, name: str, kind: type) -> None:
    """A mapping from names to results of a kind."""
    if not isinstance(values, Mapping):
        raise TypeError(
            f"`{name}` must map names to objects {kind.__name__}, got {describe(values)}"
        )
    for key, value in values.items():
        check_text(key, name)
        check_instance(value, name, kind)


def _spread(number: int) -> list[int]:
    """At most ten of some levels, evenly spaced from the first to the last."""
    shown = torch.linspace(0, number - 1, min(number, _COLUMNS)).round().long()
    return shown.tolist()


def _grid(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 * columns + 0.6, 1.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure, axes.tolist()


def _show_signed(axis: Axes, vector: Tensor) -> None:
    """An eigenvector: one channel in red and blue around 0, three in colour around grey."""
    values = (vector.real if vector.is_complex() else vector).cpu()
    if values.ndim != 3:
        raise ValueError(f"eigenvectors must have shape [C, H, W], got {describe(vector)}")
    largest = float(values.abs().max()) or 1.0
    axis.set_xticks([])
    axis.set_yticks([])
    if values.shape[0] == 3:
        axis.imshow((values.permute(1, 2, 0) / (2 * largest) + 0.5).numpy())
    else:
        axis.imshow(values.mean(0).numpy(), cmap="RdBu", vmin=-largest, vmax=largest)
