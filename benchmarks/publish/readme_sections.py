"""Sections of README.md and docs/findings.md that come from results files, between marks."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable

from pyflocality.backends.report import backend_table

from . import quality_tables
from .report_figures import CAPTIONS
from .results_files import NOT_MEASURED, Results, cpu_results, latest

_COMMENT = "<!-- {edge} of {name}: python -m benchmarks.report --readme {page} -->"

Section = Callable[[list[Results]], str]

# Figures of the summary that the README shows; those of libraries where they ran.
_FIGURES = (
    "PCA locality, sum of 10 steps: seconds",
    "PCA locality, sum of 10 steps: times faster than eager einsum",
    "PCA locality, sum of 10 steps: time over matmuls of the schedule's multiply-adds",
    "local score, window 7: times faster than eager unfold of patches",
    "local score, window 7: times faster than eager unfold of differences",
    "local score: slowest window over fastest",
    "equivariant, window 7: times faster than eager convolution",
    "patch set, window 7: time over the local score's",
    "optimal, B = 8: times faster than eager",
    "covariance, exact: times faster than torch.cov of float32",
    "masked_posterior_jvp, t = 400: time with 8 tangents over time without",
)
_LIBRARY_FIGURES = (
    "PCA locality, t = 400: times faster than torch.compile of eager",
    "local score, window 7: times faster than torch.compile of eager unfold of differences",
    "equivariant, window 7: times faster than torch.compile of eager convolution",
    "optimal, B = 8: times faster than torch.compile of eager",
    "optimal, B = 8: times faster than torch's attention",
    "optimal, B = 8: times faster than KeOps",
    "nearest image: times faster than faiss",
)


def speed_section(results: list[Results]) -> str:
    """What was measured, the table of figures, and the picture.

    Raises:
        FileNotFoundError: There is no results file of the CPU suite.
        ValueError: A figure is not in it.
    """
    found = cpu_results(results)
    report, name = found.report, f"benchmarks/results/{found.path.name}"
    machine, data = report["machine"], report["data"]
    sets = machine["instruction_sets"]
    measured = {entry["what"]: entry["value"] for entry in report["summary"]}
    absent = [figure for figure in _FIGURES if figure not in measured]
    if absent:
        raise ValueError(f"{found.path}: the summary has no figure {absent[0]!r}")
    told = _filled(
        f"{data['name']}, {data['images']:,} images {'x'.join(map(str, data['shape']))}, B = 8 "
        f"noisy images, on {machine['cores']} cores of {machine['cpu']}"
        f"{f' ({sets[0]})' if sets else ''}, measured on {report['date'][:10]} by "
        f"`{found.command.replace(name, 'results.json')}`. Every case is checked against the "
        "reference in float64 before it is timed, and takes turns with its yardstick; all figures "
        f"are in [the results file]({name})."
    )
    figures = [one for one in (*_FIGURES, *_LIBRARY_FIGURES) if one in measured]
    rows = [f"| {figure} | {measured[figure]:.3g} |" for figure in figures]
    lines = [told, "", "| figure | measured |", "|---|---|", *rows]
    if "" in found.pictures:
        picture = found.pictures[""].name
        lines += ["", f"![Seconds a call as sizes grow](benchmarks/results/{picture})"]
    gpu = latest(results, "gpu", on_gpu=True)
    told = NOT_MEASURED if gpu is None else f"[results file](benchmarks/results/{gpu.path.name})"
    return "\n".join([*lines, "", f"GPUs: {told}."])


def _of(results: list[Results], kind: str, of: str) -> Results | None:
    """The newest file of a kind for a set of images, which its name begins with."""
    return latest([one for one in results if one.path.stem.startswith(f"{kind}-{of}")], kind)


def _quality(of: str = "mnist", *, picture: bool = True) -> Section:
    """A section with the models against the first network, in short; pictures in colour are large.

    Args:
        of: The set.
        picture: Whether to show the samples.
    """

    def section(results: list[Results]) -> str:
        from ..reproduce.scores import shown
        from ..reproduce.table import label_of

        found = _of(results, "reproduce", of)
        if found is None:
            return f"Quality against trained networks: {NOT_MEASURED}."
        report, name = found.report, f"benchmarks/results/{found.path.name}"
        first = report["networks"][0]["name"]
        told = (
            f"{report['data']['name']}, {report['settings']['samples']} images of each model from "
            f"the same noise in {len(report['settings']['timesteps'])} DDIM steps, against those "
            "of a small U-Net: mean ± standard error. The second network differs from the first "
            "in its seed alone. [The findings](docs/findings.md) have the whole table, how long "
            f"the networks were trained, and what it means; [results file]({name})."
        )
        lines = [_filled(told), "", "| model | MSE | r2 | r2 of all steps | s / step |"]
        lines.append("|---|---|---|---|---|")
        for row in report["table"]:
            one = row["against"].get(first)
            if one is None:
                continue
            mse, r2 = one["mse"], one["r2"]
            cells = [label_of(row, report), shown(mse["final"], 4), shown(r2["final"], 3)]
            cells += [shown(r2["all_steps"], 3), f"{row['seconds_per_step']:.3g}"]
            lines.append("| " + " | ".join(cells) + " |")
        # The others are on the report's page.
        if picture and "samples" in found.pictures:
            file = found.pictures["samples"].name
            lines += ["", f"![{CAPTIONS['samples']}](benchmarks/results/{file})"]
        return "\n".join(lines)

    return section


def _table(of: str = "mnist") -> Section:
    """A section with the whole table of models, as `pyflocality reproduce` writes it."""

    def section(results: list[Results]) -> str:
        from ..reproduce.table import markdown

        found = _of(results, "reproduce", of)
        if found is None:
            return f"Table of models against networks: {NOT_MEASURED}."
        head, rows, tail = markdown(found.report).strip().split("\n\n")
        told = f"`{found.command}`, [results file](benchmarks/results/{found.path.name})."
        paragraphs = [_filled(head), rows, _filled(tail), _filled(told)]
        for name in ("steps", "samples"):
            if name in found.pictures:
                picture = found.pictures[name].name
                paragraphs.append(f"![{CAPTIONS[name]}](benchmarks/results/{picture})")
        return "\n\n".join(paragraphs)

    return section


def _filled(text: str) -> str:
    """A paragraph in lines of at most 100 characters, links and words whole."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _study(
    kind: str, table: Callable[[dict], str], picture: str = "", *, of: str = "mnist"
) -> Section:
    """A section with a table of a study beside networks, and its picture of a name."""

    def section(results: list[Results]) -> str:
        found = _of(results, kind, of)
        if found is None:
            return f"{kind.capitalize()}: {NOT_MEASURED}."
        note, _, rows = table(found.report).partition("\n\n")
        told = f"`{found.command}`, [results file](benchmarks/results/{found.path.name})."
        lines = [_filled(note), "", rows, "", _filled(told)]
        if picture in found.pictures:
            caption = CAPTIONS.get(picture, picture) or kind.capitalize()
            lines += ["", f"![{caption}](benchmarks/results/{found.pictures[picture].name})"]
        return "\n".join(lines)

    return section


