"""`pyflocality calibrate`: the model of every noise level, chosen by held-out images."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyflocality._support.memory import peak_memory_bytes
from pyflocality._support.paths import checked_path
from pyflocality._support.record import software
from pyflocality._support.streams import answer, listed
from pyflocality.cli._errors import reported
from pyflocality.cli._groups import SAMPLING
from pyflocality.cli._options import (
    Flip,
    NoiseOptions,
    ResultOptions,
    SourceOptions,
    Spacing,
    Steps,
)
from pyflocality.cli._work import working

if TYPE_CHECKING:
    from pyflocality import Calibration


@dataclass(frozen=True, kw_only=True)
class _RunOptions(NoiseOptions):
    """The run whose levels are calibrated."""

    steps: Steps = 10
    spacing: Spacing = None
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the choice of held-out images, and of their noise.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0


@reported()
def calibrate(
    *,
    source: SourceOptions,
    out: Annotated[
        str, typer.Option(metavar="PATH", help="File to write, JSON.", show_default=False)
    ],
    flip: Flip = False,
    sampling: _RunOptions,
    results: ResultOptions,
) -> None:
    """Choose the model of every noise level by held-out images, for `generate --calibration`.

    No network is involved. Of 64 images that are left out of the set, models are asked for what
    they make of them with noise, in one step and along the whole way down to the data; the simplest
    within one standard error of the best is chosen, models level by level, their temperature and
    slope for whole runs. Calibrate with the steps, schedule and --flip
    that images are to be made with.
    """
    from pyflocality import calibrate as calibrated

    start, file = time.perf_counter(), checked_path(out, "out")
    source.check()
    sampling.check()
    with working("calibrate", [file], results, asdict(source), asdict(sampling), flip) as work:
        with work.stages("load", f"loading {source.source}"):
            data = source.load(progress=results.progress).augmented(flip=flip)
        with work.stages("calibrate", f"calibrating by {data.name}"):
            found = calibrated(
                data,
                schedule=sampling.noise_schedule(),
                steps=sampling.steps,
                seed=sampling.seed,
                progress=results.progress,
            )
        found.save(work.temporary(file), force=True)
        work.commit()
    if results.as_json:
        record = {
            "source": source.source,
            **_told(found),
            "backends": work.backends_by_operation(),
            "seconds": work.stages.seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "software": software(),
            "files": [str(file)],
        }
        answer(json.dumps(record, indent=2), only_here=True)
    else:
        seconds = time.perf_counter() - start
        answer(f"{_table(found)}\n{seconds:.1f} s: {listed([file])}", only_here=False)


def _told(found: Calibration) -> dict[str, Any]:
    levels = []
    for level, trial, choice in zip(found.levels, found.chosen, found.choices, strict=True):
        levels.append(
            {"time": level.time, "alpha": level.alpha, "sigma": level.sigma}
            | {"model": choice.as_json(), "error": trial.error}
            | {"restored": None if trial.restored is None else asdict(trial.restored)}
        )
    names = ("content_key", "images", "held_out", "folds", "seed")
    return {name: getattr(found, name) for name in names} | {"levels": levels}


def _table(found: Calibration) -> str:
    """The choices, with errors of single steps, and of what is restored with its sharpness."""
    lines = [f"{'time':>7} {'error':>9} {'restored':>9} {'sharpness':>9}  model"]
    for level, trial, choice in zip(found.levels, found.chosen, found.choices, strict=True):
        told = "        -         -"
        if trial.restored is not None:
            told = f"{trial.restored.error:>9.5f} {trial.restored.sharpness:>9.3f}"
        lines.append(f"{level.time:>7.4g} {trial.error:>9.5f} {told}  {choice}")
    return "\n".join(lines)
