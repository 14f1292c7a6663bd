"""Which PCA locality comes closest to trained networks, and why.

    python -m benchmarks.reproduce.sweeps --source TRAIN --network A [--network B] --out FILE.json

Temperature, threshold and aggregation are varied one at a time around the exact model at
temperature 1. Every variant and every network starts from the same noise of several seeds; the
comparison is that of the package. Standard errors are over the images of all noise seeds together;
the means of each noise seed are told beside them. They tell nothing of how trained networks differ:
each network is a curve of its own.

The batch mean is taken over batches of mixed classes, as the original files have them, in three
random orders, whose spread is the noise of the order; over the images sorted by class, as folders
and zips come; and at two further thresholds.

Every variant is compared with the exact model at temperature 1 in pairs, image by image:
`minus_exact` is r2 of the variant less r2 of the exact model, against each network, so positive
where the variant is closer. The exact model has the threshold of the command; for an aggregation,
that of the aggregation. `why` looks at aggregations at the *same* noisy images, the states of a
network's run; see `benchmarks.reproduce.diagnosis`.

Writes FILE.json, FILE.png, FILE-why.png and FILE-samples.png; finished runs are kept in FILE.runs,
and an interrupted command goes on where it ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

import pyflocality as pf

from ..command import Record, read_json, write_json
from . import diagnosis, networks, sweeps_draw
from .methods import BY_CLASS, Settings, in_order
from .runs import STEPS, Request, Run, perform, starting_noise
from .scores import by_image, summary
from .study import Study

TEMPERATURES = (0.5, 0.7, 1.0, 1.4, 2.0)
# Of the threshold that is asked for.
THRESHOLDS = (0.2, 0.4, 1.0, 2.0, 4.0, 10.0)
BATCHES = (128, 512, 2048)
DIAGNOSED = (512, 2048)
# The batch mean of this size is taken in other orders and at other thresholds, too.
FURTHER = 512
ORDERS = (2, 3)
FURTHER_THRESHOLDS = (0.4, 2.0)
CLASS_ORDER = f"batch_mean {FURTHER}, sorted by class"


def exact(threshold: float) -> Settings:
    """Settings of the exact model at temperature 1, which variants are compared with."""
    return {"model": "pca-locality", "threshold": threshold, "temperature": 1.0}


def multiples(threshold: float, factors: Sequence[float]) -> list[float]:
    """A threshold itself, and multiples of it below 1 as numbers of few digits."""
    result = (threshold if factor == 1 else float(f"{factor * threshold:g}") for factor in factors)
    return [value for value in result if value < 1]


def variants(threshold: float, labelled: bool) -> dict[str, dict[str, Settings]]:
    """Settings by sweep and value; those of sorted batches where images are `labelled`."""
    base = exact(threshold)
    aggregations = {"exact": base}
    for size in BATCHES:
        aggregations[f"batch_mean {size}"] = base | {"batch_size": size}
    further = f"batch_mean {FURTHER}"
    for order in ORDERS:
        aggregations[f"{further}, order {order}"] = base | {"batch_size": FURTHER, "order": order}
    if labelled:
        aggregations[CLASS_ORDER] = base | {"batch_size": FURTHER, "order": BY_CLASS}
    for value in multiples(threshold, FURTHER_THRESHOLDS):
        aggregations[f"{further}, threshold {value:g}"] = exact(value) | {"batch_size": FURTHER}
    return {
        "temperature": {f"{value:g}": base | {"temperature": value} for value in TEMPERATURES},
        "threshold": {
            f"{value:g}": base | {"threshold": value} for value in multiples(threshold, THRESHOLDS)
        },
        "aggregation": aggregations,
    }


class Sweep:
    """Makes the runs, or finds them.

    Args:
        study: What was asked for, and what the runs are made of.
    """

    def __init__(self, study: Study) -> None:
        self.study, options = study, study.options
        self.samples, self.seeds, self.threshold = options.samples, options.seeds, options.threshold
        self.kept = study.kept(samples=self.samples, seeds=self.seeds, steps=STEPS)
        shape = study.data.image_shape
        seeds = range(self.seeds)
        self.noise = torch.cat([starting_noise(shape, self.samples, seed) for seed in seeds])
        self.targets = {
            network.name: self.run(network.name, network.settings, network.path)
            for network in study.trained
        }

    def run(self, name: str, settings: Settings, network: Path | None = None) -> Run:
        """The run of some settings; the same whatever it is called."""
        study = self.study

        def make() -> Run:
            print(f"sampling {len(self.noise)} images: {name}", flush=True)
            request = Request(
                settings,
                in_order(study.data, settings.get("order")) if network is None else None,
                study.moments if network is None else None,
                network,
                self.noise,
                STEPS,
                study.progress,
                study.device,
            )
            return perform(request)

        return self.kept.get(settings["model"], settings, make)[0]

    def record(self, run: Run) -> Record:
        """What is told of a run: how close it is to each network, and how sharp it is."""
        return {
            "against": {
                name: {
                    measure: self._told(values[-1])
                    | {
                        "all_steps": self._told(values.mean(0)),
                        "steps": [summary(step) for step in values],
                    }
                    for measure, values in by_image(run.x0, target.x0).items()
                }
                for name, target in self.targets.items()
                if target is not run
            },
            "gradient_energy": [float(pf.metrics.gradient_energy(x0).mean()) for x0 in run.x0],
            "seconds_per_step": sum(run.facts["seconds"]) / STEPS,
        }

    def difference(self, run: Run, base: Run) -> Record:
        """r2 of a run less that of another, image by image, against each network.

        With `positive_share`, the share of the images that are closer to the network's at the end.
        """
        result = {}
        for name, target in self.targets.items():
            values = by_image(run.x0, target.x0)["r2"] - by_image(base.x0, target.x0)["r2"]
            share = float((values[-1] > 0).double().mean())
            result[name] = {
                "final": self._told(values[-1]) | {"positive_share": share},
                "all_steps": self._told(values.mean(0)),
                "steps": [summary(step) for step in values],
            }
        return result

    def _told(self, values: torch.Tensor) -> Record:
        """Summary of values [seeds samples], and the mean of each seed."""
        seeds = values.reshape(self.seeds, self.samples)
        return summary(values) | {"by_seed": [summary(seed)["mean"] for seed in seeds]}


def run_sweeps(sweep: Sweep) -> tuple[Record, dict[str, Run]]:
    """The results, and the runs that are drawn."""
    study, threshold = sweep.study, sweep.threshold
    asked = variants(threshold, study.data.labels is not None)
    results: Record = {"networks_against_each_other": {}, "sweeps": {}}
    for name, target in sweep.targets.items():
        results["networks_against_each_other"][name] = sweep.record(target)
    for kind, values in asked.items():
        results["sweeps"][kind] = {}
        for value, settings in values.items():
            run = sweep.run(f"{kind} {value}", settings)
            of_base = settings["threshold"] if kind == "aggregation" else threshold
            base = sweep.run(f"threshold {of_base:g}", exact(of_base))
            results["sweeps"][kind][value] = sweep.record(run) | {
                "minus_exact": sweep.difference(run, base)
            }
    results["masks"] = {
        value: masks(study.data, study.moments, settings["threshold"])
        for value, settings in asked["threshold"].items()
    }
    runs = {
        name: sweep.run(f"aggregation {name}", settings)
        for name, settings in asked["aggregation"].items()
    }
    return results, sweep.targets | runs


def masks(data: pf.TrainingSet, moments: pf.Moments, threshold: float) -> list[dict[str, float]]:
    """For each step the share of inputs that an output listens to, and of outputs without any.

    Those answer the plain mean of the training images. The published recipe divides the filter's
    rows by their diagonal: where a value hardly varies, other entries of its row grow far beyond
    1, and a threshold relative to the largest of all leaves nothing to anybody else.
    """
    denoiser = pf.PCALocalityDenoiser(data, threshold, moments=moments)
    schedule = pf.DDPMSchedule()
    result = []
    for t in schedule.timesteps(STEPS).tolist():
        alpha, sigma = schedule(t)
        weights = denoiser.weights_at(sigma, alpha)
        empty = (weights.dense(torch.float32) == 0).all(1)
        # Where every image agrees the mean is the right answer.
        varied = moments.covariance.diagonal().cpu() > 0
        result.append(
            {
                "t": t,
                "density": weights.density,
                "without_inputs": float(empty[varied].double().mean()),
            }
        )
    return result


def why(sweep: Sweep) -> Record:
    """The diagnosis of exact posteriors and batch means, made unless it is kept."""
    study, network = sweep.study, sweep.study.trained[0]
    settings = {"diagnosis": diagnosis.VERSION, "network": network.sha256}
    path = sweep.kept.path("why", settings | {"threshold": sweep.threshold}, ".json")
    if path.exists():
        return read_json(path)
    batch_means = [(f"batch_mean {size}", study.data, size) for size in DIAGNOSED]
    if study.data.labels is not None:
        batch_means.append((CLASS_ORDER, in_order(study.data, BY_CLASS), FURTHER))
    result = diagnosis.diagnose(
        study.data,
        study.moments,
        networks.load(network.path, study.device),
        sweep.noise[: min(sweep.samples, diagnosis.SAMPLES)],
        sweep.threshold,
        batch_means,
        progress=study.progress,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, path)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweeps; returns the exit code."""
    study = Study("sweeps", 32, "images for each seed", positive_threshold=True)
    study.parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    study.start(arguments)
    sweep = Sweep(study)
    results, runs = run_sweeps(sweep)
    results["why"] = why(sweep)
    times = pf.DDPMSchedule().timesteps(STEPS).tolist()
    report = study.write(results, seeds=sweep.seeds, timesteps=times)
    pictures = [study.picture(name) for name in ("", "-why", "-samples")]
    sweeps_draw.sweeps(report, pictures[0])
    sweeps_draw.why(report, pictures[1])
    sweeps_draw.samples(runs, pictures[2])
    print("\n".join(f"written: {path}" for path in (study.options.out, *pictures)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
