"""`pyflocality plan`: what a step would cost, before anything is decoded or scanned."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import typer

from pyflocality._support.streams import answer
from pyflocality.cli._errors import reported
from pyflocality.cli._options import MemoryBudget, TellingOptions


@reported()
def plan(
    *,
    images: Annotated[int, typer.Option(help="Training images.", show_default=False)],
    shape: Annotated[
        str,
        typer.Option(help="Channels, height and width, such as 3x64x64.", show_default=False),
    ],
    batch: Annotated[int, typer.Option(help="Images made at a time.")] = 1,
    device: Annotated[
        str,
        typer.Option(
            help="cpu measures how long a step takes here; of a100, h100 and h200 costs are told."
        ),
    ] = "cpu",
    memory_budget: MemoryBudget = None,
    mask_share: Annotated[
        float,
        typer.Option(
            help="Share of an image's values that pca-locality adds up for each of them, up to "
            "0.5; masks of neighbours share most of their sums. CIFAR-10's mean by default."
        ),
    ] = 0.022,
    telling: TellingOptions,
) -> None:
    """Tell what one denoising step of every model costs: operations, bytes, time and memory."""
    from dataclasses import asdict

    from pyflocality._support.budget import memory_budget_bytes
    from pyflocality._support.checks import check_choice, check_count
    from pyflocality._support.progress import progress_bar
    from pyflocality.planner import Setting, cost_of, models, seconds_of

    memory_budget_bytes(memory_budget)
    check_choice(device, "device", ("cpu", "a100", "h100", "h200"))
    setting = Setting(
        check_count(images, "images"),
        _parse_shape(shape),
        check_count(batch, "batch"),
        memory_budget,
        _checked_share(mask_share),
    )
    measures = telling.progress and device == "cpu"
    planned = progress_bar(models(), description="measuring", enabled=measures)
    record: dict[str, Any] = {
        "images": images,
        "shape": list(setting.shape),
        "batch": batch,
        "device": device,
        "mask_share": mask_share,
        "set_bytes": images * setting.values,
        "models": {
            model: asdict(cost_of(model, setting))
            | {"seconds": seconds_of(model, setting) if device == "cpu" else None}
            for model in planned
        },
    }
    answer(json.dumps(record, indent=2) if telling.as_json else _table(record), only_here=True)


def _checked_share(share: float) -> float:
    if not 0 < share <= 0.5:
        raise ValueError(f"`mask_share` must be above 0 and at most 0.5, got {share:g}")
    return share


def _parse_shape(text: str) -> tuple[int, int, int]:
    """Channels, height and width of "3x64x64"."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ValueError(f"`shape` must be CxHxW such as 3x64x64, got {text!r}")
    return int(match[1]), int(match[2]), int(match[3])


def _table(record: dict[str, Any]) -> str:
    from pyflocality._support.text import bytes_told
    from pyflocality.planner import WINDOW

    size = "x".join(map(str, record["shape"]))
    lines = [
        f"{record['images']:,} images {size}: {bytes_told(record['set_bytes'])}; "
        f"one step for {record['batch']:,} noisy images",
        f"{'model':<14}{'operations':>13}{'bytes':>11}{'scans':>7}{'memory':>11}{'time':>12}",
    ]
    for model, cost in record["models"].items():
        told = "not measured" if cost["seconds"] is None else f"{cost['seconds']:.3g} s"
        lines.append(
            f"{model:<14}{cost['flops'] / 1e9:>10,.1f} G  {bytes_told(cost['bytes']):>10}"
            f"{cost['scans']:>7}{bytes_told(cost['working_bytes']):>11}{told:>13}"
        )
    lines.append(
        f"Windows of {WINDOW} pixels or of the image; masks of pca-locality whose sums take "
        f"{record['mask_share']:.3g} of an image's values each (--mask-share), where CIFAR-10's "
        "take 0.022 on average over ten steps. Memory is beside the images, at most."
    )
    if record["device"] == "cpu":
        lines.append("Time is measured here on a few images in memory, and extrapolated.")
    else:
        lines.append(f"Time not measured on this device: {record['device']}.")
    return "\n".join(lines)
