"""`pyflocality moments`: mean and covariance of a set of images."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyflocality._support.memory import ignoring_memory, peak_memory_bytes
from pyflocality._support.paths import checked_path
from pyflocality._support.record import software
from pyflocality._support.streams import answer, listed
from pyflocality.cli._errors import reported
from pyflocality.cli._foreseen import hold_moments
from pyflocality.cli._options import IgnoreMemory, ResultOptions, SourceOptions, given_path
from pyflocality.cli._work import complete_moments, working

if TYPE_CHECKING:
    from PIL import Image

    from pyflocality import Moments

_LEADING = (1, 10, 100)
_DRAWN = 15


@reported()
def moments(
    *,
    source: SourceOptions,
    out: Annotated[
        str,
        typer.Option(
            metavar="PATH", help="File to write, in safetensors format.", show_default=False
        ),
    ],
    picture: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Also draw the mean and the leading eigenvectors into this PNG file.",
        ),
    ] = None,
    ignore_memory: IgnoreMemory = False,
    results: ResultOptions,
) -> None:
    """Compute mean and covariance of a set, once, for `generate --moments`.

    Exact for 8-bit images: the same for every order of the images.
    """
    file, drawing = checked_path(out, "out"), given_path(picture, "picture")
    if drawing is not None and drawing.suffix.lower() != ".png":
        raise ValueError(f"`picture` must end in .png, got {picture!r}")
    if drawing is not None and os.path.realpath(drawing) == os.path.realpath(file):
        raise ValueError(f"`picture` must be another file than `out`, got {picture!r} twice")
    source.check()
    files = [file] if drawing is None else [file, drawing]
    with (
        ignoring_memory(ignore_memory),
        working("moments", files, results, asdict(source), files) as work,
    ):
        with work.stages("load", f"loading {source.source}"):
            data = source.load(progress=results.progress)
        hold_moments(data)
        computed = complete_moments(data, None, work.stages)
        computed.save(work.temporary(file), force=True)
        if drawing is not None:
            draw_moments(computed).save(work.temporary(drawing))
        work.commit()
    record = summary(computed) | {
        "source": source.source,
        "backends": sorted({backend for _, backend in work.backends}),
        "seconds": work.stages.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "software": software(),
        "files": [str(path) for path in files],
    }
    text = json.dumps(record, indent=2) if results.as_json else _table(record)
    answer(text, only_here=results.as_json)


def summary(moments: Moments) -> dict[str, Any]:
    """Number and shape of the images, total variance and the share of the leading components."""
    values = moments.eigh().values
    total = float(values.sum())
    leading = [count for count in _LEADING if count <= len(values)]
    return {
        "images": moments.count,
        "image_shape": list(moments.image_shape),
        "mean": float(moments.mean.mean()),
        "total_variance": total,
        "rank": int((values > 0).sum()),
        # Images that are all alike have no variance to share.
        "variance_share": {
            str(count): float(values[:count].sum()) / total if total > 0 else None
            for count in leading
        },
    }


def draw_moments(moments: Moments) -> Image.Image:
    """The mean image, and the leading eigenvectors, each scaled to fill [-1, 1] around grey."""
    from pyflocality import pictures

    vectors = moments.eigh().vectors[:, :_DRAWN].T
    vectors = vectors / vectors.abs().amax(1, keepdim=True)
    mean, vectors = moments.mean[None], vectors.reshape(-1, *moments.image_shape)
    rows = [("mean", mean)]
    for start in range(0, len(vectors), 5):
        part = vectors[start : start + 5]
        rows.append((f"eigenvectors {start + 1} to {start + len(part)}", part))
    return pictures.captioned_rows(rows)


def _table(record: dict[str, Any]) -> str:
    shape = "x".join(map(str, record["image_shape"]))
    lines = [
        f"images          {record['images']:,} of {shape}",
        f"mean value      {record['mean']:.4f}",
        f"total variance  {record['total_variance']:.4f} (rank {record['rank']:,})",
    ]
    for count, share in record["variance_share"].items():
        told = "-" if share is None else f"{share:.2%}"
        lines.append(f"  leading {count:>3}   {told}")
    lines.append(f"written to {listed(record['files'])}")
    return "\n".join(lines)
