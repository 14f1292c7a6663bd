"""Analysis against explicit Jacobians and explicit posteriors in float64."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from native_cpu import NO_CPU
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
    assert {backend for _, backend in calls} == {"cpu" if NO_CPU is None else "reference"}
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


def test_fields_of_centred_disks_are_not_local():
    """They follow the covariance: far pixels that vary together count more than near ones."""
    sigma, alpha, size = 0.6, 0.9, 16
    data = synthetic.disks(3000, size, centred=True)
    flat = data.values(dtype=torch.float64).flatten(1)
    centred = flat - flat.mean(0)
    covariance = centred.T @ centred / (len(flat) - 1)
    noisy_covariance = alpha**2 * covariance + sigma**2 * torch.eye(size**2, dtype=torch.float64)
    rows = alpha * torch.linalg.solve(noisy_covariance, covariance)
    wiener = pf.WienerDenoiser(data)
    x = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(8)).double()
    correlation = torch.corrcoef(flat.T).reshape(size, size, size, size)
    # Output, a near pixel that is often across the edge, a far one that seldom is.
    for output, near, far in (
        ((8, 10), (8, 12), (8, 5)),
        ((2, 2), (5, 6), (13, 13)),
        ((8, 8), (8, 11), (5, 7)),
    ):
        field = analysis.sensitivity(wiener, x, sigma, alpha, pixel=(0, *output))[0, 0]
        expected = rows[output[0] * size + output[1]].abs().reshape(size, size)
        torch.testing.assert_close(field, expected, rtol=1e-6, atol=1e-9)
        reach = [math.dist(output, place) for place in (near, far)]
        agreement = [float(correlation[(*output, *place)]) for place in (near, far)]
        assert reach[0] < reach[1] and agreement[0] < agreement[1] - 0.1
        assert field[far] > 1.5 * field[near]
    # Where the disks lie anywhere, the same output listens to what is around it.
    moving = pf.WienerDenoiser(synthetic.disks(3000, size))
    field = analysis.sensitivity(moving, x, sigma, alpha, pixel=(0, 8, 10))[0, 0]
    assert field[8, 12] > 1.5 * field[8, 5]


RECITING = {
    "optimal": lambda data: pf.OptimalDenoiser(data.subset([0])),
    "local": lambda data: pf.LocalDenoiser(data.subset([0]), 3),
    "wiener": lambda data: pf.WienerDenoiser(data.subset([0])),
}


@pytest.mark.parametrize("name", RECITING)
def test_the_jacobian_of_one_image_has_no_spectrum_but_0(name, data, x):
    denoiser = RECITING[name](data)
    for symmetrized in (True, False):
        found = analysis.jacobian_spectrum(
            denoiser, x[0], SIGMA, ALPHA, k=3, symmetrized=symmetrized
        )
        assert found.values.abs().max() < 1e-12 and found.values.is_complex() == (not symmetrized)
        lengths = found.vectors.flatten(1).norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones(3, dtype=torch.float64))
    triplets = analysis.jacobian_singular(denoiser, x[0], SIGMA, ALPHA, k=3)
    assert triplets.values.abs().max() < 1e-12 and triplets.left.shape == (3, *SHAPE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_spectra_of_half_precision_images_are_computed_in_single(dtype, data, x):
    denoiser, image = pf.LocalDenoiser(data, 3), x[0].to(dtype)
    found = analysis.jacobian_spectrum(denoiser, image, SIGMA, ALPHA, k=4)
    exact = analysis.jacobian_spectrum(denoiser, image.double(), SIGMA, ALPHA, k=4)
    torch.testing.assert_close(found.values, exact.values, rtol=1e-5, atol=1e-6)
    assert found.residuals.max() < 1e-5


def test_concentration_stays_within_its_ends(x):
    same = pf.OptimalDenoiser(pf.TrainingSet(torch.full((3, *SHAPE), 7, dtype=torch.uint8)))
    found = analysis.posterior_concentration(same, x.float(), SIGMA, ALPHA)
    torch.testing.assert_close(
        found.effective_sample_size, torch.full((2, 1), 3.0, dtype=torch.float64)
    )
    torch.testing.assert_close(
        found.entropy, torch.full((2, 1), math.log(3), dtype=torch.float64), rtol=0, atol=1e-6
    )


def test_the_runs_of_a_curve_start_at_the_noise_of_their_schedule(data, monkeypatch):
    started = []
    run = analysis.memorization_curve.__globals__["sample"]

    def spy(*arguments, **options):
        started.append(options["x_T"])
        return run(*arguments, **options)

    monkeypatch.setitem(analysis.memorization_curve.__globals__, "sample", spy)
    deviations = []
    for schedule in (pf.DDPMSchedule(), pf.KarrasSchedule()):
        analysis.memorization_curve(
            pf.OptimalDenoiser, data, [2], n=20, steps=2, schedule=schedule, progress=False
        )
        deviations.append(float(started[-1].std()))
    assert deviations[0] == pytest.approx(1.0, rel=0.2)
    assert deviations[1] == pytest.approx(80 * deviations[0], rel=1e-6)


@pytest.mark.parametrize("augmented", [False, True])
def test_similarities_are_counted_from_the_mean_of_all_copies(augmented, data, monkeypatch):
    monkeypatch.setitem(analysis.memorization.__globals__, "_BLOCK", 3 * SIZE)
    whole = data.augmented(flip=True, shifts=1) if augmented else data
    samples = data.values(0, 2, dtype=torch.float64) * 0.5
    found = analysis.memorization(samples, whole)
    mean = pf.Moments.from_data(whole).mean
    given = analysis.memorization(samples, whole, mean=mean)
    torch.testing.assert_close(found.similarity, given.similarity, rtol=1e-12, atol=1e-12)
    assert (
        given.similarity - analysis.memorization(samples, whole, mean=0 * mean).similarity
    ).any()


def test_memorization_needs_no_covariance(data, monkeypatch):
    # Its products of D^2 values would take minutes and gigabytes where images are large.
    monkeypatch.setattr(pf.Moments, "from_data", None)
    found = analysis.memorization(data.values(1, 2), data)
    assert found.indices.tolist() == [1]
    curve = analysis.memorization_curve(pf.OptimalDenoiser, data, [1], n=1, steps=1, progress=False)
    assert curve.nearest.shape == (1, 1)


def test_pixels_in_every_form(data):
    denoiser = pf.LocalDenoiser(data, 3)
    run = functools.partial(analysis.sensitivity_along_run, denoiser, n=1, steps=2, progress=False)
    generators = [torch.Generator().manual_seed(1) for _ in range(4)]
    one = run((1, 2, 3), generator=generators[0])
    for form, generator in zip(
        ([1, 2, 3], [(1, 2, -2)], ((np.int64(1), 2, 3),)), generators[1:], strict=True
    ):
        other = run(form, generator=generator)
        assert torch.equal(other.fields, one.fields) and other.pixels == ((1, 2, 3),)


def test_no_images_have_no_fields(data, x):
    for denoiser in (pf.LocalDenoiser(data, 3), pf.PatchSetDenoiser(data, 3)):
        found = analysis.sensitivity(denoiser, x[:0], SIGMA, pixel=(0, 0, 0))
        assert found.shape == (0, *SHAPE)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("name", ["optimal", "local", "pca"])
def test_fields_of_a_sharded_set(name, data, x):
    expected = analysis.sensitivity(make(name, data), x, SIGMA, ALPHA, pixel=(1, 2, 3))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        denoiser = make(name, pf.distributed.shard(data))
        found = analysis.sensitivity(denoiser, x, SIGMA, ALPHA, pixel=(1, 2, 3))
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_pattern_is_injected_in_the_precision_of_the_set(data):
    exact = pf.TrainingSet(data.values(dtype=torch.float64) / 3)
    injected = synthetic.inject_pattern(exact, torch.zeros(SHAPE[1:]), 0.25)
    torch.testing.assert_close(injected.images, 0.75 * exact.images, rtol=0, atol=1e-15)


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
        (lambda d, x: analysis.jacobian_trace(d, None, 1.0), TypeError, "`x`"),
        (lambda d, x: analysis.local_linearity(d, x[0], 1.0), ValueError, "`x`"),
        (lambda d, x: analysis.jacobian_spectrum(d, x[0], 1.0, seed=-1), ValueError, "`seed`"),
        (lambda d, x: analysis.sensitivity_along_run(d, 3), TypeError, "`pixels`"),
        (lambda d, x: analysis.sensitivity_along_run(d, []), ValueError, "`pixels`"),
        (lambda d, x: analysis.sensitivity_along_run(d, (0, 9, 0)), ValueError, "`pixels`"),
        (
            lambda d, x: analysis.sensitivity_along_run(d, (0, 0, 0), every=2.5),
            TypeError,
            "`every`",
        ),
        (
            lambda d, x: analysis.sensitivity_along_run(d, (0, 0, 0), n=5, x_T=x),
            ValueError,
            "`n`",
        ),
        (lambda d, x: analysis.posterior_concentration(d, x[:0], 1.0), ValueError, "`x`"),
        (
            lambda d, x: analysis.posterior_concentration(
                pf.PCALocalityDenoiser(d.data, aggregation="batch_mean"), x, 1.0
            ),
            TypeError,
            "`aggregation`",
        ),
        (lambda d, x: analysis.memorization(x[:0], d.data), ValueError, "`samples`"),
        (
            lambda d, x: analysis.memorization_curve(pf.LocalDenoiser, d.data, 5),
            TypeError,
            "`sizes`",
        ),
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
