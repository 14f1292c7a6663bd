"""The samples of a run, made batch by batch: what is held does not grow with their steps.

Whatever their number, a run holds the starting noise of all of them, what a batch takes, and the
few that are drawn; the values go into a file as they come. The batches follow from the shape of
the images and the number of steps, so a run that is started again has the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pyflocality._support.record import Stages

if TYPE_CHECKING:
    from torch import Tensor

    from pyflocality.cli._options import NoiseOptions
    from pyflocality.cli._recorded import RecordedDenoiser
    from pyflocality.ops.nearest import Neighbours
    from pyflocality.sampling import DenoiserFunction

# How many samples are drawn in a picture, and of how many the way from noise.
SHOWN, SHOWN_WAYS = 256, 3
# At how many steps a way is drawn.
_COLUMNS = 10
# A batch has at least so many images, those whose way is drawn among them; else so many bytes in a
# state, and so many in the answers of all its steps, which are kept for a run that goes on. For
# tensors beyond 32 MiB the C library asks the system each time, which took twice the arithmetic.
_LEAST, _STATE_BYTES, _ANSWERS_BYTES = 64, 16 * 2**20, 2**30


@dataclass(frozen=True)
class Way:
    """The way of the first samples from noise, at the steps that are drawn.

    Attributes:
        x_t: States [columns, ways, C, H, W].
        x0: The denoiser's answers to them.
        steps: Which steps these are.
    """

    x_t: Tensor
    x0: Tensor
    steps: list[int]


@dataclass(frozen=True)
class Samples:
    """What a run came to, the same on every rank.

    Attributes:
        images: The first samples, as many as are drawn, [n, C, H, W].
        way: The way of the first of them, where it is drawn.
        neighbours: The training images nearest to all samples, or None where nobody looked.
    """

    images: Tensor
    way: Way | None
    neighbours: Neighbours | None


class _Watched:
    """A denoiser of which states and answers are kept where a step that is drawn begins."""

    def __init__(self, observed: RecordedDenoiser, sampling: NoiseOptions, ways: int) -> None:
        import torch

        self.image_shape, self.device = observed.image_shape, observed.device
        columns = min(sampling.steps, _COLUMNS)
        shown = torch.linspace(0, sampling.steps - 1, columns).round().long()
        self.steps: list[int] = shown.tolist()
        # Heun's method asks twice in a step, first where it begins.
        stride = 2 if sampling.sampler == "heun" else 1
        self._kept_calls = {stride * step for step in self.steps}
        self._observed, self._ways, self._calls = observed, ways, 0
        self.pairs: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        answer = self._observed(x, sigma, alpha)
        if self._calls in self._kept_calls:
            self.pairs += [x[: self._ways].clone(), answer[: self._ways].clone()]
        self._calls += 1
        return answer


def batch_size(image_shape: tuple[int, ...], steps: int) -> int:
    """How many samples are made at a time."""
    import math

    size = 4 * math.prod(image_shape)
    return max(_LEAST, min(_STATE_BYTES, _ANSWERS_BYTES // steps) // size)


def starting_noise(observed: RecordedDenoiser, sampling: NoiseOptions) -> Tensor:
    """The noise that a run starts from; the same seed starts every denoiser from the same one."""
    import torch

    generator = torch.Generator().manual_seed(sampling.seed)
    noise = torch.randn(sampling.n, *observed.image_shape, generator=generator)
    return noise.mul_(sampling.noise_schedule().init_noise_sigma)


def draw(
    denoiser: DenoiserFunction, sampling: NoiseOptions, start: Tensor, *, progress: bool
) -> Tensor:
    """The samples that a denoiser makes of noise, [n, C, H, W]."""
    from pyflocality import sample

    run = sample(
        denoiser,
        schedule=sampling.noise_schedule(),
        steps=sampling.steps,
        sampler=sampling.sampler,
        x_T=start,
        progress=progress,
        trajectory=False,
    )
    return run.images


def make_samples(
    recorded: RecordedDenoiser,
    sampling: NoiseOptions,
    look: Callable[[Tensor], Neighbours] | None,
    write: Callable[[Tensor], None],
    stages: Stages,
    *,
    ways: int,
    progress: bool,
) -> Samples:
    """Make the samples of a run, on every rank alike.

    Args:
        recorded: The denoiser.
        sampling: How to sample.
        look: Finds the training images nearest to samples; None where nobody is to look.
        write: Takes the samples on the CPU, float32, as they come.
        stages: The stopwatch.
        ways: Of how many samples the way is kept.
        progress: Whether there are progress bars.
    """
    import torch

    from pyflocality.ops.nearest import Neighbours

    noise = starting_noise(recorded, sampling)
    ways = min(ways, len(noise))
    parts = noise.split(batch_size(tuple(recorded.image_shape), sampling.steps))
    way, shown, near = None, [], []
    for number, start in enumerate(parts):
        done = number * len(parts[0])
        some = f"{len(noise)} images"
        if len(parts) > 1:
            some = f"images {done + 1} to {done + len(start)} of {len(noise)}"
        with stages("sampling", f"sampling {some} in {sampling.steps} steps"):
            start = start.to(recorded.device)
            own = ways if number == 0 else 0
            images, some_way = _batch(recorded, sampling, start, len(parts) > 1, own, progress)
        way = some_way if own else way
        if done < SHOWN:
            shown.append(images[: SHOWN - done].cpu())
        write(images.cpu().float())
        if look is not None:
            near.append(look(images))
    return Samples(
        torch.cat(shown),
        way,
        Neighbours(*map(torch.cat, zip(*near, strict=True))) if near else None,
    )


def _batch(
    recorded: RecordedDenoiser,
    sampling: NoiseOptions,
    start: Tensor,
    is_one_of_many: bool,
    ways: int,
    progress: bool,
) -> tuple[Tensor, Way]:
    """A batch of samples and the way of the first, or what an interrupted run made of it."""
    import torch

    watched = _Watched(recorded, sampling, ways)
    columns, count = len(watched.steps), len(start)
    kept = None
    if is_one_of_many:
        like = start.new_empty(count + 2 * columns * ways, *start.shape[1:])
        kept = recorded.finished(start, like)
    if kept is None:
        images = draw(watched, sampling, start, progress=progress)
        kept = torch.cat([images, *watched.pairs])
        if is_one_of_many:
            recorded.finish(start, kept)
    pairs = kept[count:].reshape(columns, 2, ways, *start.shape[1:])
    return kept[:count], Way(pairs[:, 0], pairs[:, 1], watched.steps)


class SamplesFile:
    """A `with` block in which samples are written as they come.

    Args:
        path: The .npy file of all their values.
        count: How many there will be.
        singles: Pictures of single samples, in order.
    """

    def __init__(self, path: Path, count: int, singles: Iterable[Path]) -> None:
        self._path, self._count, self._singles = path, count, iter(singles)

    def __enter__(self) -> SamplesFile:
        """Open the file."""
        self._file: IO[bytes] = open(self._path, "wb")
        return self

    def write(self, images: Tensor) -> None:
        """Write the next samples, float32 on the CPU, [n, C, H, W]."""
        import numpy as np

        from pyflocality import pictures

        if self._file.tell() == 0:
            shape = (self._count, *images.shape[1:])
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self._file, header)
        # Plain writes, not a map: a full disk is then an error and not a bus error.
        self._file.write(images.contiguous().numpy().astype("<f4", copy=False).data)
        for image, path in zip(images, self._singles, strict=False):
            pictures.image_grid(image[None], pad=0, scale=1).save(path)

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._file.close()
