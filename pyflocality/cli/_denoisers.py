"""The denoisers that `generate` and `compare` offer.

A new denoiser is one entry of `DENOISERS`; an option of its own is one more parameter of both
commands, named in the entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyflocality import Basis, Calibration, Moments, TrainingSet
    from pyflocality._support.record import Stages
    from pyflocality.denoisers import Denoiser


@dataclass(frozen=True)
class Entry:
    """A denoiser of the command line.

    Attributes:
        class_name: Its class in `pyflocality`.
        summary: What it is, for the help.
        options: Options it takes: the name on the command line and its argument.
        operations: Operations it runs, where the backend can be chosen.
        needs_moments: Whether it is made of moments: "no", "also" beside the images, which it makes
            them of where it needs them, "only", or "either" of moments or of images.
        required: Options that must be given.
        centred: Whether its window lies around a pixel, so that its side must be odd.
        subsets: Ways in which it can search part of the images, keys of `SUBSETS`.
        sums_by_torch: Whether torch adds up its answers, whose rounding depends on the threads.
        estimate: What it makes of the covariance of the images alone, for a warning where these are
            few; None where it makes nothing of it, or shrinks it.
        instead: What to try, beside more images, where its samples are training images.
    """

    class_name: str
    summary: str
    options: Mapping[str, str]
    operations: tuple[str, ...]
    needs_moments: str = "no"
    required: tuple[str, ...] = ()
    centred: bool = False
    subsets: tuple[str, ...] = ()
    sums_by_torch: bool = False
    estimate: str | None = None
    instead: tuple[str, ...] = ()


# Classes in `pyflocality.denoisers` that wrap a denoiser, and what tells how much they search.
SUBSETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "golden": ("GoldenSubset", ("k_min", "k_max")),
    "certified": ("CertifiedSubset", ("tol",)),
}

_LOCAL_MODELS = "--denoiser local or patch-set"
_SMALLER_WINDOW = "a smaller --window (a larger one recites more)"
_SCAN = {"backend": "backend", "memory_budget": "memory_budget"}

DENOISERS: dict[str, Entry] = {
    "pca-locality": Entry(
        "PCALocalityDenoiser",
        "one posterior per value, over inputs chosen by the covariance",
        {
            "threshold": "mask_threshold",
            "softness": "softness",
            "temperature": "temperature",
            "aggregation": "aggregation",
            "loader_batch": "batch_size",
            **_SCAN,
        },
        ("masked_posterior",),
        needs_moments="also",
        subsets=("golden",),
        estimate="PCA locality",
        instead=("a larger --threshold", _LOCAL_MODELS),
    ),
    "calibrated": Entry(
        "CalibratedDenoiser",
        "at every noise level the model that --calibration has for it",
        {"calibration": "calibration", **_SCAN},
        ("masked_posterior", "window_posterior", "patch_set"),
        needs_moments="also",
        required=("calibration",),
        sums_by_torch=True,
        instead=(_LOCAL_MODELS,),
    ),
    "local": Entry(
        "LocalDenoiser",
        "one posterior per pixel, over a square window",
        {"window": "window", "temperature": "temperature", **_SCAN},
        ("window_posterior",),
        centred=True,
        subsets=("golden",),
        instead=(_SMALLER_WINDOW,),
    ),
    "equivariant": Entry(
        "EquivariantDenoiser",
        "one posterior per pixel, over patches from anywhere",
        {"window": "window", "boundary": "boundary", "temperature": "temperature", **_SCAN},
        ("equivariant_posterior",),
        centred=True,
        subsets=("golden",),
        instead=(_SMALLER_WINDOW,),
    ),
    "patch-set": Entry(
        "PatchSetDenoiser",
        "one posterior per square patch, blended into one image",
        {"window": "window", "temperature": "temperature", **_SCAN},
        ("patch_set",),
        required=("window",),
        subsets=("golden",),
        instead=(_SMALLER_WINDOW,),
    ),
    "optimal": Entry(
        "OptimalDenoiser",
        "one posterior per image: recites the training set",
        {"temperature": "temperature", **_SCAN},
        ("global_posterior",),
        subsets=("golden", "certified"),
        instead=("--denoiser pca-locality, local or patch-set",),
    ),
    "wiener": Entry(
        "WienerDenoiser",
        "the best linear one",
        {},
        (),
        needs_moments="only",
        sums_by_torch=True,
        estimate="the Wiener filter",
        instead=("--denoiser ledoit-wolf", _LOCAL_MODELS),
    ),
    "ledoit-wolf": Entry(
        "LedoitWolfDenoiser",
        "the linear one for few images, its covariance shrunk",
        {},
        (),
        sums_by_torch=True,
        instead=(_LOCAL_MODELS,),
    ),
    "fourier": Entry(
        "FourierWienerDenoiser",
        "the best linear one that treats all places alike",
        {},
        (),
        needs_moments="either",
        sums_by_torch=True,
        instead=(_LOCAL_MODELS,),
    ),
    "nearest": Entry(
        "NearestDenoiser",
        "the nearest training image",
        _SCAN,
        ("nearest",),
        instead=("--denoiser pca-locality, local or patch-set",),
    ),
}


@dataclass(frozen=True)
class DenoiserOptions:
    """A denoiser as it is asked for.

    Attributes:
        name: Key of `DENOISERS`.
        given: Values of the options that were given, by their names on the command line.
    """

    name: str
    given: Mapping[str, Any]

    @property
    def entry(self) -> Entry:
        """The denoiser's entry."""
        return DENOISERS[self.name]

    @property
    def needs_moments(self) -> bool:
        """Whether it is made of moments."""
        return self.entry.needs_moments != "no"

    @property
    def depends_on_threads(self) -> bool:
        """Whether the number of threads changes the rounding of the answers: not by our kernels."""
        from pyflocality.backends.selection import machine_reason, requested_backend

        backend = requested_backend(self.given.get("backend"))
        if backend == "auto" and machine_reason("cpu") is not None:
            backend = "reference"
        return self.entry.sums_by_torch or backend == "reference"

    def check(self) -> None:
        """Refuse wrong values, foreign options and backends that cannot run, before any work."""
        from pyflocality._support.budget import memory_budget_bytes
        from pyflocality._support.checks import check_count, check_positive
        from pyflocality.masks import check_softness, check_threshold

        for option in self.given:
            if option not in self.entry.options:
                raise ValueError(f"`{option}` belongs to {_takers(option)}, not to {self.name}")
        for option in self.entry.required:
            if option not in self.given:
                raise ValueError(f"`{option}` must be given for {self.name}")
        if self.entry.centred and "window" in self.given:
            _check_odd(self.given["window"])
        checks = {
            "threshold": lambda value: check_threshold(value, "threshold"),
            "softness": lambda value: check_softness(
                value, self.given.get("threshold", 1.0), "threshold"
            ),
            "temperature": lambda value: check_positive(value, "temperature"),
            "loader_batch": lambda value: check_count(value, "loader_batch"),
            "memory_budget": memory_budget_bytes,
        }
        for option, check in checks.items():
            if option in self.given:
                check(self.given[option])
        if "loader_batch" in self.given and self.given.get("aggregation") != "batch_mean":
            raise ValueError("`loader_batch` belongs to --aggregation batch-mean")
        for operation in self.entry.operations:
            _check_backend(operation, self.given.get("backend"))

    def build(
        self, data: TrainingSet, moments: Moments | Basis | None, stages: Stages | None = None
    ) -> Denoiser:
        """The denoiser itself, of moments or components where they are at hand.

        Principal components that it is made of are a stage of the run.
        """
        import pyflocality

        make = getattr(pyflocality, self.entry.class_name)
        source = data if moments is None else moments
        if self.entry.needs_moments == "only" and stages is not None:
            from pyflocality.cli._work import components_of

            source = components_of(source, stages)
        if self.entry.needs_moments in ("only", "either"):
            return make(source).to(data.device)
        arguments = {self.entry.options[name]: value for name, value in self.given.items()}
        if self.entry.needs_moments == "also":
            arguments |= {"moments": moments, "progress": stages is not None and stages.announce}
        return make(data, **arguments)

    def in_force(self, denoiser: Denoiser) -> dict[str, Any]:
        """The value of every option that the denoiser takes, defaults included."""
        values = {
            option: getattr(denoiser, argument) for option, argument in self.entry.options.items()
        }
        if "calibration" in values:
            values["calibration"] = _choices_told(values["calibration"])
        return values


