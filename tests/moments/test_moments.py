"""Moments: exact and order-free for bytes, float64 for floats, safe on disk."""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from moment_images import SHAPE, assert_same_bits, byte_images, float_images

import pyflocality as pf
from pyflocality.backends import machine_reason, trace_blocks
from pyflocality.moments import Moments
from pyflocality.moments import sums as _moment_sums

EPS = np.finfo(np.float64).eps
D = 30


def exact_moments(images: torch.Tensor) -> tuple[list[Fraction], list[list[Fraction]]]:
    """Mean and covariance of bytes u meaning u / 127.5 - 1, in rational arithmetic."""
    rows = images.flatten(1).tolist()
    n, values = len(rows), len(rows[0])
    sums = [sum(row[a] for row in rows) for a in range(values)]
    mean = [Fraction(2 * total, 255 * n) - 1 for total in sums]
    covariance = [
        [
            (sum(row[a] * row[b] for row in rows) - Fraction(sums[a] * sums[b], n))
            / (n - 1)
            / Fraction(255, 2) ** 2
            for b in range(values)
        ]
        for a in range(values)
    ]
    return mean, covariance


def test_byte_moments_against_rational_arithmetic():
    images = byte_images(41)
    moments = Moments.from_data(images)
    mean, covariance = exact_moments(images)
    assert moments.count == 41
    assert moments.image_shape == SHAPE
    assert moments.mean.shape == SHAPE
    assert moments.mean.dtype == moments.covariance.dtype == torch.float64
    # The mean is correctly rounded: equal to the bit.
    assert moments.mean.flatten().tolist() == [float(value) for value in mean]
    error = max(
        abs(Fraction(got) - want)
        for got_row, want_row in zip(moments.covariance.tolist(), covariance, strict=True)
        for got, want in zip(got_row, want_row, strict=True)
    )
    # Three roundings of numbers below the largest variance.
    assert error <= 3 * EPS * max(covariance[a][a] for a in range(D))


@pytest.mark.parametrize("low", [0, 100, 253])
def test_small_variances_keep_their_digits(low):
    """Values of two neighbouring bytes, far from zero: every variance to a few roundings."""
    images = byte_images(1000, low=low, high=low + 2)
    covariance = Moments.from_data(images).covariance
    expected = exact_moments(images[:, :1, :1])[1]
    for a in range(5):
        got, want = covariance[a, a].item(), expected[a][a]
        assert abs(Fraction(got) - want) <= 8 * EPS * want


def test_constant_values_give_exact_zeros():
    images = byte_images(50)
    images[:, 0, 1, :] = 255
    images[:, 1, 2, 3] = 0
    moments = Moments.from_data(images)
    constant = (images == images[0]).all(0).flatten()
    assert constant.sum() == 6
    assert (moments.covariance[constant] == 0).all()
    assert (moments.covariance[:, constant] == 0).all()
    assert (moments.mean[0, 1] == 1.0).all() and moments.mean[1, 2, 3] == -1.0


@pytest.mark.parametrize("make", [byte_images, float_images])
def test_covariance_is_symmetric_to_the_bit(make):
    covariance = Moments.from_data(make(20)).covariance
    assert torch.equal(covariance, covariance.T)


@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_bytes_in_any_chunks_and_order_give_the_same_bits(size):
    images = byte_images(100)
    whole = Moments.from_data(images)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(size))
    chunked = Moments()
    for batch in images[order].split(size):
        chunked.update(batch)
    assert_same_bits(chunked, whole)


def test_merged_bytes_give_the_same_bits():
    images = byte_images(90)
    whole = Moments.from_data(images)
    a, b, c = (Moments.from_data(images[start::3]) for start in range(3))
    assert_same_bits(a.merge(b).merge(c), whole)
    assert_same_bits(c.merge(a.merge(b)), whole)
    assert a.count == b.count == c.count == 30
    assert_same_bits(a, Moments.from_data(images[::3]))


