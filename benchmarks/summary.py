"""What a run shows: figures over several cases, beside what they are meant to reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.registry import DDIM_STEPS

Record = dict[str, Any]


def summarise(records: Sequence[Record], *, judged: bool = True) -> list[Record]:
    """Figures of the suites that ran.

    Args:
        records: Records of the cases.
        judged: False leaves out what the figures are meant to reach, where the sizes are not
            those it is meant for.

    Returns:
        Entries with `what`, the `value`, the `bar` it is meant to reach, whether it does
        (`reached`). Bar and `reached` are None where nothing is asked.
    """
    found: list[Record] = []
    for suite, figures in _FIGURES.items():
        of_suite = [record for record in records if record["suite"] == suite]
        if of_suite:
            found += figures(of_suite)
    return found if judged else [_told(entry["what"], entry["value"]) for entry in found]


def _at_least(what: str, value: float, bar: float) -> Record:
    return {"what": what, "value": value, "bar": f">= {bar:g}", "reached": value >= bar}


def _at_most(what: str, value: float, bar: float) -> Record:
    return {"what": what, "value": value, "bar": f"<= {bar:g}", "reached": value <= bar}


def _told(what: str, value: float) -> Record:
    return {"what": what, "value": value, "bar": None, "reached": None}


def _pca_locality(records: Sequence[Record]) -> list[Record]:
    """Sums over the steps, of medians."""

    def total(name: str) -> float:
        return sum(record["yardsticks"][name]["seconds"]["median"] for record in records)

    mine = sum(record["seconds"]["median"] for record in records)
    steps = f"PCA locality, sum of {len(records)} steps"
    found = [
        _told(f"{steps}: seconds", mine),
        _at_least(f"{steps}: times faster than eager einsum", total("eager") / mine, 8),
        _at_most(
            f"{steps}: time over matmuls of the schedule's multiply-adds",
            mine / total("matmul_same_terms"),
            2,
        ),
        _at_most(
            f"{steps}: time over matmuls of the core-and-fringe multiply-adds",
            mine / total("matmul_core_fringe"),
            2,
        ),
    ]
    if {record["timestep"] for record in records} == set(DDIM_STEPS):
        return found
    return [_told(entry["what"], entry["value"]) for entry in found]


def _local_score(records: Sequence[Record]) -> list[Record]:
    found = []
    for record in records:
        what = f"local score, window {record['window']}: times faster than eager unfold of"
        patches = record["yardsticks"]["eager_patches"]["ratio"]["median"]
        differences = record["yardsticks"]["eager_differences"]["ratio"]["median"]
        if record["window"] == 7:
            found.append(_at_least(f"{what} patches", patches, 50))
        else:
            found.append(_told(f"{what} patches", patches))
        found.append(_told(f"{what} differences", differences))
    times = [record["seconds"]["median"] for record in records]
    slowest = max(times) / min(times)
    found.append(_told("local score: slowest window over fastest", slowest))
    return found


def _equivariant(records: Sequence[Record]) -> list[Record]:
    ratio = records[0]["yardsticks"]["eager_convolution"]["ratio"]["median"]
    what = f"equivariant, window {records[0]['window']}: times faster than eager convolution"
    return [_at_least(what, ratio, 10)]


def _patch_set(records: Sequence[Record]) -> list[Record]:
    ratio = records[0]["yardsticks"]["window_mean"]["ratio"]["median"]
    what = f"patch set, window {records[0]['window']}: time over the local score's"
    return [_told(what, 1 / ratio)]


def _covariance(records: Sequence[Record]) -> list[Record]:
    ratio = records[0]["yardsticks"]["torch_cov"]["ratio"]["median"]
    return [_at_least("covariance, exact: times faster than torch.cov of float32", ratio, 1)]


def _optimal(records: Sequence[Record]) -> list[Record]:
    found = []
    for record in records:
        what = f"optimal, B = {record['batch']}"
        eager, read = record["yardsticks"]["eager"], record["yardsticks"]["read_bytes"]
        found.append(_told(f"{what}: times faster than eager", eager["ratio"]["median"]))
        found.append(
            _told(f"{what}: time over one read of the images", 1 / read["ratio"]["median"])
        )
    return found


def _tangents(records: Sequence[Record]) -> list[Record]:
    return [
        _at_most(
            f"{record['op']}, t = {record['timestep']}: time with {record['tangents']} tangents "
            "over time without",
            1 / record["yardsticks"]["no_tangents"]["ratio"]["median"],
            (1 + record["tangents"]) * 1.3,
        )
        for record in records
    ]


_FIGURES: dict[str, Callable[[Sequence[Record]], list[Record]]] = {
    "pca_locality": _pca_locality,
    "local_score": _local_score,
    "equivariant": _equivariant,
    "patch_set": _patch_set,
    "covariance": _covariance,
    "optimal": _optimal,
    "tangents": _tangents,
}


def table(records: Sequence[Record], summary: Sequence[Record]) -> str:
    """Cases and summary as text."""
    width = max(len(record["id"]) for record in records)
    lines = [f"{'case':<{width}}  {'median':>10} {'p20':>10} {'p80':>10} {'GFLOP/s':>9}  beside"]
    for record in records:
        seconds = record["seconds"]
        times = " ".join(f"{seconds[key] * 1e3:>7.1f} ms" for key in ("median", "p20", "p80"))
        beside = ", ".join(
            f"{name} x{yardstick['ratio']['median']:.3g}"
            for name, yardstick in record["yardsticks"].items()
        )
        rate = record["gflops_per_second"]
        lines.append(f"{record['id']:<{width}}  {times} {rate:>9.1f}  {beside}")
    if summary:
        width = max(len(entry["what"]) for entry in summary)
        lines.append("")
    for entry in summary:
        verdict = {True: "reached", False: "NOT REACHED", None: ""}[entry["reached"]]
        bar = entry["bar"] or ""
        lines.append(f"{entry['what']:<{width}}  {entry['value']:>9.3g}  {bar:<8} {verdict}")
    return "\n".join(lines)
