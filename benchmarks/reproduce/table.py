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

import pyflocality as pf
from pyflocality._support.checks import check_count
from pyflocality._support.devices import parse_device
from pyflocality._support.outputs import Outputs
from pyflocality._support.record import Stages
from pyflocality.masks import check_threshold
from pyflocality.ops import nearest_images
from pyflocality.planner import Job, Setting, check_fits

from ..command import SCHEMA, Record
from . import draw, methods, networks
from .methods import METHODS, Settings
from .networks import Network
from .runs import STEPS, KeptRuns, Request, Run, now, perform_apart, starting_noise
from .scores import score, shown
from .study import data_record, facts_of
from .windows import CALIBRATION_SAMPLES, calibrated_windows

_WINDOWS_TOLD = (
    " Windows are those that follow network A at each noise level; ELS and bbELS take those of LS."
)
# What is told as memory, by the device.
_MEMORY = {
    "cpu": "what the process needs",
    "cuda": "what torch's allocator of GPU memory holds",
}
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
        rows = table.rows()
        record = _record(plan, data, trained, rows, table)
        record["seconds"] = stages.seconds | {"total": round(time.perf_counter() - start, 4)}
        files = {path.name: temporary for path, temporary in outputs.temporary.items()}
        text = json.dumps(record, indent=1, allow_nan=False)
        files["reproduce.json"].write_text(text + "\n", encoding="utf-8")
        files["table.md"].write_text(markdown(record), encoding="utf-8")
        draw.samples(record, table.runs).save(files["samples.png"])
        draw.steps(record, files["steps.png"])
        outputs.commit()
    return record


