"""Derivatives through every denoiser: explicit Jacobians of the float64 reference are the truth."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from every_denoiser import MAKERS
from native_cpu import needs_cpu
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from truth import random_images

import pyflocality as pf

SHAPE = (1, 3, 5)
D = 15
SIGMA = torch.tensor([0.25, 0.45, 0.9], dtype=torch.float64)
ALPHA = torch.tensor([1.0, 0.8, 0.9], dtype=torch.float64)
EPS = 1.2e-7
each = pytest.mark.parametrize("name", MAKERS)
SMOOTH = [name for name in MAKERS if name != "nearest"]
each_smooth = pytest.mark.parametrize("name", SMOOTH)


@functools.lru_cache
def images(count: int = 40) -> pf.TrainingSet:
    generator = torch.Generator().manual_seed(1)
    return pf.TrainingSet(random_images(generator, count, SHAPE, torch.uint8))


@functools.lru_cache
def denoiser_of(name: str, count: int = 40) -> pf.Denoiser:
    return MAKERS[name](images(count))


def noisy(batch: int = 3) -> Tensor:
    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2))
    column = (slice(3), None, None, None)
    x = ALPHA[column] * images().values(5, 8).double() + SIGMA[column] * noise
    # Values that float32 holds, so that both precisions see the same problem.
    return x[:batch].float().double()


def directions(count: int, batch: int = 3, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, batch, *SHAPE, generator=generator).double()


@functools.lru_cache
def jacobians(name: str) -> Tensor:
    """One Jacobian for each of three noisy images: backward passes of the reference, [3, D, D]."""
    x = noisy().requires_grad_()
    with pf.use_backend("reference"):
        denoiser = denoiser_of(name)
        levels = denoiser._checked(x, SIGMA, ALPHA).levels
        out = denoiser._denoise(x, levels).flatten(1).sum(0)
    if not out.requires_grad:
        return torch.zeros(3, D, D, dtype=torch.float64)
    rows = [torch.autograd.grad(value, x, retain_graph=True)[0].flatten(1) for value in out]
    return torch.stack(rows, 1)


def along(name: str, tangents: Tensor) -> Tensor:
    batch = tangents.shape[1]
    product = torch.einsum("bmd,kbd->kbm", jacobians(name)[:batch], tangents.flatten(2))
    return product.reshape(tangents.shape)


def against(name: str, cotangents: Tensor) -> Tensor:
    batch = cotangents.shape[1]
    product = torch.einsum("bmd,kbm->kbd", jacobians(name)[:batch], cotangents.flatten(2))
    return product.reshape(cotangents.shape)


def call(name: str, batch: int = 3) -> Callable[[Tensor], Tensor]:
    denoiser = denoiser_of(name)
    return lambda x: denoiser(x, SIGMA[:batch], ALPHA[:batch])


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@each
@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("batch", [1, 3])
def test_jvp_and_vjp_equal_the_jacobian(name, count, batch):
    x, u = noisy(batch), directions(count, batch)
    level = SIGMA[:batch], ALPHA[:batch]
    assert jacobians(name).abs().max() > 0.1 or name == "nearest"
    estimate, jv = denoiser_of(name).jvp(x, u, *level)
    assert_close(estimate, denoiser_of(name)(x, *level), 1e-12)
    assert_close(jv, along(name, u))
    assert_close(denoiser_of(name).vjp(x, u, *level), against(name, u))


@each
def test_jvp_equals_finite_differences(name):
    x, u = noisy(), directions(1)
    _, jv = denoiser_of(name).jvp(x, u, SIGMA, ALPHA)
    step = 1e-5
    ends = [call(name)(x + side * step * u[0]) for side in (1, -1)]
    # The third derivative grows as sigma^-6, times step^2.
    assert_close(jv[0], (ends[0] - ends[1]) / (2 * step), 1e-4)


def largest(values: Tensor) -> float:
    return float(values.abs().max())


@each
def test_float32_holds_its_budget(name):
    """Errors in float32: of sums of some hundred products, times alpha / sigma^2.

    Distances have a relative error of EPS, which moves a derivative by that share of the logits,
    at most D (1 + alpha / sigma); products are of order min(sigma / alpha, 1)^2 |u| where values
    are counted from near the image that fits.
    """
    x, u = noisy(), directions(3)
    exact = along(name, u), against(name, u)
    narrow = x.float(), u.float(), SIGMA, ALPHA
    found = denoiser_of(name).jvp(*narrow)[1], denoiser_of(name).vjp(*narrow)
    for b in range(3):
        sigma, alpha = float(SIGMA[b]), float(ALPHA[b])
        logit = D * (1 + alpha / sigma)
        product = alpha / sigma**2 * min(sigma / alpha, 1) ** 2 * largest(u.flatten(2).norm(dim=2))
        for one, true in zip(found, exact, strict=True):
            allowed = EPS * (4 * logit * largest(true[:, b]) + 8 * product)
            assert largest(one[:, b] - true[:, b]) <= allowed


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["optimal", "wiener", "pca", "local", "filtered", "patch_set"])
def test_autocast_lowers_no_precision(name, backend):
    x, u = noisy().float(), directions(2).float()

    def everything() -> list[Tensor]:
        denoiser, leaf = denoiser_of(name), x.clone().requires_grad_()
        sigma = SIGMA.float().requires_grad_()
        denoiser(leaf, sigma, ALPHA).square().sum().backward()
        row = pf.analysis.sensitivity(denoiser, x, SIGMA, ALPHA, pixel=(0, 1, 2))
        products = denoiser.jvp(x, u, SIGMA, ALPHA)[1], denoiser.vjp(x, u, SIGMA, ALPHA)
        return [denoiser(x, SIGMA, ALPHA), *products, row, leaf.grad, sigma.grad]

    with pf.use_backend(backend):
        expected = everything()
        with torch.autocast("cpu", torch.bfloat16):
            found = everything()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


@each
def test_backward(name):
    x, g = noisy().requires_grad_(), directions(1)[0]
    (call(name)(x) * g).sum().backward()
    assert_close(x.grad, against(name, g[None])[0])


@each
def test_forward_mode(name):
    x, u = noisy(), directions(1)
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(call(name)(forward_ad.make_dual(x, u[0])))
    assert_close(out.primal, call(name)(x), 1e-12)
    assert_close(out.tangent, along(name, u)[0])


@each
def test_torch_func_products(name):
    x, u = noisy(), directions(2)
    value, derivative = torch.func.jvp(call(name), (x,), (u[0],))
    assert_close(value, call(name)(x), 1e-12)
    assert_close(derivative, along(name, u)[0])
    value, pull = torch.func.vjp(call(name), x)
    assert_close(pull(u[0])[0], against(name, u)[0])
    assert_close(torch.vmap(lambda g: pull(g)[0])(u), against(name, u))
    _, push = torch.func.linearize(call(name), x)
    assert_close(push(u[1]), along(name, u)[1])


@each
def test_torch_func_jacobians(name):
    x = noisy(1)
    expected = jacobians(name)[:1].reshape(1, *SHAPE, 1, *SHAPE)
    assert_close(torch.func.jacrev(call(name, 1))(x), expected)
    assert_close(torch.func.jacfwd(call(name, 1))(x), expected)


@each
def test_jacobians_of_every_image_by_vmap(name):
    denoiser = denoiser_of(name)

    def alone(x: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
        return denoiser(x[None], sigma, alpha)[0]

    found = torch.vmap(torch.func.jacrev(alone))(noisy(), SIGMA, ALPHA)
    assert_close(found.reshape(3, D, D), jacobians(name))
    found = torch.vmap(torch.func.jacfwd(alone))(noisy(), SIGMA, ALPHA)
    assert_close(found.reshape(3, D, D), jacobians(name))


@each
def test_vmap_over_every_argument(name):
    denoiser, x = denoiser_of(name), torch.stack([noisy(), noisy().flip(0)])
    expected = torch.stack([denoiser(part, SIGMA, ALPHA) for part in x])
    assert_close(torch.vmap(call(name))(x), expected, 1e-12)
    behind = torch.vmap(call(name), in_dims=4, out_dims=1)(x.movedim(0, 4))
    assert_close(behind, expected.transpose(0, 1), 1e-12)
    levels = torch.vmap(lambda s, a: denoiser(x[0], s, a))(SIGMA, ALPHA)
    expected = torch.stack([denoiser(x[0], float(s), float(a)) for s, a in zip(SIGMA, ALPHA)])  # noqa: B905
    assert_close(levels, expected, 1e-12)
    nested = torch.vmap(lambda part: torch.vmap(lambda s: denoiser(part, s))(SIGMA))(x)
    expected = torch.stack([torch.stack([denoiser(part, float(s)) for s in SIGMA]) for part in x])
    assert_close(nested, expected, 1e-12)


SECOND = {
    "hessian": torch.func.hessian,
    "backward twice": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "forward twice": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
    "backward over forward": lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
}


def second_by_differences(name: str, g: Tensor) -> Tensor:
    """Second derivatives of sum(g * estimate) at one image: differences of vjp, [D, D]."""
    x, level, step = noisy(1), (0.4, 0.9), 1e-5
    units = torch.eye(D, dtype=torch.float64).reshape(D, 1, *SHAPE)
    ends = [
        torch.stack(
            [denoiser_of(name, 9).vjp(x + side * step * e, g[None], *level)[0] for e in units]
        )
        for side in (1, -1)
    ]
    return ((ends[0] - ends[1]) / (2 * step)).reshape(D, D)


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, "hessian") for name in MAKERS]
    + [(name, way) for name in ("optimal", "local") for way in SECOND if way != "hessian"],
)
def test_second_derivatives(name, way):
    g, denoiser = directions(1, 1)[0], denoiser_of(name, 9)
    found = SECOND[way](lambda x: (denoiser(x, 0.4, 0.9) * g).sum())(noisy(1))
    expected = second_by_differences(name, g)
    assert largest(expected) > 0.1 or name in ("nearest", "wiener")
    assert_close(found.reshape(D, D), expected)


@pytest.mark.parametrize("name", ["optimal", "filtered", "wiener"])
def test_gradcheck_by_all_arguments(name):
    arguments = [noisy(1), SIGMA[1:2].clone(), ALPHA[1:2].clone()]
    arguments = [argument.requires_grad_() for argument in arguments]
    assert torch.autograd.gradcheck(
        denoiser_of(name, 9), arguments, check_forward_ad=True, fast_mode=True
    )


@pytest.mark.parametrize("name", ["pca", "local"])
def test_gradgradcheck(name):
    x, denoiser = noisy(1).requires_grad_(), denoiser_of(name, 9)
    assert torch.autograd.gradgradcheck(
        lambda x: denoiser(x, 0.4, 0.9), (x,), check_fwd_over_rev=True, fast_mode=True
    )


@pytest.mark.parametrize("name", ["local", "wiener"])
def test_products_are_themselves_differentiable(name):
    x, g = noisy(1), directions(1, 1)
    denoiser, second = denoiser_of(name, 9), second_by_differences(name, g[0])
    by_vjp = torch.func.jacrev(lambda x: denoiser.vjp(x, g, 0.4, 0.9))(x)
    assert_close(by_vjp.reshape(D, D), second)
    u = directions(1, 1, seed=4)
    start = x.clone().requires_grad_()
    _, jv = denoiser.jvp(start, u, 0.4, 0.9)
    (gradient,) = torch.autograd.grad((jv * g).sum(), start)
    assert_close(gradient.flatten(), second @ u.flatten())


@each
def test_derivatives_by_the_noise_level(name):
    """By sigma and alpha with the windows, masks and patches of the level as they are."""
    denoiser, x, g = denoiser_of(name), noisy(), directions(1)[0]
    if name == "pca_signed":
        for level in ("sigma", "alpha"):
            given = {"sigma": SIGMA.clone(), "alpha": ALPHA.clone()}
            given[level].requires_grad_()
            with pytest.raises(NotImplementedError, match="no derivative by `sigma` or `alpha`"):
                denoiser(x, **given).sum().backward()
        return
    step = 1e-6
    for level in ("sigma", "alpha"):
        given = {"sigma": SIGMA.clone(), "alpha": ALPHA.clone()}
        ends = [denoiser(x, **{**given, level: given[level] + side * step}) for side in (1, -1)]
        expected = (ends[0] - ends[1]) / (2 * step)
        assert largest(expected) > 0.05 or name == "nearest"
        one = torch.ones(3, dtype=torch.float64)
        run = functools.partial(lambda value, level, given: denoiser(x, **{**given, level: value}))
        along_level = functools.partial(run, level=level, given=given)
        found = torch.func.jvp(along_level, (given[level],), (one,))[1]
        assert_close(found, expected, 1e-6)
        leaf = given[level].clone().requires_grad_()
        (along_level(leaf) * g).sum().backward()
        assert_close(leaf.grad, (expected * g).flatten(1).sum(1), 1e-6)
        with forward_ad.dual_level():
            dual = along_level(forward_ad.make_dual(given[level], one))
            assert_close(forward_ad.unpack_dual(dual).tangent, expected, 1e-6)


def test_a_number_for_all_images_collects_all_their_gradients():
    sigma = torch.tensor(0.4, requires_grad=True)
    denoiser_of("local")(noisy(), sigma).square().sum().backward()
    ends = [denoiser_of("local")(noisy(), 0.4 + side * 1e-6).square().sum() for side in (1, -1)]
    assert float(sigma.grad) == pytest.approx(float(ends[0] - ends[1]) / 2e-6, rel=1e-4)


@needs_cpu
@pytest.mark.parametrize(
    ("name", "op"),
    [("optimal", "global_posterior"), ("local", "window_posterior"), ("pca", "masked_posterior")],
)
def test_native_kernels_run_where_derivatives_are_asked(name, op):
    x, g = noisy(1).float().requires_grad_(), directions(1, 1)
    with pf.trace_backends() as calls:
        out = call(name, 1)(x)
    assert calls[-1] == (op, "cpu")
    with pf.trace_backends() as calls:
        out.backward(g[0].float())
    # The optimal denoiser's Jacobian is symmetric.
    assert calls == [(op + ("_jvp" if name == "optimal" else "_vjp"), "cpu")]
    assert_close(x.grad.double(), against(name, g)[0], 1e-4)
    with pf.trace_backends() as calls:
        torch.func.jvp(call(name, 1), (x.detach(),), (x.detach(),))
    assert calls == [(op, "cpu"), (op + "_jvp", "cpu")]
    with pf.trace_backends() as calls:
        denoiser_of(name).jvp(x.detach(), directions(2, 1).float(), SIGMA[:1], ALPHA[:1])
    assert calls == [(op + "_jvp", "cpu")]


@needs_cpu
def test_tangents_alone_go_through_the_set_together():
    x = noisy().float()
    with pf.trace_backends() as calls:
        torch.func.jacfwd(call("optimal"))(x)
    # A pass for the estimate, and one for all 45 tangents.
    assert calls.count(("global_posterior_jvp", "cpu")) == 1


@needs_cpu
def test_a_backend_without_the_derivative_refuses():
    denoiser = pf.OptimalDenoiser(images(), backend="cpu")
    x = noisy().float().requires_grad_()
    (gradient,) = torch.autograd.grad(denoiser(x, 0.4).sum(), x, create_graph=True)
    with pytest.raises(pf.BackendUnavailableError, match="it has no derivative"):
        gradient.sum().backward()
    sigma = torch.tensor(0.4, requires_grad=True)
    with pytest.raises(pf.BackendUnavailableError, match="it has no derivative"):
        denoiser(x, sigma).sum().backward()


def test_backward_keeps_the_backend_of_the_call():
    x = noisy().float().requires_grad_()
    with pf.use_backend("reference"):
        out = call("optimal")(x)
    with pf.trace_backends() as calls:
        out.sum().backward()
    assert calls == [("global_posterior_jvp", "reference")]


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


# Golden subsets gather a share of the set, and certified ones keep coefficients of all of it.
GROWING = {"golden", "golden_pca", "certified"}


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


@pytest.mark.parametrize("name", ["optimal", "local", "wiener"])
def test_overflowed_gradients_are_nan_where_they_overflowed(name):
    x, g = noisy().requires_grad_(), directions(1)[0]
    g[1, 0, 0, 0] = torch.inf
    (gradient,) = torch.autograd.grad(call(name)(x), x, g)
    assert gradient[1].isnan().all()
    g[1] = 0
    expected = against(name, g[None])[0]
    assert_close(gradient[::2], expected[::2])


def test_values_that_vmap_hides_are_checked_all_the_same():
    x = noisy()
    with pytest.raises(ValueError, match="`x` holds NaN"):
        torch.vmap(lambda x: denoiser_of("wiener")(x, 0.3))(torch.stack([x, x * torch.nan]))
    with pytest.raises(ValueError, match="`sigma` must be finite and not negative"):
        torch.vmap(lambda s: denoiser_of("wiener")(x, s))(-SIGMA)


class Shift(pf.Denoiser):
    """A denoiser with a parameter, and nothing but `_denoise`."""

    device = torch.device("cpu")

    def __init__(self, trained: bool) -> None:
        super().__init__(SHAPE)
        self.shift = torch.tensor(0.3)
        if trained:
            self.shift = torch.nn.Parameter(self.shift)

    def _denoise(self, x, levels) -> Tensor:
        _, sigma = levels.columns(3, x.device)
        return (x + self.shift).sin() * sigma.to(x.dtype)


@pytest.mark.parametrize("trained", [False, True])
def test_a_denoiser_that_says_nothing_about_its_derivatives_has_them(trained):
    denoiser, x, u = Shift(trained), noisy(), directions(2)
    slope = (x + 0.3).cos() * SIGMA[:, None, None, None]
    estimate, jv = denoiser.jvp(x, u, SIGMA)
    assert_close(estimate, denoiser(x, SIGMA))
    assert_close(jv, slope * u)
    assert_close(denoiser.vjp(x, u, SIGMA), slope * u)
    expected = torch.stack([denoiser(part, SIGMA) for part in u])
    assert_close(torch.vmap(lambda x: denoiser(x, SIGMA))(u), expected)
    if trained:
        denoiser(x, SIGMA).sum().backward()
        assert_close(denoiser.shift.grad.double(), slope.sum())


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


def test_a_linearised_denoiser_must_live():
    def linearised() -> Callable[[Tensor], Tensor]:
        denoiser = pf.OptimalDenoiser(images())
        _, push = torch.func.linearize(lambda x: denoiser(x, 0.4), noisy())
        assert_close(push(noisy()), denoiser.jvp(noisy(), noisy()[None], 0.4)[1][0])
        return push

    push = linearised()
    gc.collect()
    with pytest.raises(RuntimeError, match="is gone: keep it"):
        push(noisy())
