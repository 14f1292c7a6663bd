"""Whatever the arguments, a public call answers rightly or with an error that names the argument.

`wrong_calls.py` makes the calls, `public_calls.py` lists what is public, `wrong_values.py` what it
is given.
"""

from __future__ import annotations

import fractions
import time

import numpy as np
import public_calls
import pytest
import torch
import wrong_calls

import pyflocality as pf

SHAPE = (1, 4, 4)


def _images(count: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, *SHAPE, generator=generator, dtype=dtype) * 2 - 1


def test_everything_public_has_an_entry():
    entries = public_calls.calls()
    assert public_calls.discovered() == set(entries)
    for name, call in entries.items():
        assert set(public_calls.kinds_of(call)) == set(call.parameters()), name


def test_a_new_public_name_must_enter(monkeypatch):
    monkeypatch.setattr(pf.metrics, "newcomer", lambda a: a, raising=False)
    pf.metrics.newcomer.__module__ = "pyflocality.metrics"
    assert public_calls.discovered() - set(public_calls.calls()) == {"metrics.newcomer"}


def _assert_good(answers: list[wrong_calls.Answer]) -> None:
    bad = [answer for answer in answers if answer.kind not in wrong_calls.GOOD]
    listed = "\n".join(f"{a.kind}: {a.case}: {a.detail}" for a in bad[:100])
    assert not bad, f"{len(bad)} of {len(answers)} calls were answered wrongly\n{listed}"


def test_some_wrong_calls():
    """Every argument of every callable gets some of the values, the same ones in every run."""
    answers = wrong_calls.answers(every=181)
    assert len(answers) > 500
    _assert_good(answers)


@pytest.mark.slow
def test_all_wrong_calls():
    answers = wrong_calls.answers()
    assert len(answers) > 100_000
    _assert_good(answers)


def test_the_judge_sees_what_is_wrong():
    """Each kind of wrong answer, from a function made for it."""

    def call(function, kind):
        return public_calls.Call(function, lambda: {"a": 2.0}, {"a": kind})

    def judged(function, label, kind):
        entry = call(function, kind)
        tried = next(t for t in kind(2.0) if t.label == label)
        return wrong_calls.judge(entry, "a", tried, 2.0)[0]

    from wrong_values import real

    def deep(a):
        return float(a)

    def unnamed(a):
        raise ValueError("no")

    def named(a):
        raise ValueError(f"`a` is wrong: {type(a)}")

    def late(a):
        torch.linalg.eigh(torch.eye(2))
        raise ValueError("`a` is wrong")

    assert judged(deep, "10**400", real()) == "deep"
    assert judged(deep, "str", real()) == "deep"
    assert judged(unnamed, "str", real()) == "unnamed"
    assert judged(named, "str", real()) == "refused"
    assert judged(late, "str", real()) == "late"
    assert judged(lambda a: 1.0, "str", real()) == "silent"
    assert judged(lambda a: float("nan"), "2.5", real()) == "not finite"
    assert judged(lambda a: 3.0, "the same as NumPy", real()) == "different"
    assert judged(lambda a: 2.0, "the same as NumPy", real()) == "taken"


OPERATIONS = {
    "global": lambda x, v: pf.ops.global_posterior_mean(x, v, 0.5),
    "window": lambda x, v: pf.ops.window_posterior_mean(x, v, 3, 0.5),
    "equivariant": lambda x, v: pf.ops.equivariant_posterior_mean(x, v, 3, 0.5),
    "masked": lambda x, v: pf.ops.masked_posterior_mean(x, v, torch.ones(16, 16) > 0, 0.5),
    "patch_set": lambda x, v: pf.ops.patch_set_mean(x, v, 3, 0.5),
    "log_sum_exp": lambda x, v: pf.ops.posterior_log_sum_exp(x, v, 0.5),
    "nearest": lambda x, v: pf.ops.nearest_images(x, v),
    "jvp": lambda x, v: pf.ops.global_posterior_jvp(x, x[None], v, 0.5),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_images_that_are_no_numbers(name, value):
    images = _images()
    images[3, 0, 2, 1] = value
    with pytest.raises(ValueError, match="`images` holds NaN or infinite values"):
        OPERATIONS[name](_images(2), images)


def test_images_are_looked_at_once(monkeypatch):
    seen = []
    plain = torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda t, **o: seen.append(t.numel()) or plain(t, **o))
    images, x = _images(), _images(2)
    for _ in range(3):
        pf.ops.global_posterior_mean(x, images, 0.5)
    assert seen == [images.numel()]
    # Parts of what is known are known, other memory is not.
    pf.ops.global_posterior_mean(x, images[1:3], 0.5)
    assert len(seen) == 1
    pf.ops.global_posterior_mean(x, images.clone(), 0.5)
    assert len(seen) == 2
    # A set has been looked at when it was made.
    made = pf.TrainingSet(_images(6))
    seen.clear()
    pf.OptimalDenoiser(made)(x, 0.5)
    pf.OptimalDenoiser(made.subset(slice(1, 4)))(x, 0.5)
    assert seen == []


