"""The options that several commands share, in groups, and what they describe."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyflocality._support.devices import parse_device
from pyflocality._support.paths import checked_path
from pyflocality.cli._denoisers import DENOISERS
from pyflocality.cli._groups import IMAGES, MODEL, OUTPUT, SAMPLING, Group, OneOf
from pyflocality.sources.layout import check_layout

if TYPE_CHECKING:
    from torch import Tensor

    from pyflocality import TrainingSet
    from pyflocality.noise import NoiseSchedule

_SCHEDULES = {
    "ddpm": "DDPMSchedule",
    "cosine": "CosineSchedule",
    "karras": "KarrasSchedule",
    "flow": "FlowSchedule",
}
# Those whose steps may be spaced in several ways.
_SPACED = ("ddpm", "cosine")


DENOISERS_HELP = "; ".join(f"{name}: {entry.summary}" for name, entry in DENOISERS.items())


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Training images: digits, photos, disks or c_alpha (builtin sets), a folder or .zip "
        "of images, a .npy or .npz file, MNIST idx files, a folder of CIFAR batches, a folder "
        "that `pyflocality pack` wrote.",
        show_default=False,
        rich_help_panel="Arguments",
    ),
]


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(Group):
    """How images are read."""

    heading = IMAGES

    resolution: Annotated[
        str | None,
        typer.Option(help="Bring all images to this size: 32, or 32x48 for height x width."),
    ] = None
    channels: Annotated[int | None, typer.Option(help="1 for grey, 3 for RGB.")] = None
    split: Annotated[
        str | None, typer.Option(help="Part of a set that has parts: train, test, ...")
    ] = None


@dataclass(frozen=True, kw_only=True)
class SourceOptions(ReadingOptions):
    """A training set as it is asked for."""

    source: Source
    layout: Annotated[
        str | None,
        typer.Option(help="How the axes of a .npy or .npz file are to be read: NCHW, NHWC or NHW."),
    ] = None
    label: Annotated[
        str | None,
        typer.Option(help="Use the images of one class alone: its name or number."),
    ] = None
    device: str = "cpu"

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


Device = Annotated[
    str, typer.Option(help="cpu, or cuda with or without a number.", rich_help_panel=MODEL)
]


@dataclass(frozen=True, kw_only=True)
class DeviceSourceOptions(SourceOptions):
    """A training set that is searched on a device."""

    device: Device = "cpu"


MemoryBudget = Annotated[
    str | None,
    typer.Option(
        help="Working memory, such as 2GB or 512MB. 1GB if not given.", rich_help_panel=MODEL
    ),
]


IgnoreMemory = Annotated[
    bool,
    typer.Option(
        "--ignore-memory",
        help="Try what takes more memory than there is; it is refused before any work if not "
        "given.",
        rich_help_panel=MODEL,
    ),
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Group):
    """What goes to a model, where it is given."""

    heading = MODEL

    threshold: Annotated[
        float | None,
        typer.Option(
            help="pca-locality: share of the largest sensitivity that an input needs to count, in "
            "[0, 1). Smaller keeps more of an image together. 0.02 if not given; published: 0.005 "
            "for MNIST, 0.02 for faces, 0.05 for CIFAR-10."
        ),
    ] = None
    softness: Annotated[
        float | None,
        typer.Option(
            help="pca-locality: power of an input's sensitivity that it counts with. 0 if not "
            "given: inputs count whole or not at all."
        ),
    ] = None
    window: Annotated[
        str | None,
        typer.Option(
            help="local, equivariant: side of the window in pixels, odd; patch-set: side of the "
            "patches; or a table of noise level (sigma / alpha) and side, such as "
            "10:15,1:7,0.1:3. 7 if not given; patch-set needs one."
        ),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(help="Divides the logits of every posterior. 1 if not given."),
    ] = None
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="calibrated: the choices, as `pyflocality calibrate` writes them.",
        ),
    ] = None
    memory_budget: MemoryBudget = None
    ignore_memory: IgnoreMemory = False

    @property
    def given(self) -> dict[str, Any]:
        """The options of models that were given, by name, as the library takes their values."""
        names = dict.fromkeys(name for entry in DENOISERS.values() for name in entry.options)
        given = {name: getattr(self, name, None) for name in names}
        if self.window is not None:
            given["window"] = parse_window(self.window)
        if self.calibration is not None:
            from pyflocality import Calibration

            given["calibration"] = Calibration.load(self.calibration)
        if given["aggregation"] is not None:
            given["aggregation"] = given["aggregation"].replace("-", "_")
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class MomentsModelOptions(ModelOptions):
    """What goes to a model that may be made of moments."""

    moments: Annotated[
        str | None,
        typer.Option(
            "--moments",
            metavar="PATH",
            help="Moments of the set, as `pyflocality moments` writes them.",
        ),
    ] = None


Flip = Annotated[
    bool,
    typer.Option(
        "--flip",
        help="Learn from the images mirrored left to right, too, without keeping them in memory.",
        rich_help_panel=MODEL,
    ),
]


@dataclass(frozen=True, kw_only=True)
class EveryModelOptions(MomentsModelOptions):
    """Every option of every model."""

    boundary: Annotated[
        str | None,
        typer.Option(
            help="equivariant: circular goes on periodically; broken cuts windows at the border "
            "and keeps positions near it apart. circular if not given."
        ),
        OneOf("circular", "broken"),
    ] = None
    aggregation: Annotated[
        str | None,
        typer.Option(
            help="pca-locality: exact is the posterior over the whole set; batch-mean averages "
            "posteriors over batches, as the published code does. exact if not given."
        ),
        OneOf("exact", "batch-mean"),
    ] = None
    loader_batch: Annotated[
        int | None,
        typer.Option(help="Images a batch of --aggregation batch-mean. 256 if not given."),
    ] = None
    backend: Annotated[
        str | None,
        typer.Option(help="What runs the denoiser; the first that can if not given."),
        OneOf("auto", "reference", "cpu", "triton", "cuda"),
    ] = None
    flip: Flip = False


Steps = Annotated[int, typer.Option(help="Denoising steps.", rich_help_panel=SAMPLING)]
Spacing = Annotated[
    str | None,
    typer.Option(
        help="ddpm, cosine: which times of the schedule the steps visit. leading, as diffusers "
        "does if not told otherwise, may start far from noise where the steps do not divide "
        "the schedule; trailing and linspace start at its end. leading if not given.",
        rich_help_panel=SAMPLING,
    ),
    OneOf("leading", "trailing", "linspace"),
]
Seed = Annotated[int, typer.Option(help="Seed of the starting noise.", rich_help_panel=SAMPLING)]


@dataclass(frozen=True, kw_only=True)
class NoiseOptions(Group):
    """How to sample, of which the schedule and the seed are to be chosen."""

    heading = SAMPLING

    n: int = 1
    steps: int = 1
    schedule: Annotated[
        str,
        typer.Option(help="Noise levels of the steps."),
        OneOf(*_SCHEDULES),
    ] = "ddpm"
    sampler: str = "ddim"
    seed: Seed = 0
    spacing: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for, as plain values."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def check(self) -> None:
        """Raise ValueError for what cannot be run."""
        from pyflocality._support.checks import check_count

        check_count(self.n, "n")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"`seed` must lie in [0, 2^63), got {self.seed}")
        if self.spacing is not None and self.schedule not in _SPACED:
            raise ValueError(
                f"`spacing` is of the schedules {' and '.join(_SPACED)}, it is of no use to "
                f"{self.schedule}"
            )
        self.noise_schedule().timesteps(self.steps)

    @property
    def timesteps(self) -> Tensor:
        """The times of the steps."""
        return self.noise_schedule().timesteps(self.steps)

    def noise_schedule(self) -> NoiseSchedule:
        """The schedule itself."""
        from pyflocality import noise

        options = {} if self.spacing is None else {"spacing": self.spacing}
        return getattr(noise, _SCHEDULES[self.schedule])(**options)


@dataclass(frozen=True, kw_only=True)
class StepsOptions(NoiseOptions):
    """How to sample, of which number and steps are to be chosen, too."""

    # torchrun's parser takes --n for the beginning of options of its own.
    n: Annotated[int, typer.Option("--n", "-n", help="How many images to make.")] = 8
    steps: Steps = 10


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(StepsOptions):
    """How to sample, all of it to be chosen."""

    spacing: Spacing = None
    sampler: Annotated[
        str,
        typer.Option(help="How a step follows from the denoised image."),
        OneOf("ddim", "euler", "heun"),
    ] = "ddim"


@dataclass(frozen=True, kw_only=True)
class TellingOptions(Group):
    """What a command says."""

    heading = OUTPUT

    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the record of the run as JSON on standard output."),
    ] = False
    progress: Annotated[
        bool, typer.Option(help="Say on standard error what is being done, with progress bars.")
    ] = True


@dataclass(frozen=True, kw_only=True)
class ResultOptions(TellingOptions):
    """What a command writes and says."""

    force: Annotated[
        bool, typer.Option("--force", help="Replace files that are there already.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class FolderOptions(ResultOptions):
    """What a command writes into a folder, and says."""

    out: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            help="Folder for the results; it is made if need be.",
            show_default=False,
        ),
    ]


def given_path(text: str | None, name: str) -> Path | None:
    """The path of an option, where it is given."""
    return None if text is None else checked_path(text, name)


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
