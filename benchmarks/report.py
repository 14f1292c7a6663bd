"""A static page, and sections of pages, from committed results files and nothing else.

    python -m benchmarks.report --out DIR
    python -m benchmarks.report --readme README.md
    python -m benchmarks.report --readme docs/findings.md

The first writes DIR/index.html with its pictures and the results files it is made of: speed-ups
against every baseline, the roofline, scaling curves, the studies, and the table of models against
trained networks. The others rewrite what stands between the marks of a page, and nothing else.
"""

from __future__ import annotations

import argparse
import html
import importlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from .command import Record, path_option
from .publish import quality_tables
from .publish.plots import draw
from .publish.readme_sections import rewritten
from .publish.report_figures import (
    BASELINES,
    CAPTIONS,
    baselines_of,
    compared,
    draw_roofline,
    draw_speedups,
    missing_of,
)
from .publish.results_files import (
    BESIDE_NETWORKS,
    FOLDER,
    NOT_MEASURED,
    Results,
    cpu_results,
    latest,
    read_results,
)
from .publish.summary import size_of

_TABLES = {
    "sweeps": (quality_tables.sweeps, quality_tables.diagnosis, quality_tables.masks),
    "denoising": (quality_tables.denoising,),
    "fields": (quality_tables.fields,),
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums }
td, th { padding: 0.2rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
figure { margin: 1.5rem 0 } img { max-width: 100% }
figcaption, .origin { color: #555; font-size: 0.8rem }
.scroll { overflow-x: auto }
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what the command line asks for; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.out is None and options.readme is None:
        parser.error("--out or --readme is required")
    page = None if options.out is None else options.out / "index.html"
    if page is not None and page.exists() and not options.force:
        parser.error(f"{page} is there already; --force replaces it")
    try:
        results = read_results(options.results)
        if options.readme is not None:
            text = options.readme.read_text(encoding="utf-8")
            options.readme.write_text(rewritten(text, results), encoding="utf-8")
            print(f"written: {options.readme}")
        if page is not None:
            write_page(results, options.out)
            print(f"written: {page}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


def write_page(results: list[Results], out: Path) -> None:
    """Write the page, its pictures and the results files into a folder, made if need be.

    Raises:
        FileNotFoundError: There is no results file of the CPU suite.
    """
    cpu = cpu_results(results)
    (out / "results").mkdir(parents=True, exist_ok=True)
    records = cpu.report["results"]
    draw_speedups(records, out / "speedups.png")
    draw_roofline(cpu.report, out / "roofline.png")
    scaling = draw(cpu.path, out / "scaling.png")
    roofs = "" if "rates" in cpu.report else " This file has no rates of the machine."
    parts = [
        "<h2>Speed-ups</h2>",
        _speed_table(cpu),
        _figure("speedups.png", "Times faster than each baseline of the same run.", cpu),
        "<h2>Roofline</h2>",
        _figure("roofline.png", f"Kernels of 8-bit integers may pass a float32 roof.{roofs}", cpu),
        "<h2>Scaling</h2>",
        "" if scaling is None else _figure("scaling.png", "Seconds a call as sizes grow.", cpu),
        "<h2>GPU</h2>",
        _gpu_table(records, latest(results, "gpu", on_gpu=True)),
        "<h2>Quality against trained networks</h2>",
        *_quality(results, out),
        "<h2>Studies</h2>",
        *_studies(results, out),
        "<h2>Results files</h2>",
        *map(_origin, results),
    ]
    for one in results:
        shutil.copyfile(one.path, out / "results" / one.path.name)
    page = "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>pyflocality: measurements</title>\n<style>{_STYLE}</style>",
            "<h1>pyflocality: measurements</h1>",
            "<p>Made of the results files alone; each table and picture names its own.</p>",
            *parts,
            "</html>\n",
        ]
    )
    (out / "index.html").write_text(page, encoding="utf-8")


def _speed_table(cpu: Results) -> str:
    """Cases with a baseline: time, and times faster than each."""
    records = compared(cpu.report["results"])
    shape = "x".join(map(str, cpu.report["data"]["shape"]))
    rows = []
    for record in records:
        beside, missing = baselines_of(record), missing_of(record)
        cells = [
            f"{record['op']} ({record['backend']})",
            "x".join(map(str, record["shape"])) if "shape" in record else shape,
            size_of(record),
            f"{record['seconds']['median'] * 1e3:.3g}",
        ]
        for family in BASELINES:
            told = beside.get(family)
            # The whole reason is in the results file.
            reason = missing.get(family, "").partition(":")[0]
            cells.append(reason if told is None else f"{told['ratio']['median']:.3g}")
        rows.append(cells)
    head = ["operation", "images", "case", "ms", *BASELINES.values()]
    note = (
        "Times faster than each baseline, which ran in turns with the case; of several kinds of "
        "the same baseline the fastest. Empty: does not apply."
    )
    return f"<p>{note}</p>\n{_table(head, rows)}\n{_origin(cpu)}"


def _gpu_table(records: Sequence[Record], gpu: Results | None) -> str:
    """The GPU suite's cases, or that they are not yet measured."""
    if gpu is None:
        ops = dict.fromkeys(record["op"] for record in records)
        return _table(["operation", "H100, H200"], [[op, NOT_MEASURED] for op in ops])
    rows = []
    for record in gpu.report["results"]:
        if record["status"] != "ok":
            rows.append([record["id"], record["status"], ""])
            continue
        beside = ", ".join(
            f"{name} {mark['ratio']['median']:.3g}"
            for name, mark in record["yardsticks"].items()
            if "ratio" in mark
        )
        rows.append([record["id"], f"{record['seconds']['median'] * 1e3:.3g}", beside])
    return _table(["case", "ms", "times faster than"], rows) + _origin(gpu)


def _quality(results: list[Results], out: Path) -> list[str]:
    """Every table that `pyflocality reproduce` wrote, then the studies beside networks."""
    from .reproduce.table_text import markdown

    tables = [one for one in results if one.kind == "reproduce"]
    parts = [] if tables else [f"<p>Table of models against networks: {NOT_MEASURED}.</p>"]
    for one in tables:
        parts += [_title(one.path.stem), _from_markdown(markdown(one.report))]
        parts += [_origin(one), *_pictures(one, out)]
    for kind in BESIDE_NETWORKS:
        module = importlib.import_module(f".reproduce.{kind}", __package__)
        shows = (module.__doc__ or "").partition("\n")[0]
        for one in (one for one in results if one.kind == kind):
            parts += [_title(one.path.stem), f"<p>{html.escape(shows)}</p>"]
            parts += [_from_markdown(table(one.report)) for table in _TABLES[kind]]
            parts += [_origin(one), *_pictures(one, out)]
    return parts


def _studies(results: list[Results], out: Path) -> list[str]:
    """Pictures of everything else."""
    parts = []
    for one in results:
        if one.kind not in ("cpu", "gpu", "reproduce", *BESIDE_NETWORKS):
            title = str(one.report.get("title", one.kind))
            parts += [_title(title), *(_pictures(one, out) or [_origin(one)])]
    return parts


def _title(text: str) -> str:
    return f"<h3>{html.escape(text)}</h3>"


def _pictures(one: Results, out: Path) -> list[str]:
    """The pictures beside a results file, copied."""
    parts = []
    for name, path in one.pictures.items():
        shutil.copyfile(path, out / path.name)
        caption = CAPTIONS.get(name, name)
        parts.append(_figure(path.name, f"{caption}." if caption else "", one))
    return parts


def _figure(name: str, caption: str, one: Results) -> str:
    told = f"<figcaption>{html.escape(caption)} {_told(one)}</figcaption>"
    alt = html.escape(caption or one.kind)
    return f'<figure><img src="{html.escape(name)}" alt="{alt}">\n{told}</figure>'


def _origin(one: Results) -> str:
    return f'<p class="origin">{_told(one)}</p>'


def _told(one: Results) -> str:
    """Where figures come from: file, machine, date, commit, command."""
    name = html.escape(one.path.name)
    return (
        f'<a href="results/{name}">{name}</a>; {html.escape(one.origin())}; '
        f"<code>{html.escape(one.command)}</code>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [_row("th", head), *(_row("td", row) for row in rows)]
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _from_markdown(text: str) -> str:
    """Paragraphs and tables."""
    parts = []
    for block in text.strip().split("\n\n"):
        if not block.startswith("|"):
            parts.append(f"<p>{html.escape(block)}</p>")
            continue
        head, _, *rows = (
            [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()
        )
        parts.append(_table(head, rows))
    return "\n".join(parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="Report from committed results files."
    )
    parser.add_argument("--out", type=path_option, help="folder for the page")
    parser.add_argument("--force", action="store_true", help="replace the page where it exists")
    parser.add_argument("--readme", type=path_option, help="page to rewrite between its marks")
    parser.add_argument(
        "--results", type=path_option, default=FOLDER, help="folder of the results files"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
