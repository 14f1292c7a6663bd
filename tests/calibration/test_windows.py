"""Windows chosen by a network: the known window is found, tables are saved and used."""

from __future__ import annotations

import functools
import json
import pickle

import pytest
import torch
from torch import nn

import pyflocality as pf

SHAPE = (2, 9, 9)
RUN = {"steps": 4, "samples": 3, "progress": False}


def smooth(count=80):
    coarse = torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse / 2, size=(9, 9), mode="bilinear").clamp(-1, 1)


@pytest.fixture(scope="module")
def data():
    return pf.TrainingSet(smooth())


def seeded():
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("window", [3, 5, 9])
@pytest.mark.parametrize(
    "make", [pf.LocalDenoiser, functools.partial(pf.EquivariantDenoiser, boundary="broken")]
)
def test_the_known_window_is_found_at_every_level(data, make, window):
    # Levels at which several images share the posteriors, which the window then decides.
    table = pf.calibrate_windows(
        data,
        make(data, window),
        pf.KarrasSchedule(0.3, 3.0),
        model=make,
        generator=seeded(),
        **RUN,
    )
    assert [found for _, found in table] == [window] * 4
    assert table.windows == (3, 5, 7, 9)
    best = [row[table.windows.index(window)] for row in table.similarities]
    assert best == pytest.approx([1.0] * 4, abs=1e-9)
    # The others are told apart, not tied with it.
    assert all(sorted(row)[-2] < 1 - 1e-7 for row in table.similarities)


def test_a_window_that_falls_with_the_noise_is_found_and_used(data):
    schedule = pf.KarrasSchedule(0.1, 3.0)
    planted = [(3.0, 9), (0.8, 5), (0.1, 3)]
    table = pf.calibrate_windows(
        data,
        pf.LocalDenoiser(data, planted),
        schedule,
        steps=3,
        samples=4,
        generator=seeded(),
        progress=False,
    )
    levels = schedule.timesteps(3).tolist()
    assert [ratio for ratio, _ in table] == pytest.approx(levels)
    used, known = pf.LocalDenoiser(data, table), pf.LocalDenoiser(data, planted)
    for level in levels:
        assert torch.equal(used(smooth(2), level), known(smooth(2), level))


def test_similarities_are_those_of_the_scores(data):
    network = pf.OptimalDenoiser(data)
    table = pf.calibrate_windows(data, network, windows=[3, 7], generator=seeded(), **RUN)
    noise = torch.randn(3, *SHAPE, generator=seeded())
    run = pf.sample(network, x_T=noise, steps=4, progress=False)
    for step, time in enumerate(run.timesteps):
        alpha, sigma = pf.DDPMSchedule()(int(time))
        x = run.x_t[step].double()
        mine = pf.noise.score_from_x0(x, network(x, sigma, alpha), alpha, sigma).flatten(1)
        for column, window in enumerate((3, 7)):
            answer = pf.LocalDenoiser(data, window)(x, sigma, alpha)
            score = pf.noise.score_from_x0(x, answer, alpha, sigma).flatten(1)
            cosine = (mine * score).sum(1) / mine.norm(dim=1) / score.norm(dim=1)
            expected = float(cosine.sort().values[1])
            assert table.similarities[step][column] == pytest.approx(expected, abs=1e-4)


def test_batches_do_not_matter(data):
    runs = [
        pf.calibrate_windows(
            data, pf.OptimalDenoiser(data), generator=seeded(), batch_size=size, **RUN
        )
        for size in (None, 2)
    ]
    for row, other in zip(runs[0].similarities, runs[1].similarities, strict=True):
        assert row == pytest.approx(other, abs=1e-5)


TABLE = pf.WindowTable((10.0, 0.5), (3, 5), ((0.1, 0.9), (0.7, 0.7)))


def test_tables_are_saved_and_loaded(tmp_path):
    path = tmp_path / "windows.json"
    TABLE.save(path)
    # Of equally good windows the first counts.
    assert list(TABLE) == [(10.0, 5), (0.5, 3)] and len(TABLE) == 2 and TABLE[-1] == (0.5, 3)
    assert TABLE[1:] == [(0.5, 3)] and TABLE[::-1] == [(0.5, 3), (10.0, 5)]
    assert pf.WindowTable.load(path) == TABLE == pickle.loads(pickle.dumps(TABLE))
    assert json.loads(path.read_text())["levels"][0]["window"] == 5
    with pytest.raises(FileExistsError, match="windows.json is already there"):
        TABLE.save(path)
    TABLE.save(path, force=True)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder to save w.json in"):
        TABLE.save(tmp_path / "nowhere" / "w.json")
    with pytest.raises(IsADirectoryError, match="is a folder, expected the name of a file"):
        TABLE.save(tmp_path, force=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["windows.json"]


def test_damaged_tables_are_named(tmp_path):
    path = tmp_path / "w.json"
    with pytest.raises(FileNotFoundError, match="w.json"):
        pf.WindowTable.load(path)
    TABLE.save(path)
    good = path.read_text()
    for text, words in (
        (good[:40], "does not hold a window table .* not readable as JSON"),
        ("[" * 100_000, "does not hold a window table .* nested too deeply"),
        ("[1]", "does not hold a window table"),
        (good.replace("window table", "moments"), "does not hold a window table"),
        (good.replace('"version": 1', '"version": 9'), "version 9"),
        (good.replace('"window": 5', '"window": 3'), "do not follow"),
        (good.replace("10.0", "-10.0"), "`ratios` must be finite and positive"),
        (good.replace("0.9", '"much"'), "`similarities` must be a number"),
        (good.replace('"ratio"', '"level"'), "damaged"),
    ):
        assert text != good
        path.write_text(text)
        with pytest.raises(ValueError, match=words) as caught:
            pf.WindowTable.load(path)
        assert str(path) in str(caught.value)


def test_wrong_arguments_are_refused_before_any_work(data):
    def network(x, sigma, alpha):
        pytest.fail("work was begun")

    def calibrate(data=data, network=network, **options):
        return pf.calibrate_windows(data, network, **(RUN | options))

    for call, error, message in (
        (lambda: calibrate(data=smooth()), TypeError, "`data` must be a TrainingSet"),
        (lambda: calibrate(network=3), TypeError, "`network` must be callable"),
        (lambda: calibrate(schedule="ddpm"), TypeError, "`schedule`"),
        (lambda: calibrate(model=3), TypeError, "`model` must be callable"),
        (lambda: calibrate(generator=3), TypeError, "`generator` must be a torch.Generator"),
        (lambda: calibrate(windows=[4]), ValueError, "`windows` holds 4, .*must be odd"),
        (lambda: calibrate(windows=[]), ValueError, "`windows` must hold at least one"),
        (lambda: calibrate(windows=7), TypeError, "`windows` must be a sequence"),
        (lambda: calibrate(samples=0), ValueError, "`samples` must be at least 1"),
        (lambda: calibrate(steps=0), ValueError, "`steps` must be at least 1"),
        (lambda: calibrate(batch_size=0), ValueError, "`batch_size`"),
        (lambda: pf.WindowTable((), (3,), ()), ValueError, "`ratios`"),
        (lambda: pf.WindowTable((1.0,), (3,), ((0.5, 0.5),)), ValueError, "`similarities`"),
        (lambda: pf.WindowTable((1.0,), (3,), ()), ValueError, "`similarities`"),
    ):
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(ValueError, match="`network` answered NaN"):
        calibrate(network=lambda x, sigma, alpha: x * float("nan"))