@dataclass(frozen=True)
class SubsetOptions:
    """A search of part of the images, as it is asked for.

    Attributes:
        name: Key of `SUBSETS`.
    """

    name: str

    @property
    def needs_moments(self) -> bool:
        """Whether it is made of moments."""
        return self.name == "certified"

    def check(self, denoiser: DenoiserOptions, *, flip: bool) -> None:
        """Refuse what cannot be wrapped, before any work."""
        if self.name not in denoiser.entry.subsets:
            names = " or ".join(
                name for name, entry in DENOISERS.items() if self.name in entry.subsets
            )
            raise ValueError(f"`subset` {self.name} is of {names}, not of {denoiser.name}")
        if flip:
            raise ValueError("`subset` is of the images themselves, it does not go with `flip`")
        if denoiser.given.get("aggregation") == "batch_mean":
            raise ValueError("`subset` does not go with `aggregation` batch-mean")

    def build(self, denoiser: Denoiser, moments: Moments | Basis | None) -> Denoiser:
        """The denoiser over subsets."""
        from pyflocality import denoisers

        make = getattr(denoisers, SUBSETS[self.name][0])
        return make(denoiser, moments=moments) if self.needs_moments else make(denoiser)

    def in_force(self, denoiser: Denoiser) -> dict[str, Any]:
        """Name and sizes, as the denoiser over subsets has them."""
        sizes = SUBSETS[self.name][1]
        return {"name": self.name, **{size: getattr(denoiser, size) for size in sizes}}


