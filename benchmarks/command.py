"""What the commands of this folder share: options, refusals before any work, and results files."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pyflocality._support.locks import remove_abandoned, replacing, twins_of

from .machine import machine_facts

SCHEMA = 1

# What a results file holds, or a part of it.
Record = dict[str, Any]


def path_option(text: str) -> Path:
    """A path, for argparse: shells leave the `~` of `--out=~/results` as it is."""
    return Path(os.path.expanduser(text))


def results_parser(
    name: str, about: str | None = None, *, required: bool = True
) -> argparse.ArgumentParser:
    """The parser of the command `python -m benchmarks.NAME`, with the options of its results."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    words = ("--out", "--output")
    parser.add_argument(*words, type=path_option, required=required, help="JSON file to write")
    parser.add_argument("--force", action="store_true", help="replace --out where it exists")
    return parser


def check_results(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse a results file that is not named, is there already, or has no folder."""
    out, kept = options.out, getattr(options, "resume", False)
    if out is None:
        parser.error("--out is required")
    if out.exists() and not (options.force or kept):
        resume = ", --resume goes on" if hasattr(options, "resume") else ""
        parser.error(f"{out} is there already; --force replaces it{resume}")
    if not out.parent.is_dir():
        parser.error(f"there is no folder {out.parent}")


class Run:
    """A command that runs: when it began."""

    def __init__(self) -> None:
        self.date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._start = time.perf_counter()

    def report(self, **facts: object) -> Record:
        """Facts and results, and when, how long and on which machine they were made."""
        return {
            "schema": SCHEMA,
            "date": self.date,
            "seconds": time.perf_counter() - self._start,
            "machine": machine_facts(),
            **facts,
        }


def bar(
    what: str, value: float, most: float | None = None, *, least: float | None = None
) -> Record:
    """A figure beside the most, or the least, that it is meant to be."""
    if most is not None:
        return {"what": what, "value": value, "most": most, "reached": value <= most}
    assert least is not None
    return {"what": what, "value": value, "least": least, "reached": value >= least}


def write_json(report: Mapping[str, Any], path: Path) -> None:
    """Write a report, whole or not at all."""
    remove_abandoned(twins_of(path))
    with replacing(path, 0o666) as file:
        file.write((json.dumps(report, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Record:
    """What a results file holds."""
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record
