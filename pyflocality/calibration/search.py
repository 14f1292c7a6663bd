"""The model of every noise level, chosen by held-out images: no network is involved."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from pyflocality._support.checks import (
    NoiseLevel,
    check_count,
    check_flag,
    check_rounds,
    describe,
)
from pyflocality._support.record import software
from pyflocality._support.streams import tell
from pyflocality.calibration.candidates import Candidate, check_candidates
from pyflocality.calibration.folds import (
    check_whole,
    folds_of,
    held_out_positions,
    spread_positions,
)
from pyflocality.calibration.foreseen import foreseen
from pyflocality.calibration.record import CalibratedLevel, Calibration
from pyflocality.calibration.runs import Search
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import check_set
from pyflocality.noise import DDPMSchedule, NoiseSchedule
from pyflocality.sampling import Level, levels_of_run


def calibrate(
    data: TrainingSet,
    *,
    schedule: NoiseSchedule | None = None,
    steps: int = 10,
    candidates: Sequence[Candidate] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    r"""Choose the model of every noise level of a run, by images that it has not seen.

    Images are held out, and all candidates are models of the rest: :math:`x = \alpha x_0 + \sigma
    \epsilon` with the same images and the same noise for all of them. At each level

    1. all candidates denoise a few of the images in one step, and those of the four families of
       the least errors :math:`\lVert \hat x_0 - x_0 \rVert^2 / D`, answers clipped to [-1, 1],
       all of them. Candidates of a family differ in temperature and slope alone, and share passes
       over the set. Of means the two best families go on beside these;
    2. of the two best families, and the best of means, those within 15 percent of the best restore
       the images, at the first temperature and slope that candidates have: DDIM goes from the
       noisy image down to the data, by the candidate at its first step and by what was chosen for
       the levels below, from the cleanest level upwards. The simplest of those within one standard
       error of the best is chosen; means have a run of their own;
    3. every other temperature and slope makes a run of the same families, over all of these levels
       together. Of the runs the simplest within one standard error of the best is chosen, by what
       they restore from the noisiest of these levels, where every image gets noise twice anew.

    What has restored images is judged by :math:`\log e + \max(0, |\log g| - \log \tfrac 4 3)`, the
    less the better, with e the mean squared error of what is restored and g its gradient energy
    (`metrics.gradient_energy`) as a share of that by the simplest of those compared: a quarter off
    is free.

    Sampling meets states of its own making, not noised images, so the error of one step alone
    prefers slopes that are too large; the error of what is restored prefers what is too smooth,
    which the gradient energy bounds. What a temperature or a slope gains at one level is less than
    can be told; along a whole run it adds up, so these are chosen for all levels at once. At the
    cleanest level a restoration is one step, and all runs take the same candidate. So they do where
    the best error is above two thirds of that of the mean image: there a noisy image tells too
    little of what it was for its restoration to be told from any other image, and the errors of
    single steps choose, again the simplest within one standard error of the best.

    64 images are held out, half of the set at most, drawn from all classes in proportion; of
    small sets in up to five folds, each of which leaves out a twentieth of the images. All work is
    counted: two machines do the same, and choose the same but for what rounding decides.

    Args:
        data: The training set, whole. Copies of an augmentation are left out with their images.
        schedule: Noise schedule of the runs; by default `DDPMSchedule()`.
        steps: Their number of steps, which is that of noise levels.
        candidates: What to choose among, the simplest first; by default `default_candidates`.
        seed: Seed of the choice of images and of the noise, in [0, 2^63).
        progress: Whether to tell on standard error how long it takes, and to show progress bars.

    Returns:
        The choices with all that they were made by: for `CalibratedDenoiser`, or to be saved.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, a window does not fit the images, or the set has
            fewer than four images or is one rank's part.

    References:
        Breiman, Friedman, Olshen and Stone, Classification and regression trees, 1984 (the rule of
        one standard error).
    """
    check_whole(check_set(data))
    schedule = DDPMSchedule() if schedule is None else schedule
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"`schedule` must be a NoiseSchedule, got {describe(schedule)}")
    times, levels = levels_of_run(schedule, check_rounds(steps, "steps"))
    tried = check_candidates(candidates, data.image_shape)
    _check_fit(tried, data)
    seed = check_count(seed, "seed", minimum=0, maximum=2**63 - 1)
    progress = check_flag(progress, "progress")
    return calibrated_by(
        data, times.tolist(), levels, tried, seed=seed, images=len(data), progress=progress
    )


def calibrated_by(
    data: TrainingSet,
    times: Sequence[float],
    levels: Sequence[Level],
    candidates: tuple[Candidate, ...],
    *,
    seed: int,
    images: int,
    progress: bool,
) -> Calibration:
    """As `calibrate`, for a run from time to time, by so many images, of every class in proportion.

    There is one more level than times, that of the end.
    """
    noisy = [NoiseLevel(*level) for level in levels[:-1]]
    generator = torch.Generator().manual_seed(seed)
    searched = data
    if images < len(data):
        searched = data.subset(spread_positions(data, images, generator).sort().values)
    positions = held_out_positions(searched, generator)
    if progress:
        told = foreseen(searched, candidates, noisy)
        if told is not None:
            tell(told)
    # Of few images, and of masks that keep nothing: what comes of it the errors tell.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        needed = any(candidate.takes_moments for candidate in candidates)
        folds = folds_of(searched, positions, moments=needed, progress=progress)
        search = Search(folds, candidates, [*noisy, NoiseLevel(*levels[-1])], generator)
        trials, runs = search.run(progress)
    found = tuple(
        CalibratedLevel(time, level.alpha, level.sigma, some)
        for time, level, some in zip(times, search.levels, trials, strict=False)
    )
    return Calibration(
        candidates,
        found,
        runs,
        data.content_key(),
        data.image_shape,
        len(data),
        len(searched),
        sum(map(len, positions)),
        len(folds),
        seed,
        {name: software()[name] for name in ("pyflocality", "torch", "numpy")},
    )


def _check_fit(candidates: Sequence[Candidate], data: TrainingSet) -> None:
    """Refuse what does not fit the images, before any work."""
    for candidate in candidates:
        # Nothing else has to fit the images.
        for leaf in candidate.leaves:
            if leaf.window is None:
                continue
            try:
                # Without what a slope is made of.
                leaf.family.build(data)
            except ValueError as error:
                raise ValueError(f"`candidates` holds {candidate}: {error}") from error
