"""The kernels and the models beside trained networks, measured on one machine in one command.

    python -m benchmarks.everything --out FOLDER --mnist ZIP --mnist-test ZIP \\
        --cifar10 ZIP --cifar10-test ZIP [--device cuda]

runs one after the other: the kernel suite; the training of two networks for each set, but for
those that --networks has; the calibration of each set, which no network has a part in; the table of
models against them; sweeps, denoising and fields; and the report's page. Results are named as those
in `benchmarks/results`, NAME-SET-MACHINE-DATE, with the day on which the folder was begun; networks
lie in FOLDER/networks-MACHINE, and the page, which shows the committed results as well, in
FOLDER/page. Models run on the backends that "auto" takes; the kernel suite names its own.

Started again, it leaves out what is there and goes on inside what was interrupted. Where a step
fails those go on that do not need what it makes. `--list` shows what would run, and runs nothing.
The studies by themselves, from `memorize` to `pattern`, are commands of their own.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

from pyflocality._support.devices import parse_device

from . import gpu_suite
from .command import path_option
from .machine import machine_facts
from .publish.results_files import FOLDER
from .reproduce.networks import check_networks

# Sets, and the published thresholds of PCA locality for them.
SETS = {"mnist": 0.005, "cifar10": 0.05}
SEEDS = (0, 1)
# The published width for 28x28; that for 32x32 is twice as large, and its file too large to commit.
_WIDTH = 64
# A CPU has no time for it.
_ON_CPU = ("--width", 32, "--batch", 64, "--rate", 1e-3)
# Seconds of the GPU suite: enough for every case.
_BUDGET = 3600
_PICTURES = {"sweeps": ("", "-why", "-samples"), "denoising": ("",), "fields": ("",)}
# Options of tiny sizes, for a look.
_QUICK = {
    "suite": ("--quick",),
    "train": ("--width", 8, "--batch", 16, "--steps", 20),
    "calibrate": ("--steps", 2),
    "reproduce": ("--samples", 2, "--els-images", 50, "--els-samples", 1),
    "sweeps": ("--samples", 2, "--seeds", 1),
    "denoising": ("--samples", 2),
    "fields": ("--samples", 2, "--steps", 10),
}


@dataclass(frozen=True)
class Step:
    """A command, and the files that it is run for.

    Attributes:
        name: What it is called in messages.
        words: The command.
        makes: Files that are there once it is done; without any it runs every time.
        needs: Files that must be there.
        copies: Copies by the files that the command writes; made if it ends with one of `codes`.
        codes: Exit codes with which the results are whole.
        clears: Files that are removed before.
    """

    name: str
    words: Sequence[object]
    makes: Sequence[Path] = ()
    needs: Sequence[Path] = ()
    copies: dict[Path, Path] = field(default_factory=dict)
    codes: tuple[int, ...] = (0,)
    clears: Sequence[Path] = ()

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", *map(str, self.words)]

    @property
    def done(self) -> bool:
        return bool(self.makes) and all(path.exists() for path in self.makes)

    def run(self) -> str:
        """Run it unless it is done; what became of it."""
        if self.done:
            return "skipped, it is there"
        missing = [path for path in self.needs if not path.exists()]
        if missing:
            return f"failed, there is no {missing[0]}"
        print(f"\n{self.name}: {shlex.join(self.command)}", flush=True)
        for path in self.clears:
            path.unlink(missing_ok=True)
        code = execute(self.command)
        if code in self.codes:
            missing = [path for path in self.copies if not path.exists()]
            if missing:
                return f"failed, it left no {missing[0]}"
            for source, target in self.copies.items():
                shutil.copyfile(source, target)
        return "done" if code == 0 else f"failed with exit code {code}"


def execute(command: Sequence[str]) -> int:
    """Run a command whose output passes through; its exit code."""
    return subprocess.run(command, check=False).returncode


def steps(options: argparse.Namespace) -> list[Step]:
    """All steps, in order."""
    stamp = f"{options.machine}-{day_of(options.out, options.machine)}"
    trained = {
        name: [_network(options, f"{name}-seed{seed}.safetensors") for seed in SEEDS]
        for name in SETS
    }
    result = [_suite(options, stamp)]
    for name, paths in trained.items():
        result += [_training(options, name, seed, paths[seed]) for seed in SEEDS]
    result += [_calibration(options, name) for name in SETS]
    for kind in ("reproduce", *_PICTURES):
        result += [_comparison(options, kind, name, trained[name], stamp) for name in SETS]
    words: list[object] = ["report", "--results", _folder(options, "work") / "results", "--out"]
    return [*result, Step("report", _of_package(*words, options.out / "page", "--force"))]


def _suite(options: argparse.Namespace, stamp: str) -> Step:
    """The kernel suite."""
    tiny = _QUICK["suite"] if options.quick else ()
    if parse_device(options.device).type == "cpu":
        made = options.out / f"cpu-{stamp}.json"
        words = _of_package("cpu_suite", "--cifar10", options.cifar10, "--out", made, *tiny)
        return Step("cpu suite", words, [made])
    # It writes after every case: what an interrupted one leaves is no result. A failed case is.
    made, part = options.out / f"gpu-{stamp}.json", _folder(options, "work") / "gpu.json"
    sets = ("--cifar10", options.cifar10, "--mnist", options.mnist)
    words = _of_package("gpu_suite", *sets, "--budget", _BUDGET, "--out", part, *tiny)
    codes = (0, gpu_suite.FAILED)
    return Step("gpu suite", words, [made], copies={part: made}, codes=codes, clears=[part])


def _training(options: argparse.Namespace, name: str, seed: int, made: Path) -> Step:
    """The training of a network."""
    folder = _folder(options, "work") / f"{name}-seed{seed}"
    on_cpu = parse_device(options.device).type == "cpu"
    words: list[object] = ["oracle.train", getattr(options, name), "--out", folder, "--seed", seed]
    words += ["--minutes", options.minutes, "--device", options.device]
    words += _ON_CPU if on_cpu else ("--width", _WIDTH)
    words += _QUICK["train"] if options.quick else ()
    log = {folder / "log.jsonl": made.with_suffix(".jsonl")}
    copies = log | {folder / "unet.safetensors": made}
    return Step(f"training {name} seed {seed}", _of_package(*words), [made], copies=copies)


def _calibration(options: argparse.Namespace, name: str) -> Step:
    """The model of each noise level of a set, which table and denoising take."""
    made = _calibrated(options, name)
    words: list[object] = ["pyflocality", "calibrate", getattr(options, name), "--out", made]
    words += _QUICK["calibrate"] if options.quick else ()
    return Step(f"calibration {name}", words, [made])


def _calibrated(options: argparse.Namespace, name: str) -> Path:
    return _folder(options, "work") / f"calibration-{name}.json"


def _comparison(
    options: argparse.Namespace, kind: str, name: str, trained: Sequence[Path], stamp: str
) -> Step:
    """The table of a set ("reproduce"), or a study beside networks."""
    words: list[object] = ["--threshold", SETS[name], "--device", options.device, "--force"]
    words += [word for path in trained for word in ("--network", path)]
    words += _QUICK[kind] if options.quick else ()
    source, made = getattr(options, name), options.out / f"{kind}-{name}-{stamp}"
    needs = [*trained]
    if kind in ("reproduce", "denoising"):
        needs.append(_calibrated(options, name))
        words += ["--calibration", needs[-1]]
    if kind == "reproduce":
        folder = _folder(options, "work") / f"reproduce-{name}"
        ends = {"reproduce.json": ".json", "samples.png": "-samples.png", "steps.png": "-steps.png"}
        copies = {folder / file: made.with_name(made.name + end) for file, end in ends.items()}
        command: Sequence[object] = ("pyflocality", "reproduce", source, "--out", folder, *words)
        return Step(f"{kind} {name}", command, list(copies.values()), needs, copies)
    files = [made.with_name(f"{made.name}{end}.png") for end in _PICTURES[kind]]
    files.append(made.with_name(f"{made.name}.json"))
    words += ["--test", getattr(options, f"{name}_test")] if kind == "denoising" else []
    command = _of_package(f"reproduce.{kind}", "--source", source, "--out", files[-1], *words)
    return Step(f"{kind} {name}", command, files, needs)


def _network(options: argparse.Namespace, file: str) -> Path:
    """The file of a network: the given one, or the one that is trained."""
    given = options.networks / file if options.networks else None
    return given if given and given.exists() else _folder(options, "networks") / file


def _folder(options: argparse.Namespace, name: str) -> Path:
    """A folder in that of the results, of this machine alone and apart from quick looks."""
    return options.out / f"{name}-{options.machine}"


def _of_package(module: object, *words: object) -> tuple[object, ...]:
    """The words of a command of this package, which is `pyflocality.benchmarks` if installed."""
    return (f"{__package__}.{module}", *words)


def machine_name(device: str) -> str:
    """The machine as names of results files have it: "2core", "h200"."""
    if parse_device(device).type == "cpu":
        return f"{machine_facts()['cores']}core"
    words = torch.cuda.get_device_name(device).lower().replace("-", " ").split()
    return next((word for word in words if re.search(r"\d", word)), "gpu")


def day_of(out: Path, machine: str) -> str:
    """The day in the names of a machine's results in a folder, today where there are none."""
    pattern = re.compile(rf"-{re.escape(machine)}-(\d{{4}}-\d\d-\d\d)")
    days = [match[1] for path in out.glob("*") if (match := pattern.search(path.name))]
    return max(days, default=datetime.now(timezone.utc).strftime("%Y-%m-%d"))


