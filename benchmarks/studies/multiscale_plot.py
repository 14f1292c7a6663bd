"""The picture of a results file of `benchmarks.multiscale`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_DOMAINS = {"pixel": "windows in the pixel domain", "wavelet": "windows in the wavelet domain"}


def draw(results: Path) -> Path:
    """Draw PSNR out against PSNR in, a line per window, and what small windows lose."""
    from matplotlib.figure import Figure

    report = json.loads(results.read_text(encoding="utf-8"))
    records = report["results"]
    figure = Figure(figsize=(15, 4.6 * len(records)), layout="constrained")
    rows = figure.subplots(len(records), 3, squeeze=False)
    for panels, record in zip(rows, records, strict=True):
        for panel, domain in zip(panels[:2], _DOMAINS, strict=True):
            _draw_domain(panel, report["psnr_in"], record, domain)
        panels[1].sharey(panels[0])
        _draw_drops(panels[2], report["psnr_in"], record)
    machine = report["machine"]
    figure.suptitle(
        f"{machine['cpu']}, {machine['cores']} cores; {report['date'][:10]}"
        + ("; QUICK: the numbers mean nothing" if report["quick"] else ""),
        fontsize=10,
    )
    picture = results.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    return picture


def _draw_domain(panel: Any, psnr_in: list[float], record: dict[str, Any], domain: str) -> None:
    from matplotlib import colormaps

    windows = list(record[domain])
    for number, window in enumerate(windows):
        colour = colormaps["viridis"](number / max(1, len(windows) - 1) * 0.9)
        label = f"window {window}"
        panel.plot(psnr_in, record[domain][window], color=colour, marker="o", ms=3, label=label)
    for name, values in record["yardsticks"].items():
        panel.plot(psnr_in, values, linestyle="--", linewidth=1, label=name)
    panel.set(xlabel="PSNR in (dB)", ylabel="PSNR out (dB)")
    panel.set_title(f"{record['name']}: {_DOMAINS[domain]}", fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=7)


def _draw_drops(panel: Any, psnr_in: list[float], record: dict[str, Any]) -> None:
    for domain, style in (("pixel", "-"), ("wavelet", "--")):
        best = [max(column) for column in zip(*record[domain].values(), strict=True)]
        for number, (window, row) in enumerate(list(record[domain].items())[:4]):
            lost = [top - own for top, own in zip(best, row, strict=True)]
            panel.plot(psnr_in, lost, style, color=f"C{number}", label=f"{domain}, window {window}")
    panel.set(xlabel="PSNR in (dB)", ylabel="dB below the domain's best window")
    panel.set_title("what small windows lose", fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=7)
