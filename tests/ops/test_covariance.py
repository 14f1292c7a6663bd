"""Exact covariance sums: every implementation against integer arithmetic."""

from __future__ import annotations

import signal
import sys

import numpy as np
import pytest
import torch

from pyflocality.backends import selection as _backends
from pyflocality.ops.covariance import accumulate_covariance
from pyflocality.reference import covariance as reference

NATIVE_MISSING = _backends.machine_reason("cpu")
needs_native = pytest.mark.skipif(NATIVE_MISSING is not None, reason=str(NATIVE_MISSING))


def instruction_sets() -> list[str]:
    return [] if NATIVE_MISSING else _backends.native_module().instruction_sets()


def random_images(n: int, values: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * n + values)
    return torch.randint(0, 256, (n, values), dtype=torch.uint8, generator=generator)


def truth(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Upper triangle of the products and sums of the centred bytes, in int64."""
    centred = images.numpy().astype(np.int64) - 128
    return np.triu(np.einsum("ia,ib->ab", centred, centred)), centred.sum(0)


def zeros(values: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.zeros(values, values, dtype=torch.int64),
        torch.zeros(values, dtype=torch.int64),
    )


@pytest.fixture
def threads():
    """Set torch's number of threads, which the native kernel follows, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Odd sizes around panels, words and tiles; one image; one value; several tiles of outputs.
SIZES = [(1, 1), (1, 7), (2, 33), (3, 8), (31, 65), (127, 31), (257, 129), (130, 600)]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize(("n", "values"), SIZES)
def test_native_is_exact(n, values, isa, count, threads):
    from pyflocality.kernels.cpu import covariance as native

    threads(count)
    images = random_images(n, values)
    gram, total = zeros(values)
    native.accumulate_covariance(images, gram, total, instruction_set=isa)
    expected_gram, expected_total = truth(images)
    np.testing.assert_array_equal(gram.numpy(), expected_gram)
    np.testing.assert_array_equal(total.numpy(), expected_total)


@pytest.mark.parametrize(("n", "values"), SIZES)
def test_reference_is_exact(n, values):
    images = random_images(n, values)
    gram, total = zeros(values)
    reference.accumulate_covariance(images, gram, total)
    expected_gram, expected_total = truth(images)
    np.testing.assert_array_equal(gram.numpy(), expected_gram)
    np.testing.assert_array_equal(total.numpy(), expected_total)


def test_reference_is_exact_in_bands_and_blocks(monkeypatch):
    images = random_images(50, 37)
    gram, total = zeros(37)
    # Bands of 5 rows and blocks of 5 images, so neither divides its size.
    monkeypatch.setattr(reference, "_BLOCK_BYTES", 8 * 37 * 5)
    reference.accumulate_covariance(images, gram, total)
    np.testing.assert_array_equal(gram.numpy(), truth(images)[0])
    np.testing.assert_array_equal(total.numpy(), truth(images)[1])


@pytest.mark.parametrize("byte", [0, 127, 128, 255])
@pytest.mark.parametrize("implementation", ["reference", *instruction_sets()])
def test_extreme_sums_beyond_32_bits(implementation, byte):
    """The largest products, over more images than a block and than int32 can sum."""
    n = 140_001
    images = torch.full((n, 3), byte, dtype=torch.uint8)
    gram, total = zeros(3)
    if implementation == "reference":
        reference.accumulate_covariance(images, gram, total)
    else:
        from pyflocality.kernels.cpu import covariance as native

        native.accumulate_covariance(images, gram, total, instruction_set=implementation)
    assert torch.equal(gram, torch.full((3, 3), n * (byte - 128) ** 2).triu())
    assert torch.equal(total, torch.full((3,), n * (byte - 128)))


@pytest.mark.parametrize("isa", instruction_sets())
def test_many_blocks_with_a_remainder(isa):
    from pyflocality.kernels.cpu import covariance as native

    images = random_images(40_003, 21)
    gram, total = zeros(21)
    native.accumulate_covariance(images, gram, total, instruction_set=isa)
    np.testing.assert_array_equal(gram.numpy(), truth(images)[0])
    np.testing.assert_array_equal(total.numpy(), truth(images)[1])


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
def test_adds_to_what_is_there_and_leaves_the_lower_triangle(backend):
    images = random_images(40, 50)
    gram = torch.arange(2500).reshape(50, 50)
    total = torch.arange(50)
    with _backends.trace_backends() as calls:
        accumulate_covariance(images, gram, total, backend=backend)
    assert calls == [("covariance", backend)]
    expected_gram, expected_total = truth(images)
    np.testing.assert_array_equal(gram.numpy(), np.arange(2500).reshape(50, 50) + expected_gram)
    np.testing.assert_array_equal(total.numpy(), np.arange(50) + expected_total)


@needs_native
def test_auto_takes_the_native_kernel_on_the_cpu():
    with _backends.trace_backends() as calls:
        accumulate_covariance(random_images(4, 9), *zeros(9))
    assert calls == [("covariance", "cpu")]


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
def test_strided_images(backend):
    images = random_images(60, 80)
    for view in (images[::3], images[:, ::2], images[5:9, 3:50], images.T):
        gram, total = zeros(view.shape[1])
        accumulate_covariance(view, gram, total, backend=backend)
        np.testing.assert_array_equal(gram.numpy(), truth(view)[0])
        np.testing.assert_array_equal(total.numpy(), truth(view)[1])


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
def test_memory_mapped_images(backend, tmp_path):
    images = random_images(300, 40)
    np.save(tmp_path / "images.npy", images.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "images.npy", mmap_mode="c"))
    gram, total = zeros(40)
    accumulate_covariance(mapped, gram, total, backend=backend)
    np.testing.assert_array_equal(gram.numpy(), truth(images)[0])