def test_bytes_left_out_give_the_same_bits():
    images = byte_images(90)
    whole, part = Moments.from_data(images), Moments.from_data(images[::7])
    rest = [index for index in range(90) if index % 7]
    assert_same_bits(whole.without(part), Moments.from_data(images[rest]))
    assert_same_bits(whole, Moments.from_data(images))
    assert_same_bits(whole.without(part).merge(part), whole)


def test_floats_left_out_against_numpy():
    images = float_images(70)
    rest = Moments.from_data(images).without(Moments.from_data(images[:9]))
    rows = images[9:].flatten(1).numpy()
    assert rest.count == 61
    np.testing.assert_allclose(rest.mean.flatten(), rows.mean(0), rtol=0, atol=8 * EPS)
    # What is taken away is of the size of what stays.
    np.testing.assert_allclose(rest.covariance, np.cov(rows.T), rtol=1e-12, atol=1e-14)


def test_moments_that_are_no_part_are_not_left_out():
    moments = Moments.from_data(byte_images(10))
    with pytest.raises(TypeError, match="`other`"):
        moments.without(torch.zeros(3))
    with pytest.raises(ValueError, match="`other` must have kind of dtype uint8, got floating"):
        moments.without(Moments.from_data(float_images(3)))
    for other in (moments, Moments(), Moments.from_data(byte_images(11))):
        with pytest.raises(ValueError, match="`other` must hold fewer images than these moments"):
            moments.without(other)
    blend = moments.blended(moments, 0.5)
    with pytest.raises(ValueError, match="blended have no images to leave out"):
        blend.without(moments)


@pytest.mark.parametrize("make", [byte_images, float_images])
def test_merging_with_no_images_copies(make):
    full, empty = Moments.from_data(make(10)), Moments()
    for merged in (full.merge(empty), empty.merge(full)):
        assert_same_bits(merged, full)
        merged.update(make(5, seed=1))
        assert merged.count == 15
        assert full.count == 10
    assert empty.merge(Moments()).count == 0


def test_backends_agree_to_the_bit():
    if (reason := machine_reason("cpu")) is not None:
        pytest.skip(reason)
    images = byte_images(333)
    results = []
    for backend in ("cpu", "reference"):
        with pf.trace_backends() as calls:
            results.append(Moments.from_data(images, backend=backend))
        assert calls == [("covariance", backend)]
    assert_same_bits(*results)


@pytest.mark.parametrize("make", [byte_images, float_images])
def test_small_blocks_change_nothing(make, monkeypatch):
    """Bands of the covariance and blocks of images that do not divide their sizes."""
    images = make(50)
    whole = Moments.from_data(images)
    whole_covariance = whole.covariance
    monkeypatch.setattr(_moment_sums, "BLOCK_BYTES", 8 * D * 7)
    with trace_blocks() as blocks:
        small = Moments.from_data(images, progress=True)
    assert min(block.count for block in blocks) < len(images) or make is byte_images
    torch.testing.assert_close(small.covariance, whole_covariance, rtol=1e-13, atol=1e-15)
    if make is byte_images:
        assert torch.equal(small.covariance, whole_covariance)


def test_memory_mapped_images(tmp_path):
    images = byte_images(200)
    np.save(tmp_path / "images.npy", images.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "images.npy", mmap_mode="c"))
    assert_same_bits(Moments.from_data(mapped), Moments.from_data(images))


def test_views_of_any_layout():
    images = byte_images(40)
    expected = Moments.from_data(images[::2])
    layouts = images.to(memory_format=torch.channels_last)
    assert_same_bits(Moments.from_data(layouts[::2]), expected)
    assert_same_bits(
        Moments.from_data(images.permute(3, 1, 2, 0).permute(3, 1, 2, 0)[::2]), expected
    )