class _Table:
    """Makes the runs, or finds them, and compares them.

    Attributes:
        runs: Runs by the name of their row.
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
        self.windows: dict[str, pf.WindowTable] = {}
        self.reused: list[str] = []

    @functools.cached_property
    def moments(self) -> pf.Moments:
        """Moments of the images with their eigenvectors."""
        with self.stages("moments", f"covariance of {len(self.data):,} images"):
            moments = pf.Moments.from_data(self.data, progress=self.plan.progress)
            moments.eigh()
        return moments

    def rows(self) -> list[Record]:
        """The rows: first the networks, then the methods."""
        rows = []
        for network in self.trained:
            run = self._run(network.name, network.settings, self.plan.samples, network.path)
            rows.append(self._row(network.name, network.name, {}, run))
        # Networks are held against each other when all have run.
        for row in rows:
            row["against"] = self._against(row["name"], self.runs[row["name"]])
        for name in methods.check_methods(self.plan.methods):
            rows.append(self._nearest() if name == "nearest" else self._method(name))
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
            name, self.data.image_shape, plan.threshold, self.windows, els_images
        )
        samples = min(plan.els_samples, plan.samples) if method.few else plan.samples
        run = self._run(name, settings, samples)
        row = self._row(name, method.label, settings, run)
        row["against"] = self._against(name, run)
        if method.few and (els_images < len(self.data) or samples < plan.samples):
            whole = row["seconds_per_step"] * len(self.data) * plan.samples / els_images / samples
            row["extrapolated_seconds_per_step"] = round(whole, 1)
        return row

    def _run(self, name: str, settings: Settings, samples: int, network: Path | None = None) -> Run:
        """The run of a row, made unless it is there."""
        moments = network is None and METHODS[name].needs_moments

        def make() -> Run:
            request = Request(
                settings,
                self.data if network is None else None,
                self.moments if moments else None,
                network,
                self.noise[:samples],
                STEPS,
                self.plan.progress,
                self.device,
            )
            with self.stages(name, f"sampling {samples} images: {name}"):
                return perform_apart(request)

        run, reused = self.kept.get(name, settings | {"samples": samples}, make)
        if reused:
            self.reused.append(name)
        self.runs[name] = run
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
            against[network.name] = score(run.x0, target)
            # Those of the first network are drawn.
            if self.runs.setdefault("nearest", run) is run and reused:
                self.reused.append("nearest")
        row = self._row("nearest", METHODS["nearest"].label, {}, self.runs["nearest"])
        return row | {"against": against}

    def _search(self, target: torch.Tensor) -> Run:
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

    def _row(self, name: str, label: str, settings: Settings, run: Run) -> Record:
        is_network = name not in METHODS
        searched = None if is_network or name == "wiener" else len(self.data)
        return {
            "name": name,
            "label": label,
            "settings": {key: value for key, value in settings.items() if key != "model"},
            "images": settings.get("images", searched),
            "samples": run.x0.shape[1],
            "seconds_per_step": sum(run.facts["seconds"]) / len(run.facts["seconds"]),
            **run.facts,
        }

    def _against(self, name: str, run: Run) -> Record:
        samples = run.x0.shape[1]
        return {
            network.name: score(run.x0, self.runs[network.name].x0[:, :samples])
            for network in self.trained
            if network.name != name
        }


def _record(
    plan: Plan,
    data: pf.TrainingSet,
    trained: Sequence[Network],
    rows: list[Record],
    table: _Table,
) -> Record:
    """What is written of a run; nothing in it names a folder of this machine."""
    return {
        "schema": SCHEMA,
        "command": "reproduce",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": facts_of(table.device),
        "device": str(table.device),
        "memory": _MEMORY[table.device.type],
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
        "table": rows,
        "reused_runs": table.reused,
    }


def markdown(record: Record) -> str:
    """The table as text for people."""
    names = [network["name"] for network in record["networks"]]
    data, settings = record["data"], record["settings"]
    head = ["model"]
    for name in names:
        head += [f"MSE, {name}", f"r2, {name}", f"r2 of all steps, {name}"]
    head += ["s / step", "memory, MB", "backend"]
    lines = [
        f"{data['name']}: {data['images']:,} images, {settings['samples']} samples, "
        f"{len(settings['timesteps'])} DDIM steps, threshold {settings['threshold']:g}. "
        "Mean ± standard error over the samples.",
        *(_told(network) for network in record["networks"]),
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    lines += ["| " + " | ".join(_cells(row, names, record)) + " |" for row in record["table"]]
    machine = record["machine"]
    # Files from before there was a choice of the device do not tell.
    memory = record.get("memory", _MEMORY["cpu"])
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    lines += [
        "",
        "Seconds are those of one denoiser call for all samples, without moments and masks; memory "
        f"is {memory} beside images, moments and noise, at most."
        + (_WINDOWS_TOLD if record["windows"] else ""),
        f"{where}, {record['date'][:10]}, pyflocality "
        f"{machine['pyflocality']}, torch {machine['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def _told(network: Record) -> str:
    """How long a network was trained, as far as its file tells."""
    facts, name = network["facts"], network["name"]
    told = f"{name[:1].upper()}{name[1:]}: {network['parameters']:,} parameters"
    if {"steps", "batch"} <= facts.keys():
        told += f", {facts['steps']:,} training steps of {facts['batch']} images"
    return f"{told}."


def label_of(row: Record, record: Record) -> str:
    """What a row is called, with what sets its run apart from the others."""
    label = row["label"]
    if row["images"] is not None and row["images"] < record["data"]["images"]:
        label += f" ({row['images']:,} images)"
    if row["samples"] < record["settings"]["samples"]:
        label += f" ({row['samples']} samples)"
    if "extrapolated_seconds_per_step" in row:
        label += f", about {row['extrapolated_seconds_per_step']:,.0f} s / step for all"
    return label


def _cells(row: Record, names: list[str], record: Record) -> list[str]:
    cells = [label_of(row, record)]
    for name in names:
        result = row["against"].get(name)
        if result is None:
            cells += ["", "", ""]
            continue
        cells += [shown(result["mse"]["final"], 4), shown(result["r2"]["final"], 3)]
        cells.append(shown(result["r2"]["all_steps"], 3))
    memory = row["extra_memory_bytes"]
    cells.append(f"{row['seconds_per_step']:.3g}")
    cells.append("-" if memory is None else f"{memory / 1e6:,.0f}")
    return [*cells, ", ".join(row["backends"])]