def gather(out: Path, gathered: Path) -> None:
    """Bring the committed results and those of a folder together, for the report."""
    gathered.mkdir(parents=True, exist_ok=True)
    for folder in (FOLDER, out):
        for path in (*folder.glob("*.json"), *folder.glob("*.png")):
            shutil.copyfile(path, gathered / path.name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns 1 where something failed."""
    options = _checked(arguments)
    if options.list:
        print("\n".join(shlex.join(step.command) for step in steps(options) if not step.done))
        return 0
    for name in ("work", "networks"):
        _folder(options, name).mkdir(parents=True, exist_ok=True)
    outcomes = {}
    for step in steps(options):
        if step.name == "report":
            gather(options.out, _folder(options, "work") / "results")
        outcomes[step.name] = step.run()
        print(f"{step.name}: {outcomes[step.name]}", flush=True)
    print("\n" + "\n".join(f"{name:<24}{outcome}" for name, outcome in outcomes.items()))
    return int(any(outcome.startswith("failed") for outcome in outcomes.values()))


def _checked(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, refused where they can be before any work."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.everything")
    add = parser.add_argument
    add("--out", type=path_option, required=True, help="folder of the results, made if need be")
    for name in SETS:
        add(f"--{name}", type=path_option, required=True, help="training images")
        add(f"--{name}-test", type=path_option, required=True, help="test images")
    add(
        "--networks",
        type=path_option,
        help="folder of networks SET-seedN.safetensors, not trained anew",
    )
    add("--device", default="cpu", help="cpu or cuda")
    add("--minutes", type=float, default=10.0, help="minutes of training for each network")
    add("--quick", action="store_true", help="tiny sizes, for a look: its numbers mean nothing")
    add("--list", action="store_true", help="show the commands that would run, and stop")
    options = parser.parse_args(arguments)
    sources = [getattr(options, f"{name}{part}") for name in SETS for part in ("", "_test")]
    for path in sources:
        if not path.exists():
            parser.error(f"there is no {path}")
    for path in (options.out, *options.out.parents):
        if path.exists() and not path.is_dir():
            parser.error(f"--out: {path} is no folder")
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive, got {options.minutes}")
    try:
        if parse_device(options.device).index is not None:
            parser.error("--device must be cpu or cuda: CUDA_VISIBLE_DEVICES chooses among GPUs")
        _check_given(options.networks)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    # In names of files and folders.
    options.machine = machine_name(options.device) + ("-quick" if options.quick else "")
    return options


def _check_given(folder: Path | None) -> None:
    """Refuse a folder of networks that has one of a set, but not all, or what is no network."""
    if folder is None:
        return
    if not folder.is_dir():
        raise FileNotFoundError(f"--networks: there is no folder {folder}")
    for name in SETS:
        files = [folder / f"{name}-seed{seed}.safetensors" for seed in SEEDS]
        if any(path.exists() for path in files):
            check_networks(files)


if __name__ == "__main__":
    raise SystemExit(main())
