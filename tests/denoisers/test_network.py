"""Trained networks as denoisers: formulas, noise levels, derivatives, a published network."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import pyflocality as pf

SHAPE = (2, 5, 4)
SCHEDULES = {
    "ddpm": pf.DDPMSchedule(),
    "cosine": pf.CosineSchedule(),
    "karras": pf.KarrasSchedule(),
    "flow": pf.FlowSchedule(),
}


class Oracle(nn.Module):
    """Knows the clean images in its own range, and answers in any of the four ways."""

    def __init__(self, clean, predicts, takes, s=None):
        super().__init__()
        self.register_buffer("clean", clean)
        self.predicts, self.takes, self.s = predicts, takes, s
        self.seen = None

    def forward(self, y, told=None):
        self.seen = (y, told)
        if isinstance(self.takes, pf.NoiseSchedule):
            a, s = self.takes(told)
        else:
            a, s = torch.ones(len(y)), self.s if told is None else told
        a, s = (level.double().reshape(-1, 1, 1, 1) for level in (a, s))
        noise = (y - a * self.clean) / s
        return {
            "x0": self.clean.expand_as(y),
            "noise": noise,
            "residual": s * noise,
            "v": a * noise - s * self.clean,
        }[self.predicts]


class Mixing(nn.Module):
    """A small nonlinear network with parameters, conditioned on sigma."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.first = nn.Conv2d(2, 6, 3, padding=1, dtype=dtype)
        self.last = nn.Conv2d(6, 2, 3, padding=1, dtype=dtype)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype) / 4

    def forward(self, y, sigma):
        return self.last(torch.tanh(self.first(y) + sigma[:, None, None, None]))


def noisy(batch=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)


def clean(batch=3):
    generator = torch.Generator().manual_seed(4)
    return torch.rand(batch, *SHAPE, generator=generator, dtype=torch.float64) * 2 - 1


def mixing(predicts="residual", **options):
    return pf.NetworkDenoiser(Mixing(), predicts, takes="sigma", image_shape=SHAPE, **options)


@pytest.mark.parametrize("predicts", ["x0", "noise", "residual", "v"])
@pytest.mark.parametrize("takes", ["sigma", "nothing", *SCHEDULES])
@pytest.mark.parametrize("value_range", [(-1.0, 1.0), (0.0, 1.0), (-0.5, 2.0)])
def test_what_an_oracle_knows_is_answered(predicts, takes, value_range):
    low, high = value_range
    x0, noise = clean(), noisy()
    own = low + (high - low) * (x0 + 1) / 2
    schedule = SCHEDULES.get(takes)
    if takes == "ddpm":
        # Levels at which the network's range meets the table exactly.
        alpha, sigma = schedule(torch.tensor([0, 300, 900]))
        sigma = sigma * 2 / (high - low)
    else:
        alpha, sigma = torch.tensor([1.0, 0.8, 0.1]).double(), torch.tensor([0.05, 0.6, 0.9])
        sigma = sigma.double()
    s = (high - low) / 2 * sigma / alpha
    oracle = Oracle(own, predicts, schedule or takes, s)
    denoiser = pf.NetworkDenoiser(
        oracle, predicts, takes=schedule or takes, image_shape=SHAPE, value_range=value_range
    )
    x = alpha.reshape(-1, 1, 1, 1) * x0 + sigma.reshape(-1, 1, 1, 1) * noise
    found = denoiser(x, sigma, alpha)
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-9)

    # It was shown the same image with the same noise, in its own terms.
    y, told = oracle.seen
    a = schedule(told)[0] if schedule else torch.ones(3)
    if schedule:
        torch.testing.assert_close(schedule(told)[1] / a, s, rtol=1e-9, atol=0)
    expected = a.reshape(-1, 1, 1, 1) * (own + s.reshape(-1, 1, 1, 1) * noise)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


def test_at_levels_of_the_schedule_the_network_sees_x_itself():
    schedule = pf.DDPMSchedule()
    times = torch.tensor([0, 1, 500, 999])
    oracle = Oracle(clean(4), "noise", schedule)
    denoiser = pf.NetworkDenoiser(oracle, "noise", takes=schedule, image_shape=SHAPE)
    alpha, sigma = schedule(times)
    x = noisy(4)
    denoiser(x, sigma, alpha)
    y, told = oracle.seen
    assert torch.equal(y, x) and torch.equal(told, times) and told.dtype == torch.int64


