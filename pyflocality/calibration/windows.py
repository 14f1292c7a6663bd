"""Windows by noise level, chosen so that a local model moves like a trained network."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from pyflocality._support.checks import (
    check_callable,
    check_count,
    check_flag,
    check_generator,
    check_real,
    check_rounds,
    check_sequence,
    check_within_memory,
    describe,
)
from pyflocality._support.progress import progress_bar
from pyflocality.calibration.files import read_object, write_object
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import Denoiser, check_set
from pyflocality.denoisers.local import LocalDenoiser
from pyflocality.noise import DDPMSchedule, NoiseSchedule
from pyflocality.sampling import DenoiserFunction, SampleResult, sample

_WHAT = "window table"
_VERSION = 1


@dataclass(frozen=True)
class WindowTable(Sequence[tuple[float, int]]):
    """Pairs (sigma / alpha, window), as the argument `window` of the denoisers takes them.

    Attributes:
        ratios: Noise levels sigma / alpha, positive.
        windows: Sides of the windows that were tried, in pixels.
        similarities: For each noise level the similarity of each window, in [-1, 1].

    Raises:
        TypeError: A value has the wrong type.
        ValueError: There is no level or no window, or a value is out of range.
    """

    ratios: tuple[float, ...]
    windows: tuple[int, ...]
    similarities: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        """Check the table."""
        _check_numbers(self.ratios, "ratios", 0.0, math.inf)
        for window in _check_filled(self.windows, "windows"):
            check_count(window, "windows")
        check_sequence(self.similarities, "similarities")
        if len(self.similarities) != len(self.ratios):
            raise ValueError(
                f"`similarities` must have a row for each of {len(self.ratios)} levels, got "
                f"{len(self.similarities)}"
            )
        for row in self.similarities:
            _check_numbers(row, "similarities", -1.001, 1.001)
            if len(row) != len(self.windows):
                raise ValueError(
                    f"`similarities` must have {len(self.windows)} values a row, got {len(row)}"
                )

    def __len__(self) -> int:
        return len(self.ratios)

    @overload
    def __getitem__(self, index: int) -> tuple[float, int]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[float, int]]: ...

    def __getitem__(self, index: int | slice) -> tuple[float, int] | list[tuple[float, int]]:
        """The level at a position, and its best window: of equally good ones the first.

        Raises:
            TypeError: `index` is neither a whole number nor a slice.
            IndexError: There is no such level.
        """
        if isinstance(index, slice):
            return [self._best(position) for position in range(len(self))[index]]
        count = len(self)
        index = check_count(index, "index", minimum=-sys.maxsize, maximum=sys.maxsize)
        if not -count <= index < count:
            # What ends an iteration over a sequence.
            raise IndexError(f"`index` must be in 0..{count - 1}, got {index}")
        return self._best(index)

    def _best(self, index: int) -> tuple[float, int]:
        row = self.similarities[index]
        return self.ratios[index], self.windows[row.index(max(row))]

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write a JSON file with every level's window and the similarities it was chosen by.

        Args:
            path: File to write; its folder must exist.
            force: Whether a file that is there may be replaced.

        Raises:
            FileExistsError: The file is there and `force` is False; it is a pipe or a device.
            IsADirectoryError: `path` is a folder.
            FileNotFoundError: The folder of `path` does not exist.
            OSError: The file cannot be written.
        """
        levels = [
            {"ratio": ratio, "window": window, "similarities": list(row)}
            for (ratio, window), row in zip(self, self.similarities, strict=True)
        ]
        content = {
            "format": f"pyflocality {_WHAT}",
            "version": _VERSION,
            "windows": list(self.windows),
            "levels": levels,
        }
        write_object(path, content, force)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WindowTable:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: The system does not let it be read, or takes no such name.
            ValueError: The file is damaged, or not a window table of this version.
        """
        content = read_object(path, _WHAT, _VERSION)
        try:
            levels = content["levels"]
            table = cls(
                tuple(level["ratio"] for level in levels),
                tuple(content["windows"]),
                tuple(tuple(level["similarities"]) for level in levels),
            )
            stated = [level["window"] for level in levels]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if stated != [window for _, window in table]:
            raise ValueError(f"{path} is damaged: its windows do not follow from its similarities")
        return table


def calibrate_windows(
    data: TrainingSet,
    network: DenoiserFunction,
    schedule: NoiseSchedule | None = None,
    *,
    steps: int = 10,
    samples: int = 16,
    windows: Sequence[int] | None = None,
    model: Callable[[TrainingSet, int], Denoiser] = LocalDenoiser,
    generator: torch.Generator | None = None,
    progress: bool = True,
    batch_size: int | None = None,
) -> WindowTable:
    r"""Choose a local model's window at each noise level, by a trained network.

    The network samples from noise by DDIM. At each of its steps the window wins whose score

    .. math::
        s(x) = (\alpha \hat x_0(x) - x) / \sigma^2

    has the highest cosine similarity with the network's own score at the same states x, by the
    median over the samples (Kamb and Ganguli 2025).

    Args:
        data: The training set of the local model, best the one that the network was trained on.
        network: The trained network, as a function (x, sigma, alpha) -> x0: a `NetworkDenoiser`.
        schedule: Noise schedule to sample with; by default `DDPMSchedule()`.
        steps: Number of steps, which is that of noise levels in the table.
        samples: Images that are sampled.
        windows: Sides to try; by default the odd numbers from 3 to min(H, W).
        model: Makes the local model from the set and a side: `LocalDenoiser`,
            `EquivariantDenoiser`, or a function that sets their options.
        generator: Source of the starting noise; by default torch's global generator.
        progress: Show progress bars on standard error.
        batch_size: Images per call; by default all samples.

    Returns:
        A table for the argument `window` of the model, with all similarities.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, a window does not fit the images, or the network
            answers NaN.
    """
    shape = check_set(data).image_shape
    schedule = _check_run(network, schedule, model, generator)
    steps, progress = check_rounds(steps, "steps"), check_flag(progress, "progress")
    samples = check_within_memory(
        check_count(samples, "samples"), 8 * steps * data.num_values, "samples"
    )
    if batch_size is not None:
        batch_size = check_count(batch_size, "batch_size")
    if windows is None:
        windows = range(3, min(shape[1:]) + 1, 2)
    windows = tuple(check_count(window, "windows") for window in _check_filled(windows, "windows"))
    # Refuses a wrong window before any work.
    models = [_model_of(model, data, window) for window in windows]
    device = data.device if generator is None else generator.device
    # The network may be any function, without a shape and a device of its own.
    size = (samples, *shape)
    noise = torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(
        data.device
    )
    run = sample(
        network,
        schedule=schedule,
        steps=steps,
        x_T=schedule.init_noise_sigma * noise,
        progress=progress,
        batch_size=batch_size,
    )
    if not torch.isfinite(run.x0).all():
        raise ValueError("`network` answered NaN or infinite values")
    ratios, rows = _similarities(run, schedule, models, progress, batch_size)
    return WindowTable(ratios, windows, rows)


def _model_of(model: Callable[..., Denoiser], data: TrainingSet, window: int) -> Denoiser:
    try:
        return model(data, window)
    except ValueError as error:
        raise ValueError(f"`windows` holds {window}, which does not fit: {error}") from error


def _check_run(
    network: object, schedule: object, model: object, generator: object
) -> NoiseSchedule:
    """Check what is sampled and compared; the schedule, with the default filled in."""
    check_callable(network, "network")
    check_callable(model, "model")
    check_generator(generator)
    schedule = DDPMSchedule() if schedule is None else schedule
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"`schedule` must be a NoiseSchedule, got {describe(schedule)}")
    return schedule


@torch.no_grad()
def _similarities(
    run: SampleResult,
    schedule: NoiseSchedule,
    models: Sequence[Denoiser],
    progress: bool,
    batch_size: int | None,
) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...]]:
    """Noise levels sigma / alpha of a run, and the similarities of each model at each."""
    alphas, sigmas = schedule(run.timesteps)
    rows: list[list[float]] = [[] for _ in run.timesteps]
    visits = [(step, model) for step in range(len(rows)) for model in models]
    for step, model in progress_bar(visits, description="comparing windows", enabled=progress):
        x, alpha, sigma = run.x_t[step], float(alphas[step]), float(sigmas[step])
        parts = x.split(len(x) if batch_size is None else batch_size)
        answers = torch.cat([model(part, sigma, alpha) for part in parts])
        # The factor 1 / sigma^2 of the score does not change an angle.
        scores = (alpha * result.double() - x.double() for result in (answers, run.x0[step]))
        rows[step].append(_median_cosine(*scores))
    ratios = tuple((sigmas / alphas).tolist())
    return ratios, tuple(map(tuple, rows))


def _median_cosine(a: Tensor, b: Tensor) -> float:
    """Median over images [n, C, H, W] of the cosine of the angle between a and b."""
    return float(torch.cosine_similarity(a.flatten(1), b.flatten(1), eps=1e-300).quantile(0.5))


def _check_filled(values: object, name: str) -> Sequence:
    given = check_sequence(values, name)
    if len(given) == 0:
        raise ValueError(f"`{name}` must hold at least one value, got none")
    return given


def _check_numbers(values: object, name: str, low: float, high: float) -> None:
    for value in _check_filled(values, name):
        check_real(value, name, low=low, high=high, above=True, below=True)
