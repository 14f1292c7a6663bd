"""Committed results files: finding them, reading them, and where each comes from."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

from ..command import Record

FOLDER = Path(__file__).resolve().parents[1] / "results"
NOT_MEASURED = "not yet measured"

# Studies beside trained networks, each a module of `benchmarks.reproduce`.
BESIDE_NETWORKS = ("sweeps", "denoising", "fields")

# How the files of each suite were made; studies and others tell by themselves.
_COMMANDS = {
    "cpu": "python -m benchmarks.cpu_suite --out {path}",
    "gpu": "python -m benchmarks.gpu_suite --out {path}",
    "subsets": "python -m benchmarks.subsets --out {path} --cifar10 ZIP --cifar10-test ZIP "
    "--mnist ZIP --mnist-test ZIP",
    "large_images": "python -m benchmarks.large_images --out {path} --cifar10 ZIP",
    "multiscale": "python -m benchmarks.multiscale --output {path} --mnist ZIP ZIP "
    "--networks FOLDER",
}


@dataclass(frozen=True)
class Results:
    """A results file.

    Attributes:
        path: The file.
        report: What it holds.
    """

    path: Path
    report: Record

    @property
    def kind(self) -> str:
        """The suite, study or command that it is of; the file's name where it does not tell."""
        names = ("suite", "study", "command")
        return next((self.report[name] for name in names if name in self.report), self.path.stem)

    @property
    def on_gpu(self) -> bool:
        """Whether it tells of a GPU."""
        return bool(self.report["machine"].get("gpu"))

    @property
    def pictures(self) -> dict[str, Path]:
        """The pictures beside the file: FILE.png by "", FILE-NAME.png by NAME.

        One that belongs to another results file, whose name begins like this one's, is not among
        them.
        """
        folder, stem = self.path.parent, self.path.stem
        others = [other.stem for other in folder.glob("*.json")]
        result = {}
        for path in sorted(folder.glob("*.png"), key=lambda path: path.stem):
            if not _is_of(path.stem, stem):
                continue
            owner = max((one for one in (stem, *others) if _is_of(path.stem, one)), key=len)
            if owner == stem:
                result[path.stem[len(stem) + 1 :]] = path
        return result

    @property
    def command(self) -> str:
        """The command that made it."""
        path = f"benchmarks/results/{self.path.name}"
        if "study" in self.report:
            if self.kind in BESIDE_NETWORKS:
                return self._study_beside_networks(path)
            study = importlib.import_module(f"..studies.{self.kind}", __package__)
            words = [f"python -m benchmarks.studies {self.kind} --out {path}"]
            words += [f"--{name} ZIP" for name in study.NEEDS]
            return " ".join([*words, *self._networks()])
        if self.kind == "reproduce":
            return self._reproduce()
        if self.kind not in _COMMANDS:
            return str(self.report.get("command", "not recorded"))
        real = self.kind == "cpu" and self.report["data"]["name"] == "CIFAR-10"
        return _COMMANDS[self.kind].format(path=path) + (" --cifar10 ZIP" if real else "")

    def _study_beside_networks(self, path: str) -> str:
        """The command of a study of `benchmarks.reproduce` that writes to a path."""
        words = [f"python -m benchmarks.reproduce.{self.kind} --source ZIP"]
        words += ["--test ZIP"] if self.kind == "denoising" else []
        words += self._networks()
        names = ("threshold", "samples", "seeds", "steps")
        words += [f"--{name} {self.report[name]}" for name in names if name in self.report]
        words += self._calibration()
        return " ".join([*words, *self._device(), f"--out {path}"])

    def _reproduce(self) -> str:
        """The command of `pyflocality reproduce`, with the methods unless they are all."""
        from ..reproduce.methods import METHODS

        settings = self.report["settings"]
        words = [f"pyflocality reproduce {self.report['data']['name']}", *self._networks()]
        words += [f"--{name} {settings[name]}" for name in ("threshold", "samples", "seed")]
        rows = {row["name"]: row for row in self.report["table"] if row["name"] in METHODS}
        if len(rows) < len(METHODS):
            words.append(f"--methods {','.join(rows)}")
        few = [row for name, row in rows.items() if METHODS[name].few]
        if few:
            words.append(f"--els-images {few[0]['images']} --els-samples {few[0]['samples']}")
        words += self._calibration()
        return " ".join([*words, *self._device(), "--out DIR"])

    def _device(self) -> list[str]:
        """The option of the device, unless it is the CPU."""
        device = self.report.get("device", "cpu")
        return [] if device == "cpu" else [f"--device {device}"]

    def _calibration(self) -> list[str]:
        """The option of a calibration, where it was one of a file."""
        file = (self.report.get("calibration") or {}).get("file")
        return [] if file is None else [f"--calibration {file}"]

    def _networks(self) -> list[str]:
        """Options that name the networks' files."""
        return [f"--network {network['file']}" for network in self.report.get("networks", [])]

    def origin(self) -> str:
        """Machine, date and commit in a line."""
        machine = self.report["machine"]
        where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
        commit = (machine["commit"] or "unknown")[:12]
        changes = " and changes after it" if machine.get("changes") else ""
        return f"{where}; {self.report['date'][:10]}; commit {commit}{changes}"


def _is_of(picture: str, results: str) -> bool:
    """Whether a picture may be of a results file, by their names without endings."""
    return picture == results or picture.startswith(f"{results}-")


def read_results(folder: Path) -> list[Results]:
    """All results files of a folder, by name.

    Raises:
        FileNotFoundError: There is no such folder, or no results file in it.
        ValueError: A file is no results file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder of results files")
    result = []
    for path in sorted(folder.glob("*.json")):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON, got {error}") from error
        if not isinstance(report, dict) or not {"machine", "date"} <= report.keys():
            raise ValueError(f"{path}: expected a results file with `machine` and `date`")
        result.append(Results(path, report))
    if not result:
        raise FileNotFoundError(f"{folder}: expected results files *.json, found none")
    return result


def latest(results: list[Results], kind: str, *, on_gpu: bool = False) -> Results | None:
    """The newest file of a kind; None where there is none."""
    chosen = [one for one in results if one.kind == kind and one.on_gpu == on_gpu]
    return max(chosen, key=lambda one: one.report["date"], default=None)


def cpu_results(results: list[Results]) -> Results:
    """The newest whole run of the CPU suite.

    Raises:
        FileNotFoundError: There is none.
    """
    whole = [one for one in results if one.report.get("complete") and not one.report.get("quick")]
    result = latest(whole, "cpu")
    if result is None:
        folder = results[0].path.parent
        raise FileNotFoundError(
            f"{folder}: expected the results of a whole run of `python -m benchmarks.cpu_suite`, "
            "found none"
        )
    return result
