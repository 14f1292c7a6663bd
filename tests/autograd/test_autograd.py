"""Derivatives through every denoiser: explicit Jacobians of the float64 reference are the truth."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable

import pytest
import torch
from differentiated import (
    ALPHA,
    SHAPE,
    SIGMA,
    D,
    against,
    along,
    assert_close,
    call,
    denoiser_of,
    directions,
    images,
    jacobians,
    largest,
    noisy,
)
from every_denoiser import MAKERS, SLOPED
from native_cpu import needs_cpu
from torch import Tensor
from torch.autograd import forward_ad

import pyflocality as pf

EPS = 1.2e-7
each = pytest.mark.parametrize("name", MAKERS)


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
    if name in {"pca_signed", "pca_soft"} | SLOPED:
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
