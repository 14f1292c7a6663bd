"""One rank of the tests of sharded sets: `python distributed_worker.py MODE OUT`.

Started with the environment that torchrun gives its processes. Whatever is asked for lies in
OUT / rank-<number>.pt afterwards.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pyflocality as pf
from pyflocality import ops

SHAPE, COUNT, SIGMAS, ALPHAS = (2, 6, 5), 23, (0.3, 1.5), (0.9, 0.6)


def whole_set(dtype: torch.dtype) -> pf.TrainingSet:
    """The set that every rank knows and shards."""
    generator = torch.Generator().manual_seed(11)
    images = torch.randint(0, 256, (COUNT, *SHAPE), generator=generator, dtype=torch.uint8)
    # The first image once more, on the last rank: as near as itself to anything.
    images[-1] = images[0]
    if dtype == torch.uint8:
        return pf.TrainingSet(images)
    return pf.TrainingSet((images.double() / 127.5 - 1).clamp(-1, 1).to(dtype))


def arguments() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy images with little and with much noise, directions, sigma and alpha."""
    generator = torch.Generator().manual_seed(12)
    x = torch.randn(2, *SHAPE, generator=generator)
    directions = torch.randn(3, 2, *SHAPE, generator=generator)
    return x, directions, torch.tensor(SIGMAS), torch.tensor(ALPHAS)


def values_of_first(data: pf.TrainingSet) -> torch.Tensor:
    """Values of the first image of the whole set, of which `data` may be a part."""
    return whole_set(data.dtype).values(0, 1, dtype=torch.float64)


def split_answers(split: Callable[[pf.LocalDenoiser], Any]) -> dict[str, torch.Tensor]:
    """What is sampled when the batches of a denoiser are split.

    Args:
        split: Makes a denoiser of which every rank does a part of the batch.
    """
    found = {}
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(14)
        start = torch.randn(5, *SHAPE, generator=generator).to(dtype)
        for count in (1, 5):
            drawn = pf.sample(
                split(pf.LocalDenoiser(whole_set(torch.uint8), 3)),
                steps=3,
                sampler=pf.DDIM(eta=1.0),
                x_T=start[:count],
                generator=generator,
                progress=False,
            )
            found[f"{count} {dtype}"] = drawn.images
    # Levels of their own for the images.
    x = torch.stack([-torch.zeros(SHAPE), *start[:2].float()])
    levels = torch.tensor([0.1, 0.5, 2.0]), torch.tensor([1.0, 0.9, 0.5])
    found["levels"] = split(pf.LocalDenoiser(whole_set(torch.uint8), 3))(x, *levels)
    found["signs"] = torch.signbit(split(_Negative())(x, 1.0, 1.0))
    return found


class _Negative:
    """A denoiser that answers minus zero."""

    def __call__(self, x: torch.Tensor, sigma: float, alpha: float) -> torch.Tensor:
        return -torch.zeros_like(x)


