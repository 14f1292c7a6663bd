"""Options that several commands share, their checks, and the training set they describe."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyflocality._support.devices import parse_device
from pyflocality._support.paths import checked_path
from pyflocality.sources.layout import check_layout

if TYPE_CHECKING:
    from pyflocality import TrainingSet

# Headings of the options in the help.
IMAGES, MODEL, OUTPUT = "Training images", "Model", "Results"

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Training images: digits, photos, disks or c_alpha (builtin sets), a folder or .zip "
        "of images, a .npy or .npz file, MNIST idx files, a folder of CIFAR batches, a folder "
        "that `pyflocality pack` wrote.",
        show_default=False,
    ),
]
Resolution = Annotated[
    str | None,
    typer.Option(
        help="Bring all images to this size: 32, or 32x48 for height x width.",
        rich_help_panel=IMAGES,
    ),
]
Channels = Annotated[
    int | None, typer.Option(help="1 for grey, 3 for RGB.", rich_help_panel=IMAGES)
]
Split = Annotated[
    str | None,
    typer.Option(help="Part of a set that has parts: train, test, ...", rich_help_panel=IMAGES),
]
Layout = Annotated[
    str | None,
    typer.Option(
        help="How the axes of a .npy or .npz file are to be read: NCHW, NHWC or NHW.",
        rich_help_panel=IMAGES,
    ),
]
Label = Annotated[
    str | None,
    typer.Option(
        help="Use the images of one class alone: its name or number.", rich_help_panel=IMAGES
    ),
]
Device = Annotated[
    str, typer.Option(help="cpu, or cuda with or without a number.", rich_help_panel=MODEL)
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Replace files that are there already.", rich_help_panel=OUTPUT),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the record of the run as JSON on standard output.",
        rich_help_panel=OUTPUT,
    ),
]
Progress = Annotated[
    bool,
    typer.Option(
        help="Say on standard error what is being done, with progress bars.", rich_help_panel=OUTPUT
    ),
]


def given_path(text: str | None, name: str) -> Path | None:
    """The path of an option, where it is given."""
    return None if text is None else checked_path(text, name)


@dataclass(frozen=True)
class SourceOptions:
    """A training set as it is asked for.

    Attributes:
        source: Builtin name or path.
        resolution: Size as typed, "32" or "32x48", or None.
        channels: 1, 3 or None.
        split: Name of a part, or None.
        label: Name or number of a class, or None.
        device: Name of a torch device.
        layout: How the axes of arrays are to be read, or None.
    """

    source: str
    resolution: str | None = None
    channels: int | None = None
    split: str | None = None
    label: str | None = None
    device: str = "cpu"
    layout: str | None = None

    def check(self) -> None:
        """Raise ValueError for what can be told without the images."""
        parse_resolution(self.resolution)
        parse_device(self.device)
        check_layout(self.layout)

    def load(self, *, progress: bool) -> TrainingSet:
        """The training set, on its device."""
        return self.of_label(self.load_all(progress=progress)).to(parse_device(self.device))

    def load_all(self, *, progress: bool) -> TrainingSet:
        """The images of all classes, on the CPU."""
        from pyflocality import TrainingSet

        return TrainingSet.load(
            self.source,
            resolution=parse_resolution(self.resolution),
            channels=self.channels,
            split=self.split,
            layout=self.layout,
            progress=progress,
        )

    def of_label(self, data: TrainingSet) -> TrainingSet:
        """The images of the class that is asked for, all of them where none is."""
        if self.label is None:
            return data
        named = self.label in (data.label_names or ())
        number = re.fullmatch(r"-?\d+", self.label) is not None and not named
        return data.with_label(int(self.label) if number else self.label)


def parse_resolution(text: str | None) -> int | tuple[int, int] | None:
    """A size: "32" for a square, "32x48" for height x width."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise ValueError(f"`resolution` must be a size such as 32 or 32x48, got {text!r}")
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


def parse_window(text: str) -> int | tuple[tuple[float, int], ...]:
    """A window: "7", or pairs of noise level sigma / alpha and size such as "10:15,1:7"."""
    if re.fullmatch(r"\d+", text):
        return int(text)
    table = []
    for pair in text.split(","):
        ratio, _, size = pair.partition(":")
        try:
            level = float(ratio)
        except ValueError:
            level = math.nan
        if not (math.isfinite(level) and level > 0) or not re.fullmatch(r"\s*\d+\s*", size):
            raise ValueError(
                "`window` must be a whole number, or pairs of a positive noise level "
                f"(sigma / alpha) and a whole number such as 10:15,1:7, got {text!r}"
            )
        table.append((level, int(size)))
    return tuple(table)