_SECTIONS: dict[str, Section] = {
    "backends": lambda results: backend_table(),
    "speed": speed_section,
    "quality": _quality(),
    "quality_cifar10": _quality("cifar10", picture=False),
    "table": _table(),
    "table_cifar10": _table("cifar10"),
    "sweeps": _study("sweeps", quality_tables.sweeps),
    "sweeps_cifar10": _study("sweeps", quality_tables.sweeps, of="cifar10"),
    "diagnosis": _study("sweeps", quality_tables.diagnosis, "why"),
    "diagnosis_cifar10": _study("sweeps", quality_tables.diagnosis, "why", of="cifar10"),
    "masks": _study("sweeps", quality_tables.masks, "samples"),
    "masks_cifar10": _study("sweeps", quality_tables.masks, "samples", of="cifar10"),
    "fields": _study("fields", quality_tables.fields),
    "fields_cifar10": _study("fields", quality_tables.fields, of="cifar10"),
    "denoising": _study("denoising", quality_tables.denoising),
    "denoising_cifar10": _study("denoising", quality_tables.denoising, of="cifar10"),
    "pattern": _study("pattern", quality_tables.pattern, of=""),
}


def rewritten(text: str, results: list[Results]) -> str:
    """A page with its marked sections as the results files have them; the rest as it is.

    Links of a page in a folder of the repository lead back to its root.

    Raises:
        FileNotFoundError: A section's results file is not there.
        ValueError: No section is marked, or one has not one beginning and one end, in this order.
    """
    pages = set(re.findall(_COMMENT.format(edge="(?:Begin|End)", name=r"\w+", page=r"(\S+)"), text))
    if len(pages) > 1:
        raise ValueError(f"expected marks of one page, got {', '.join(sorted(pages))}")
    page = next(iter(pages), "README.md")
    back = "](" + "../" * page.count("/") + "benchmarks/results/"
    marked = False
    for name, section in _SECTIONS.items():
        start, end = (_COMMENT.format(edge=edge, name=name, page=page) for edge in ("Begin", "End"))
        counts = text.count(start), text.count(end)
        if counts == (0, 0):
            continue
        marked = True
        between = re.compile(f"{re.escape(start)}\n.*?{re.escape(end)}", re.DOTALL)
        if counts != (1, 1) or between.search(text) is None:
            raise ValueError(f"{page}: expected one {start!r} and after it one {end!r}")
        body = f"{start}\n{section(results).replace('](benchmarks/results/', back)}\n{end}"
        before, after = between.split(text)
        text = before + body + after
    if not marked:
        start = _COMMENT.format(edge="Begin", name="speed", page=page)
        raise ValueError(f"{page}: expected a section marked {start!r}")
    return text