def split_options(names: Sequence[str], given: Mapping[str, Any]) -> list[DenoiserOptions]:
    """Several denoisers by their keys, each with those of the given options that it takes.

    Raises:
        ValueError: None of the denoisers takes an option.
    """
    for option in given:
        if not any(option in DENOISERS[name].options for name in names):
            raise ValueError(f"`{option}` belongs to {_takers(option)}, which is not compared")
    return [
        DenoiserOptions(
            name,
            {option: given[option] for option in given if option in DENOISERS[name].options},
        )
        for name in names
    ]


def model_in_force(name: str | None, given: Mapping[str, Any]) -> DenoiserOptions:
    """The model that is asked for; without a name that of a calibration, else PCA locality."""
    if name is None:
        name = "calibrated" if "calibration" in given else "pca-locality"
    return DenoiserOptions(name, given)


def _choices_told(calibration: Calibration) -> dict[str, Any]:
    """What a record tells of a calibration: its set, and what it has for each level."""
    levels = zip(calibration.levels, calibration.choices, strict=True)
    facts = ("content_key", "images", "searched", "held_out", "folds", "seed")
    return {name: getattr(calibration, name) for name in facts} | {
        "levels": [
            {"alpha": level.alpha, "sigma": level.sigma, **choice.as_json()}
            for level, choice in levels
        ],
    }


def _takers(option: str) -> str:
    return " or ".join(name for name, entry in DENOISERS.items() if option in entry.options)


def _check_odd(window: int | Sequence[tuple[float, int]]) -> None:
    for size in [window] if isinstance(window, int) else [size for _, size in window]:
        if size % 2 == 0:
            raise ValueError(f"`window` must be odd so that it has a centre pixel, got {size}")


def _check_backend(operation: str, backend: str | None) -> None:
    """Refuse a backend that was asked for and that this machine lacks.

    What a backend cannot do with the images at hand shows once they are there.
    """
    from pyflocality.backends.selection import (
        OPERATIONS,
        BackendUnavailableError,
        machine_reason,
        requested_backend,
    )

    request, table = requested_backend(backend), OPERATIONS[operation]
    if request == "auto":
        return
    reason = machine_reason(request) if request in table else "it has no implementation of this"
    if reason is not None:
        available = tuple(name for name in table if machine_reason(name) is None)
        raise BackendUnavailableError(request, operation, reason, available)
