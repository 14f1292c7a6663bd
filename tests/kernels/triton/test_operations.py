"""The public operations on the Triton backend by name, and what its launchers cache."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from truth import random_images

import pyflocality as pf
from pyflocality import ops
from pyflocality.backends import selection as _backends
from pyflocality.kernels.triton import (
    _cached,
    _masked_softmax,
    equivariant_posterior,
    global_posterior,
    masked_posterior,
)
from pyflocality.kernels.triton._centred_images import CentredImages
from pyflocality.kernels.triton._global_products import squared_norms
from pyflocality.kernels.triton._masked_levels import OUTPUTS, mask_levels
from pyflocality.kernels.triton._masked_plan import CONFIGS
from pyflocality.posterior.problem import posterior_problem
from pyflocality.posterior.sharded import ShardedImages
from pyflocality.weights import QueryWeights

SHAPE, SIGMA, ALPHA = (2, 4, 5), 0.5, 0.9
VALUES = 40


@pytest.fixture(autouse=True)
def _served(monkeypatch, device):
    """Without a GPU the interpreter serves CPU tensors."""
    if device.type == "cpu":
        monkeypatch.setattr(_backends, "machine_reason", lambda backend: None)
        monkeypatch.setattr(_backends, "_device_reason", lambda backend, device: None)


@pytest.fixture
def given(rng, device):
    """Noisy images, training images, masks and tangents."""
    images = random_images(rng, 70, SHAPE, torch.uint8)
    clean = images[:2].double() / 127.5 - 1
    x = (ALPHA * clean + SIGMA * torch.randn(clean.shape, generator=rng)).float()
    masks = QueryWeights(torch.rand(VALUES, VALUES, generator=rng) < 0.5)
    tangents = torch.randn(2, *x.shape, generator=rng)
    return SimpleNamespace(
        x=x.to(device), images=images.to(device), masks=masks, tangents=tangents.to(device)
    )


CALLS = {
    "masked_posterior": lambda g, x, **more: ops.masked_posterior_mean(
        x, g.images, g.masks, SIGMA, ALPHA, **more
    ),
    "masked_posterior_jvp": lambda g, x, **more: ops.masked_posterior_jvp(
        x, g.tangents.to(x), g.images, g.masks, SIGMA, ALPHA, **more
    )[1],
    "global_posterior": lambda g, x, **more: ops.global_posterior_mean(
        x, g.images, SIGMA, ALPHA, **more
    ),
    "global_posterior_jvp": lambda g, x, **more: ops.global_posterior_jvp(
        x, g.tangents.to(x), g.images, SIGMA, ALPHA, **more
    )[1],
    "equivariant_posterior": lambda g, x, **more: ops.equivariant_posterior_mean(
        x, g.images, 3, SIGMA, ALPHA, boundary="broken", **more
    ),
}


@pytest.mark.parametrize(
    "op",
    [
        pytest.param(op, marks=pytest.mark.slow if op == "equivariant_posterior" else ())
        for op in CALLS
    ],
)
def test_answers_by_name(op, given):
    with pf.trace_backends() as calls:
        found = CALLS[op](given, given.x, backend="triton")
    assert calls == [(op, "triton")]
    exact = CALLS[op](given, given.x.double(), backend="reference")
    assert (found.double() - exact).abs().max() < 1e-3 * max(1, exact.abs().max())
    for more in ({"memory_budget": 30_000}, {"chunk_size": 33}):
        again = CALLS[op](given, given.x, backend="triton", **more)
        torch.testing.assert_close(again, found, rtol=0, atol=2e-5)
    with pf.trace_backends() as calls:
        CALLS[op](given, given.x)
    by_name_only = _backends.OPERATIONS[op]["triton"].by_name_only is not None
    assert (calls == [(op, "triton")]) != by_name_only


def test_real_weights_by_name(given, rng):
    weights = QueryWeights(torch.rand(VALUES, VALUES, generator=rng))
    level = (SIGMA, ALPHA)
    with pf.use_backend("triton"), pf.trace_backends() as calls:
        mean = ops.masked_posterior_mean(given.x, given.images, weights, *level)
        told = ops.masked_posterior_jvp(given.x, given.tangents, given.images, weights, *level)
        log = ops.posterior_log_sum_exp(given.x, given.images, *level, weights=weights)
    assert {backend for _, backend in calls} == {"triton"}
    x, tangents = given.x.double(), given.tangents.double()
    exact = ops.masked_posterior_jvp(x, tangents, given.images, weights, *level)
    assert (mean.double() - exact[0]).abs().max() < 1e-3
    assert (told[1].double() - exact[1]).abs().max() < 1e-3 * exact[1].abs().max()
    exact = ops.posterior_log_sum_exp(x, given.images, *level, weights=weights)
    assert (log - exact).abs().max() < 1e-3 * exact.abs().max()


def test_exact_sums_by_name(given):
    totals = []
    for backend in ("triton", "reference"):
        gram = torch.zeros(VALUES, VALUES, dtype=torch.int64, device=given.x.device)
        total = gram.new_zeros(VALUES)
        ops.accumulate_covariance(given.images.flatten(1), gram, total, backend=backend)
        totals.append((gram.triu(), total))
    assert all(torch.equal(found, exact) for found, exact in zip(*totals, strict=True))


def test_a_model_on_a_backend_in_force(given):
    data = pf.TrainingSet(given.images)
    model = pf.PCALocalityDenoiser(data, mask_threshold=0.05)
    exact = model(given.x.double(), SIGMA, ALPHA)
    graphs = []

    def graph(module, _inputs):
        graphs.append(module)
        return module.forward

    with pf.use_backend("triton"), pf.trace_backends() as calls:
        found = model(given.x, SIGMA, ALPHA)
        jv = model.jvp(given.x, given.tangents, SIGMA, ALPHA)[1]
        compiled = torch.compile(model, backend=graph)(given.x, SIGMA, ALPHA)
    assert set(calls) == {("masked_posterior", "triton"), ("masked_posterior_jvp", "triton")}
    assert (found.double() - exact).abs().max() < 1e-3
    assert torch.equal(compiled, found)
    # What the operator runs is not compiled in its turn.
    assert len(graphs) == 1
    exact = model.jvp(given.x.double(), given.tangents.double(), SIGMA, ALPHA)[1]
    assert (jv.double() - exact).abs().max() < 1e-3 * exact.abs().max()


def test_precision_reaches_the_kernels(given, launches):
    """By the operations and the models; a log-sum-exp is exact whatever is permitted."""
    given.x = (given.x + 4 * given.tangents[0]).contiguous()
    level = (4.0, ALPHA)
    data, auto = pf.TrainingSet(given.images), {"backend": "triton", "precision": "auto"}
    images, weights = given.images, given.masks
    x = given.x
    calls = {
        "operation": lambda: ops.masked_posterior_mean(x, images, weights, *level, **auto),
        "pca": lambda: pf.PCALocalityDenoiser(data, 0.05, **auto)(x, *level),
        "own": lambda: pf.FilteredPosteriorDenoiser(data, torch.eye(VALUES).bool(), **auto)(
            x, *level
        ),
        "copied": lambda: copy.deepcopy(pf.PCALocalityDenoiser(data, 0.05, **auto))(x, *level),
        "patches": lambda: pf.EquivariantDenoiser(data, 3, **auto)(x, *level),
    }
    launches.watch(_masked_softmax, "masked_scan_kernel")
    launches.watch(equivariant_posterior, "scan_kernel")
    for name, call in calls.items():
        launches.calls.clear()
        call()
        assert {options["HALVES"] for _, _, options in launches.calls} == {1}, name
    launches.calls.clear()
    ops.posterior_log_sum_exp(x, images, *level, weights=weights, **auto)
    assert {options["HALVES"] for _, _, options in launches.calls} == {2}


def test_a_part_of_a_sharded_set(given):
    """The state of this rank's images goes to the join, which answers for all."""
    merged = []

    def join(state, scale):
        merged.append(state.minimum.shape)
        return state

    ranks = SimpleNamespace(agree=lambda *what: None, merged=join)
    images = ShardedImages.of(given.images, ranks)
    found = ops.global_posterior_mean(given.x, images, SIGMA, ALPHA, backend="triton")
    assert merged == [(2, 1)]
    assert torch.equal(found, CALLS["global_posterior"](given, given.x, backend="triton"))


