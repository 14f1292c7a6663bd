"""What a calibration tells of its time beforehand, from counts and rates of one's own."""

from __future__ import annotations

import re

import pytest
import torch
from truth import random_images

import pyflocality as pf
from pyflocality.calibration import foreseen
from pyflocality.calibration.counts import counts_of

SHAPE = (1, 6, 6)
PLAIN = pf.Candidate("local", window=3)
WIDE = pf.Candidate("local", window=5)
SLOPED = pf.Candidate("local", window=3, slope=0.25)
LEVELS = [pf.NoiseLevel(1.0, sigma) for sigma in (0.5, 0.3, 0.1)]
COUNT, HELD_OUT = 1300, 64


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """A second for each step, an hour for each operation of products; nothing is quick."""
    monkeypatch.setattr(foreseen, "_LONG_FLOPS", 0.0)
    monkeypatch.setattr(foreseen, "seconds_of", lambda *_: 1e6)
    monkeypatch.setattr(foreseen, "stages_of", lambda *_, **__: [])
    monkeypatch.setattr(foreseen, "product_seconds", lambda flops, dtype: 10.0 * flops)
    monkeypatch.setattr(foreseen, "time_told", lambda seconds: f"{seconds:.0f} s")


def told(*candidates):
    images = random_images(torch.Generator().manual_seed(0), COUNT, SHAPE, torch.uint8)
    line = foreseen.foreseen(pf.TrainingSet(images), candidates, LEVELS)
    return float(re.search(r"about (\d+) s", line).group(1))


def rows(*candidates):
    # Of three levels two restore images.
    counts = counts_of(len(LEVELS), HELD_OUT, candidates, 1, 2)
    return counts.screened + counts.compared + counts.restored


def test_steps_are_counted():
    assert told(PLAIN) == pytest.approx(1e6 * rows(PLAIN) / HELD_OUT)


def test_any_family_may_go_on(monkeypatch):
    """Images that all see are counted by family, others by the mean of families."""
    monkeypatch.setattr(
        foreseen, "seconds_of", lambda _, setting, aim: 1e6 * (1 + 2 * (setting.window == 5))
    )
    counts = counts_of(len(LEVELS), HELD_OUT, [PLAIN, WIDE], 1, 2)
    # Two families see them, which take one and three seconds.
    expected = 4e6 * (counts.screened + (counts.compared + counts.restored) / 2) / HELD_OUT
    assert told(PLAIN, WIDE) == pytest.approx(expected)


def test_slopes_take_linear_images_and_value_images_beside_the_image():
    values = COUNT * SHAPE[1] * SHAPE[2]
    linear = 10.0 * len(LEVELS) * 2 * values * SHAPE[1] * SHAPE[2]
    assert linear > 1e6
    expected = 1.5e6 * rows(PLAIN, SLOPED) / HELD_OUT + linear
    assert told(PLAIN, SLOPED) == pytest.approx(expected)
