"""What a run shows: figures over several cases, beside what they are meant to reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..command import Record
from ..kernels.registry import DDIM_STEPS

# How the names of yardsticks begin that are the published algorithms in plain torch.
EAGER = "eager"
# What other yardsticks are called in words.
LIBRARIES = {
    "compiled": "torch.compile of eager",
    "compiled_patches": "torch.compile of eager unfold of patches",
    "compiled_differences": "torch.compile of eager unfold of differences",
    "compiled_convolution": "torch.compile of eager convolution",
    "attention": "torch's attention",
    "keops": "KeOps",
    "faiss": "faiss",
}


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
    result: list[Record] = []
    for suite, figures in _FIGURES.items():
        of_suite = [record for record in records if record["suite"] == suite]
        if of_suite:
            result += figures(of_suite)
    return result if judged else list(map(_unjudged, result))


def _unjudged(entry: Record) -> Record:
    return _entry(entry["what"], entry["value"])


def _entry(
    what: str, value: float, *, least: float | None = None, most: float | None = None
) -> Record:
    bar = reached = None
    if least is not None:
        bar, reached = f">= {least:g}", value >= least
    if most is not None:
        bar, reached = f"<= {most:g}", value <= most
    return {"what": what, "value": value, "bar": bar, "reached": reached}


def _ratio(record: Record, name: str) -> float:
    """How many times faster than a yardstick a case is."""
    ratio: float = record["yardsticks"][name]["ratio"]["median"]
    return ratio


def _libraries(what: str, record: Record) -> list[Record]:
    """Against the yardsticks of libraries that a case ran beside."""
    return [
        _entry(f"{what}: times faster than {LIBRARIES[name]}", _ratio(record, name))
        for name in record["yardsticks"]
        if name in LIBRARIES
    ]


def _pca_locality(records: Sequence[Record]) -> list[Record]:
    """Sums over the steps, of medians."""

    def total(name: str) -> float:
        return sum(record["yardsticks"][name]["seconds"]["median"] for record in records)

    mine = sum(record["seconds"]["median"] for record in records)
    steps = f"PCA locality, sum of {len(records)} steps"
    over = f"{steps}: time over matmuls of the"
    result = [
        _entry(f"{steps}: seconds", mine),
        _entry(f"{steps}: times faster than eager einsum", total("eager") / mine, least=8),
        _entry(f"{over} schedule's multiply-adds", mine / total("matmul_same_terms"), most=2),
        _entry(f"{over} core-and-fringe multiply-adds", mine / total("matmul_core_fringe"), most=2),
    ]
    if {record["timestep"] for record in records} != set(DDIM_STEPS):
        result = list(map(_unjudged, result))
    for record in records:
        result += _libraries(f"PCA locality, t = {record['timestep']}", record)
    return result


def _local_score(records: Sequence[Record]) -> list[Record]:
    result = []
    for record in records:
        name = f"local score, window {record['window']}"
        what = f"{name}: times faster than eager unfold of"
        least = 50 if record["window"] == 7 else None
        result.append(_entry(f"{what} patches", _ratio(record, "eager_patches"), least=least))
        result.append(_entry(f"{what} differences", _ratio(record, "eager_differences")))
        result += _libraries(name, record)
    times = [record["seconds"]["median"] for record in records]
    result.append(_entry("local score: slowest window over fastest", max(times) / min(times)))
    return result


def _equivariant(records: Sequence[Record]) -> list[Record]:
    what, ratio = f"equivariant, window {records[0]['window']}", "eager_convolution"
    told = f"{what}: times faster than eager convolution"
    return [_entry(told, _ratio(records[0], ratio), least=10), *_libraries(what, records[0])]


def _patch_set(records: Sequence[Record]) -> list[Record]:
    what = f"patch set, window {records[0]['window']}: time over the local score's"
    return [_entry(what, 1 / _ratio(records[0], "window_mean"))]


def _covariance(records: Sequence[Record]) -> list[Record]:
    what = "covariance, exact: times faster than torch.cov of float32"
    return [_entry(what, _ratio(records[0], "torch_cov"), least=1)]


def _optimal(records: Sequence[Record]) -> list[Record]:
    result = []
    for record in records:
        what = f"optimal, B = {record['batch']}"
        result.append(_entry(f"{what}: times faster than eager", _ratio(record, "eager")))
        result += _libraries(what, record)
        reading = 1 / _ratio(record, "read_bytes")
        result.append(_entry(f"{what}: time over one read of the images", reading))
    return result


def _nearest(records: Sequence[Record]) -> list[Record]:
    return _libraries("nearest image", records[0])


def _tangents(records: Sequence[Record]) -> list[Record]:
    return [
        _entry(
            f"{record['op']}, t = {record['timestep']}: time with {record['tangents']} tangents "
            "over time without",
            1 / _ratio(record, "no_tangents"),
            most=(1 + record["tangents"]) * 1.3,
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
    "nearest": _nearest,
    "tangents": _tangents,
}


def times_faster(record: Record) -> float | None:
    """Than the eager yardstick, or the fastest where there are some; None where there is none."""
    ratios = [
        yardstick["ratio"]["median"]
        for name, yardstick in record["yardsticks"].items()
        if name.startswith(EAGER)
    ]
    return min(ratios, default=None)


def size_of(record: Record) -> str:
    """What a case is, beside its operation, backend and images: the last part of its name."""
    return record["id"].rpartition("/")[2]


def table(records: Sequence[Record], summary: Sequence[Record]) -> str:
    """Cases and summary as text."""
    head = ("operation", "backend", "shape", "case", "ms", "eager x", "GFLOP/s", "GB/s", "beside")
    rows = [head, *map(_cells, records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [
            f"{cell:<{width}}" if column < 4 else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row[:-1], widths, strict=True))
        ]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    if summary:
        width = max(len(entry["what"]) for entry in summary)
        lines.append("")
    for entry in summary:
        verdict = {True: "reached", False: "NOT REACHED", None: ""}[entry["reached"]]
        bar = entry["bar"] or ""
        lines.append(f"{entry['what']:<{width}}  {entry['value']:>9.3g}  {bar:<8} {verdict}")
    return "\n".join(lines)


def _cells(record: Record) -> Sequence[str]:
    faster = times_faster(record)
    beside = [
        f"{name} x{yardstick['ratio']['median']:.3g}"
        for name, yardstick in record["yardsticks"].items()
    ]
    # Reasons are in the record; a table has room for their beginning.
    missing = record.get("missing", {})
    beside += [f"{name} {reason.partition(':')[0]}" for name, reason in missing.items()]
    return (
        record["op"],
        record["backend"],
        "x".join(map(str, record["shape"])),
        size_of(record),
        f"{record['seconds']['median'] * 1e3:.2f}",
        "" if faster is None else f"{faster:.3g}",
        f"{record['gflops_per_second']:.1f}",
        f"{record['gbytes_per_second']:.2f}",
        ", ".join(beside),
    )
