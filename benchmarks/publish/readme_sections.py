"""Sections of README.md and docs/findings.md that come from results files, between marks."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from functools import partial

from pyflocality.backends.report import backend_table

from ..command import Record
from . import large_tables, quality_tables
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
    result = cpu_results(results)
    report, name = result.report, f"benchmarks/results/{result.path.name}"
    machine, data = report["machine"], report["data"]
    sets = machine["instruction_sets"]
    measured = {entry["what"]: entry["value"] for entry in report["summary"]}
    absent = [figure for figure in _FIGURES if figure not in measured]
    if absent:
        raise ValueError(f"{result.path}: the summary has no figure {absent[0]!r}")
    told = _filled(
        f"{data['name']}, {data['images']:,} images {'x'.join(map(str, data['shape']))}, B = 8 "
        f"noisy images, on {machine['cores']} cores of {machine['cpu']}"
        f"{f' ({sets[0]})' if sets else ''}, measured on {report['date'][:10]} by "
        f"`{result.command.replace(name, 'results.json')}`. Every case is checked against the "
        "reference in float64 before it is timed, and takes turns with its yardstick; all figures "
        f"are in [the results file]({name})."
    )
    figures = [one for one in (*_FIGURES, *_LIBRARY_FIGURES) if one in measured]
    rows = [f"| {figure} | {measured[figure]:.3g} |" for figure in figures]
    lines = [told, "", "| figure | measured |", "|---|---|", *rows]
    if "" in result.pictures:
        picture = result.pictures[""].name
        lines += ["", f"![Seconds a call as sizes grow](benchmarks/results/{picture})"]
    gpu = latest(results, "gpu", on_gpu=True)
    told = NOT_MEASURED if gpu is None else f"[results file](benchmarks/results/{gpu.path.name})"
    return "\n".join([*lines, "", f"GPUs: {told}."])


def _beside_networks(
    kind: str, body: Callable[[Results], str], what: str = "", *, of: str = "mnist"
) -> Section:
    """A section of the newest results of a kind for a set; `what` is named where there are none."""

    def section(results: list[Results]) -> str:
        of_set = [one for one in results if one.path.stem.startswith(f"{kind}-{of}")]
        result = latest(of_set, kind)
        missing = f"{what or kind.capitalize()}: {NOT_MEASURED}."
        return missing if result is None else body(result)

    return section


def _file_of(result: Results) -> str:
    return f"[results file](benchmarks/results/{result.path.name})"


def _picture_of(result: Results, name: str, caption: str = "") -> list[str]:
    """A picture beside a file as a paragraph of its own, where it is there."""
    if name not in result.pictures:
        return []
    caption = CAPTIONS.get(name, name) or caption
    return ["", f"![{caption}](benchmarks/results/{result.pictures[name].name})"]


def _filled(text: str) -> str:
    """A paragraph in lines of at most 100 characters, links and words whole."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _blocks_filled(text: str) -> str:
    """Paragraphs and tables, the lines of paragraphs filled."""
    blocks = text.strip().split("\n\n")
    return "\n\n".join(one if one.startswith("|") else _filled(one) for one in blocks)


def _quality(result: Results, *, picture: bool = True) -> str:
    """The models against the first network, in short; pictures in colour are large."""
    from ..reproduce.scores import shown
    from ..reproduce.table_text import label_of

    report = result.report
    first = report["networks"][0]["name"]
    told = (
        f"{report['data']['name']}, {report['settings']['samples']} images of each model from "
        f"the same noise in {len(report['settings']['timesteps'])} DDIM steps, against those "
        "of a small U-Net: mean ± standard error. The second network differs from the first "
        "in its seed alone. [The findings](docs/findings.md) have the whole table, how long "
        f"the networks were trained, and what it means; {_file_of(result)}."
    )
    lines = [_filled(told), "", "| model | MSE | r2 | r2 of all steps | s / step |"]
    lines.append("|---|---|---|---|---|")
    for row in report["table"]:
        if first not in row["against"]:
            continue
        mse, r2 = (row["against"][first][name] for name in ("mse", "r2"))
        cells = [label_of(row, report), shown(mse["final"], 4), shown(r2["final"], 3)]
        cells += [shown(r2["all_steps"], 3), f"{row['seconds_per_step']:.3g}"]
        lines.append("| " + " | ".join(cells) + " |")
    # The others are on the report's page.
    return "\n".join([*lines, *(_picture_of(result, "samples") if picture else [])])


def _table(result: Results) -> str:
    """The whole table of models, as `pyflocality reproduce` writes it."""
    from ..reproduce.table_text import markdown

    lines = [_blocks_filled(markdown(result.report)), ""]
    lines.append(_filled(f"`{result.command}`, {_file_of(result)}."))
    return "\n".join([*lines, *_picture_of(result, "steps"), *_picture_of(result, "samples")])


def _study(table: Callable[[Record], str], picture: str = "") -> Callable[[Results], str]:
    """What a section of a study beside networks holds: its table, and its picture of a name."""

    def body(result: Results) -> str:
        told = _filled(f"`{result.command}`, {_file_of(result)}.")
        drawn = _picture_of(result, picture, result.kind.capitalize())
        return "\n".join([_blocks_filled(table(result.report)), "", told, *drawn])

    return body


def _large(results: list[Results]) -> str:
    """What large images and long jobs take."""
    result = latest(results, "large_images")
    if result is None:
        return f"Large images and long jobs: {NOT_MEASURED}."
    machine, date = result.report["machine"], result.report["date"][:10]
    told = _filled(
        f"`{result.command}`, on {machine['cores']} cores of {machine['cpu']}, {date}, "
        f"{_file_of(result)}."
    )
    tables = (large_tables.reached, large_tables.foreseen, large_tables.ways)
    body = "\n\n".join(table(result.report) for table in tables)
    return "\n".join([told, "", body, *_picture_of(result, "", "Where time goes")])


def _sections() -> dict[str, Section]:
    """The sections by name."""
    models, whole = "Quality against trained networks", "Table of models against networks"
    small = partial(_quality, picture=False)
    result = {
        "backends": lambda results: backend_table(),
        "speed": speed_section,
        "large": _large,
        "quality": _beside_networks("reproduce", _quality, models),
        "quality_cifar10": _beside_networks("reproduce", small, models, of="cifar10"),
        "pattern": _beside_networks("pattern", _study(quality_tables.pattern), of=""),
    }
    for name, kind, body, what in (
        ("table", "reproduce", _table, whole),
        ("sweeps", "sweeps", _study(quality_tables.sweeps), ""),
        ("diagnosis", "sweeps", _study(quality_tables.diagnosis, "why"), ""),
        ("masks", "sweeps", _study(quality_tables.masks, "samples"), ""),
        ("fields", "fields", _study(quality_tables.fields), ""),
        ("denoising", "denoising", _study(quality_tables.denoising), ""),
    ):
        result[name] = _beside_networks(kind, body, what)
        result[f"{name}_cifar10"] = _beside_networks(kind, body, what, of="cifar10")
    return result


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
    for name, section in _sections().items():
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