def test_other_levels_get_the_nearest_time_in_log_ratio():
    schedule = pf.DDPMSchedule()
    alpha, sigma = schedule(torch.arange(1000))
    table = (sigma / alpha).log()
    ratios = torch.tensor(
        [1e-9, 0.0, 0.01, 0.0137, 0.3, 1.0, 7.77, 157.0, 1e6], dtype=torch.float64
    )
    oracle = Oracle(clean(9), "x0", schedule)
    denoiser = pf.NetworkDenoiser(oracle, takes=schedule, image_shape=SHAPE)
    denoiser(noisy(9), ratios)
    expected = [
        0 if ratio == 0 else int((table - math.log(ratio)).abs().argmin())
        for ratio in ratios.tolist()
    ]
    assert oracle.seen[1].tolist() == expected
    assert expected[-1] == 999 and 0 < expected[3] < expected[4]


def test_between_times_the_noise_that_is_there_counts():
    # A perfect predictor of the noise gives the clean image at any level, also between two times.
    x0, noise = clean(1), noisy(1)

    class KnowsNoise(nn.Module):
        def forward(self, y, t):
            return noise

    denoiser = pf.NetworkDenoiser(
        KnowsNoise(), "noise", takes=pf.DDPMSchedule(), image_shape=SHAPE, value_range=(0, 1)
    )
    found = denoiser(0.7 * x0 + 0.4321 * noise, 0.4321, 0.7)
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("predicts", ["x0", "noise", "residual", "v"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tangents", [1, 3, 8])
def test_products_with_the_jacobian(predicts, batch, tangents):
    denoiser = mixing(predicts, value_range=(0, 1))
    x = noisy(batch)
    sigma = torch.linspace(0.2, 0.9, batch, dtype=torch.float64)
    generator = torch.Generator().manual_seed(tangents)
    u = torch.randn(tangents, *x.shape, generator=generator, dtype=torch.float64)
    full = torch.autograd.functional.jacobian(lambda x: denoiser(x, sigma, 0.9), x)
    x0, jv = denoiser.jvp(x, u, sigma, 0.9)
    g = denoiser.vjp(x, u, sigma, 0.9)
    torch.testing.assert_close(x0, denoiser(x, sigma, 0.9).detach(), rtol=0, atol=1e-12)
    expected = torch.einsum("bchwaijk,naijk->nbchw", full, u)
    torch.testing.assert_close(jv, expected, rtol=0, atol=1e-12)
    expected = torch.einsum("bchwaijk,nbchw->naijk", full, u)
    torch.testing.assert_close(g, expected, rtol=0, atol=1e-12)
    assert not (jv.requires_grad or g.requires_grad or x0.requires_grad)


def test_many_directions_in_parts_and_none():
    denoiser = mixing()
    x = noisy(3)
    u = torch.randn(50, *x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    together = denoiser.jvp(x, u, 0.4)[1], denoiser.vjp(x, u, 0.4)
    for index in (0, 20, 21, 49):
        one = u[index : index + 1]
        alone = denoiser.jvp(x, one, 0.4)[1], denoiser.vjp(x, one, 0.4)
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[index], part[0], rtol=0, atol=1e-12)
    assert denoiser.jvp(x, u[:0], 0.4)[1].shape == denoiser.vjp(x, u[:0], 0.4).shape == u[:0].shape


def test_gradients_flow_to_the_input_and_the_parameters():
    denoiser = mixing("v")
    x = noisy(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: denoiser(x, 0.5, 0.8), (x,))
    denoiser(x, 0.5, 0.8).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in denoiser.parameters())
    u = torch.ones(2, *x.shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: denoiser.jvp(x, u, 0.5, 0.8)[1], (x,))
    assert torch.autograd.gradcheck(lambda x: denoiser.vjp(x, u, 0.5, 0.8), (x,))
    u = torch.ones_like(x)
    _, jv = torch.func.jvp(lambda x: denoiser(x, 0.5, 0.8), (x.detach(),), (u,))
    expected = denoiser.jvp(x.detach(), u[None], 0.5, 0.8)[1][0]
    torch.testing.assert_close(jv.detach(), expected, rtol=0, atol=1e-12)
    jacobian = torch.func.jacrev(lambda x: denoiser(x, 0.5, 0.8))(x.detach())
    expected = torch.autograd.functional.jacobian(lambda x: denoiser(x, 0.5, 0.8), x)
    torch.testing.assert_close(jacobian.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("own", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_network_runs_in_its_own_dtype(own, dtype):
    module = Mixing(own)
    seen = []
    module.register_forward_pre_hook(lambda _, given: seen.extend(t.dtype for t in given))
    denoiser = pf.NetworkDenoiser(module, "residual", takes="sigma", image_shape=SHAPE)
    found = denoiser(noisy(dtype=dtype), 0.4, 0.8)
    assert found.dtype == dtype and set(seen) == {own}
    exact = mixing()(noisy(), 0.4, 0.8)
    tolerance = 3e-2 if torch.bfloat16 == own else 3e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance)


def test_levels_per_image_equal_one_call_each():
    denoiser = mixing()
    sigma, alpha = torch.tensor([0.0, 0.3, 2.0]), torch.tensor([1.0, 0.8, 0.3])
    together = denoiser(noisy(), sigma, alpha)
    for b in range(3):
        alone = denoiser(noisy()[b : b + 1], float(sigma[b]), float(alpha[b]))
        torch.testing.assert_close(together[b], alone[0], rtol=0, atol=1e-12)
    assert denoiser(noisy(0), 0.3).shape == (0, *SHAPE)


def test_copies_and_sampling():
    denoiser = mixing()
    for twin in (copy.deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser))):
        assert torch.equal(twin(noisy(), 0.3), denoiser(noisy(), 0.3))
    fresh = pf.NetworkDenoiser(Mixing(), takes="sigma", image_shape=SHAPE)
    fresh.load_state_dict(denoiser.state_dict())
    assert set(fresh.state_dict()) == {f"module.{name}" for name in Mixing().state_dict()}
    out = pf.sample(denoiser, 2, steps=3, progress=False, generator=torch.Generator())
    assert out.images.shape == (2, *SHAPE) and torch.isfinite(out.images).all()
    assert "residual" in repr(denoiser) and "sigma" in repr(denoiser)


