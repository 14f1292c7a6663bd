"""`pyflocality moments`: mean and covariance of a set of images."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyflocality._support.memory import check_memory, ignoring_memory, peak_memory_bytes
from pyflocality._support.paths import checked_path
from pyflocality._support.record import software
from pyflocality._support.streams import answer, listed
from pyflocality.cli._errors import reported
from pyflocality.cli._foreseen import hold_moments
from pyflocality.cli._options import IgnoreMemory, ResultOptions, SourceOptions, given_path
from pyflocality.cli._work import Work, components_of, moments_of, working

if TYPE_CHECKING:
    from PIL import Image

    from pyflocality import Basis, TrainingSet

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
    """Compute mean, covariance and principal components of a set, once, for `generate --moments`.

    Exact for 8-bit images: the same for every order of the images. The components go into a second
    file, NAME.basis.SUFFIX beside NAME.SUFFIX. Of fewer images than values whose covariance the
    memory cannot hold, they are all that is written, into the first.
    """
    from pyflocality.moments.basis import basis_method
    from pyflocality.moments.files import basis_file

    file, drawing = checked_path(out, "out"), given_path(picture, "picture")
    if drawing is not None and drawing.suffix.lower() != ".png":
        raise ValueError(f"`picture` must end in .png, got {picture!r}")
    beside = basis_file(file)
    written = [os.path.realpath(path) for path in (file, beside)]
    if drawing is not None and os.path.realpath(drawing) in written:
        raise ValueError(f"`picture` must be another file than `out`, got {picture!r} twice")
    source.check()
    files = [file, beside] if drawing is None else [file, beside, drawing]
    with (
        ignoring_memory(ignore_memory),
        working("moments", files, results, asdict(source), files) as work,
    ):
        with work.stages("load", f"loading {source.source}"):
            data = source.load(progress=results.progress)
        thin = basis_method(len(data) * data.copies, data.num_values) == "gram"
        alone = thin and not _covariance_fits(data)
        if not thin:
            hold_moments(data)
        computed = _written(work, data, file, thin=thin, alone=alone)
        if alone:
            files.remove(beside)
        if drawing is not None:
            draw_moments(computed).save(work.temporary(drawing))
        work.commit()
    record = summary(computed) | {
        "source": source.source,
        "covariance": not alone,
        "backends": sorted({backend for _, backend in work.backends}),
        "seconds": work.stages.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "software": software(),
        "files": [str(path) for path in files],
    }
    text = json.dumps(record, indent=2) if results.as_json else _table(record)
    answer(text, only_here=results.as_json)


def _covariance_fits(data: TrainingSet) -> bool:
    """Whether there is memory for the moments of a set."""
    from pyflocality.moments.limits import totals_bytes

    try:
        check_memory(totals_bytes(data), "moments")
    except MemoryError:
        return False
    return True


def _written(work: Work, data: TrainingSet, file: Path, *, thin: bool, alone: bool) -> Basis:
    """Write moments and components, or these alone; the components."""
    from pyflocality.moments.basis import save_beside
    from pyflocality.moments.files import basis_file

    beside = basis_file(file)
    if alone:
        basis = components_of(data, work.stages)
        basis.save(work.temporary(file), force=True)
        work.leave_out(beside)
        return basis
    moments = moments_of(data, work.stages)
    moments.save(work.temporary(file), force=True)
    if thin:
        # What the components are made of is the images: room for them.
        del moments
        basis = components_of(data, work.stages)
    else:
        basis = components_of(moments, work.stages)
    save_beside(basis, work.temporary(file), work.temporary(beside))
    return basis


def summary(basis: Basis) -> dict[str, Any]:
    """Number and shape of the images, total variance and the share of the leading components."""
    values = basis.values
    total = float(values.sum())
    leading = [count for count in _LEADING if count <= len(basis.variance)]
    return {
        "images": basis.count,
        "image_shape": list(basis.image_shape),
        "mean": float(basis.mean.mean()),
        "total_variance": total,
        "rank": basis.rank,
        # Images that are all alike have no variance to share.
        "variance_share": {
            str(count): float(values[:count].sum()) / total if total > 0 else None
            for count in leading
        },
    }


def draw_moments(basis: Basis) -> Image.Image:
    """The mean image, and the leading eigenvectors, each scaled to fill [-1, 1] around grey."""
    from pyflocality import pictures

    vectors = basis.vectors[:, :_DRAWN].T
    vectors = vectors / vectors.abs().amax(1, keepdim=True)
    mean, vectors = basis.mean[None], vectors.reshape(-1, *basis.image_shape)
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
    if not record["covariance"]:
        lines.append("components alone: the memory cannot hold the covariance")
    lines.append(f"written to {listed(record['files'])}")
    return "\n".join(lines)
