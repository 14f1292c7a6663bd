"""A noise level is a pair that is not mistaken: every public door takes it whole."""

from __future__ import annotations

import copy
import functools
import json
import pickle

import public_calls
import pytest
import torch
from wrong_calls import is_close

import pyflocality as pf

LEVEL = pf.NoiseLevel(0.9, 0.5)
SWAPPED = "`sigma` and `alpha` must not be taken for each other"
# Arrays of CuPy are asked for where there are some.
ELSEWHERE = ("cuda.", "synthetic.c_alpha", "NoiseLevel")


@functools.cache
def doors() -> dict[str, public_calls.Call]:
    """Every public callable that takes sigma and alpha, by its signature."""
    return {
        name: call
        for name, call in public_calls.calls().items()
        if {"sigma", "alpha"} <= set(call.parameters()) and not name.startswith(ELSEWHERE)
    }


NAMES = sorted(doors())


def test_there_are_doors():
    assert len(NAMES) > 60
    assert {"LocalDenoiser.forward", "ops.patch_set_mean", "noise.x0_from_v"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_level_whole_is_both_of_its_coefficients(name):
    call = doors()[name]
    first = next(word for word in call.parameters() if word in ("sigma", "alpha"))

    def asked(**levels: object) -> object:
        given = call.arguments()
        given = {word: value for word, value in given.items() if word not in ("sigma", "alpha")}
        # Of one direction alone the second eigenvector is any other.
        given |= {"k": 1} if "k" in call.parameters() else {}
        torch.manual_seed(0)
        answer = call.function(**given, **levels)
        # Which vectors ARPACK starts again from is chance.
        return answer._replace(products=0) if hasattr(answer, "products") else answer

    apart = asked(sigma=0.5, alpha=0.9)
    assert is_close(asked(**{first: LEVEL}), apart)
    assert is_close(asked(sigma=LEVEL.sigma, alpha=LEVEL.alpha), apart)
    with pytest.raises(TypeError, match=SWAPPED):
        asked(sigma=LEVEL.alpha, alpha=LEVEL.sigma)
    second = {"sigma": "alpha", "alpha": "sigma"}[first]
    with pytest.raises(TypeError, match=f"`{second}` must be .*left out beside a NoiseLevel"):
        asked(**{first: LEVEL, second: 0.7})


def test_the_mistake_of_the_order_is_an_error(denoiser, x):
    schedule = pf.DDPMSchedule()
    for times in (400, torch.tensor([400, 600])):
        alpha, sigma = schedule(times)
        with pytest.raises(TypeError, match=SWAPPED + r".*denoiser\(x, schedule\(t\)\)"):
            denoiser(x, *schedule(times))
        with pytest.raises(TypeError, match=SWAPPED):
            denoiser(x, alpha)
        assert torch.equal(denoiser(x, schedule(times)), denoiser(x, sigma, alpha))
    with pytest.raises(TypeError, match=SWAPPED):
        pf.DDIM().step(denoiser, x, (LEVEL.sigma, LEVEL.alpha), (0.95, 0.3))
    with pytest.raises(TypeError, match=SWAPPED):
        pf.NoiseLevel(LEVEL.sigma, LEVEL.alpha)


def test_a_level_is_a_pair_of_floats():
    alpha, sigma = LEVEL
    assert (alpha, sigma) == (0.9, 0.5) == LEVEL == (LEVEL.alpha, LEVEL.sigma)
    assert isinstance(alpha, float)
    assert repr(LEVEL) == "NoiseLevel(alpha=0.9, sigma=0.5)"
    assert json.dumps([alpha, repr(sigma)]) == '[0.9, "0.5"]'
    for plain in (alpha * 1, -sigma, float(alpha), copy.copy(alpha), copy.deepcopy(sigma)):
        assert type(plain) is float
    assert type(pickle.loads(pickle.dumps(alpha))) is float


@pytest.mark.parametrize("level", [LEVEL, pf.NoiseLevel(torch.ones(2), torch.tensor([0.1, 0.2]))])
def test_a_copy_of_a_level_is_one(level, denoiser, x):
    for other in (pickle.loads(pickle.dumps(level)), copy.copy(level), copy.deepcopy(level)):
        assert type(other) is pf.NoiseLevel
        assert torch.equal(denoiser(x, other), denoiser(x, level))
        with pytest.raises(TypeError, match=SWAPPED):
            denoiser(x, *other)


@pytest.mark.parametrize("time", [0.4, torch.tensor([0.4, 0.6])])
def test_torch_load_takes_saved_levels_for_safe(time, tmp_path, denoiser, x):
    level = pf.CosineSchedule()(time)
    torch.save({"level": level, "alpha": level.alpha, "sigma": level.sigma}, tmp_path / "a.pt")
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert type(loaded["level"]) is pf.NoiseLevel
    wanted = denoiser(x, level)
    assert torch.equal(denoiser(x, loaded["level"]), wanted)
    assert torch.equal(denoiser(x, loaded["sigma"], loaded["alpha"]), wanted)
    with pytest.raises(TypeError, match=SWAPPED):
        denoiser(x, *loaded["level"])


def test_a_tensor_that_is_given_is_not_changed(denoiser, x):
    given = torch.tensor([0.3, 0.5])
    level = pf.NoiseLevel(given, given)
    assert torch.equal(denoiser(x, given, given), denoiser(x, level))
    # What is computed of a coefficient is any number.
    assert torch.equal(denoiser(x, level.alpha * 1, level.sigma * 1), denoiser(x, level))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_calls_take_levels(fullgraph, denoiser, x):
    torch.compiler.reset()
    graph = torch.compile(denoiser, backend="eager", fullgraph=fullgraph)
    schedule = pf.DDPMSchedule()
    for level in (schedule(300), schedule(500), schedule(torch.tensor([100, 700]))):
        assert torch.equal(graph(x, level), denoiser(x, level))
        assert torch.equal(graph(x, level.sigma, level.alpha), denoiser(x, level))
        with pytest.raises(torch._dynamo.exc.Unsupported if fullgraph else TypeError):
            graph(x, *level)
    torch.compiler.reset()


def test_samplers_hand_plain_numbers_to_a_compiled_function():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    graph = torch.compile(lambda x, sigma, alpha: x / (sigma + alpha), backend="eager")
    pf.sample(graph, steps=10, x_T=torch.zeros(1, 1, 4, 4), progress=False)
    # Once for each level, if they were not.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    torch.compiler.reset()


def test_transforms_take_levels(denoiser, x):
    value, product = torch.func.jvp(lambda y: denoiser(y, LEVEL), (x,), (x,))
    assert torch.equal(value, denoiser(x, LEVEL))
    assert torch.equal(product, denoiser.jvp(x, x[None], LEVEL)[1][0])
    mapped = torch.func.vmap(lambda y: denoiser(y[None], LEVEL)[0])(x)
    torch.testing.assert_close(mapped, value)
    with pytest.raises(TypeError, match=SWAPPED):
        torch.func.vmap(lambda y: denoiser(y[None], *LEVEL)[0])(x)


@pytest.fixture
def denoiser() -> pf.LocalDenoiser:
    images = torch.rand(12, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return pf.LocalDenoiser(pf.TrainingSet(images), window=3)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1))
