"""What held-out images tell of samples: criteria of a calibration beside trained networks.

    python -m benchmarks.reproduce.criteria --source TRAIN --network A [--network B] --out FILE.json

Calibrates by the images alone, with a wider choice of temperatures and slopes than `calibrate` has,
and then samples by every run that it compared: by one temperature and slope at all levels where
runs differ, by single models and by means. For each, r2 at the end against each network's run from
the same noise, in pairs with the first run, and the gradient energy; and what each criterion said
of it before: the error of single steps, and that of what was restored from the noisiest of these
levels, alone, with its sharpness weighed, and as `calibrate` judges it. `ranks` has the rank
correlation of each criterion with r2: 1 where it orders the runs as a network does. Networks choose
nothing.

Writes FILE.json; the calibration is kept as FILE.calibration.json and finished runs in FILE.runs,
and an interrupted command goes on where it ended.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from datetime import datetime, timezone

import torch
from torch import Tensor

import pyflocality as pf
from pyflocality.calibration import RunTrial, default_candidates

from ..command import Record
from . import networks
from .runs import STEPS, KeptRuns, Run, now, starting_noise
from .scores import by_image, shown, summary
from .study import Study

# Of single models, beside those of `default_candidates`.
FURTHER = ((1.0, 0.25), (1.4, 0.15), (1.4, 0.5))
# Of the sharpness, as a share of the images' own, beside the error of what is restored.
WEIGHTS = (0.0, 0.05, 0.1, 0.2)
SEED = 0


# States and answers by model and noise level.
_Answers = dict[tuple[pf.Candidate, float], tuple[Tensor, Tensor]]


def candidates(image_shape: tuple[int, int, int]) -> list[pf.Candidate]:
    """The default ones, and single models at further temperatures and slopes before means."""
    tried = default_candidates(image_shape)
    singles = [one for one in tried if not one.parts]
    families = [
        one for one in dict.fromkeys(one.family for one in singles) if one.model != "wiener"
    ]
    singles += [
        dataclasses.replace(one, temperature=temperature, slope=slope)
        for temperature, slope in FURTHER
        for one in families
    ]
    return [*singles, *(one for one in tried if one.parts)]


class _Shared:
    """A denoiser that answers what another has answered of the same states by the same model."""

    def __init__(self, denoiser: pf.CalibratedDenoiser, known: _Answers) -> None:
        self.denoiser, self.known = denoiser, known
        self.image_shape, self.device = denoiser.image_shape, denoiser.device

    def __call__(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        choice = self.denoiser.calibration.at(sigma, alpha)
        answered = self.known.get((choice, sigma))
        if answered is None or not torch.equal(answered[0], x):
            answered = self.known[choice, sigma] = x, self.denoiser(x, sigma, alpha)
        return answered[1]


def calibration_of(study: Study) -> pf.Calibration:
    """The calibration of the images, found again where it is of them."""
    path = study.options.out.with_suffix(".calibration.json")
    if path.is_file():
        found = pf.Calibration.load(path)
        if found.content_key == study.data.content_key():
            return found
    found = pf.calibrate(
        study.data, candidates=candidates(study.data.image_shape), progress=study.progress
    )
    found.save(path, force=True)
    return found


def criteria(calibration: pf.Calibration, run: RunTrial) -> dict[str, float]:
    """What each criterion says of a run, the less the better.

    Raises:
        ValueError: No runs were compared.
    """
    differ = [
        level.trials[number].error
        for level, number, others in zip(
            calibration.levels,
            run.choices,
            zip(*(one.choices for one in calibration.runs), strict=True),
            strict=True,
        )
        if len(set(others)) > 1
    ]
    restored = run.restored
    if restored is None:
        raise ValueError(f"`calibration` must have runs that differ, got {calibration.runs}")
    told = {"single steps": sum(map(math.log, differ)) / max(1, len(differ))}
    for weight in WEIGHTS:
        distance = abs(math.log(restored.sharpness))
        name = f"restoration, sharpness weighed {weight:g}" if weight else "restoration"
        told[name] = math.log(restored.error) + weight * distance
    told["restoration, a quarter of the sharpness free"] = restored.excess
    return told


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation (Spearman)."""
    ranks = [
        torch.tensor(some, dtype=torch.float64).argsort().argsort().double() for some in (a, b)
    ]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


