"""Native search of nearest images: exact with every instruction set, size and thread number."""

from __future__ import annotations

import signal
import sys

import numpy as np
import pytest
import torch
from exact_order import in_exact_order
from instruction_sets import ISAS
from native_cpu import needs_cpu

import pyflocality as pf
from pyflocality._support.native import native_module
from pyflocality.kernels.cpu import nearest as native
from pyflocality.posterior.problem import posterior_problem

pytestmark = needs_cpu


@pytest.fixture
def threads():
    """Set torch's number of threads, which the native kernel follows, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def candidates(images, noisy, k, limit=np.inf, **options):
    """Rows, values and slacks of each noisy image."""
    limits = np.full(len(noisy), limit)
    search = native_module().nearest_candidates
    return search(images, noisy, limits, **({"k": k, "threads": 1} | options))


def random_set(count: int, dim: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes [N, D], the last ones like the first, and noisy images in their units [B, D]."""
    rng = np.random.default_rng(count * 1000 + dim)
    images = rng.integers(0, 256, (count, dim), dtype=np.uint8)
    images[count - count // 4 :] = images[: count // 4]
    noise = rng.normal(size=(batch, dim)) * np.logspace(-3, 6, batch)[:, None]
    return images, images[rng.integers(0, count, batch)] + noise


# Around steps of 16 and 32 values, pieces of 128 steps, tiles of 4 and 6 images and pieces of 256.
SIZES = [(1, 1), (2, 3), (7, 17), (31, 15), (63, 32), (257, 33), (1025, 65), (40, 4097), (9, 8500)]


@pytest.mark.parametrize(("count", "dim"), SIZES)
def test_the_same_candidates_everywhere_and_none_is_missing(count, dim):
    images, noisy = random_set(count, dim, 11)
    exact = images.astype(np.float64)
    for k in {1, min(5, count), count}:
        expected = candidates(images, noisy, k, isa="portable")
        for isa in ISAS:
            for workers in (1, 2, 5):
                found = candidates(images, noisy, k, isa=isa, threads=workers)
                for one, other in zip(found, expected, strict=True):
                    assert all(map(np.array_equal, one, other))
        for target, (rows, values, slacks) in zip(noisy, expected, strict=True):
            # Of |t - u|^2 in extended precision.
            truth = (exact**2).sum(1, dtype=np.longdouble)
            truth -= 2 * (exact * target.astype(np.longdouble)).sum(1)
            assert (np.abs(values - truth[rows]) <= slacks).all()
            assert (np.diff(rows) > 0).all()
            nearest = np.sort(truth)[k - 1]
            assert set(np.flatnonzero(truth <= nearest)) <= set(rows.tolist())
            if k < count and dim > 30:
                # No more than what ties, but for a few.
                assert len(rows) <= 2 * k + 2


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [4096, 70_000])
def test_largest_products(isa, dim):
    """Sums of the largest bytes and integers, at the ends of what 32 bits hold."""
    images = np.full((13, dim), 255, dtype=np.uint8)
    images[5] = 254
    noisy = np.stack([np.full(dim, 1e9), np.full(dim, -1e9), np.full(dim, 254.0)])
    found = candidates(images, noisy, 1, isa=isa)
    whole = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]
    assert [rows.tolist() for rows, _, _ in found] == [whole, [5], [5]]
    np.testing.assert_allclose(found[0][1], -2e9 * 255 * dim, rtol=1e-6)


