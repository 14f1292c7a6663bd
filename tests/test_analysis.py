"""Analysis against explicit Jacobians and explicit posteriors in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from truth import random_images

import pyflocality as pf
from pyflocality import analysis, synthetic

SHAPE = (2, 4, 5)
SIGMA, ALPHA = 0.6, 0.8
SIZE = math.prod(SHAPE)


@pytest.fixture(scope="module")
def data() -> pf.TrainingSet:
    return pf.TrainingSet(
        random_images(torch.Generator().manual_seed(5), 40, SHAPE, torch.uint8), name="random"
    )


@pytest.fixture(scope="module")
def x() -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)


def make(name: str, data: pf.TrainingSet) -> pf.Denoiser:
    return {
        "optimal": lambda: pf.OptimalDenoiser(data),
        "wiener": lambda: pf.WienerDenoiser(data),
        "local": lambda: pf.LocalDenoiser(data, 3),
        "pca": lambda: pf.PCALocalityDenoiser(data, mask_threshold=0.1),
        "patches": lambda: pf.PatchSetDenoiser(data, 3),
    }[name]()


def explicit(denoiser: pf.Denoiser, image: Tensor) -> Tensor:
    """The Jacobian [D, D] at one image, by autograd through plain torch."""
    with pf.use_backend("reference"):
        jacobian = torch.func.jacrev(lambda y: denoiser(y[None], SIGMA, ALPHA)[0])(image)
    return jacobian.reshape(SIZE, SIZE)


NAMES = ("optimal", "wiener", "local", "pca", "patches")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pixel", [(0, 0, 0), (1, 2, 3), (-1, -1, 0)])
def test_sensitivity_is_a_row_of_the_jacobian(name, pixel, data, x):
    denoiser = make(name, data)
    found = analysis.sensitivity(denoiser, x, SIGMA, ALPHA, pixel=pixel)
    for image, field in zip(x, found, strict=True):
        row = explicit(denoiser, image).reshape(*SHAPE, *SHAPE)[pixel].abs()
        assert row.max() > 1e-4
        torch.testing.assert_close(field, row, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["optimal", "local", "pca"])
def test_sensitivity_in_single_precision_runs_on_the_best_backend(name, data, x):
    denoiser = make(name, data)
    with pf.trace_backends() as calls:
        found = analysis.sensitivity(denoiser, x.float(), SIGMA, ALPHA, pixel=(1, 2, 3))
    assert {backend for _, backend in calls} == {
        "cpu" if pf._backends.machine_reason("cpu") is None else "reference"
    }
    exact = analysis.sensitivity(denoiser, x, SIGMA, ALPHA, pixel=(1, 2, 3))
    assert (found.double() - exact).abs().max() < 1e-5


def test_fields_along_a_run_are_means_over_its_samples(data):
    denoiser = pf.LocalDenoiser(data, 3)
    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    pixels = [(0, 1, 1), (1, 3, 4)]
    run = analysis.sensitivity_along_run(
        denoiser, pixels, steps=4, every=2, x_T=noise, progress=False
    )
    out = pf.sample(denoiser, x_T=noise, steps=4, progress=False)
    assert run.fields.shape == (2, 2, *SHAPE) and run.timesteps.tolist() == [750.0, 250.0]
    for row, step in enumerate((0, 2)):
        level = (float(run.sigma[row]), float(run.alpha[row]))
        for column, pixel in enumerate(pixels):
            mean = analysis.sensitivity(denoiser, out.x_t[step], *level, pixel=pixel).mean(0)
            torch.testing.assert_close(run.fields[row, column], mean)
    scaled = run.scaled()
    assert scaled.amin((-3, -2, -1)).eq(0).all() and scaled.amax((-3, -2, -1)).eq(1).all()


def test_high_snr_projection_keeps_components_above_the_noise(data):
    moments = pf.Moments.from_data(data)
    covariance = moments.covariance.reshape(SIZE, SIZE)
    values, vectors = torch.linalg.eigh(covariance)
    sigma = float((values[-6] * values[-7]).sqrt().sqrt()) * ALPHA
    kept = vectors[:, -6:]
    row = (1 * SHAPE[1] + 2) * SHAPE[2] + 3
    expected = (kept @ kept.T)[row].abs().reshape(SHAPE)
    found = analysis.high_snr_projection(moments, sigma, ALPHA, pixel=(1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_injected_pattern_has_the_variance_that_was_put_in(data):
    pattern = torch.zeros(SHAPE[1:])
    pattern[1:3, 2] = 1.0
    gamma, many = 0.5, pf.TrainingSet(data.images.repeat(500, 1, 1, 1))
    injected = synthetic.inject_pattern(many, pattern, gamma)
    assert injected.images.dtype == torch.uint8 and len(injected) == len(many)
    direction = torch.stack([pattern, torch.zeros_like(pattern)])
    before = analysis.pattern_variance(pf.Moments.from_data(many), direction)
    after = analysis.pattern_variance(pf.Moments.from_data(injected), direction)
    # Var(U(-1, 1)) = 1 / 3, and |W|^2 = 2; 20,000 draws.
    assert after == pytest.approx((1 - gamma) ** 2 * before + gamma**2 * 2 / 3, rel=0.03)
    ruler = analysis.snr_ruler(
        pf.Moments.from_data(injected), direction, torch.tensor([0.5, 2.0]), ALPHA
    )
    expected = after * ALPHA**2 / torch.tensor([0.25, 4.0], dtype=torch.float64)
    torch.testing.assert_close(ruler, expected)


def test_disk_tangents_are_derivatives_of_the_images():
    size, step = 16, 1e-5
    parameters = synthetic.draw_disks(4, size, torch.Generator().manual_seed(3))
    tangents = synthetic.disk_tangents(parameters, size)
    assert tangents.shape == (4, 5, 1, size, size)
    for column, name in enumerate(("x", "y", "radius", "foreground", "background")):
        moved = [
            synthetic.render_disks(
                type(parameters)(**{**vars(parameters), name: getattr(parameters, name) + move}),
                size,
            )
            for move in (-step, step)
        ]
        slope = (moved[1] - moved[0]) / (2 * step)
        # Where a pixel's share reaches 0 or 1 within the step the two may differ.
        wrong = (tangents[:, column] - slope).abs() > 1e-6
        assert wrong.float().mean() < 0.01 and tangents[:, column].abs().amax() > 0.1
    flat = tangents.flatten(2)
    assert torch.linalg.matrix_rank(flat).eq(5).all()


def test_centred_disks_lie_in_the_middle():
    images = synthetic.disks(20, 16, centred=True).images
    torch.testing.assert_close(images, images.flip(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(images, images.transpose(-1, -2), rtol=0, atol=1e-6)
    assert images.flatten(1).std(1).min() > 0


@pytest.mark.parametrize("name", NAMES)
def test_leading_eigenpairs_of_the_symmetric_part(name, data, x):
    denoiser = make(name, data)
    jacobian = explicit(denoiser, x[0])
    values, vectors = torch.linalg.eigh((jacobian + jacobian.T) / 2)
    found = analysis.jacobian_spectrum(denoiser, x[0], SIGMA, ALPHA, k=5)
    torch.testing.assert_close(found.values, values.flip(0)[:5], rtol=1e-7, atol=1e-8)
    overlaps = (found.vectors.flatten(1) @ vectors.flip(1)[:, :5]).diagonal().abs()
    torch.testing.assert_close(overlaps, torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-4)
    assert found.residuals.max() < 1e-6 and 0 < found.products <= 20 * SIZE


def test_complex_eigenvalues_and_singular_values(data, x):
    denoiser = pf.LocalDenoiser(data, 3)
    jacobian = explicit(denoiser, x[:1][0])
    values = torch.linalg.eigvals(jacobian)
    found = analysis.jacobian_spectrum(denoiser, x[:1], SIGMA, ALPHA, k=4, symmetrized=False)
    expected = values.abs().sort(descending=True).values[:4]
    torch.testing.assert_close(found.values.abs(), expected, rtol=1e-7, atol=1e-8)
    assert found.residuals.max() < 1e-6
    triplets = analysis.jacobian_singular(denoiser, x[:1], SIGMA, ALPHA, k=4)
    expected = torch.linalg.svdvals(jacobian)[:4]
    torch.testing.assert_close(triplets.values, expected, rtol=1e-7, atol=1e-8)
    mapped = triplets.right.flatten(1) @ jacobian.T
    torch.testing.assert_close(
        mapped, triplets.values[:, None] * triplets.left.flatten(1), rtol=1e-5, atol=1e-7
    )


def test_trace_estimate(data, x):
    denoiser = pf.LocalDenoiser(data, 3)
    found = analysis.jacobian_trace(denoiser, x, SIGMA, ALPHA, probes=200)
    for image, value, error in zip(x, *found, strict=True):
        assert abs(float(explicit(denoiser, image).trace() - value)) < 4 * float(error)
        assert float(error) < 0.2 * float(value)


def test_linear_denoisers_are_their_own_linearisation(data, x):
    centred = pf.TrainingSet(torch.cat([data.values(), -data.values()]))
    assert analysis.local_linearity(pf.WienerDenoiser(centred), x, SIGMA, ALPHA).max() < 1e-6
    local = pf.LocalDenoiser(data, 3)
    expected = explicit(local, x[0]) @ x[0].flatten()
    answer = local(x[:1], SIGMA, ALPHA).flatten()
    found = analysis.local_linearity(local, x[:1], SIGMA, ALPHA)
    torch.testing.assert_close(found[0], (expected - answer).norm() / answer.norm())


@pytest.mark.parametrize("name", ["optimal", "local", "pca"])
@pytest.mark.parametrize("sigma", [0.1, 0.6, 20.0])
def test_concentration_of_explicit_posteriors(name, sigma, data, x):
    denoiser = make(name, data)
    flat = data.values(dtype=torch.float64).flatten(1)
    squares = (x.flatten(1)[:, None] - ALPHA * flat).square()
    if name == "optimal":
        weights = torch.ones(1, SIZE, dtype=torch.float64)
    elif name == "pca":
        weights = denoiser.weights_at(sigma, ALPHA).dense(torch.float64)
    else:
        rows, columns = torch.arange(SHAPE[1]), torch.arange(SHAPE[2])
        near = (
            ((rows[:, None] - rows).abs() <= 1)[:, None, :, None]
            & ((columns[:, None] - columns).abs() <= 1)[None, :, None, :]
        ).reshape(SHAPE[1] * SHAPE[2], -1)
        weights = near.repeat(1, SHAPE[0]).double()
    p = (-(squares @ weights.T) / (2 * sigma**2)).softmax(1)
    found = analysis.posterior_concentration(denoiser, x, sigma, ALPHA)
    torch.testing.assert_close(
        found.effective_sample_size, 1 / p.square().sum(1), rtol=1e-8, atol=0
    )
    entropy = -(p * p.clamp(min=1e-300).log()).sum(1)
    torch.testing.assert_close(found.entropy, entropy, rtol=0, atol=1e-5)


def test_training_images_are_recognised(data):
    samples = data.values(3, 6, dtype=torch.float64)
    found = analysis.memorization(samples, data)
    assert found.indices.tolist() == [3, 4, 5]
    assert found.distances.eq(0).all() and found.ratio.eq(0).all()
    torch.testing.assert_close(found.similarity, torch.ones(3, dtype=torch.float64))
    between = (samples[:1] + data.values(20, 21, dtype=torch.float64)) / 2
    halfway = analysis.memorization(between, data)
    flat = data.values(dtype=torch.float64).flatten(1)
    distances = (between.flatten() - flat).norm(dim=1).sort().values
    torch.testing.assert_close(halfway.ratio[0], distances[0] / distances[1])
    torch.testing.assert_close(halfway.distances[0], distances[0])


def test_mirrored_training_images_are_recognised(data):
    samples = data.values(3, 6, dtype=torch.float64).flip(-1)
    found = analysis.memorization(samples, data.augmented(flip=True))
    assert found.indices.tolist() == [len(data) + i for i in (3, 4, 5)]
    torch.testing.assert_close(found.similarity, torch.ones(3, dtype=torch.float64))


def test_models_of_one_image_recite_it(data):
    curve = analysis.memorization_curve(
        pf.OptimalDenoiser, data, [1, 20], n=3, steps=3, progress=False
    )
    torch.testing.assert_close(curve.nearest[0], torch.ones(3, dtype=torch.float64))
    assert curve.samples.shape == (2, 2, 3, *SHAPE)
    first, second = curve.samples[0]
    # One image each: all samples of a model are the same.
    assert first.std(0).max() < 1e-6 and (first - second).abs().max() > 0.1
    mean = pf.Moments.from_data(data).mean
    torch.testing.assert_close(curve.between[0], pf.metrics.cosine_similarity(first, second, mean))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d, x: analysis.sensitivity(d, x, 1.0, pixel=(0, 9, 0)), ValueError, "`pixel`"),
        (lambda d, x: analysis.sensitivity(d, x, 1.0, pixel=3), TypeError, "`pixel`"),
        (lambda d, x: analysis.sensitivity(abs, x, 1.0, pixel=(0, 0, 0)), TypeError, "`denoiser`"),
        (lambda d, x: analysis.sensitivity(d, x, 0.0, pixel=(0, 0, 0)), ValueError, "`sigma`"),
        (lambda d, x: analysis.jacobian_spectrum(d, x, 1.0), ValueError, "`x`"),
        (lambda d, x: analysis.jacobian_spectrum(d, x[0], 1.0, k=SIZE), ValueError, "`k`"),
        (lambda d, x: analysis.jacobian_trace(d, x, 1.0, probes=1), ValueError, "`probes`"),
        (
            lambda d, x: analysis.posterior_concentration(pf.WienerDenoiser(d.data), x, 1.0),
            TypeError,
            "`denoiser`",
        ),
        (
            lambda d, x: analysis.memorization_curve(pf.LocalDenoiser, d.data, [21]),
            ValueError,
            "`sizes`",
        ),
        (lambda d, x: analysis.memorization(x[:, :1], d.data), ValueError, "`samples`"),
        (
            lambda d, x: synthetic.inject_pattern(d.data, torch.ones(4, 4), 0.5),
            ValueError,
            "`pattern`",
        ),
        (
            lambda d, x: synthetic.inject_pattern(d.data, torch.ones(4, 5), 1.5),
            ValueError,
            "`gamma`",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, error, message, data, x):
    with pytest.raises(error, match=message):
        call(pf.LocalDenoiser(data, 3), x)