def test_a_network_without_parameters_is_where_it_is_moved():
    denoiser = pf.NetworkDenoiser(nn.Identity(), takes="nothing", image_shape=SHAPE)
    assert torch.equal(denoiser(noisy(), 0.3, 0.5), noisy() / 0.5)
    assert denoiser.device == torch.device("cpu")
    assert denoiser.to("meta").device == torch.device("meta")


WRONG = {
    "module": (lambda: {"module": math.sin}, TypeError, "`module` must be a torch.nn.Module"),
    "predicts": (lambda: {"predicts": "score"}, ValueError, "`predicts` must be one of 'x0'"),
    "takes": (lambda: {"takes": "t"}, ValueError, "`takes` must be one of 'sigma', 'nothing'"),
    "takes type": (lambda: {"takes": 3}, TypeError, "`takes` must be a schedule"),
    "shape": (lambda: {"image_shape": (3, 4)}, ValueError, r"`image_shape` must be \(C, H, W\)"),
    "shape type": (lambda: {"image_shape": 8}, TypeError, "`image_shape`"),
    "shape size": (lambda: {"image_shape": (3, 0, 4)}, ValueError, "`image_shape` must be at"),
    "range": (lambda: {"value_range": (1, 0)}, ValueError, "`value_range` must be finite and"),
    "range nan": (lambda: {"value_range": (0, math.nan)}, ValueError, "`value_range`"),
    "range type": (lambda: {"value_range": 255}, TypeError, "`value_range` must be two numbers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_refused(case):
    change, error, message = WRONG[case]
    given = {"module": nn.Identity(), "takes": "nothing", "image_shape": SHAPE} | change()
    with pytest.raises(error, match=message):
        pf.NetworkDenoiser(given.pop("module"), **given)


@pytest.mark.parametrize("part", [nn.Dropout(0.5), nn.BatchNorm2d(2)])
def test_derivatives_of_what_changes_from_call_to_call_are_refused(part):
    module = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), part)
    denoiser = pf.NetworkDenoiser(module, "residual", takes="nothing", image_shape=SHAPE)
    x = noisy(dtype=torch.float32)
    message = rf"`module` must be in evaluation mode .* {type(part).__name__} '1'"
    for product in (denoiser.jvp, denoiser.vjp):
        with pytest.raises(ValueError, match=message):
            product(x, x[None], 0.5)
    # Training itself goes on.
    denoiser(x, 0.5).square().sum().backward()
    assert module[0].weight.grad.abs().max() > 0
    denoiser.eval()
    full = torch.autograd.functional.jacobian(lambda x: denoiser(x, 0.5), x)
    expected = torch.einsum("bchwaijk,aijk->bchw", full, x)
    torch.testing.assert_close(denoiser.jvp(x, x[None], 0.5)[1][0], expected)


