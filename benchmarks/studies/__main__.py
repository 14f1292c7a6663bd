"""The command that runs one study; see the package."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Sequence
from datetime import datetime, timezone

from ..cpu_suite import write_json
from ..machine import machine_facts
from ..options import path_option
from ..reproduce.networks import check_networks

STUDIES = ("disks", "regularity", "pattern", "memorize", "eigenpairs", "streaming", "planner")
SCHEMA = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies")
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=path_option, required=True, help="JSON file to write")
    parser.add_argument("--force", action="store_true", help="replace --out where it exists")
    parser.add_argument(
        "--mnist", type=path_option, help="zip or folder of MNIST's training images"
    )
    parser.add_argument("--cifar10", type=path_option, help="zip of CIFAR-10's training images")
    parser.add_argument(
        "--network",
        type=path_option,
        action="append",
        default=[],
        help="trained network, for `pattern`",
    )
    parser.add_argument("--scratch", type=path_option, help="folder for large temporary files")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for a look")
    options = parser.parse_args(arguments)
    if options.out.exists() and not options.force:
        parser.error(f"{options.out} is there already; --force replaces it")
    if not options.out.parent.is_dir():
        parser.error(f"there is no folder {options.out.parent}")
    study = importlib.import_module(f".{options.study}", __package__)
    for name in study.NEEDS:
        if getattr(options, name) is None and not options.quick:
            parser.error(f"--{name} is required for the study {options.study!r}")

    started, clock = datetime.now(timezone.utc), time.perf_counter()
    accepted = getattr(study, "ACCEPTS", ())
    if options.network and "network" not in accepted:
        parser.error(f"--network: the study {options.study!r} takes none")
    names = (*study.NEEDS, *accepted)
    sources = {name: getattr(options, name) for name in names}
    try:
        trained = check_networks(options.network) if options.network else []
        results, pictures = study.run(quick=options.quick, **sources)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    report = {
        "schema": SCHEMA,
        "study": options.study,
        "quick": options.quick,
        "date": started.isoformat(timespec="seconds"),
        "seconds": time.perf_counter() - clock,
        "machine": machine_facts(),
        "networks": [one.record() for one in trained],
        "results": results,
    }
    write_json(report, options.out)
    print(f"written: {options.out}")
    picture = options.out.with_suffix(".png")
    study.draw(results, pictures, picture)
    print(f"drawn:   {picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
