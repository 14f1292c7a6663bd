"""The denoiser that a calibration describes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from pyflocality._support.caller import caller_level
from pyflocality._support.checks import check_instance
from pyflocality.calibration.candidates import made_once
from pyflocality.calibration.record import Calibration
from pyflocality.data import TrainingSet
from pyflocality.denoisers import DenoiserOptions, MixtureDenoiser
from pyflocality.denoisers.base import check_set
from pyflocality.moments import Basis, Moments
from pyflocality.posterior.sharded import ranks_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CalibratedDenoiser(MixtureDenoiser):
    """At every noise level the model that a calibration has chosen for it.

    A mixture of the chosen models, of which one has all of the weight at a level: its answers and
    derivatives are that model's to the bit. Between the levels of the calibration the nearest in
    log(sigma / alpha) counts, and outside them the first or the last, which is said once.

    Args:
        data: The training set: best the one that was calibrated, of which nothing is held out now.
        calibration: What `calibrate` found.
        moments: Moments of the data or its components, where they are at hand; None makes what is
            needed of the data.
        progress: Whether to show what is being done where moments and masks are made.
        options: Backend, dtype, memory and precision of the models that scan the set: see
            `pyflocality.denoisers.DenoiserOptions`.

    Attributes:
        calibration: The calibration.
        candidates: What was chosen for some level, in the order of `denoisers`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The images have another shape than those of the calibration, or an option is
            out of range.

    Warns:
        UserWarning: The calibration is of another set; in calls, a noise level lies outside it
            (said once).
    """

    def __init__(
        self,
        data: TrainingSet,
        calibration: Calibration,
        *,
        moments: Moments | Basis | None = None,
        progress: bool = False,
        **options: Unpack[DenoiserOptions],
    ) -> None:
        shape = check_set(data).image_shape
        check_instance(calibration, "calibration", Calibration)
        if calibration.image_shape != shape:
            raise ValueError(
                f"`calibration` must be of images of shape {shape}, got {calibration.image_shape}"
            )
        # A rank has no key of the whole set.
        if ranks_of(data.images) is None and data.content_key() != calibration.content_key:
            warnings.warn(
                f"the calibration is of another set, of {calibration.images:,} images, than "
                f"{data.name}, of {len(data):,}: its choices may not be the best of this one",
                stacklevel=caller_level(),
            )
        candidates = tuple(dict.fromkeys(calibration.choices))
        makers = [one for one in candidates if one.takes_moments]
        # PCA locality alone makes them where masks are not cached.
        if moments is None and [one.model for one in makers] not in ([], ["pca-locality"]):
            moments = made_once(data, progress=progress)
        table = [
            (level.ratio, [float(one == choice) for one in candidates])
            for level, choice in zip(calibration.levels, calibration.choices, strict=True)
        ]
        models = [one.build(data, moments, progress, **options) for one in candidates]
        super().__init__(models, table)
        self.data, self.calibration, self.candidates = data, calibration, candidates
        self.backend, self.memory_budget = options.get("backend"), options.get("memory_budget")
        self._told = False

    def _rule(self) -> Callable[[float, float], tuple[float, ...]]:
        rule = super()._rule()

        def told(alpha: float, sigma: float) -> tuple[float, ...]:
            if not (self._told or _covers(self.calibration, alpha, sigma)):
                self._told = True
                ratios = [level.ratio for level in self.calibration.levels]
                warnings.warn(
                    f"sigma / alpha {sigma / alpha:.3g} lies outside the calibration, from "
                    f"{min(ratios):.3g} to {max(ratios):.3g}: what it has for the nearest level is "
                    "taken",
                    stacklevel=caller_level(),
                )
            return rule(alpha, sigma)

        return told

    def extra_repr(self) -> str:
        """What `repr` shows."""
        chosen = "; ".join(map(str, self.candidates))
        return f"{len(self.calibration.levels)} levels: {chosen}"


def _covers(calibration: Calibration, alpha: float, sigma: float) -> bool:
    """Whether a level lies between the first and the last, or half a step beyond them."""
    if sigma == 0:
        return True
    ratios = sorted(math.log(level.ratio) for level in calibration.levels)
    margin = (ratios[-1] - ratios[0]) / max(1, len(ratios) - 1) / 2 + 1e-6
    return ratios[0] - margin <= math.log(sigma / alpha) <= ratios[-1] + margin