def test_training_set():
    from pyflocality.data import TrainingSet

    images = byte_images(30)
    assert_same_bits(Moments.from_data(TrainingSet(images)), Moments.from_data(images))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_float_moments_against_numpy(dtype):
    images = float_images(60).to(dtype)
    moments = Moments()
    for batch in images.split(17):
        moments.update(batch)
    rows = images.double().flatten(1).numpy()
    np.testing.assert_allclose(moments.mean.flatten(), rows.mean(0), rtol=0, atol=4 * EPS)
    np.testing.assert_allclose(moments.covariance, np.cov(rows.T), rtol=1e-12, atol=1e-15)


def test_float_moments_far_from_zero():
    """The streaming update keeps the digits that a sum of squares would cancel."""
    spread = float_images(200) * 1e-6
    moments = Moments()
    for batch in (spread + 1).split(23):
        moments.update(batch)
    rows = (spread + 1).flatten(1).numpy()
    np.testing.assert_allclose(
        moments.covariance.diagonal(), rows.var(0, ddof=1), rtol=1e-8, atol=0
    )


def test_merged_floats_against_numpy():
    images = float_images(70)
    merged = Moments.from_data(images[:9]).merge(Moments.from_data(images[9:]))
    rows = images.flatten(1).numpy()
    np.testing.assert_allclose(merged.mean.flatten(), rows.mean(0), rtol=0, atol=4 * EPS)
    np.testing.assert_allclose(merged.covariance, np.cov(rows.T), rtol=1e-12, atol=1e-15)


