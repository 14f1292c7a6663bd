"""The command that runs one study; see the package."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from ..command import Run, check_results, path_option, results_parser, write_json
from ..reproduce.networks import check_networks

STUDIES = ("disks", "regularity", "pattern", "memorize", "eigenpairs", "streaming", "planner")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study; returns the exit code."""
    parser = results_parser("studies")
    add = parser.add_argument
    add("study", choices=STUDIES)
    add("--mnist", type=path_option, help="zip or folder of MNIST's training images")
    add("--cifar10", type=path_option, help="zip of CIFAR-10's training images")
    add(
        "--network",
        type=path_option,
        action="append",
        default=[],
        help="trained network, for `pattern`",
    )
    add("--scratch", type=path_option, help="folder for large temporary files")
    add("--quick", action="store_true", help="tiny sizes, for a look")
    options = parser.parse_args(arguments)
    check_results(parser, options)
    study = importlib.import_module(f".{options.study}", __package__)
    for name in study.NEEDS:
        if getattr(options, name) is None and not options.quick:
            parser.error(f"--{name} is required for the study {options.study!r}")
    accepted = getattr(study, "ACCEPTS", ())
    if options.network and "network" not in accepted:
        parser.error(f"--network: the study {options.study!r} takes none")
    sources = {name: getattr(options, name) for name in (*study.NEEDS, *accepted)}
    begun = Run()
    try:
        trained = check_networks(options.network) if options.network else []
        results, pictures = study.run(quick=options.quick, **sources)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    facts = {"study": options.study, "quick": options.quick}
    networks = [one.record() for one in trained]
    write_json(begun.report(**facts, networks=networks, results=results), options.out)
    print(f"written: {options.out}")
    drawn = options.out.with_suffix(".png")
    study.draw(results, pictures, drawn)
    print(f"drawn:   {drawn}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