def answers(data: pf.TrainingSet, backend: str) -> dict[str, torch.Tensor]:
    """What every model and `Moments` answer, by name."""
    x, directions, sigma, alpha = arguments()
    if data.dtype == torch.float64:
        x, directions = x.double(), directions.double()
    generator = torch.Generator().manual_seed(13)
    values = data.num_values
    weights = torch.rand(7, values, generator=generator) > 0.5
    responses = torch.rand(7, values, generator=generator) > 0.6
    square = torch.rand(values, values, generator=generator) > 0.7
    models = {
        "optimal": pf.OptimalDenoiser(data, backend=backend),
        "local": pf.LocalDenoiser(data, 3, backend=backend),
        "masked": pf.FilteredPosteriorDenoiser(data, square, backend=backend),
        "patches": pf.PatchSetDenoiser(data, 3, backend=backend),
        "filtered": pf.FilteredPosteriorDenoiser(data, weights, responses, backend=backend),
        "pca": pf.PCALocalityDenoiser(data, 0.02, backend=backend),
        "equivariant": pf.EquivariantDenoiser(data, 3, backend=backend),
        "wiener": pf.WienerDenoiser(data),
        "gaussian mixture": pf.GaussianMixtureDenoiser(data, 0.3, backend=backend),
    }
    models["sloped"] = pf.LocallyLinearDenoiser(models["local"], 0.4)
    models["sloped pca"] = pf.LocallyLinearDenoiser(models["pca"], 0.4)
    # Other models for each of the levels.
    shares = [(0.3, (0.3, 0.7, 0.0)), (2.5, (0.0, 0.4, 0.6))]
    mixed = [models[name] for name in ("optimal", "local", "sloped pca")]
    models["mixture"] = pf.MixtureDenoiser(mixed, shares)
    found = {}
    for name, model in models.items():
        found[name] = model(x, sigma, alpha)
        # The patch set's derivatives and those of two others run on the reference backend alone.
        alone = "patches", "filtered", "equivariant"
        if backend == "reference" or name not in alone:
            found[f"{name} jvp"] = model.jvp(x, directions, sigma, alpha)[1]
            found[f"{name} vjp"] = model.vjp(x, directions, sigma, alpha)
    found["log sums"] = models["local"].log_sum_exp(x, sigma, alpha)
    flipped = pf.LocalDenoiser(data.augmented(flip=True), 3, backend=backend)
    found["flipped"] = flipped(x, sigma, alpha)
    # No noise: the nearest image, which lies on one of the ranks.
    found["nearest"] = models["optimal"](x, 0.0)
    flips = data.augmented(flip=True).augmentation
    first = values_of_first(data)
    for name, queries in (("neighbours", x), ("ties", torch.cat([first, first.flip(3)]))):
        near = ops.nearest_images(queries.to(x.dtype), data.images, k=3, augmentation=flips)
        found |= {name: near.indices, f"{name}, distances": near.distances}
    moments = pf.Moments.from_data(data)
    found |= {"mean": moments.mean, "covariance": moments.covariance}
    found["count"] = torch.tensor(moments.count)
    drawn = pf.sample(
        models["local"], 2, steps=3, generator=torch.Generator().manual_seed(5), progress=False
    )
    found["samples"] = drawn.images
    return found


def refusals(data: pf.TrainingSet, rank: int) -> dict[str, str]:
    """What a sharded set answers to those who would take a part of it for the whole."""
    x, _, sigma, alpha = arguments()
    whole = pf.OptimalDenoiser(whole_set(torch.uint8))
    attempts = {
        "values": lambda: data.values(0, 2),
        "subset": lambda: data.subset([0]),
        "key": data.content_key,
        "nearest": lambda: pf.NearestDenoiser(data)(x, sigma, alpha),
        "batch mean": lambda: pf.PCALocalityDenoiser(data, aggregation="batch_mean")(x, 1.0),
        "samples": lambda: pf.distributed.split_samples(pf.OptimalDenoiser(data))(x, 1.0),
        "samples differ": lambda: pf.distributed.split_samples(whole)(x + rank, 1.0),
        "samples of a shape": lambda: pf.distributed.split_samples(lambda x, *_: x[:, :1])(
            torch.cat([x, x]), 1.0
        ),
        "golden": lambda: pf.GoldenSubset(pf.OptimalDenoiser(data))(x, sigma, alpha),
        "differ": lambda: pf.OptimalDenoiser(data)(x + rank, 1.0),
        "other operation": lambda: pf.LocalDenoiser(data, 3 + 2 * rank)(x, 1.0),
        "twice": lambda: pf.distributed.shard(data),
        "pickle": lambda: torch.save(data, os.devnull),
        "by sigma": lambda: (
            pf.OptimalDenoiser(data)(x, torch.tensor(1.0, requires_grad=True)).sum().backward()
        ),
    }
    told = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            told[name] = "answered"
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


def main() -> None:
    """Run one mode."""
    mode, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    with pf.distributed.ranks(timeout=4.0 if mode == "stuck" else 60.0):
        whole = whole_set(torch.uint8)
        data = pf.distributed.shard(whole)
        if mode == "answers":
            result = {
                "cpu": answers(data, "auto"),
                "float64": answers(pf.distributed.shard(whole_set(torch.float64)), "reference"),
                "split": split_answers(pf.distributed.split_samples),
                "refusals": refusals(data, rank),
                "repr": repr(data),
                "length": len(data),
            }
            torch.save(result, out / f"rank-{rank}.pt")
            return
        denoiser = pf.OptimalDenoiser(data)
        x = arguments()[0]
        denoiser(x, 1.0)
        (out / f"ready-{rank}").touch()
        if mode == "killed" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "stuck" and rank == 1:
            time.sleep(15)
            return
        denoiser(x, 2.0)


if __name__ == "__main__":
    main()
