"""Denoisers in compiled graphs, traces and memory: what is kept, what is refused."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from differentiated import (
    ALPHA,
    SHAPE,
    SIGMA,
    against,
    along,
    assert_close,
    call,
    denoiser_of,
    directions,
    images,
    largest,
    noisy,
)
from every_denoiser import MAKERS, SLOPED
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from truth import random_images

import pyflocality as pf

SMOOTH = [name for name in MAKERS if name != "nearest"]

each_smooth = pytest.mark.parametrize("name", SMOOTH)


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors held at a time inside the block, but for one given."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.live, self.peak, self._seen = 0, 0, {given.untyped_storage()._cdata}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(tensor, Tensor) or tensor.untyped_storage()._cdata in self._seen:
                continue
            storage = tensor.untyped_storage()
            self._seen.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return out

    def _forget(self, storage: int, size: int) -> None:
        self._seen.discard(storage)
        self.live -= size


@contextmanager
def bytes_kept() -> Iterator[list[int]]:
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


@each_smooth
def test_nothing_but_the_arguments_is_kept_for_backward(name):
    x = noisy().requires_grad_()
    with bytes_kept() as sizes:
        call(name)(x)
    # The images, and two float64 levels each.
    assert sum(sizes) <= x.nbytes + 2 * 3 * 8


# Golden subsets gather a share of the set, certified ones keep coefficients of all of it, and those
# with a slope or whitened images the linear images of a level.
GROWING = {"golden", "golden_pca", "certified", "gaussian_mixture"} | SLOPED


@pytest.mark.parametrize("name", [name for name in SMOOTH if name not in GROWING | {"wiener"}])
def test_memory_of_derivatives_does_not_grow_with_the_set(name):
    peaks = []
    for count in (30, 90) if "equivariant" in name else (200, 600):
        data = pf.TrainingSet(
            random_images(torch.Generator().manual_seed(1), count, SHAPE, torch.uint8)
        )
        denoiser = MAKERS[name](data, backend="reference", memory_budget="20KB")
        # Builds masks.
        denoiser(noisy(1), 0.4, 0.9)
        with PeakMemory(data.images) as memory:
            denoiser.jvp(noisy(1), directions(2, 1), 0.4, 0.9)
            x = noisy(1).requires_grad_()
            denoiser(x, 0.4, 0.9).sum().backward()
        peaks.append(memory.peak)
    assert peaks[1] <= 1.1 * peaks[0]


def test_a_fixed_window_takes_all_noise_levels_together():
    with pf.trace_backends() as calls:
        denoiser_of("local")(noisy(), SIGMA, ALPHA)
    assert len(calls) == 1


TRACERS = ("eager", "aot_eager")


@pytest.fixture
def compiled() -> Iterator[Callable[..., Callable[..., Tensor]]]:
    torch.compiler.reset()
    yield functools.partial(torch.compile, fullgraph=True)
    torch.compiler.reset()


@pytest.mark.parametrize(("name", "tracer"), [("local", "aot_eager"), ("pca", "eager")])
def test_compiled_in_one_graph(name, tracer, compiled):
    denoiser = denoiser_of(name)
    graph = compiled(denoiser, backend=tracer)
    for sigma, alpha in ((0.3, 0.8), (0.4, 0.9), (SIGMA, ALPHA)):
        assert torch.equal(graph(noisy(), sigma, alpha), denoiser(noisy(), sigma, alpha))
    x, g = noisy().requires_grad_(), directions(1)
    (graph(x, SIGMA, ALPHA) * g[0]).sum().backward()
    assert_close(x.grad, against(name, g)[0])
    u = directions(2)
    products = compiled(lambda x, u: denoiser.jvp(x, u, SIGMA, ALPHA)[1], backend=tracer)
    assert_close(products(noisy(), u), along(name, u))
    with pytest.raises(ValueError, match="`x` holds NaN"):
        graph(noisy() * torch.nan, SIGMA, ALPHA)


def test_compiled_copies_are_told_apart(compiled):
    one = pf.LocalDenoiser(images(), 3)
    other = copy.deepcopy(one)
    other.window = 5
    both = compiled(lambda x: one(x, 0.4) + 2 * other(x, 0.4), backend="eager")
    assert torch.equal(both(noisy()), one(noisy(), 0.4) + 2 * other(noisy(), 0.4))
    assert largest(one(noisy(), 0.4) - other(noisy(), 0.4)) > 1e-3


@pytest.mark.parametrize("tracer", TRACERS)
def test_compiled_graphs_refuse_what_they_would_lose(tracer, compiled):
    x, denoiser = noisy(), denoiser_of("local")
    inside = compiled(
        lambda x: torch.func.jvp(lambda z: denoiser(z, 0.4), (x,), (x,))[1], backend=tracer
    )
    with pytest.raises(Exception, match="lose forward-mode tangents|torch.func inside"):
        inside(x)
    inside = compiled(
        lambda x: torch.func.vjp(lambda z: denoiser(z, 0.4), x)[1](x)[0], backend=tracer
    )
    with pytest.raises(Exception, match="torch.func inside torch.compile"):
        inside(x)
    graph = compiled(denoiser, backend=tracer)
    with forward_ad.dual_level(), pytest.raises(Exception, match="lose forward-mode tangents"):
        graph(forward_ad.make_dual(x, x), 0.4)


def test_compiled_gradients_by_the_noise_level_are_refused(compiled):
    graph = compiled(denoiser_of("local"), backend="aot_eager")
    with pytest.raises(Exception, match="only first derivatives by `x` can be traced"):
        graph(noisy(), SIGMA.clone().requires_grad_()).sum().backward()
