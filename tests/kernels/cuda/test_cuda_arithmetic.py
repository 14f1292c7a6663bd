"""The arithmetic shared by the native kernels (`csrc/include`), compiled for the host."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

INCLUDE = Path(__file__).resolve().parents[3] / "csrc" / "include"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

WINDOWS = (1, 2, 3, 4, 7, 8, 15, 17, 31, 64)
HARNESS = r"""
#include <vector>
#include "pyflocality/online_softmax.h"
#include "pyflocality/window_sums.h"

using namespace pyflocality;

template <int kWindow>
void sums_of(int length, int before, float* line, bool in_registers) {
  const auto element = [&](int x) { return line[x]; };
  const auto emit = [&](int x, float sum) { line[x] = sum; };
  if (in_registers) {
    RegisterTails<kWindow> tails;
    window_sums<kWindow, true>(length, before, element, tails, emit);
  } else {
    // Exactly as many entries as the contract names, three apart.
    std::vector<float> memory(3 * (kWindow < length ? kWindow : length), 1e30f);
    StridedTails tails{memory.data(), 3};
    window_sums<kWindow, false>(length, before, element, tails, emit);
  }
}

extern "C" void window_sums_of(int window, int length, int before, float* line, bool registers) {
  switch (window) {
#define CASE(k) case k: return sums_of<k>(length, before, line, registers);
    CASES
  }
}

extern "C" void online(const float* distance, const float* value, int count, int group,
                       float factor, float* result) {
  OnlineSoftmax<2> state;
  state.init();
  for (int first = 0; first < count; first += group) {
    const int last = first + group < count ? first + group : count;
    float nearest = infinity();
    for (int i = first; i < last; ++i) nearest = distance[i] < nearest ? distance[i] : nearest;
    state.lower(nearest, factor);
    for (int i = first; i < last; ++i) {
      const float weight = state.weight(distance[i], factor);
      state.sums[0] += weight;
      state.sums[1] += weight * value[i];
    }
  }
  result[0] = state.minimum, result[1] = state.sums[0], result[2] = state.sums[1];
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arithmetic")
    cases = " ".join(f"CASE({k})" for k in WINDOWS)
    (folder / "harness.cpp").write_text(HARNESS.replace("CASES", cases))
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    command += ["-Wno-unused-variable", "-Werror", "-fsanitize=undefined", "-static-libubsan"]
    command += ["-fno-sanitize-recover", "-fPIC", "-shared", f"-I{INCLUDE}"]
    subprocess.run([*command, "-o", "harness.so", "harness.cpp"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "harness.so"))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_window_sums(library, window, registers):
    """In place, at every position of the window and many lengths; exact, the sums being whole."""
    generator = np.random.default_rng(window)
    for length in (1, 2, 3, 5, 8, 14, 15, 16, 29, 31, 32, 33, 64, 100):
        line = generator.integers(0, 1000, length)
        for before in {0, window // 2, window - 1}:
            found = line.astype(np.float32)
            library.window_sums_of(window, length, before, pointer(found), registers)
            exact = [
                line[max(0, x - before) : max(0, x - before + window)].sum() for x in range(length)
            ]
            np.testing.assert_array_equal(found, exact)


def test_small_sums_keep_their_digits_beside_large_terms(library):
    """A running sum that subtracts would leave the rounding of 1e8 in the sums behind it."""
    line = np.array([1e8, 1, 2, 3, 4, 5, 6, 7, 8, 9], dtype=np.float32)
    for registers in (False, True):
        found = line.copy()
        library.window_sums_of(3, len(line), 1, pointer(found), registers)
        np.testing.assert_array_equal(found[2:9], [6, 9, 12, 15, 18, 21, 24])


def online(library, distance, value, group, factor):
    distance, value = (np.asarray(array, dtype=np.float32) for array in (distance, value))
    result = np.empty(3, dtype=np.float32)
    library.online(
        pointer(distance),
        pointer(value),
        len(distance),
        group,
        ctypes.c_float(factor),
        pointer(result),
    )
    return result


@pytest.mark.parametrize("group", [1, 4, 7, 100])
@pytest.mark.parametrize("factor", [2.0**-126, 1e-6, 0.03, 1.0, 1e4, 2.0**120])
def test_online_softmax(library, group, factor):
    generator = np.random.default_rng(group)
    distance = generator.uniform(0, 300, 100).astype(np.float32)
    value = generator.uniform(-1, 1, 100).astype(np.float32)
    minimum, total, weighted = online(library, distance, value, group, factor)
    excess = distance.astype(np.float64) - distance.min()
    weights = np.exp2(-excess * np.float64(np.float32(factor)))
    assert minimum == distance.min()
    # Every weight is rounded, as is the exponent: 2^-24 of up to a few hundred.
    np.testing.assert_allclose(total, weights.sum(), rtol=2e-5)
    np.testing.assert_allclose(weighted, (weights * value).sum(), rtol=0, atol=2e-5 * total)


def test_extremes(library):
    # The largest factor: nearest images share, a neighbour one rounding away weighs nothing.
    near = np.nextafter(np.float32(5), np.float32(6))
    np.testing.assert_array_equal(online(library, [5, near, 5], [1, 9, 3], 1, 2.0**120), [5, 2, 4])
    # Images that are not there: infinitely far, whatever comes first and whatever the factor.
    for factor in (2.0**-126, 1.0, 2.0**120):
        for distance, group in (([np.inf, 7], 2), ([7, np.inf], 2), ([7, np.inf], 1)):
            np.testing.assert_array_equal(
                online(library, distance, [2, 2], group, factor), [7, 1, 2]
            )
