"""`pyflocality pack`: a source decoded once into memory-mapped bytes."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from pyflocality._support.streams import answer, listed
from pyflocality.cli._errors import reported
from pyflocality.cli._groups import IMAGES
from pyflocality.cli._options import ReadingOptions, TellingOptions, parse_resolution


@reported()
def pack(
    *,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder or .zip of images, a .tar or a folder of .tar shards (webdataset), a "
            "folder with a saved dataset or parquet files of the library `datasets`.",
            show_default=False,
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    reading: ReadingOptions,
    image_column: Annotated[
        str | None,
        typer.Option(
            help="Column of images of a dataset that has several.", rich_help_panel=IMAGES
        ),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            help="Column of classes of a dataset that has several, such as fine_label.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    sort_by_label: Annotated[
        bool,
        typer.Option(
            "--sort-by-label", help="Bring the images of a class together, to be used by class."
        ),
    ] = False,
    telling: TellingOptions,
) -> None:
    """Decode a big set once, into a folder that every other command maps into memory.

    Run it again after an interruption or a full disk: it goes on behind what is finished. A
    finished set is compared with its checksums.
    """
    from pyflocality import packing
    from pyflocality.sources.packed import read_manifest

    start = time.perf_counter()
    folder = packing.pack(
        source,
        out,
        resolution=parse_resolution(reading.resolution),
        channels=reading.channels,
        split=reading.split,
        image_column=image_column,
        label_column=label_column,
        sort_by_label=sort_by_label,
        progress=telling.progress,
    )
    manifest = read_manifest(folder)
    seconds = time.perf_counter() - start
    if telling.as_json:
        names = ("name", "shape", "bytes", "label_names")
        record = {name: manifest[name] for name in names} | {"seconds": round(seconds, 4)}
        answer(json.dumps(record, indent=2), only_here=True)
        return
    count, *shape = manifest["shape"]
    size = "x".join(map(str, shape))
    answer(
        f"{count:,} images {size}, {manifest['bytes'] / 1e9:.2f} GB in {seconds:.1f} s: "
        f"{listed([folder])}",
        only_here=False,
    )