def test_no_images_add_nothing():
    gram, total = zeros(4)
    accumulate_covariance(torch.zeros(0, 4, dtype=torch.uint8), gram, total)
    assert not gram.any() and not total.any()


@needs_native
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no interval timers")
def test_a_signal_stops_a_long_call_between_blocks():
    """A handler that raises, as Ctrl-C does, ends the call with its exception."""
    from pyflocality.kernels.cpu import covariance as native

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    images = random_images(100_000, 400)
    gram, total = zeros(400)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(Stop):
            native.accumulate_covariance(images, gram, total, instruction_set="portable")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    # Some images are counted, but not all.
    assert total.any()
    assert total[0] != truth(images[:, :1])[1].item()


WRONG = {
    "images type": (dict(images=[[1, 2]]), TypeError, "`images`"),
    "images dtype": (dict(images=torch.zeros(2, 3)), TypeError, "`images`.*torch.float32"),
    "images shape": (dict(images=torch.zeros(3, dtype=torch.uint8)), ValueError, "`images`.*n, D"),
    "no values": (dict(images=torch.zeros(3, 0, dtype=torch.uint8)), ValueError, "`images`"),
    "gram dtype": (dict(gram=torch.zeros(3, 3)), TypeError, "`gram`"),
    "gram shape": (dict(gram=torch.zeros(3, 4, dtype=torch.int64)), ValueError, "`gram`"),
    "gram layout": (
        dict(gram=torch.zeros(3, 6, dtype=torch.int64)[:, ::2]),
        ValueError,
        "`gram` must be contiguous",
    ),
    "total shape": (dict(total=torch.zeros(4, dtype=torch.int64)), ValueError, "`total`"),
    "device": (
        dict(gram=torch.zeros(3, 3, dtype=torch.int64, device="meta")),
        ValueError,
        "`gram` must hold values",
    ),
    "backend": (dict(backend="fortran"), ValueError, "`backend`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    change, kind, message = WRONG[case]
    gram, total = zeros(3)
    arguments = dict(images=random_images(2, 3), gram=gram, total=total) | change
    with pytest.raises(kind, match=message):
        accumulate_covariance(**arguments)
    assert not gram.any() and not total.any()


def test_a_backend_without_an_implementation_is_refused():
    with pytest.raises(_backends.BackendUnavailableError, match="no implementation"):
        accumulate_covariance(random_images(2, 3), *zeros(3), backend="cuda")


@needs_native
def test_extension_checks_its_arguments():
    native = _backends.native_module()
    images, gram, total = random_images(2, 3).numpy(), *(t.numpy() for t in zeros(3))
    fixed = gram.copy()
    fixed.flags.writeable = False
    for arguments, options, kind, message in [
        ((images[0], gram, total), {}, ValueError, "`images`"),
        ((images, gram[:2], total), {}, ValueError, "`gram`"),
        ((images, gram, total[:2]), {}, ValueError, "`total`"),
        ((images, fixed, total), {}, ValueError, "writeable"),
        ((images.astype(np.int16), gram, total), {}, TypeError, "incompatible"),
        ((images[:, ::2], gram, total), {}, TypeError, "incompatible"),
        ((images, gram.astype(np.int32), total), {}, TypeError, "incompatible"),
        ((images, gram, total), {"threads": 0}, ValueError, "`threads`"),
        ((images, gram, total), {"isa": "mmx"}, ValueError, "`isa`.*portable.*got mmx"),
    ]:
        with pytest.raises(kind, match=message):
            native.accumulate_covariance(*arguments, **({"threads": 1} | options))
    assert not gram.any() and not total.any()
