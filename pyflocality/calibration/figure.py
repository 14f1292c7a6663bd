"""The figure of a calibration, by matplotlib (the extra `plot`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyflocality.calibration.record import Calibration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What lies further above the best does not stretch the axis.
_HIGHEST = 2.0


def calibration_figure(calibration: Calibration) -> Figure:
    """Errors over noise levels as multiples of the best, and the sharpness of what is restored.

    Above the single steps of every candidate, below what restores images, at the bottom whole runs;
    rings mark the chosen, bars the standard errors of the differences from the best.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 9), layout="constrained")
    axes: Any = figure.subplots(4, 1)
    for one in axes[:2]:
        one.sharex(axes[2])
        one.tick_params(labelbottom=False)
    ratios = [level.ratio for level in calibration.levels]
    for number, candidate in enumerate(calibration.candidates):
        trials = [level.trials[number] for level in calibration.levels]
        shares = [
            trial.error / max(trial.error - trial.excess, 1e-300) if trial.error > 0 else 1.0
            for trial in trials
        ]
        spread = [
            share * trial.deviation / max(trial.error, 1e-300)
            for share, trial in zip(shares, trials, strict=True)
        ]
        color = f"C{number % 10}"
        axes[0].errorbar(ratios, shares, spread, fmt=".-", lw=0.6, ms=3, color=color)
        restored = [
            (ratio, trial.restored, chosen.candidate == number)
            for ratio, trial, chosen in zip(ratios, trials, calibration.chosen, strict=True)
            if trial.restored is not None
        ]
        for ratio, one, chosen in restored:
            size = 9 if chosen else 4
            style = {"color": color, "mfc": "none" if chosen else color}
            label = str(candidate) if ratio == restored[0][0] else None
            axes[1].errorbar(ratio, one.excess, one.deviation, fmt="o", ms=size, lw=0.6, **style)
            axes[2].plot(ratio, one.sharpness, "o", ms=size, label=label, **style)
    axes[0].set_ylim(0.95, _HIGHEST)
    axes[0].set_ylabel("error of a step\nas a multiple of the best", fontsize=8)
    axes[1].set_ylabel("restored images:\ncriterion above the best", fontsize=8)
    axes[2].set_ylabel("gradient energy as a\nshare of the images' own", fontsize=8)
    axes[2].axhline(1.0, color="0.7", lw=0.6)
    axes[2].set_xlabel("sigma / alpha")
    axes[2].set_xscale("log")
    axes[2].legend(fontsize=6, ncols=2)
    _draw_runs(axes[3], calibration)
    return figure


def _draw_runs(axes: Axes, calibration: Calibration) -> None:
    """The criterion of whole runs above the best, one beneath the other."""
    runs = calibration.runs
    for place, run in enumerate(runs):
        if run.restored is None:
            continue
        chosen = run == calibration.run
        color = f"C{place % 10}"
        fill, size = ("none", 9) if chosen else (color, 4)
        axes.errorbar(
            run.restored.excess,
            place,
            xerr=run.restored.deviation,
            fmt="o",
            lw=0.6,
            ms=size,
            color=color,
            mfc=fill,
        )
    axes.set_yticks(range(len(runs)), map(str, runs), fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("whole runs: criterion above the best")