class _Samples:
    """Makes the runs, or finds them."""

    def __init__(self, study: Study, calibration: pf.Calibration) -> None:
        self.study, self.calibration = study, calibration
        self.kept: KeptRuns = study.kept(samples=study.options.samples, seed=SEED, steps=STEPS)
        self.noise = starting_noise(study.data.image_shape, study.options.samples, SEED)
        self._known: _Answers = {}

    def of_network(self, network: networks.Network) -> Run:
        """The run of a network."""

        def make() -> Run:
            return self._sampled(networks.load(network.path, self.study.device))

        return self.kept.get("network", network.settings, make)[0]

    def of_run(self, run: RunTrial) -> Run:
        """The run by the choices of a run that was compared."""
        alone = dataclasses.replace(run, restored=None)
        followed = dataclasses.replace(self.calibration, runs=(alone,))
        levels = [
            [level.ratio, one.as_json()]
            for level, one in zip(followed.levels, followed.choices, strict=True)
        ]

        def make() -> Run:
            print(f"sampling {len(self.noise)} images: {run}", flush=True)
            denoiser = pf.CalibratedDenoiser(self.study.data, followed, moments=self.study.moments)
            return self._sampled(_Shared(denoiser, self._known))

        return self.kept.get("calibrated", {"model": "calibrated", "levels": levels}, make)[0]

    def _sampled(self, denoiser: pf.Denoiser | _Shared) -> Run:
        device = self.study.device
        clock = now(device)
        out = pf.sample(
            denoiser, x_T=self.noise.to(device), steps=STEPS, progress=self.study.progress
        )
        facts = {
            "seconds": round(now(device) - clock, 4),
            "threads": torch.get_num_threads(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        return Run(out.x0.float().clamp(-1, 1).cpu(), facts)


def record(run: Run, targets: dict[str, Run], base: Run | None = None) -> Record:
    """How close a run is to each network, in pairs with another run, and how sharp it is."""
    told: Record = {
        "against": {},
        "gradient_energy": summary(pf.metrics.gradient_energy(run.x0[-1])),
    }
    for name, target in targets.items():
        if target is run:
            continue
        r2 = by_image(run.x0, target.x0)["r2"]
        told["against"][name] = {"final": summary(r2[-1]), "all_steps": summary(r2.mean(0))}
        if base is not None:
            other = by_image(base.x0, target.x0)["r2"]
            told["against"][name]["minus_first"] = summary(r2[-1] - other[-1])
    return told


def compare(study: Study, calibration: pf.Calibration) -> Record:
    """The runs with what criteria said of them, and the rank correlations."""
    samples = _Samples(study, calibration)
    targets = {network.name: samples.of_network(network) for network in study.trained}
    rows: list[Record] = []
    base: Run | None = None
    # Runs that took the same models all the way are one.
    for run in {one.choices: one for one in reversed(calibration.runs)}.values():
        made = samples.of_run(run)
        base = made if run.choices == calibration.runs[0].choices else base
        choices = [str(calibration.candidates[number]) for number in run.choices]
        row: Record = {"run": str(run), "chosen": run.choices == calibration.run.choices}
        row |= {"choices": choices, "criteria": criteria(calibration, run)}
        rows.append(row | {"restored": dataclasses.asdict(run)["restored"], "made": made})
    for row in rows:
        row |= record(row.pop("made"), targets, base)
    rows.reverse()
    ranks = {
        criterion: {
            name: correlation(
                [-row["criteria"][criterion] for row in rows],
                [row["against"][name]["final"]["mean"] for row in rows],
            )
            for name in targets
        }
        for criterion in rows[0]["criteria"]
    }
    told = {name: record(target, targets) for name, target in targets.items()}
    return {"networks": told, "runs": rows, "ranks": ranks}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit code."""
    study = Study("criteria", 64, "images by each run")
    study.start(arguments)
    calibration = calibration_of(study)
    results = compare(study, calibration)
    study.write(results, seed=SEED, held_out=calibration.held_out)
    for row in results["runs"]:
        closeness = [shown(one["final"], 3) for one in row["against"].values()]
        energy = shown(row["gradient_energy"], 4)
        print(f"{row['run']:45s} {'*' if row['chosen'] else ' '} {closeness} {energy}")
    for criterion, by_network in results["ranks"].items():
        print(f"{criterion:45s} " + "  ".join(f"{value:+.2f}" for value in by_network.values()))
    print(f"written: {study.options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