def test_images_that_change_are_looked_at_again():
    images, x = _images(), _images(2)
    pf.ops.global_posterior_mean(x, images, 0.5)
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="`images` holds NaN"):
        pf.ops.global_posterior_mean(x, images, 0.5)
    images[0, 0, 0, 0] = 0.0
    pf.ops.global_posterior_mean(x, images, 0.5)


def test_negative_views_are_read_as_they_count():
    """Kernels read the memory, which holds the opposite of a negative view's values."""
    x, images = _images(2), _images()
    expected = pf.ops.global_posterior_mean(x, images, 0.5)
    turned = torch._neg_view(x.neg()), torch._neg_view(images.neg())
    assert torch.equal(pf.ops.global_posterior_mean(turned[0], images, 0.5), expected)
    assert torch.equal(pf.ops.global_posterior_mean(x, turned[1], 0.5), expected)
    assert torch.equal(pf.OptimalDenoiser(pf.TrainingSet(turned[1]))(turned[0], 0.5), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: pf.MultiscaleDenoiser(pf.TrainingSet(_images()), 2**31, 3),
        lambda: pf.WaveletShrinkageDenoiser(SHAPE, 2**31),
        lambda: pf.wavelets.decompose(_images(), 2**62),
        lambda: pf.wavelets.decompose(_images(), 10**400),
    ],
)
def test_no_power_is_computed_of_a_number_of_levels(make):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="`levels` must be at most"):
        make()
    assert time.perf_counter() - start < 5


def test_a_rank_is_checked_before_the_moments(monkeypatch):
    monkeypatch.setattr(pf.Moments, "from_data", lambda *a, **k: pytest.fail("work was begun"))
    monkeypatch.setattr(pf.Moments, "eigh", lambda *a: pytest.fail("work was begun"))
    data = pf.TrainingSet(_images())
    with pytest.raises(TypeError, match="`rank` must be a whole number, got '3'"):
        pf.WienerDenoiser(data, rank="3")
    with pytest.raises(ValueError, match="`rank` must be at most 16, got 17"):
        pf.WienerDenoiser(data, rank=17)


@pytest.mark.parametrize(
    "value", [10**400, fractions.Fraction(10**400, 3), np.longdouble("1e4000")]
)
def test_numbers_beyond_float64(value):
    data = pf.TrainingSet(_images())
    with pytest.raises(ValueError, match="`temperature` must be finite and positive"):
        pf.OptimalDenoiser(data, temperature=value)
    with pytest.raises(ValueError, match="`sigma` must be finite and not negative"):
        pf.OptimalDenoiser(data)(_images(1), value)


def test_numbers_that_python_does_not_write_out():
    with pytest.raises(ValueError, match="`steps` must be at most 1000000, got a int"):
        pf.KarrasSchedule().timesteps(10**10_000)


def test_a_number_of_images_beyond_memory_is_named():
    denoiser = pf.OptimalDenoiser(pf.TrainingSet(_images()))
    with pytest.raises(ValueError, match="`n` must be at most [0-9]+, as .* GB of memory"):
        pf.sample(denoiser, 2**50, progress=False)
    with pytest.raises(ValueError, match="`n` must be at most [0-9]+, as .* GB of memory"):
        pf.synthetic.disks(2**45)


class _Unfriendly:
    def __repr__(self):
        raise RuntimeError("no repr")