def test_a_limit_leaves_out_what_is_farther():
    images, noisy = random_set(500, 40, 3)
    everything = candidates(images, noisy, 500)
    for b, (rows, values, slacks) in enumerate(everything):
        limit = float(np.sort(values)[20])
        found = candidates(images, noisy[b : b + 1], 500, limit)[0][0]
        assert found.tolist() == rows[values - slacks <= limit].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_answers_exactly(isa, dtype, rng, threads):
    images = torch.randint(0, 256, (90, 1, 3, 7), generator=rng, dtype=torch.uint8)
    images[60:] = images[:30]
    alpha = torch.tensor([1.0, 0.3, 1e-3, 1e-9], dtype=torch.float64)
    x = torch.randn(4, 1, 3, 7, generator=rng, dtype=torch.float64).to(dtype)
    expected = [
        in_exact_order(row, images, float(level)) for row, level in zip(x, alpha, strict=True)
    ]
    for count, chunk_size in ((1, None), (3, None), (2, 7)):
        threads(count)
        problem = posterior_problem(x, images, 0.0, alpha, chunk_size=chunk_size)
        for k in (1, 4, 90):
            indices, distances = native.scan(problem, k, instruction_set=isa)
            assert indices.tolist() == [row[:k] for row in expected]
            values = images.double() / 127.5 - 1
            gaps = x.double()[:, None] - alpha[:, None, None, None, None] * values[indices]
            exact = gaps.square().flatten(2).sum(2)
            assert distances.dtype == dtype
            rtol = 2e-7 if dtype == torch.float32 else 1e-13
            torch.testing.assert_close(distances.double(), exact, rtol=rtol, atol=1e-300)


def test_some_images_alone_are_searched(rng):
    images = torch.randint(0, 256, (400, 1, 4, 5), generator=rng, dtype=torch.uint8)
    images[300:] = images[:100]
    x = torch.randn(3, 1, 4, 5, generator=rng)
    among = torch.randperm(400, generator=rng)[:250].sort().values
    values = images.double() / 127.5 - 1
    distances = (x.double()[:, None] - values[among]).square().flatten(2).sum(2)
    order = distances.sort(dim=1, stable=True).indices
    for chunk_size in (None, 30):
        for backend in ("cpu", "reference"):
            problem = posterior_problem(x, images, 0.0, 1.0, chunk_size=chunk_size)
            for k in (1, 9, 250):
                run = (k, False, among)
                with pf.trace_backends() as calls:
                    found = pf.ops.nearest.NEAREST.run("scan", problem, run, backend)
                assert calls == [("nearest", backend)] and found[1] is None
                assert torch.equal(found[0], among[order[:, :k]].sort(1).values)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no interval timers")
def test_a_signal_stops_a_long_search():
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    images, noisy = np.zeros((60_000, 3000), dtype=np.uint8), np.ones((60, 3000))
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Stop):
            candidates(images, noisy, 1, isa="portable")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_extension_checks_its_arguments():
    images, noisy = random_set(5, 3, 2)
    limits, owner = np.full(2, np.inf), np.zeros(5, dtype=np.int64)
    module = native_module()
    for arguments, options, kind, message in [
        ((images[0], noisy, limits), {}, ValueError, "`images`"),
        ((images[:, :2].copy(), noisy, limits), {}, ValueError, "`images`.*D = 3"),
        ((images, noisy[0], limits), {}, ValueError, "`noisy`"),
        ((images, noisy, limits[:1]), {}, ValueError, "`limit`"),
        ((images.astype(np.int16), noisy, limits), {}, TypeError, "incompatible"),
        ((images, noisy.astype(np.float32), limits), {}, TypeError, "incompatible"),
        ((images, noisy, limits), {"k": 0}, ValueError, "`k`"),
        ((images, noisy, limits), {"threads": 0}, ValueError, "`threads`"),
        ((images, noisy, limits), {"isa": "mmx"}, ValueError, "`isa`.*portable.*got mmx"),
    ]:
        with pytest.raises(kind, match=message):
            module.nearest_candidates(*arguments, **({"k": 1, "threads": 1} | options))
    for arguments, message in [
        ((images, noisy, limits[:1], owner), "`alpha`"),
        ((images, noisy, limits, owner[:1]), "`owner`"),
        ((images, noisy, limits, owner + 2), "`owner`.*got 2"),
        ((images, noisy, limits, owner - 1), "`owner`.*got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            module.pair_distances(*arguments, threads=1)
    assert module.nearest_candidates(images[:0], noisy, limits, k=1, threads=1)[0][0].shape == (0,)
    assert module.nearest_candidates(images, noisy[:0], limits[:0], k=1, threads=1) == []
