"""Tables of what large images and long jobs take, from the results of `benchmarks.large_images`."""

from __future__ import annotations

from collections.abc import Iterator

from ..command import Record
from .results_files import NOT_MEASURED

PARTS = {
    "pngs": "2,000 files, eight samples in ten steps",
    "many": "15,000 images, eight samples in ten steps",
    "cached": "packed, all masks cached, eight samples",
    "side-128": "2,000 images, eight samples in ten steps",
    "side-256": "200 images, one step of one sample",
}


def reached(report: Record) -> str:
    """What each part took, beside the most that it is meant to."""
    lines = ["| job | figure | measured | at most |", "|---|---|---|---|"]
    for name, told in PARTS.items():
        part = report["parts"].get(name)
        if part is None:
            lines.append(f"| {told} | | {NOT_MEASURED} | |")
            continue
        job = f"{'x'.join(map(str, part['shape']))}: {told}"
        if "set" in part:
            job += f" ({part['set']})"
        for bar in part["bars"]:
            # The whole of what a bar is called, and its unit.
            what, unit = bar["what"], " s"
            if "bytes" in what:
                what, unit = what.replace("bytes", "memory"), " GB"
            scale = 1e9 if unit == " GB" else 1.0
            values = (f"{_told(bar[key] / scale)}{unit}" for key in ("value", "most"))
            lines.append(f"| {job} | {what} | " + " | ".join(values) + " |")
    return "\n".join([*lines, *_beside(report["parts"].get("many"))])


def _told(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _beside(many: Record | None) -> Iterator[str]:
    """A step of an image, beside the published one, and what differs."""
    if many is None:
        return
    here, there = many["beside"]["here"], many["beside"]["published"]
    yield ""
    yield "| set | samples | s / step | s / step and sample | machine | aggregation |"
    yield "|---|---|---|---|---|---|"
    for one in (here, there):
        yield (
            f"| {one['set']} | {one['samples']} | {one['seconds_per_step']:.3g} | "
            f"{one['seconds_per_step_and_image']:.3g} | {one['machine']} | {one['aggregation']} |"
        )
    yield ""
    yield "What differs: " + "; ".join(many["beside"]["differs"]) + "."


def foreseen(report: Record) -> str:
    """What the planner foresees beside what was measured."""
    part = report["parts"].get("foreseen")
    if part is None:
        return f"The planner beside measurements: {NOT_MEASURED}."
    lines = ["| set | stage | foreseen | measured | memory foreseen | memory measured |"]
    lines.append("|---|---|---|---|---|---|")
    for size in part["sizes"]:
        job = f"{size['images']:,} x {'x'.join(map(str, size['shape']))}"
        for one in size["stages"]:
            seconds = (f"{_told(one[f'{kind}_seconds'])} s" for kind in ("foreseen", "measured"))
            memory = (f"{one[f'{kind}_bytes'] / 1e9:.2f} GB" for kind in ("foreseen", "measured"))
            lines.append(f"| {job} | {one['name']} | " + " | ".join([*seconds, *memory]) + " |")
    return "\n".join(lines)


def ways(report: Record) -> str:
    """How many entries of masks differ between the ways of making them."""
    part = report["parts"].get("ways")
    if part is None:
        return f"Masks by all ways: {NOT_MEASURED}."
    lines = ["| set | entries of a mask | most that differ | agree |", "|---|---|---|---|"]
    for one in part["sets"]:
        job = f"{one['images']:,} x {'x'.join(map(str, one['shape']))}"
        pairs = "; ".join(f"{pair}: {n}" for pair, n in one["most_different_entries"].items())
        agree = "yes" if one["agree"] else "NO"
        lines.append(f"| {job} | {one['entries']:,} | {pairs} | {agree} |")
    return "\n".join(lines)
