"""The picture of a results file of `benchmarks.multiscale`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..command import Record
from ..plotting import origin, picture

_DOMAINS = {"pixel": "windows in the pixel domain", "wavelet": "windows in the wavelet domain"}


def draw(report: Record, path: Path) -> None:
    """Draw PSNR out against PSNR in, a line per window, and what small windows lose."""
    records = report["results"]
    options: Record = {"figsize": (15, 4.6 * len(records)), "layout": "constrained"}
    with picture(path, len(records), 3, dpi=110, **options) as (figure, rows):
        for panels, record in zip(rows, records, strict=True):
            for panel, domain in zip(panels[:2], _DOMAINS, strict=True):
                _draw_domain(panel, report["psnr_in"], record, domain)
            panels[1].sharey(panels[0])
            _draw_drops(panels[2], report["psnr_in"], record)
            for panel in panels:
                panel.set_xlabel("PSNR in (dB)")
                panel.grid(alpha=0.3)
                panel.legend(frameon=False, fontsize=7)
        figure.suptitle(origin(report), fontsize=10)


def _draw_domain(panel: Any, psnr_in: list[float], record: Record, domain: str) -> None:
    from matplotlib import colormaps

    windows = list(record[domain])
    for number, window in enumerate(windows):
        colour = colormaps["viridis"](number / max(1, len(windows) - 1) * 0.9)
        label = f"window {window}"
        panel.plot(psnr_in, record[domain][window], color=colour, marker="o", ms=3, label=label)
    for name, values in record["yardsticks"].items():
        panel.plot(psnr_in, values, linestyle="--", linewidth=1, label=name)
    panel.set_ylabel("PSNR out (dB)")
    panel.set_title(f"{record['name']}: {_DOMAINS[domain]}", fontsize=10)


def _draw_drops(panel: Any, psnr_in: list[float], record: Record) -> None:
    for domain, style in (("pixel", "-"), ("wavelet", "--")):
        best = [max(column) for column in zip(*record[domain].values(), strict=True)]
        for number, (window, row) in enumerate(list(record[domain].items())[:4]):
            lost = [top - own for top, own in zip(best, row, strict=True)]
            panel.plot(psnr_in, lost, style, color=f"C{number}", label=f"{domain}, window {window}")
    panel.set(ylabel="dB below the domain's best window")
    panel.set_title("what small windows lose", fontsize=10)
