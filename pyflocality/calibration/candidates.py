"""Models that a calibration chooses among, and what each of them is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pyflocality._support.checks import (
    check_choice,
    check_count,
    check_flag,
    check_positive,
    check_real,
    check_sequence,
    describe,
)
from pyflocality.data import TrainingSet
from pyflocality.denoisers import (
    Denoiser,
    DenoiserOptions,
    LocalDenoiser,
    LocallyLinearDenoiser,
    MixtureDenoiser,
    PatchSetDenoiser,
    PCALocalityDenoiser,
    WienerDenoiser,
)
from pyflocality.denoisers.base import check_set
from pyflocality.masks import check_threshold
from pyflocality.moments import Basis, Moments
from pyflocality.moments.basis import basis_method
from pyflocality.posterior.sharded import ranks_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Whether means, and the temperatures and slopes of the posteriors.
Posterior = tuple[bool, tuple[tuple[float, float], ...]]

# What is tried where nobody says: shares of the largest magnitude of the Wiener filter, sides of
# windows and patches in pixels, and temperatures with slopes, the simplest first.
_THRESHOLDS = (0.05, 0.02, 0.01, 0.005, 0.002)
_SIDES = (3, 5, 7, 11, 15, 21, 31)
_MEAN_THRESHOLDS = (0.05, 0.005)
_POSTERIORS = ((1.0, 0.0), (1.4, 0.0), (1.4, 0.25), (1.4, 0.35))
# Settings that models with posteriors share.
_SHARED = ("temperature", "slope")


@dataclass(frozen=True)
class Candidate:
    """A model with its settings, as one of several that a calibration chooses among.

    | model | settings | denoiser |
    |---|---|---|
    | `"wiener"` | | `WienerDenoiser` |
    | `"pca-locality"` | threshold, temperature, slope | `PCALocalityDenoiser` |
    | `"local"` | window, temperature, slope | `LocalDenoiser` |
    | `"patch-set"` | window, temperature, slope | `PatchSetDenoiser` |
    | `"mean"` | parts | `MixtureDenoiser`, equal weights |

    With a slope it is the `LocallyLinearDenoiser` of these.

    Attributes:
        model: Name of the model.
        threshold: Share of the largest magnitude that an input of PCA locality needs, in (0, 1).
        window: Side of the window or of the patches, in pixels.
        temperature: Divides the logits, positive.
        slope: Share of the Wiener filter's slope, in [0, 1].
        parts: Candidates whose mean it is, two or more of different families, none a mean.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting is out of range, is missing, or is not one of the model's.
    """

    model: str
    threshold: float | None = None
    window: int | None = None
    temperature: float = 1.0
    slope: float = 0.0
    parts: tuple[Candidate, ...] = ()

    def __post_init__(self) -> None:
        """Check the settings, and keep them as plain numbers."""
        takes = MODELS[check_choice(self.model, "model", tuple(MODELS))].takes
        for name, default in _DEFAULTS.items():
            given = getattr(self, name)
            if name not in takes:
                if given != default:
                    raise ValueError(
                        f"`{name}` is no setting of {self.model}, got {describe(given)}"
                    )
            elif given in (None, ()):
                raise ValueError(f"`{name}` must be given for {self.model}")
            else:
                object.__setattr__(self, name, _CHECKS[name](given))

    def __str__(self) -> str:
        """Model and settings in words: "patch-set, window 5, temperature 1.4"."""
        if self.parts:
            return " and ".join(f"{share} of {part}" for share, part in self._shares())
        return ", ".join([self.model, *(f"{name} {value:g}" for name, value in self._settings())])

    @property
    def takes_moments(self) -> bool:
        """Whether it is made of moments, or of components."""
        if self.parts:
            return any(part.takes_moments for part in self.parts)
        return MODELS[self.model].takes_moments or self.slope > 0

    @property
    def family(self) -> Candidate:
        """The same without temperature and slope: what differs in these alone shares passes."""
        parts = tuple(part.family for part in self.parts)
        return replace(self, temperature=1.0, slope=0.0, parts=parts)

    @property
    def posterior(self) -> Posterior:
        """What whole runs differ in: whether of means, and at which temperatures and slopes."""
        pairs = dict.fromkeys((leaf.temperature, leaf.slope) for leaf in self.leaves)
        return bool(self.parts), tuple(pairs)

    @property
    def leaves(self) -> tuple[Candidate, ...]:
        """The parts of a mean; any other candidate itself."""
        return self.parts or (self,)

    def as_json(self) -> dict[str, object]:
        """The model and the settings that are not the defaults."""
        if self.parts:
            return {"model": self.model, "parts": [part.as_json() for part in self.parts]}
        return {"model": self.model, **dict(self._settings())}

    def _shares(self) -> list[tuple[str, Candidate]]:
        return [(f"1/{len(self.parts)}", part) for part in self.parts]

    def _settings(self) -> list[tuple[str, int | float]]:
        values = ((name, getattr(self, name), default) for name, default in _DEFAULTS.items())
        return [(name, value) for name, value, default in values if value != default]

    def build(
        self,
        data: TrainingSet,
        moments: Moments | Basis | None = None,
        progress: bool = False,
        **options: Unpack[DenoiserOptions],
    ) -> Denoiser:
        """The denoiser.

        Args:
            data: The training set.
            moments: Its moments or components, where they are at hand.
            progress: Whether to show what is being done where masks or linear images are made.
            options: Backend, dtype, memory and precision, of models that scan the set.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: A window does not fit the images, or an option is out of range.
        """
        check_set(data)
        if moments is not None and not isinstance(moments, (Moments, Basis)):
            raise TypeError(f"`moments` must be Moments or a Basis, got {describe(moments)}")
        progress = check_flag(progress, "progress")
        model = MODELS[self.model].build(self, _Material(data, moments, progress, options))
        if self.slope == 0 or self.parts:
            return model
        assert isinstance(model, (PCALocalityDenoiser, LocalDenoiser, PatchSetDenoiser))
        return LocallyLinearDenoiser(model, self.slope, moments=moments, progress=progress)


@dataclass(frozen=True)
class _Material:
    """What models are made of: a set, its moments where they are at hand, and options."""

    data: TrainingSet
    moments: Moments | Basis | None
    progress: bool
    options: DenoiserOptions


@dataclass(frozen=True)
class Model:
    """A model of the candidates.

    Attributes:
        takes: Names of its settings.
        build: Makes the denoiser, without a slope.
        takes_moments: Whether that is made of moments, or of components.
    """

    takes: tuple[str, ...]
    build: Callable[[Candidate, _Material], Denoiser]
    takes_moments: bool = False


def _wiener(candidate: Candidate, material: _Material) -> Denoiser:
    del candidate
    data, moments = material.data, material.moments
    return WienerDenoiser(data if moments is None else moments).to(data.device)


def _pca_locality(candidate: Candidate, material: _Material) -> PCALocalityDenoiser:
    assert candidate.threshold is not None
    return PCALocalityDenoiser(
        material.data,
        candidate.threshold,
        temperature=candidate.temperature,
        moments=material.moments,
        progress=material.progress,
        **material.options,
    )


def _local(candidate: Candidate, material: _Material) -> LocalDenoiser:
    assert candidate.window is not None
    data, temperature = material.data, candidate.temperature
    return LocalDenoiser(data, candidate.window, temperature=temperature, **material.options)


def _patch_set(candidate: Candidate, material: _Material) -> PatchSetDenoiser:
    data, temperature = material.data, candidate.temperature
    return PatchSetDenoiser(data, candidate.window, temperature=temperature, **material.options)


def _mean(candidate: Candidate, material: _Material) -> MixtureDenoiser:
    data, moments = material.data, material.moments
    models = [
        part.build(data, moments, material.progress, **material.options) for part in candidate.parts
    ]
    return MixtureDenoiser(models, [1 / len(models)] * len(models))


MODELS: Mapping[str, Model] = {
    "wiener": Model((), _wiener, takes_moments=True),
    "pca-locality": Model(("threshold", *_SHARED), _pca_locality, takes_moments=True),
    "local": Model(("window", *_SHARED), _local),
    "patch-set": Model(("window", *_SHARED), _patch_set),
    "mean": Model(("parts",), _mean),
}

_DEFAULTS: Mapping[str, object] = {
    "threshold": None,
    "window": None,
    "temperature": 1.0,
    "slope": 0.0,
    "parts": (),
}


def _check_share(value: object) -> float:
    share = check_threshold(value, "threshold")
    if share == 0:
        raise ValueError("`threshold` must be above 0, where weights are masks, got 0")
    return share


def _check_parts(value: object) -> tuple[Candidate, ...]:
    parts = tuple(check_sequence(value, "parts"))
    for part in parts:
        if not isinstance(part, Candidate):
            raise TypeError(f"`parts` must hold Candidate objects, got {describe(part)}")
        if part.parts:
            raise ValueError(f"`parts` must hold no means, got {part}")
    if len(parts) < 2 or len({part.family for part in parts}) < len(parts):
        raise ValueError(
            "`parts` must be two or more, which differ in more than temperature and slope, got "
            f"{describe(parts)}"
        )
    return parts


def candidate_of(entry: Mapping[str, Any]) -> Candidate:
    """The candidate of what `as_json` answered.

    Raises:
        TypeError: It holds something else.
        ValueError: A setting is out of range.
    """
    settings = dict(entry)
    if "parts" in settings:
        parts = check_sequence(settings["parts"], "parts")
        settings["parts"] = tuple(candidate_of(part) for part in parts)
    return Candidate(**settings)


_CHECKS: Mapping[str, Callable[[object], object]] = {
    "threshold": _check_share,
    "window": lambda value: check_count(value, "window"),
    "temperature": lambda value: check_positive(value, "temperature"),
    "slope": lambda value: check_real(value, "slope", low=0.0, high=1.0),
    "parts": _check_parts,
}


def made_once(data: TrainingSet, *, progress: bool = False) -> Moments | Basis:
    """What several candidates of a set are made of: components of few images, else moments."""
    # No rank has the products of all pairs of images.
    if ranks_of(data.images) is None and is_thin(data):
        return Basis.from_data(data, progress=progress)
    return Moments.from_data(data, progress=progress)


def is_thin(data: TrainingSet) -> bool:
    """Whether a set has so few images that components are made of their products."""
    return basis_method(len(data) * data.copies, data.num_values) == "gram"


def default_candidates(image_shape: tuple[int, int, int]) -> tuple[Candidate, ...]:
    """What is tried where nobody says, for images (C, H, W), the simplest first.

    The Wiener filter; PCA locality at thresholds 0.05 to 0.002, a local model with windows and
    patch sets with patches of 3 to 31 pixels, as far as they fit the images; then the same at
    temperature 1.4, without a slope and with slopes of 0.25 and 0.35; then means of patch sets and
    PCA locality at thresholds 0.05 and 0.005, alike in temperature and slope.
    """
    _, height, width = image_shape
    sides = [side for side in _SIDES if side <= min(height, width)]
    tried = [Candidate("wiener")]
    families = [Candidate("pca-locality", threshold=share) for share in _THRESHOLDS]
    for model in ("local", "patch-set"):
        families += [Candidate(model, window=side) for side in sides]
    for temperature, slope in _POSTERIORS:
        tried += [replace(family, temperature=temperature, slope=slope) for family in families]
    # What the models of two kinds make of it together, at no further pass.
    means = [
        (patches, mask)
        for patches in families
        for mask in families
        if patches.model == "patch-set" and mask.threshold in _MEAN_THRESHOLDS
    ]
    for temperature, slope in _POSTERIORS:
        tried += [
            Candidate(
                "mean",
                parts=tuple(replace(part, temperature=temperature, slope=slope) for part in pair),
            )
            for pair in means
        ]
    return tuple(tried)


def check_candidates(
    candidates: object, image_shape: tuple[int, int, int]
) -> tuple[Candidate, ...]:
    """Candidates that differ, one at least; by default those that fit the images."""
    if candidates is None:
        return default_candidates(image_shape)
    given: Sequence[object] = check_sequence(candidates, "candidates")
    checked: list[Candidate] = []
    for candidate in given:
        if not isinstance(candidate, Candidate):
            raise TypeError(f"`candidates` must hold Candidate objects, got {describe(candidate)}")
        checked.append(candidate)
    if not checked:
        raise ValueError("`candidates` must hold one Candidate at least, got none")
    if len(set(checked)) < len(checked):
        raise ValueError("`candidates` must differ from one another, got one of them twice")
    return tuple(checked)
