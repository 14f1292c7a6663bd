"""Large images and long jobs, as a user starts them: time and memory seen from outside.

    python -m benchmarks.large_images --out benchmarks/results/NAME.json [--only PART]

Sets are seeded crops of scikit-learn's two photographs, and CIFAR-10 where it is given; every
command runs in a process of its own with an empty cache, and its resident memory is looked at from
here. The parts:

- pngs: 2,000 files of 3x64x64 to eight samples of PCA locality, nothing cached, and once more: of
  crops, and of as many different photographs (CIFAR-10, enlarged);
- ways: masks by the components of images, of the covariance and by Cholesky factors;
- foreseen: what `pyflocality plan` foresees beside what is measured, at 32x32, 64x64 and 128x128;
- cached: CIFAR-10, packed (--cifar10; random bytes without), with all masks cached;
- many: 15,000 images of 3x64x64, beside the published seconds a step of AFHQ at 64x64;
- side-128: 2,000 images of 3x128x128 (CIFAR-10, enlarged; else crops), eight samples;
- side-256: 200 images of 3x256x256, one step for one image, and the plan of the rest.

Writes one JSON and a picture beside it. Parts that the file has from this commit are kept, those
that are missing run: interrupted and started again, it goes on where it was. With --only all other
parts stay as they are, each with its date and commit. Nothing else should run meanwhile.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from .command import Record, Run, path_option, read_json, results_parser, write_json
from .large.draw import draw
from .large.parts import PARTS, Work
from .large.watched import CommandFailedError
from .machine import machine_facts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; returns the exit code."""
    parser = results_parser("large_images", (__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--only", choices=tuple(PARTS), action="append", help="this part alone, again")
    add("--cifar10", type=path_option, help="training images of CIFAR-10")
    add("--scratch", type=path_option, help="folder for temporary files, 20 GB of them")
    add("--quick", action="store_true", help="tiny sizes, for a look: its numbers mean nothing")
    options = parser.parse_args(arguments)
    if not options.out.parent.is_dir():
        parser.error(f"there is no folder {options.out.parent}")
    if options.cifar10 is not None and not options.cifar10.exists():
        parser.error(f"--cifar10: there is no {options.cifar10}")
    known = {} if options.force or not options.out.exists() else read_json(options.out)
    if known and known.get("suite") != "large_images":
        parser.error(f"{options.out} is of something else; --force replaces it")
    done = _kept(known, quick=options.quick, whenever=options.only is not None)
    begun, failed = Run(), list[str]()
    for name in options.only or [name for name in PARTS if name not in done]:
        print(f"{name} ...", flush=True)
        try:
            done[name] = _record_of(name, options.quick, options.cifar10, options.scratch)
        except CommandFailedError as error:
            failed.append(name)
            print(f"{name}: FAILED, {error}", flush=True)
            continue
        parts = {part: done[part] for part in PARTS if part in done}
        complete = len(parts) == len(PARTS)
        report = begun.report(
            suite="large_images", quick=options.quick, complete=complete, parts=parts
        )
        write_json(report, options.out)
        print(told(name, done[name]), flush=True)
        if importlib.util.find_spec("matplotlib") is not None:
            draw(report, options.out.with_suffix(".png"))
    print(f"written: {options.out}")
    return int(bool(failed))


def _kept(known: Record, *, quick: bool, whenever: bool) -> Record:
    """The parts of a file that are of this size, of this commit or of any."""
    commit = machine_facts()["commit"]
    parts: Record = known.get("parts", {}) if known.get("quick") == quick else {}
    return {name: part for name, part in parts.items() if whenever or part["commit"] == commit}


def _record_of(name: str, quick: bool, cifar10: Path | None, scratch: Path | None) -> Record:
    """Run a part in a folder of its own."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=scratch, prefix="pyflocality-large-") as folder:
        record = PARTS[name](Work(Path(folder), quick, cifar10))
    facts = {"date": date, "commit": machine_facts()["commit"]}
    return facts | {"part_seconds": time.perf_counter() - start} | record


def told(name: str, record: Record) -> str:
    """What is meant to be reached of a part, as text."""
    lines = [f"{name}: {record['part_seconds']:.0f} s"]
    for bar in record.get("bars", ()):
        sign = "reached" if bar["reached"] else "MISSED"
        lines.append(f"  {bar['what']}: {bar['value']:.4g} of {bar['most']:.4g}, {sign}")
    for size in record.get("sizes", ()):
        shape = "x".join(map(str, size["shape"]))
        for one in size["stages"]:
            seconds = f"{one['measured_seconds']:9.2f} s, foreseen {one['foreseen_seconds']:9.2f} s"
            most, foreseen = (one[f"{kind}_bytes"] / 1e9 for kind in ("measured", "foreseen"))
            lines.append(
                f"  {shape} {one['name']:<15}{seconds}; {most:6.2f} GB, foreseen {foreseen:6.2f} GB"
            )
    for one in record.get("sets", ()):
        shape = "x".join(map(str, one["shape"]))
        sign = "as they may" if one["agree"] else "MORE THAN THEY MAY"
        lines.append(
            f"  {one['images']:,} images {shape}: of {one['entries']:,} entries differ at most "
            f"{one['most_different_entries']}, {sign}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
