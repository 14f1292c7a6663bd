"""Native covariance sums against integer arithmetic: every instruction set and size, signals."""

from __future__ import annotations

import signal
import sys

import numpy as np
import pytest
import torch
from instruction_sets import ISAS
from integer_sums import random_images, truth, zeros
from native_cpu import needs_cpu

from pyflocality._support.native import native_module
from pyflocality.kernels.cpu import covariance as native


@pytest.fixture
def threads():
    """Set torch's number of threads, which the native kernel follows, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Odd sizes around panels, words and tiles; one image; one value; several tiles of outputs.
SIZES = [(1, 1), (1, 7), (2, 33), (3, 8), (31, 65), (127, 31), (257, 129), (130, 600)]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("n", "values"), SIZES)
def test_native_is_exact(n, values, isa, count, threads):
    threads(count)
    images = random_images(n, values)
    gram, total = zeros(values)
    native.scan(images, gram, total, instruction_set=isa)
    expected_gram, expected_total = truth(images)
    np.testing.assert_array_equal(gram.numpy(), expected_gram)
    np.testing.assert_array_equal(total.numpy(), expected_total)


@pytest.mark.parametrize("isa", ISAS)
def test_many_blocks_with_a_remainder(isa):
    images = random_images(40_003, 21)
    gram, total = zeros(21)
    native.scan(images, gram, total, instruction_set=isa)
    np.testing.assert_array_equal(gram.numpy(), truth(images)[0])
    np.testing.assert_array_equal(total.numpy(), truth(images)[1])


@needs_cpu
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no interval timers")
def test_a_signal_stops_a_long_call_between_blocks():
    """A handler that raises, as Ctrl-C does, ends the call with its exception."""

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
            native.scan(images, gram, total, instruction_set="portable")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    # Some images are counted, but not all.
    assert total.any()
    assert total[0] != truth(images[:, :1])[1].item()


@needs_cpu
def test_extension_checks_its_arguments():
    accumulate = native_module().accumulate_covariance
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
            accumulate(*arguments, **({"threads": 1} | options))
    assert not gram.any() and not total.any()


@pytest.mark.parametrize("byte", [0, 127, 128, 255])
@pytest.mark.parametrize("isa", ISAS)
def test_extreme_sums_beyond_32_bits(isa, byte):
    """The largest products, over more images than a block and than int32 can sum."""
    n = 140_001
    images = torch.full((n, 3), byte, dtype=torch.uint8)
    gram, total = zeros(3)
    native.scan(images, gram, total, instruction_set=isa)
    assert torch.equal(gram, torch.full((3, 3), n * (byte - 128) ** 2).triu())
    assert torch.equal(total, torch.full((3,), n * (byte - 128)))
