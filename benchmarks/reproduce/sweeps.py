"""Which PCA locality comes closest to trained networks, and why.

    python -m benchmarks.reproduce.sweeps --source TRAIN --network A [--network B] --out FILE.json

Temperature, threshold and aggregation are varied one at a time around the exact model at
temperature 1. Every variant and every network starts from the same noise of several seeds; the
comparison is that of the package. Error bars are standard errors over all images; the means of
each seed are told beside them. The batch mean is taken over batches of mixed classes, as published
loaders have them, and once over the images sorted by class, as folders and zips come.

Aggregations are compared in pairs, image by image: r2 of the exact model less r2 of the batch mean.
`why` looks at both at the *same* noisy images, the states of a network's run; see
`benchmarks.reproduce.diagnosis`.

Writes FILE.json, FILE.png, FILE-why.png and FILE-samples.png; finished runs are kept in FILE.runs,
and an interrupted command goes on where it ended.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import pyflocality as pf

from ..cpu_suite import write_json
from . import diagnosis, networks, sweeps_draw
from .networks import Network
from .runs import STEPS, KeptRuns, Request, Run, perform, starting_noise
from .scores import by_image, summary
from .study import Study

TEMPERATURES = (0.5, 0.7, 1.0, 1.4, 2.0)
THRESHOLDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
BATCHES = (128, 512, 2048)
DIAGNOSED = (512, 2048)
CLASS_ORDER = "batch_mean 512, sorted by class"

Settings = dict[str, Any]


def variants(threshold: float, labelled: bool) -> dict[str, dict[str, Settings]]:
    """Settings by sweep and value.

    Args:
        threshold: Threshold of the variants of temperature and aggregation.
        labelled: Whether the images can be sorted by class.
    """
    base: Settings = {"model": "pca-locality", "threshold": threshold, "temperature": 1.0}
    aggregations = {"exact": base}
    for size in BATCHES:
        aggregations[f"batch_mean {size}"] = base | {"batch_size": size}
    if labelled:
        aggregations[CLASS_ORDER] = base | {"batch_size": 512, "order": "by class"}
    return {
        "temperature": {f"{value:g}": base | {"temperature": value} for value in TEMPERATURES},
        "threshold": {
            f"{value:g}": base | {"threshold": value} for value in sorted({*THRESHOLDS, threshold})
        },
        "aggregation": aggregations,
    }


class Sweep:
    """Makes the runs, or finds them.

    Args:
        data: The training set.
        trained: The networks.
        samples: Images for each seed.
        seeds: Number of seeds.
        kept: Where finished runs lie.
        progress: Whether to show progress bars.
    """

    def __init__(
        self,
        data: pf.TrainingSet,
        trained: Sequence[Network],
        samples: int,
        seeds: int,
        kept: KeptRuns,
        progress: bool,
    ) -> None:
        self.data, self.trained, self.kept, self.progress = data, trained, kept, progress
        self.samples, self.seeds = samples, seeds
        shape = data.image_shape
        noise = [starting_noise(shape, samples, seed) for seed in range(seeds)]
        self.noise = torch.cat(noise)
        self.moments = pf.Moments.from_data(data, progress=progress)
        self.targets = {
            network.name: self.run(network.name, network.settings, network.path)
            for network in trained
        }

    def run(self, name: str, settings: Settings, network: Path | None = None) -> Run:
        """The run of some settings; the same whatever it is called."""

        def make() -> Run:
            print(f"sampling {len(self.noise)} images: {name}", flush=True)
            data = self.data
            if settings.get("order") == "by class":
                data = data.subset(data.labels.argsort(stable=True))
            request = Request(
                settings,
                data if network is None else None,
                self.moments if network is None else None,
                network,
                self.noise,
                STEPS,
                self.progress,
            )
            return perform(request)

        return self.kept.get(settings["model"], settings, make)[0]

    def record(self, run: Run) -> dict[str, Any]:
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
            "gradient_energy": [float(diagnosis.gradient_energy(x0).mean()) for x0 in run.x0],
            "seconds_per_step": sum(run.facts["seconds"]) / STEPS,
        }

    def difference(self, better: Run, other: Run) -> dict[str, Any]:
        """r2 of a run less that of another, image by image, against each network.

        With `positive_share`, the share of the images that are closer to the network's at the end.
        """
        found = {}
        for name, target in self.targets.items():
            values = by_image(better.x0, target.x0)["r2"] - by_image(other.x0, target.x0)["r2"]
            found[name] = self._told(values[-1]) | {
                "all_steps": self._told(values.mean(0)),
                "steps": [summary(step) for step in values],
                "positive_share": float((values[-1] > 0).double().mean()),
            }
        return found

    def _told(self, values: torch.Tensor) -> dict[str, Any]:
        """Summary of values [seeds samples], and the mean of each seed."""
        seeds = values.reshape(self.seeds, self.samples)
        return summary(values) | {"by_seed": [summary(seed)["mean"] for seed in seeds]}


def run_sweeps(sweep: Sweep, threshold: float) -> tuple[dict[str, Any], dict[str, Run]]:
    """The results, and the runs that are drawn."""
    asked = variants(threshold, sweep.data.labels is not None)
    results: dict[str, Any] = {"networks_against_each_other": {}, "sweeps": {}}
    for name, target in sweep.targets.items():
        results["networks_against_each_other"][name] = sweep.record(target)
    for kind, values in asked.items():
        results["sweeps"][kind] = {
            value: sweep.record(sweep.run(f"{kind} {value}", settings))
            for value, settings in values.items()
        }
    results["masks"] = {
        value: masks(sweep.data, sweep.moments, settings["threshold"])
        for value, settings in asked["threshold"].items()
    }
    runs = {
        name: sweep.run(f"aggregation {name}", settings)
        for name, settings in asked["aggregation"].items()
    }
    results["exact_minus"] = {
        name: sweep.difference(runs["exact"], run) for name, run in runs.items() if name != "exact"
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
    found = []
    for t in schedule.timesteps(STEPS).tolist():
        alpha, sigma = schedule(t)
        weights = denoiser.weights_at(sigma, alpha)
        empty = (weights.dense(torch.float32) == 0).all(1)
        # Where every image agrees the mean is the right answer.
        varied = moments.covariance.diagonal() > 0
        found.append(
            {
                "t": t,
                "density": weights.density,
                "without_inputs": float(empty[varied].double().mean()),
            }
        )
    return found


def why(sweep: Sweep, threshold: float) -> dict[str, Any]:
    """The diagnosis of exact posteriors and batch means, made unless it is kept."""
    network = sweep.trained[0]
    settings = {"diagnosis": diagnosis.VERSION, "network": network.sha256, "threshold": threshold}
    path = sweep.kept.path("why", settings, ".json")
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    found = diagnosis.diagnose(
        sweep.data,
        sweep.moments,
        networks.load(network.path),
        sweep.noise[: min(sweep.samples, diagnosis.SAMPLES)],
        threshold,
        DIAGNOSED,
        progress=sweep.progress,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(found, path)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweeps; returns the exit code."""
    study = Study("sweeps", 32, "images for each seed")
    study.parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    study.start(arguments)
    options = study.options
    common = {
        "images": study.data.content_key(),
        "samples": options.samples,
        "seeds": options.seeds,
        "steps": STEPS,
    }
    kept = KeptRuns(options.out.with_suffix(".runs"), common)
    sweep = Sweep(study.data, study.trained, options.samples, options.seeds, kept, study.progress)
    results, runs = run_sweeps(sweep, options.threshold)
    results["why"] = why(sweep, options.threshold)
    times = pf.DDPMSchedule().timesteps(STEPS).tolist()
    report = study.report(results, seeds=options.seeds, timesteps=times)
    write_json(report, options.out)
    stem = options.out.with_suffix("")
    pictures = [Path(f"{stem}{suffix}.png") for suffix in ("", "-why", "-samples")]
    sweeps_draw.sweeps(report, pictures[0])
    sweeps_draw.why(report, pictures[1])
    sweeps_draw.samples(runs, pictures[2])
    print("\n".join(f"written: {path}" for path in (options.out, *pictures)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