@pytest.mark.parametrize("product", ["jvp", "vjp"])
def test_parameters_get_gradients_through_products_where_the_input_has_them(product):
    x = noisy(1)
    u = torch.ones(1, *x.shape, dtype=torch.float64)

    def size(denoiser, x):
        found = getattr(denoiser, product)(x, u, 0.5)
        return (found[1] if product == "jvp" else found).square().sum()

    def moved(step):
        denoiser = mixing()
        denoiser.module.first.weight.data[0, 0, 1, 1] += step
        return denoiser

    denoiser = mixing()
    assert not size(denoiser, x).requires_grad
    size(denoiser, x.clone().requires_grad_()).backward()
    expected = float(size(moved(1e-5), x) - size(moved(-1e-5), x)) / 2e-5
    found = float(denoiser.module.first.weight.grad[0, 0, 1, 1])
    assert found == pytest.approx(expected, rel=1e-5) and abs(expected) > 1e-3


def test_wrong_calls_are_refused():
    denoiser, x = mixing(), noisy()
    cropping = pf.NetworkDenoiser(nn.AvgPool2d(2), takes="nothing", image_shape=SHAPE)
    u = torch.zeros(1, *x.shape, dtype=torch.float64)
    nan = u + math.nan
    for call, error, message in (
        (lambda: denoiser(x[..., :3], 0.3), ValueError, r"`x` must have shape \[B, 2, 5, 4\]"),
        (lambda: denoiser(x, -1.0), ValueError, "`sigma`"),
        (lambda: denoiser(x * math.nan, 1.0), ValueError, "`x` holds NaN"),
        (lambda: cropping(x, 0.3), ValueError, "`module` must return images of shape"),
        (lambda: denoiser.jvp(x, u[0], 0.3), ValueError, r"`tangents` must have shape \[K, 3, 2"),
        (lambda: denoiser.jvp(x, u.float(), 0.3), TypeError, "`tangents` must be torch.float64"),
        (lambda: denoiser.jvp(x, nan, 0.3), ValueError, "`tangents` holds NaN"),
        (lambda: denoiser.jvp(x, u, 0.3, 0.0), ValueError, "`alpha`"),
        (lambda: denoiser.jvp(x, u.to("meta"), 0.3), ValueError, "`tangents`"),
        (lambda: denoiser.vjp(x, u[:, :1], 0.3), ValueError, "`cotangents` must have shape"),
        (lambda: denoiser.vjp(x * math.nan, u, 0.3), ValueError, "`x` holds NaN"),
    ):
        with pytest.raises(error, match=message):
            call()


