"""Value images in the kernels of whole images and masks: float64 truth, slices, bands, bits."""

from __future__ import annotations

import pytest
import torch
from value_problems import ValueProblem

import pyflocality as pf
from pyflocality.backends import selection as _backends
from pyflocality.kernels.triton import _global_products, _masked_levels, _masked_softmax
from pyflocality.ops.operation import OPERATIONS

SERVED = [
    (op, kind)
    for op in ("global_posterior", "masked_posterior")
    for kind, variant in OPERATIONS[op].variants.items()
    if "triton" in variant.backends and variant.backends["triton"].answers_values
]
NAMES = {"scan": "mean", "jvp": "jvp"}


@pytest.fixture(autouse=True)
def _served(monkeypatch, device):
    """Without a GPU the interpreter serves CPU tensors."""
    if device.type == "cpu":
        monkeypatch.setattr(_backends, "machine_reason", lambda backend: None)
        monkeypatch.setattr(_backends, "_device_reason", lambda backend, device: None)


def on(device, problem):
    """The problem with its tensors on a device."""
    for name in ("x", "images", "values", "tangents"):
        setattr(problem, name, getattr(problem, name).to(device))
    return problem


def answers(problem, op, kind, **options):
    """What the kernels answer, on the CPU."""
    along = (problem.tangents,) if kind == "jvp" else ()
    options = {"backend": "triton"} | options
    found = problem.found(op, NAMES[kind], torch.float32, *along, **options)
    return tuple(part.cpu() for part in found)


def truth(problem, op, kind, with_image):
    """The formulas, in float64."""
    results = [problem.truth(op, with_image)]
    if kind == "jvp":
        results.append(problem.truth(op, with_image, along=problem.tangents))
    return [torch.from_numpy(result) for result in results]