def test_what_is_cached_is_taken_again_for_a_sharded_set(given, monkeypatch):
    """Every call took another tensor for the set, and converted all of it anew."""
    ranks = SimpleNamespace(agree=lambda *what: None, merged=lambda state, scale: state)
    images = ShardedImages.of(given.images, ranks)
    converted = []

    def columns(self, first, last, columns=CentredImages.columns_of):
        converted.append(self.images.data_ptr())
        return columns(self, first, last)

    monkeypatch.setattr(CentredImages, "columns_of", columns)
    for level in (SIGMA, 2 * SIGMA):
        ops.masked_posterior_mean(given.x, images, given.masks, level, ALPHA, backend="triton")
    assert converted == [given.images.data_ptr()]
    # And what changes in place is noticed.
    given.images.copy_(255 - given.images)
    ops.masked_posterior_mean(given.x, images, given.masks, SIGMA, ALPHA, backend="triton")
    assert len(converted) == 2


class Stream:
    """A CUDA stream that notes what it is told."""

    def __init__(self) -> None:
        self.recorded, self.waited, self.read = [], [], []

    def record_event(self) -> object:
        self.recorded.append(object())
        return self.recorded[-1]

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


def test_what_is_cached_is_ordered_between_streams(given, device, monkeypatch):
    """Copies made on one stream were read on another that did not wait for them."""
    if device.type != "cpu":
        pytest.skip("streams are simulated on the CPU; a GPU has a test of its own")
    streams = {"maker": Stream(), "user": Stream()}
    current = [streams["maker"]]
    monkeypatch.setattr(_cached, "_current_stream", lambda device: current[0])
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: stream.read.append(tensor)
    )
    problem = posterior_problem(given.x, given.images, SIGMA, ALPHA)

    def run():
        return masked_posterior.scan(problem, given.masks), global_posterior.scan(problem)

    states = run()
    made, current[0] = streams["maker"].recorded, streams["user"]
    again = run()
    for one, other in zip(states, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    # The plan of the masks, the centre, the copy, its norms, and those of the global posterior.
    assert len(made) == 5 and not streams["user"].recorded
    assert set(streams["user"].waited) == set(made)
    held = {tensor.data_ptr() for tensor in streams["user"].read if tensor.numel() > 0}
    assert squared_norms(given.images).data_ptr() in held
    places = mask_levels(given.masks, SHAPE, CONFIGS[90].block_d, device).levels[0].tiles * OUTPUTS
    shapes = {tuple(tensor.shape) for tensor in streams["user"].read}
    assert {(VALUES,), (VALUES, 128), (places, 128), (70,)} <= shapes


@pytest.mark.gpu
def test_other_streams(given, device):
    if device.type == "cpu":
        pytest.skip("there is no GPU")
    expected = [CALLS[op](given, given.x, backend="triton") for op in CALLS]
    torch.cuda.synchronize()
    # New memory, so that nothing of it is kept yet.
    given.images = given.images.clone()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found = []
    for stream in streams:
        with torch.cuda.stream(stream):
            found.append([CALLS[op](given, given.x, backend="triton") for op in CALLS])
    torch.cuda.synchronize()
    for answers in found:
        assert all(torch.equal(a, b) for a, b in zip(answers, expected, strict=True))
