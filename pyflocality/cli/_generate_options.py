"""Options of `pyflocality generate` and `pyflocality compare`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyflocality.cli._denoisers import DENOISERS, SUBSETS
from pyflocality.cli._options import MODEL, OUTPUT

if TYPE_CHECKING:
    from pyflocality.noise import NoiseSchedule

_SCHEDULES = {
    "ddpm": "DDPMSchedule",
    "cosine": "CosineSchedule",
    "karras": "KarrasSchedule",
    "flow": "FlowSchedule",
}
# Those whose steps may be spaced in several ways.
_SPACED = ("ddpm", "cosine")

SAMPLING = "Sampling"


def _choice(name: str, values: list[str]) -> type[Enum]:
    """A type whose values typer offers and checks."""
    return Enum(name, {value: value for value in values}, type=str)


DenoiserName = _choice("DenoiserName", list(DENOISERS))
ScheduleName = _choice("ScheduleName", list(_SCHEDULES))
SpacingName = _choice("SpacingName", ["leading", "trailing", "linspace"])
SamplerName = _choice("SamplerName", ["ddim", "euler", "heun"])
BackendName = _choice("BackendName", ["auto", "reference", "cpu", "triton", "cuda"])
BoundaryName = _choice("BoundaryName", ["circular", "broken"])
AggregationName = _choice("AggregationName", ["exact", "batch-mean"])
SplitName = _choice("SplitName", ["images", "samples"])
SubsetName = _choice("SubsetName", list(SUBSETS))

_DENOISERS_HELP = "; ".join(f"{name}: {entry.summary}" for name, entry in DENOISERS.items())

Out = Annotated[
    str,
    typer.Option(
        metavar="PATH",
        help="Folder for the results; it is made if need be.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
Denoiser = Annotated[
    DenoiserName, typer.Option(help=f"Which model. {_DENOISERS_HELP}.", rich_help_panel=MODEL)
]
Methods = Annotated[
    str,
    typer.Option(
        help=f"Which models, in the order of the rows, as in local,optimal. {_DENOISERS_HELP}.",
        rich_help_panel=MODEL,
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        help="The model that the others are measured against; the first if not given.",
        rich_help_panel=MODEL,
    ),
]
# torchrun's parser takes --n for the beginning of options of its own.
Count = Annotated[
    int, typer.Option("--n", "-n", help="How many images to make.", rich_help_panel=SAMPLING)
]
Steps = Annotated[int, typer.Option(help="Denoising steps.", rich_help_panel=SAMPLING)]
Schedule = Annotated[
    ScheduleName, typer.Option(help="Noise levels of the steps.", rich_help_panel=SAMPLING)
]
Spacing = Annotated[
    SpacingName | None,
    typer.Option(
        help="ddpm, cosine: which times of the schedule the steps visit. leading, as diffusers "
        "does if not told otherwise, may start far from noise where the steps do not divide the "
        "schedule; trailing and linspace start at its end. leading if not given.",
        rich_help_panel=SAMPLING,
    ),
]
Sampler = Annotated[
    SamplerName,
    typer.Option(help="How a step follows from the denoised image.", rich_help_panel=SAMPLING),
]
Seed = Annotated[int, typer.Option(help="Seed of the starting noise.", rich_help_panel=SAMPLING)]
Threshold = Annotated[
    float | None,
    typer.Option(
        help="pca-locality: share of the largest sensitivity that an input needs to count, in "
        "[0, 1). Smaller keeps more of an image together. 0.02 if not given; published: 0.005 "
        "for MNIST, 0.02 for faces, 0.05 for CIFAR-10.",
        rich_help_panel=MODEL,
    ),
]
Window = Annotated[
    str | None,
    typer.Option(
        help="local, equivariant: side of the window in pixels, odd; patch-set: side of the "
        "patches; or a table of noise level (sigma / alpha) and side, such as 10:15,1:7,0.1:3. "
        "7 if not given; patch-set needs one.",
        rich_help_panel=MODEL,
    ),
]
Boundary = Annotated[
    BoundaryName | None,
    typer.Option(
        help="equivariant: circular goes on periodically; broken cuts windows at the border and "
        "keeps positions near it apart. circular if not given.",
        rich_help_panel=MODEL,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="Divides the logits of every posterior. 1 if not given.", rich_help_panel=MODEL
    ),
]
Aggregation = Annotated[
    AggregationName | None,
    typer.Option(
        help="pca-locality: exact is the posterior over the whole set; batch-mean averages "
        "posteriors over batches, as the published code does. exact if not given.",
        rich_help_panel=MODEL,
    ),
]
LoaderBatch = Annotated[
    int | None,
    typer.Option(
        help="Images a batch of --aggregation batch-mean. 256 if not given.", rich_help_panel=MODEL
    ),
]
Subset = Annotated[
    SubsetName | None,
    typer.Option(
        help="Search part of the images. golden: the nearest to each noisy image, a twentieth to "
        "a tenth of the set, without a bound on the difference; certified, for optimal: until the "
        "rest holds at most a thousandth of the posterior, proven.",
        rich_help_panel=MODEL,
    ),
]
Flip = Annotated[
    bool,
    typer.Option(
        "--flip",
        help="Learn from the images mirrored left to right, too, without keeping them in memory.",
        rich_help_panel=MODEL,
    ),
]
MomentsFile = Annotated[
    str | None,
    typer.Option(
        "--moments",
        metavar="PATH",
        help="Moments of the set, as `pyflocality moments` writes them.",
        rich_help_panel=MODEL,
    ),
]
GlobalShare = Annotated[
    float | None,
    typer.Option(
        help="With --label: weight, from 0 to 1, of the covariance of the images of all classes "
        "in that of the class, which is mostly noise where the class has few images. --moments "
        "are then those of all classes. 0 if not given.",
        rich_help_panel=MODEL,
    ),
]
SplitOver = Annotated[
    SplitName | None,
    typer.Option(
        help="Under torchrun, what the ranks divide among them. images: every rank searches its "
        "part of the training images; samples: every rank makes its part of the --n images, "
        "with all training images in its memory or mapped. images if not given.",
        rich_help_panel=MODEL,
    ),
]
Backend = Annotated[
    BackendName | None,
    typer.Option(
        help="What runs the denoiser; the first that can if not given.", rich_help_panel=MODEL
    ),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        help="Working memory, such as 2GB or 512MB. 1GB if not given.", rich_help_panel=MODEL
    ),
]
Individual = Annotated[
    bool,
    typer.Option(
        "--individual", help="Also write every image to a file of its own.", rich_help_panel=OUTPUT
    ),
]
Trajectory = Annotated[
    bool, typer.Option(help="Draw the way from noise to image.", rich_help_panel=OUTPUT)
]
Nearest = Annotated[
    bool,
    typer.Option(
        help="Draw under each image the training image nearest to it.", rich_help_panel=OUTPUT
    ),
]


@dataclass(frozen=True)
class Sampling:
    """How to sample: number of images, steps, schedule, sampler, seed, spacing of the times."""

    n: int
    steps: int
    schedule: str
    sampler: str
    seed: int
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

    def noise_schedule(self) -> NoiseSchedule:
        """The schedule itself."""
        from pyflocality import noise

        options = {} if self.spacing is None else {"spacing": self.spacing}
        return getattr(noise, _SCHEDULES[self.schedule])(**options)
