"""What `pyflocality plan` foresees of a run, beside what its stages take, watched from outside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..command import Record
from .crops import crops, write_pngs
from .watched import watched
from .worker import MARK

THRESHOLD = 0.02
# Stages of less are over before anything can be said of them.
_SECONDS = 0.5
# Found where this file lies, behind what is installed.
_ROOT = Path(__file__).parents[len(str(__package__).split("."))]
_WORKER = (
    f"import runpy, sys; sys.path.append({str(_ROOT)!r}); "
    f"runpy.run_module('{__package__}.worker', run_name='__main__', alter_sys=True)"
)


def staged(
    source: Path,
    samples: int,
    steps: int,
    *,
    environment: Mapping[str, str],
    only: int | None = None,
) -> Record:
    """Seconds and peak of resident memory of every stage of a run in a process of its own."""
    words = [source, samples, steps, THRESHOLD, *([] if only is None else [only])]
    seen = watched(["-c", _WORKER, *words], dict(environment))
    stages: dict[str, Record] = {}
    marks = [*seen.marks, (seen.seconds, MARK)]
    name, began = "", 0.0
    for (when, line), peak in zip(marks, [*seen.peaks, 0], strict=True):
        if line.startswith(MARK):
            if name in stages:
                stages[name]["seconds"] += when - began
            name, began = line.removeprefix(MARK), when
            stages.setdefault(name, {"seconds": 0.0, "peak_bytes": 0})
        if name in stages:
            stages[name]["peak_bytes"] = max(stages[name]["peak_bytes"], peak)
    shares = json.loads(seen.output)["mask_shares"]
    return {
        "stages": {name: one for name, one in stages.items() if name not in ("", "looking", "end")},
        "mask_shares": shares,
        "seconds": seen.seconds,
        "peak_bytes": seen.peak_bytes,
    }


def forecast(folder: Path, count: int, side: int, samples: int, steps: int) -> Record:
    """The plan of a run and the run itself, stage by stage."""
    source = folder / f"images-{side}"
    write_pngs(crops(count, side), source)
    caches = [{"PYFLOCALITY_CACHE_DIR": str(folder / f"{name}-{side}")} for name in "ab"]
    run = staged(source, samples, steps, environment=caches[0])
    # What masks add up depends on the images: the plan is told, as it is where they are cached.
    share = sum(run["mask_shares"]) / max(1, len(run["mask_shares"]))
    words = ["-n", samples, "--steps", steps, "--threshold", THRESHOLD, "--mask-share", share]
    planned = watched(["-m", "pyflocality", "plan", source, *words, "--json"], caches[1])
    plan = json.loads(planned.output)
    base = plan["program_bytes"] + plan["set_bytes"]
    decoding = {"name": "decoding", "seconds": plan["decoding_seconds"], "bytes": 0}
    foreseen = {one["name"]: one for one in [decoding, *plan["stages"]]}
    stages = []
    for name, measured in run["stages"].items():
        if name not in foreseen:
            continue
        ratio = foreseen[name]["seconds"] / measured["seconds"]
        most = base + foreseen[name]["bytes"]
        is_long = measured["seconds"] >= _SECONDS
        stages.append(
            {
                "name": name,
                "foreseen_seconds": foreseen[name]["seconds"],
                "measured_seconds": measured["seconds"],
                "ratio": ratio,
                "foreseen_bytes": most,
                "measured_bytes": measured["peak_bytes"],
                # None of what is over at once.
                "within_30_percent": 0.7 <= ratio <= 1.3 if is_long else None,
                "bounded": measured["peak_bytes"] <= most,
            }
        )
    return {
        "images": count,
        "shape": plan["shape"],
        "samples": samples,
        "steps": steps,
        "mask_share": share,
        "way": plan.get("way"),
        "planning_seconds": planned.seconds,
        "missing_stages": sorted(set(foreseen) ^ set(run["stages"])),
        "stages": stages,
    }