def test_floats_and_bytes_of_the_same_images_agree():
    images = byte_images(80)
    exact = Moments.from_data(images)
    floats = Moments.from_data(images.double() / 127.5 - 1)
    torch.testing.assert_close(floats.mean, exact.mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(floats.covariance, exact.covariance, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("make", [byte_images, float_images])
def test_one_image(make):
    image = make(1)
    moments = Moments.from_data(image)
    expected = image.double() / 127.5 - 1 if image.dtype == torch.uint8 else image
    torch.testing.assert_close(moments.mean, expected[0], rtol=0, atol=EPS)
    assert torch.equal(moments.covariance, torch.zeros(D, D, dtype=torch.float64))
    assert torch.equal(moments.eigh().values, torch.zeros(D, dtype=torch.float64))


def test_gradients_are_not_tracked():
    moments = Moments()
    moments.update(float_images(4).requires_grad_())
    assert not moments.mean.requires_grad and not moments.covariance.requires_grad


def test_eigendecomposition():
    moments = Moments.from_data(byte_images(100))
    values, vectors = moments.eigh()
    assert (values.diff() <= 0).all() and (values > 0).all()
    identity = torch.eye(D, dtype=torch.float64)
    torch.testing.assert_close(vectors.T @ vectors, identity, rtol=0, atol=1e-13)
    torch.testing.assert_close(vectors * values @ vectors.T, moments.covariance, rtol=0, atol=1e-13)
    expected = np.linalg.svd(moments.covariance.numpy(), compute_uv=False)
    np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_fewer_images_than_values_have_exact_zero_eigenvalues():
    values = Moments.from_data(byte_images(10)).eigh().values
    assert (values[:9] > 1e-3).all()
    assert (values[9:] == 0).all()


def test_results_are_kept_until_the_next_update():
    images = byte_images(50)
    moments = Moments.from_data(images[:40])
    covariance, eigen = moments.covariance, moments.eigh()
    assert moments.covariance is covariance
    assert moments.eigh() is eigen
    moments.update(images[40:])
    whole = Moments.from_data(images)
    assert_same_bits(moments, whole)
    assert torch.equal(moments.eigh().values, whole.eigh().values)
    assert not torch.equal(moments.covariance, covariance)


@pytest.mark.parametrize("make", [byte_images, float_images])
def test_copies_and_pickles_are_independent(make):
    moments = Moments.from_data(make(20))
    for twin in (copy.deepcopy(moments), pickle.loads(pickle.dumps(moments))):
        assert_same_bits(twin, moments)
        twin.update(make(3, seed=2))
        assert moments.count == 20


def with_nan() -> torch.Tensor:
    images = float_images(3)
    images[1, 0, 0, 0] = torch.nan
    return images


WRONG = {
    "not a tensor": (np.zeros((2, *SHAPE)), TypeError, "`{}`"),
    "integers": (torch.zeros(2, *SHAPE, dtype=torch.int64), TypeError, "`{}`.*int64"),
    "booleans": (torch.zeros(2, *SHAPE, dtype=torch.bool), TypeError, "`{}`.*bool"),
    "one image": (byte_images(1)[0], ValueError, r"`{}`.*\[n, C, H, W\]"),
    "no images": (byte_images(0), ValueError, "`{}` holds no images"),
    "nan": (with_nan(), ValueError, "`{}` holds NaN"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_images(case):
    images, kind, message = WRONG[case]
    moments = Moments()
    with pytest.raises(kind, match=message.format("batch")):
        moments.update(images)
    assert moments.count == 0
    with pytest.raises(kind, match=message.format("data")):
        Moments.from_data(images)


def test_batches_that_do_not_fit_are_refused_and_change_nothing():
    images = byte_images(10)
    moments = Moments.from_data(images)
    for batch, message in [
        (float_images(2), "uint8 like the batches before it, got a torch.float64"),
        (torch.zeros(2, 1, 3, 5, dtype=torch.uint8), r"\(2, 3, 5\).*got.*\(2, 1, 3, 5\)"),
        (torch.zeros(2, *SHAPE, dtype=torch.uint8, device="meta"), "must hold values"),
    ]:
        with pytest.raises(ValueError, match="`batch`.*" + message):
            moments.update(batch)
    assert_same_bits(moments, Moments.from_data(images))


def test_moments_that_do_not_fit_are_not_merged():
    moments = Moments.from_data(byte_images(10))
    with pytest.raises(TypeError, match="`other`"):
        moments.merge(torch.zeros(3))
    with pytest.raises(ValueError, match="`other` must have kind of dtype uint8, got floating"):
        moments.merge(Moments.from_data(float_images(3)))
    with pytest.raises(ValueError, match=r"`other` must have image shape \(2, 3, 5\)"):
        moments.merge(Moments.from_data(byte_images(3)[:, :1]))


def test_nothing_to_read_before_the_first_batch(tmp_path):
    moments = Moments()
    assert moments.count == 0
    assert repr(moments) == "Moments(count=0)"
    for read in (
        lambda: moments.mean,
        lambda: moments.covariance,
        lambda: moments.image_shape,
        moments.eigh,
        lambda: moments.save(tmp_path / "moments.safetensors"),
    ):
        with pytest.raises(ValueError, match="no images yet"):
            read()


def test_repr():
    moments = Moments.from_data(byte_images(3))
    assert repr(moments) == "Moments(count=3, image_shape=(2, 3, 5), uint8)"


def test_an_interrupted_update_is_never_read(monkeypatch):
    moments = Moments.from_data(byte_images(10))

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(_moment_sums, "accumulate_covariance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        moments.update(byte_images(2))
    monkeypatch.undo()
    for use in (
        lambda: moments.count,
        lambda: moments.covariance,
        moments.eigh,
        lambda: moments.update(byte_images(2)),
        lambda: Moments().merge(moments),
    ):
        with pytest.raises(RuntimeError, match="interrupted"):
            use()


def test_a_refused_backend_changes_nothing():
    images = byte_images(10)
    moments = Moments.from_data(images)
    with pytest.raises(pf.BackendUnavailableError):
        moments.update(images, backend="triton")
    assert_same_bits(moments, Moments.from_data(images))


@pytest.mark.parametrize("make", [byte_images, float_images])
def test_a_blend_against_numpy(make):
    few, many = make(7), make(90, seed=1)
    blend = Moments.from_data(few).blended(Moments.from_data(many), 0.3)

    def values(images):
        stored = images.double().flatten(1).numpy()
        return stored / 127.5 - 1 if images.dtype == torch.uint8 else stored

    mine, theirs = values(few), values(many)
    expected = 0.7 * np.cov(mine, rowvar=False) + 0.3 * np.cov(theirs, rowvar=False)
    np.testing.assert_allclose(blend.covariance, expected, rtol=0, atol=1e-14)
    np.testing.assert_allclose(blend.mean.flatten(), mine.mean(0), rtol=0, atol=1e-15)
    assert blend.mean.shape == SHAPE and blend.count == 7
    assert torch.equal(blend.covariance, blend.covariance.T)
    # Seven images alone leave all but six eigenvalues zero.
    assert int((Moments.from_data(few).eigh().values > 0).sum()) == 6
    np.testing.assert_allclose(
        blend.eigh().values, np.linalg.eigvalsh(expected)[::-1], rtol=0, atol=1e-14
    )
    assert (blend.eigh().values > 0).all()
    assert repr(blend) == "Moments(count=7, image_shape=(2, 3, 5), blended)"


def test_ends_of_a_blend():
    few, many = Moments.from_data(byte_images(7)), Moments.from_data(float_images(90))
    assert torch.equal(few.blended(many, 0).covariance, few.covariance)
    assert torch.equal(few.blended(many, 1).covariance, many.covariance)
    again = few.blended(many, 0.5).blended(many, 0.5)
    torch.testing.assert_close(
        again.covariance, 0.25 * few.covariance + 0.75 * many.covariance, rtol=0, atol=1e-15
    )
    before = few.covariance.clone(), many.covariance.clone()
    few.update(byte_images(1, seed=4))
    assert torch.equal(Moments.from_data(byte_images(7)).covariance, before[0])
    assert torch.equal(many.covariance, before[1])


def test_blends_are_saved_and_hashed(tmp_path):
    few, many = Moments.from_data(byte_images(7)), Moments.from_data(byte_images(90, seed=1))
    blend = few.blended(many, 0.3)
    blend.save(tmp_path / "blend.safetensors")
    for twin in (
        Moments.load(tmp_path / "blend.safetensors"),
        copy.deepcopy(blend),
        pickle.loads(pickle.dumps(blend)),
    ):
        assert_same_bits(twin, blend)
        assert twin.image_shape == SHAPE and twin.content_key() == blend.content_key()
    others = (few, many, few.blended(many, 0.31), few.blended(few, 0.3), many.blended(few, 0.7))
    assert len({moments.content_key() for moments in (blend, *others)}) == 6


def test_wrong_blends():
    few, many = Moments.from_data(byte_images(7)), Moments.from_data(byte_images(90, seed=1))
    with pytest.raises(TypeError, match="`other` must be Moments"):
        few.blended(many.covariance, 0.5)
    with pytest.raises(ValueError, match=r"`other` must have image shape \(2, 3, 5\)"):
        few.blended(Moments.from_data(byte_images(3)[:, :1]), 0.5)
    for share in (True, "half", None):
        with pytest.raises(TypeError, match="`share` must be a number"):
            few.blended(many, share)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"`share` must be in \[0, 1\]"):
            few.blended(many, share)
    for one, other in ((Moments(), many), (few, Moments())):
        with pytest.raises(ValueError, match="no images yet"):
            one.blended(other, 0.5)
    blend = few.blended(many, 0.5)
    covariance = blend.covariance.clone()
    with pytest.raises(ValueError, match="blended take in no further images"):
        blend.update(byte_images(3))
    for one, other in ((blend, few), (few, blend), (Moments(), blend), (blend, Moments())):
        with pytest.raises(ValueError, match="blended cannot be merged"):
            one.merge(other)
    assert torch.equal(blend.covariance, covariance) and blend.count == 7