class BiasFree(nn.Module):
    """The published denoiser: convolutions without bias, scaled by running deviations."""

    def __init__(self, state):
        super().__init__()
        count = sum("conv_layers" in key for key in state)
        for index in range(count):
            self.register_buffer(f"weight{index}", state[f"module.conv_layers.{index}.weight"])
        for index in range(count - 2):
            layer = f"module.BN_layers.{index}"
            scale = state[f"{layer}.gammas"] / state[f"{layer}.running_sd"]
            self.register_buffer(f"scale{index}", scale)
        self.count = count

    def forward(self, h):
        for index in range(self.count):
            weight = getattr(self, f"weight{index}")
            h = nn.functional.conv2d(h, weight, padding=weight.shape[-1] // 2)
            if 0 < index < self.count - 1:
                h = torch.relu(h * getattr(self, f"scale{index - 1}"))
        return h


@pytest.fixture
def published(shared_net):
    state = torch.load(shared_net("bfcnn_rf13.pt"), weights_only=True, map_location="cpu")
    return pf.NetworkDenoiser(
        BiasFree(state), "residual", takes="nothing", image_shape=(1, 40, 40), value_range=(0, 1)
    )


@pytest.mark.parametrize("level", ["s25", "s75"])
def test_published_network(level, golden, published):
    file = {key[4:]: value for key, value in golden("bfcnn_public.npz").items() if level in key}
    published = published.double()
    y = torch.from_numpy(file["y"]).double()
    # Their [0, 1] is our [-1, 1]: x = 2 y - 1 and twice the noise; the Jacobian is the same.
    x, sigma = 2 * y - 1, 2 * int(level[1:]) / 255
    top = torch.from_numpy(file["eigvec_sym_top5"])[:, None, None].double()
    pixels = torch.zeros(2, 1, 1, 40, 40, dtype=torch.float64)
    pixels[0, 0, 0, 20, 20] = pixels[1, 0, 0, 0, 0] = 1
    x0, jv = published.jvp(x, torch.cat([y[None], pixels[:1], top]), sigma)
    g = published.vjp(x, torch.cat([pixels, top]), sigma)

    def close(found, name, tolerance):
        np.testing.assert_allclose(found.numpy(), file[name], rtol=0, atol=tolerance)

    # What is left is their float32.
    close((x0 + 1) / 2, "f", 5e-6)
    close(g[0, 0, 0], "row_center", 5e-6)
    close(g[1, 0, 0], "row_corner", 5e-6)
    close(jv[1, 0, 0], "col_center", 5e-6)
    # Locally linear: the network has no bias, so that J y = f(y).
    f = (x0 + 1) / 2
    assert (jv[0] - f).norm() / f.norm() < 1e-12
    # Their eigenvectors and eigenvalues of (J + J^T) / 2, without the matrix.
    symmetric = (jv[2:] + g[2:]) / 2
    values = torch.from_numpy(file["eig_sym_top20"][:5]).reshape(5, 1, 1, 1, 1).double()
    torch.testing.assert_close(symmetric, values * top, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_published_network_all_eigenvalues(golden, published):
    file = golden("bfcnn_public.npz")
    x = 2 * torch.from_numpy(file["s75_y"]) - 1
    pixels = torch.eye(1600).reshape(1600, 1, 1, 40, 40)
    jacobian = published.jvp(x, pixels, 2 * 75 / 255)[1].reshape(1600, 1600).T.double()
    symmetric = (jacobian + jacobian.T) / 2
    found = torch.linalg.eigvalsh(symmetric).flip(0)
    expected = np.sort(file["s75_eig_sym_all"])[::-1]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-5)
    singular = torch.linalg.svdvals(jacobian)[:20]
    np.testing.assert_allclose(singular.numpy(), file["s75_sv_top20"], rtol=0, atol=2e-5)
    assert float(jacobian.trace()) == pytest.approx(float(file["s75_trace"]), rel=1e-5)
    antisymmetric = (jacobian - jacobian.T).norm() / jacobian.norm()
    assert float(antisymmetric) == pytest.approx(float(file["s75_asym_ratio"]), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["s25", "s75"])
def test_published_network_by_the_analysis(level, golden, published):
    """Their figures from full Jacobians, ours without a matrix."""
    pytest.importorskip("scipy", reason="spectra need SciPy")
    file = {key[4:]: value for key, value in golden("bfcnn_public.npz").items() if level in key}
    # In the network's own terms: where values are moved, f(x) = J x holds up to a constant.
    denoiser = pf.NetworkDenoiser(
        published.module, "residual", takes="nothing", image_shape=(1, 40, 40)
    )
    y, sigma = torch.from_numpy(file["y"]), int(level[1:]) / 255
    found = pf.analysis.jacobian_spectrum(denoiser, y, sigma, k=20)
    np.testing.assert_allclose(found.values.numpy(), file["eig_sym_top20"], rtol=0, atol=2e-5)
    top = torch.from_numpy(file["eigvec_sym_top5"]).double()
    overlaps = (found.vectors[:5, 0] * top).sum((1, 2)).abs()
    torch.testing.assert_close(overlaps, torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-4)
    assert found.residuals.max() < 5e-5

    singular = pf.analysis.jacobian_singular(denoiser, y, sigma, k=20)
    np.testing.assert_allclose(singular.values.numpy(), file["sv_top20"], rtol=0, atol=5e-5)

    found = pf.analysis.jacobian_spectrum(denoiser, y, sigma, k=20, symmetrized=False)
    expected = file["eig_nonsym_top20"]
    np.testing.assert_allclose(
        found.values.abs().numpy(), np.sort(np.abs(expected))[::-1], rtol=0, atol=2e-4
    )
    distances = np.abs(found.values.numpy()[:, None] - expected[None])
    # Conjugate pairs may be cut by the number that is asked for.
    assert (distances.min(0) < 5e-4).sum() >= 19

    # Theirs is the rounding of float32.
    assert file["Jy_minus_f_rel"] < 2e-6
    assert pf.analysis.local_linearity(denoiser, y, sigma).max() < 5e-6
    exact = pf.analysis.local_linearity(denoiser.double(), y.double(), sigma)
    assert exact.max() < 1e-12
