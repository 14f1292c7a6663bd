"""The table of a set: every method against every network, and the networks against each other."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

import pyflocality as pf
from pyflocality._support.checks import check_count
from pyflocality._support.devices import parse_device
from pyflocality._support.outputs import Outputs
from pyflocality._support.record import Stages
from pyflocality.masks import check_threshold
from pyflocality.ops import nearest_images
from pyflocality.planner import Job, Setting, check_fits

from ..command import SCHEMA, Record, bar
from . import calibrated, draw, methods, networks, table_text
from .methods import METHODS, Settings
from .networks import Network
from .runs import STEPS, KeptRuns, Request, Run, now, perform_apart, starting_noise
from .scores import block_edges, by_image, paired, recitation, score, summary
from .study import data_record, facts_of
from .windows import CALIBRATION_SAMPLES, calibrated_windows

# Least r2 of a calibrated model against the first network on whole sets, by names of their files.
_LEAST_R2 = {"mnist": (60_000, 0.84), "cifar10": (50_000, 0.92)}
# How far below another network it may stay, and how far off the sharpness of networks.
_BELOW_A_NETWORK, _OFF_SHARPNESS = 0.03, 0.25

FILES = ("reproduce.json", "table.md", "samples.png", "steps.png")


@dataclass(frozen=True)
class Plan:
    """What to reproduce, and where to.

    Attributes:
        source: Training images, as `TrainingSet.load` takes them.
        networks: Files of trained networks, the first of them the one that windows follow.
        out: Folder of the results; finished runs are kept in its folder `runs`.
        threshold: Threshold of PCA locality.
        samples: Images that every model makes.
        seed: Seed of the starting noise.
        methods: Keys of `METHODS`.
        els_images: Images that the equivariant model searches.
        els_samples: Samples that it makes, the first ones.
        force: Whether results that are there may be replaced.
        progress: Whether to say what is being done.
        device: Where models and networks run, "cpu" or "cuda" with or without a number.
        calibration: File of the choices of the calibrated model, made where there is none.
    """

    source: str
    networks: tuple[Path, ...]
    out: Path
    threshold: float = 0.005
    samples: int = 128
    seed: int = 0
    methods: tuple[str, ...] = tuple(METHODS)
    els_images: int = 2000
    els_samples: int = 32
    force: bool = False
    progress: bool = True
    device: str = "cpu"
    calibration: Path | None = None

    @property
    def files(self) -> list[Path]:
        """The results."""
        return [self.out / name for name in FILES]

    def check(self) -> None:
        """Refuse what can be refused without the images."""
        check_threshold(self.threshold, "threshold")
        for name in ("samples", "els_images", "els_samples"):
            check_count(getattr(self, name), name)
        if not 0 <= self.seed < 2**63 - 1:
            raise ValueError(f"`seed` must lie in [0, 2^63 - 1), got {self.seed}")
        parse_device(self.device)
        methods.check_methods(self.methods)
        networks.check_networks(self.networks)
        if self.calibration is not None:
            if "calibrated" not in self.methods:
                raise ValueError("`calibration` is for calibrated, which `methods` does not name")
            pf.Calibration.load(self.calibration)


def reproduce(plan: Plan) -> Record:
    """Fill the table; the record that is written to `reproduce.json`.

    Raises:
        FileExistsError: Results are there and `plan.force` is False.
        FileNotFoundError: A file is not there.
        ValueError: A value is out of range, or a network is for other images.
    """
    plan.check()
    start, stages = time.perf_counter(), Stages(announce=plan.progress)
    asked = {"command": "reproduce", **asdict(plan), "force": None, "progress": None}
    with Outputs(plan.files, force=plan.force, folder=plan.out, run=asked) as outputs:
        with stages("load", f"loading {plan.source}"):
            data = methods.load_mixed(plan.source, progress=plan.progress)
            trained = networks.check_networks(plan.networks, data.image_shape)
        if any(METHODS[name].needs_moments for name in plan.methods):
            setting = Setting(len(data), data.image_shape, plan.samples)
            job = Job(setting, "wiener", of_moments=True, nearest=False)
            check_fits(
                job,
                "--methods without moments would run, such as local and optimal; --ignore-memory "
                "tries it all the same",
            )
        table = _Table(plan, data, trained, stages)
        if plan.calibration is not None:
            # Refused before any run where it does not fit.
            _ = table.calibration
        rows = table.rows()
        record = _record(plan, data, trained, rows, table)
        record["seconds"] = stages.seconds | {"total": round(time.perf_counter() - start, 4)}
        files = {path.name: temporary for path, temporary in outputs.temporary.items()}
        text = json.dumps(record, indent=1, allow_nan=False)
        files["reproduce.json"].write_text(text + "\n", encoding="utf-8")
        files["table.md"].write_text(table_text.markdown(record), encoding="utf-8")
        draw.samples(record, table.runs).save(files["samples.png"])
        draw.steps(record, files["steps.png"])
        outputs.commit()
    return record


class _Table:
    """Makes the runs, or finds them, and compares them.

    Attributes:
        runs: Runs by the name of their row.
        r2: r2 of each image at the end, by the names of row and network.
        windows: Calibrated windows by key of `CALIBRATED`.
        reused: Names of the rows whose runs were there already.
    """

    def __init__(
        self, plan: Plan, data: pf.TrainingSet, trained: Sequence[Network], stages: Stages
    ) -> None:
        self.plan, self.data, self.trained, self.stages = plan, data, trained, stages
        self.device = parse_device(plan.device)
        self.noise = starting_noise(data.image_shape, plan.samples, plan.seed)
        common = {
            "images": data.content_key(),
            "samples": plan.samples,
            "seed": plan.seed,
            "steps": STEPS,
        }
        self.kept = KeptRuns(plan.out / "runs", common, self.device)
        self.runs: dict[str, Run] = {}
        self.r2: dict[tuple[str, str], Tensor] = {}
        self.windows: dict[str, pf.WindowTable] = {}
        self.reused: list[str] = []

    @functools.cached_property
    def moments(self) -> pf.Moments:
        """Moments of the images with their eigenvectors."""
        with self.stages("moments", f"covariance of {len(self.data):,} images"):
            moments = pf.Moments.from_data(self.data, progress=self.plan.progress)
            moments.eigh()
        return moments

    @functools.cached_property
    def calibration(self) -> pf.Calibration:
        """What held-out images chose, or what a file has."""
        plan = self.plan
        with self.stages("calibration", f"calibration of {len(self.data):,} images"):
            return calibrated.calibration_of(
                self.data.to(self.device),
                self.kept,
                plan.calibration,
                seed=plan.seed + 1,
                progress=plan.progress,
            )

    def rows(self) -> list[Record]:
        """The rows: first the networks, then the methods."""
        for network in self.trained:
            self._run(network.name, network.settings, self.plan.samples, network)
        # Networks are held against each other when all have run.
        rows = [
            self._row(network.name, network.name, network.settings, network)
            for network in self.trained
        ]
        for name in methods.check_methods(self.plan.methods):
            rows.append(self._nearest() if name == "nearest" else self._method(name))
        for row in rows:
            row["minus"] = self._minus(row["name"])
        return rows

    def _method(self, name: str) -> Record:
        method, plan = METHODS[name], self.plan
        if method.calibrated is not None and method.calibrated not in self.windows:
            name_of_model = method.calibrated
            with self.stages(f"windows of {name_of_model}", f"windows of {name_of_model}"):
                self.windows[name_of_model] = calibrated_windows(
                    name_of_model,
                    self.data.to(self.device),
                    self.trained[0],
                    self.kept,
                    seed=plan.seed + 1,
                    progress=plan.progress,
                )
        els_images = min(plan.els_images, len(self.data))
        settings = methods.settings_of(
            name,
            self.data.image_shape,
            plan.threshold,
            self.windows,
            els_images,
            self.calibration if name == "calibrated" else None,
        )
        samples = min(plan.els_samples, plan.samples) if method.few else plan.samples
        self._run(name, settings, samples)
        row = self._row(name, method.label, settings)
        if method.few and (els_images < len(self.data) or samples < plan.samples):
            whole = row["seconds_per_step"] * len(self.data) * plan.samples / els_images / samples
            row["extrapolated_seconds_per_step"] = round(whole, 1)
        return row

    def _run(
        self,
        name: str,
        settings: Settings,
        samples: int,
        network: Network | None = None,
        at: Network | None = None,
    ) -> Run:
        """The run of a row, or its answers to the states of a network's, made unless there.

        The row is a method's, or that of a network.
        """
        moments = network is None and METHODS[name].needs_moments
        states = None if at is None else self.runs[at.name].x_t

        def make() -> Run:
            request = Request(
                settings,
                self.data if network is None else None,
                self.moments if moments else None,
                None if network is None else network.path,
                self.noise[:samples],
                STEPS,
                self.plan.progress,
                self.device,
                self.calibration if name == "calibrated" else None,
                None if states is None else states[:, :samples],
            )
            what = "sampling" if at is None else f"states of {at.name}:"
            with self.stages(name, f"{what} {samples} images: {name}"):
                return perform_apart(request)

        further: Settings = {"samples": samples}
        if at is not None or network is not None:
            # Of a network's own run the states are kept, too.
            further["states"] = "its own" if at is None else at.sha256
        called = name if at is None else f"{name} at {at.name}"
        run, reused = self.kept.get(called, settings | further, make)
        if at is None:
            self.runs[name] = run
            self.reused += [name] * reused
        return run

    def _nearest(self) -> Record:
        """The training image nearest to each network's x0, at each step."""
        against: Record = {}
        for network in self.trained:
            target = self.runs[network.name].x0
            run, reused = self.kept.get(
                "nearest",
                {"model": "nearest", "to": network.sha256},
                functools.partial(self._search, target),
            )
            against[network.name] = self._scored("nearest", run, network)
            # Those of the first network are drawn.
            if self.runs.setdefault("nearest", run) is run and reused:
                self.reused.append("nearest")
        return self._told("nearest", METHODS["nearest"].label, {}) | {"against": against}

    def _search(self, target: Tensor) -> Run:
        result, seconds = [], []
        data = self.data.to(self.device)
        with self.stages("nearest", "searching for the nearest training images"):
            with pf.trace_backends() as calls:
                for x0 in target.to(self.device):
                    clock = now(self.device)
                    indices = nearest_images(x0, data.images).indices[:, 0]
                    seconds.append(round(now(self.device) - clock, 4))
                    result.append(pf.TrainingSet(data.images[indices].cpu()).values())
        facts = {
            "seconds": seconds,
            "preparation_seconds": 0.0,
            "extra_memory_bytes": None,
            "backends": sorted({backend for _, backend in calls}),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        return Run(torch.stack(result), facts)

    def _told(self, name: str, label: str, settings: Settings) -> Record:
        """What a row tells of its run alone."""
        run, is_network = self.runs[name], name not in METHODS
        searched = None if is_network or name == "wiener" else len(self.data)
        kept = {} if is_network else {k: v for k, v in settings.items() if k != "model"}
        last = run.x0[-1]
        return {
            "name": name,
            "label": label,
            "settings": kept,
            "images": settings.get("images", searched),
            "samples": run.x0.shape[1],
            "seconds_per_step": sum(run.facts["seconds"]) / len(run.facts["seconds"]),
            "gradient_energy": summary(pf.metrics.gradient_energy(last)),
            "block_edges": block_edges(last),
            "nearest_image": recitation(last, self.data.to(self.device)),
            **run.facts,
        }

    def _row(
        self, name: str, label: str, settings: Settings, network: Network | None = None
    ) -> Record:
        """The row of a method or a network: also against networks, and at their states."""
        row = self._told(name, label, settings) | {"against": {}, "at_states": {}}
        run = self.runs[name]
        samples = run.x0.shape[1]
        for target in self.trained:
            if target is network:
                continue
            row["against"][target.name] = self._scored(name, run, target)
            there = self._run(name, settings, samples, network, at=target)
            answers = self.runs[target.name].x0[:, :samples]
            row["at_states"][target.name] = score(by_image(there.x0, answers))
        return row

    def _scored(self, name: str, run: Run, target: Network) -> Record:
        """A run against a network's, whose r2 of each image at the end is noted."""
        values = by_image(run.x0, self.runs[target.name].x0[:, : run.x0.shape[1]])
        self.r2[name, target.name] = values["r2"][-1]
        return score(values)

    def _minus(self, name: str) -> Record:
        """r2 at the end less that of others, image by image, against each network.

        The others are PCA locality and another network.
        """
        result: Record = {}
        for target in self.trained:
            if (name, target.name) not in self.r2:
                continue
            networks = [one.name for one in self.trained if one is not target]
            result[target.name] = {
                other: paired(self.r2[name, target.name], self.r2[other, target.name])
                for other in ("pca-locality", *networks[:1])
                if other != name and (other, target.name) in self.r2
            }
        return result


def _bars(rows: Sequence[Record], data: pf.TrainingSet, names: Sequence[str]) -> list[Record]:
    """What the calibrated model is meant to reach against the networks of some names."""
    by_name = {row["name"]: row for row in rows}
    if "calibrated" not in by_name:
        return []
    row, (first, *others) = by_name["calibrated"], names
    r2 = row["against"][first]["r2"]["final"]["mean"]
    result = []
    for name, (images, least) in _LEAST_R2.items():
        if r2 is not None and data.name.startswith(name) and len(data) == images:
            result.append(bar(f"r2 at the end, {first}", r2, least=least))
    for other in others[:1]:
        ceiling = by_name[other]["against"][first]["r2"]["final"]["mean"]
        if None not in (r2, ceiling):
            what = f"r2 at the end, {first}: that of {other} less that of the calibrated model"
            result.append(bar(what, ceiling - r2, _BELOW_A_NETWORK))
    for name in names:
        energy = by_name[name]["gradient_energy"]["mean"]
        if energy > 0:
            apart = abs(row["gradient_energy"]["mean"] / energy - 1)
            result.append(bar(f"gradient energy: off that of {name} by", apart, _OFF_SHARPNESS))
    return result


def _record(
    plan: Plan,
    data: pf.TrainingSet,
    trained: Sequence[Network],
    rows: list[Record],
    table: _Table,
) -> Record:
    """What is written of a run; nothing in it names a folder of this machine."""
    calibration = None
    if "calibrated" in plan.methods:
        calibration = calibrated.told(table.calibration, data, plan.calibration)
    return {
        "schema": SCHEMA,
        "command": "reproduce",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": facts_of(table.device),
        "device": str(table.device),
        "memory": table_text.MEMORY[table.device.type],
        "data": data_record(data),
        "networks": [network.record() for network in trained],
        "settings": {
            "threshold": plan.threshold,
            "samples": plan.samples,
            "seed": plan.seed,
            "schedule": "DDPM, linear beta 1e-4..0.02, T = 1000",
            "sampler": "DDIM, eta 0, x0 clipped to [-1, 1]",
            "timesteps": pf.DDPMSchedule().timesteps(STEPS).tolist(),
            "calibration_samples": CALIBRATION_SAMPLES,
            "compared": "clipped x0 of each model's own run with that of the network's own run",
        },
        "windows": {
            name: {
                "follow": trained[0].name,
                "windows": [window for _, window in result],
                "similarities": [max(row) for row in result.similarities],
            }
            for name, result in table.windows.items()
        },
        "calibration": calibration,
        "bars": _bars(rows, data, [network.name for network in trained]),
        "table": rows,
        "reused_runs": table.reused,
    }