def assert_close(found, exact):
    """Rounding of logits of order 100 and of products of 22 bits, in units of the largest value."""
    for mine, true in zip(found, exact, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == true.shape
        atol = 2e-5 * max(1.0, float(true.abs().max()))
        torch.testing.assert_close(mine.double(), true, rtol=0, atol=atol)


def test_what_is_served():
    assert SERVED == [
        ("global_posterior", "scan"),
        ("global_posterior", "jvp"),
        ("masked_posterior", "scan"),
    ]


@pytest.mark.parametrize(("op", "kind"), SERVED)
@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize(("count", "values"), [(1, 1), (31, 2), (300, 3)])
def test_answers_are_the_formula(device, rng, op, kind, with_image, count, values):
    problem = ValueProblem(rng, count, values)
    exact = truth(problem, op, kind, with_image)
    with pf.trace_backends() as ran:
        found = answers(on(device, problem), op, kind, with_image=with_image)
    assert ran == [(OPERATIONS[op].variant_name(kind), "triton")]
    assert found[0].shape == (3, values + with_image, 2, 5, 4)
    assert_close(found, exact)


@pytest.mark.parametrize(("op", "kind"), SERVED)
def test_the_image_beside_its_values_keeps_its_bits(device, rng, op, kind):
    problem = on(device, ValueProblem(rng, count=140))
    plain = answers(problem, op, kind, values=None)
    alone = answers(problem, op, kind)
    both = answers(problem, op, kind, with_image=True)
    # Compilers join products and sums as they like.
    atol = 0.0 if device.type == "cpu" else 1e-6
    for one, values, joint in zip(plain, alone, both, strict=True):
        torch.testing.assert_close(joint[..., 0, :, :, :], one, rtol=0, atol=atol)
        torch.testing.assert_close(joint[..., 1:, :, :, :], values, rtol=atol, atol=atol)


@pytest.mark.parametrize(("op", "kind"), SERVED)
@pytest.mark.parametrize("options", [{"chunk_size": 33}, {"chunk_size": 150}, {"memory_budget": 1}])
def test_every_slice_of_the_images_answers_the_same(device, rng, op, kind, options):
    problem = ValueProblem(rng, count=300)
    exact = truth(problem, op, kind, True)
    assert_close(answers(on(device, problem), op, kind, with_image=True, **options), exact)


@pytest.mark.parametrize(("op", "kind"), SERVED)
def test_values_whose_images_lie_apart(device, rng, op, kind):
    problem = on(device, ValueProblem(rng, count=140))
    whole = answers(problem, op, kind, with_image=True)
    apart = problem.values.repeat_interleave(2, 1)[:, ::2]
    assert not apart.is_contiguous()
    found = answers(problem, op, kind, with_image=True, values=apart)
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


def test_slices_of_a_masked_scan_have_values_of_their_own(device, rng, launches):
    launches.watch(_masked_softmax, "masked_scan_kernel")
    problem = on(device, ValueProblem(rng, count=300, values=3))
    answers(problem, "masked_posterior", "scan", chunk_size=128)
    given = [options for _, options in launches.of("masked_scan_kernel")]
    assert [options["values_ptr"].shape for options in given] == [(3, 40, 128)] * 3
    assert all(not options["HAS_IMAGE"] and options["SLOTS"] == 4 for options in given)
    # Three take the shapes of many noisy images.
    assert all(options["BATCH"] == 8 for options in given)


def test_in_the_place_of_the_image_it_is_not_summed(device, rng, launches):
    launches.watch(_global_products, "weighted_sums_kernel", "coefficient_sums_kernel")
    problem = on(device, ValueProblem(rng))
    for kind, name in (("scan", "weighted_sums_kernel"), ("jvp", "coefficient_sums_kernel")):
        answers(problem, "global_posterior", kind)
        answers(problem, "global_posterior", kind, with_image=True)
        dims = [options["dim"] for _, options in launches.of(name)]
        assert dims == [80, 40, 80]


@pytest.mark.parametrize("limit", [1, 100])
def test_bands_of_outputs(device, rng, monkeypatch, limit):
    problem = on(device, ValueProblem(rng, count=140))
    whole = answers(problem, "masked_posterior", "scan", with_image=True)
    monkeypatch.setattr(_masked_levels, "_BAND_BYTES", limit)
    problem_again = answers(problem, "masked_posterior", "scan", with_image=True)
    # Other tiles add up in another order.
    torch.testing.assert_close(problem_again, whole, rtol=0, atol=2e-5)


def test_values_of_any_size_take_no_coarser_arithmetic(device, rng, launches):
    launches.watch(_masked_softmax, "masked_scan_kernel")
    problem = on(device, ValueProblem(rng))
    exact = answers(problem, "masked_posterior", "scan", with_image=True)
    automatic = answers(problem, "masked_posterior", "scan", with_image=True, precision="auto")
    assert torch.equal(automatic[0], exact[0])
    assert [options["HALVES"] for _, options in launches.of("masked_scan_kernel")] == [2, 2]


@pytest.mark.parametrize("op", ["global_posterior", "masked_posterior"])
@pytest.mark.parametrize("sigma", [0.0, 0.01, 3.0, 1e3])
def test_every_noise_level(device, rng, op, sigma):
    problem = on(device, ValueProblem(rng, count=140))
    given = () if op == "global_posterior" else (torch.rand(40, 40, generator=rng) < 0.5,)
    function = getattr(pf.ops, f"{op}_mean")
    rest = (problem.images, *given, sigma)
    options = {"values": problem.values, "with_image": True}
    found = function(problem.x.float(), *rest, **options, backend="triton")
    exact = function(problem.x.float().double(), *rest, **options, backend="reference")
    # Expanded distances of masks lose digits where sigma is small against the images.
    atol = 2e-3 if op == "masked_posterior" and sigma < 0.1 else 1e-4
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=atol)


def test_batches_may_be_empty(device, rng):
    problem = on(device, ValueProblem(rng))
    problem.x, problem.tangents = problem.x[:0], problem.tangents[:, :0]
    for op, kind in SERVED:
        mean, *derivatives = answers(problem, op, kind, with_image=True)
        assert mean.shape == (0, 3, 2, 5, 4)
        assert all(part.shape == (2, 0, 3, 2, 5, 4) for part in derivatives)


def test_what_is_not_served_is_refused_by_name(device, rng):
    problem = on(device, ValueProblem(rng))
    with pytest.raises(pf.BackendUnavailableError, match="`values` are given"):
        answers(problem, "masked_posterior", "jvp")
    flipped = pf.TrainingSet(problem.images).augmented(flip=True).augmentation
    problem.values = torch.cat([problem.values, problem.values])
    for op in ("global_posterior", "masked_posterior"):
        with pytest.raises(pf.BackendUnavailableError, match="mirrored or shifted copies"):
            answers(problem, op, "scan", augmentation=flipped)
