"""Errors of candidates against float64 truth over what is left of a set, and no more than that."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from truth import filtered_posterior_mean, random_images, values_of, window_weights

import pyflocality as pf
from pyflocality.backends import trace_blocks
from pyflocality.calibration.counts import counts_of, temperatures_of
from pyflocality.calibration.folds import folds_of, held_out_positions
from pyflocality.calibration.record import Restored, RunTrial, Trial, simplest
from pyflocality.calibration.trained import Trained
from pyflocality.calibration.trials import compared, mean_error, restoration
from pyflocality.storage.mapped import mapped_file
from pyflocality.storage.reader import Reader

SHAPE = (2, 6, 6)
# Few levels, at which posteriors span several images and the images' noise tells what they were.
SCHEDULE = pf.KarrasSchedule(0.1, 0.5)
LOCAL = pf.Candidate("local", window=3)
WARM = pf.Candidate("local", window=3, temperature=1.4)
WIENER = pf.Candidate("wiener")


def training_set(count=90, labels=None):
    images = random_images(torch.Generator().manual_seed(3), count, SHAPE, torch.uint8)
    return pf.TrainingSet(images, labels)


def calibrated(data, *candidates, steps=2, seed=7, schedule=SCHEDULE):
    return pf.calibrate(
        data,
        schedule=schedule,
        steps=steps,
        candidates=candidates,
        seed=seed,
        progress=False,
    )


def drawn(data, seed=7, steps=2):
    """Held-out positions, and noise of every fold and level, as they are drawn."""
    generator = torch.Generator().manual_seed(seed)
    positions = held_out_positions(data, generator)
    noise = [
        [torch.randn(len(some), *SHAPE, generator=generator).double() for _ in range(steps)]
        for some in positions
    ]
    return positions, noise


def local_mean(x, images, level, temperature=1.0):
    weights, answers = window_weights(SHAPE, 3)
    alpha, sigma = (np.full(len(x), value) for value in level)
    return filtered_posterior_mean(x, images, weights, answers, sigma, alpha, temperature)


def wiener_mean(x, images, level):
    alpha, sigma = level
    values = values_of(images).reshape(len(images), -1)
    mean, covariance = values.mean(0), np.cov(values.T)
    total = alpha**2 * covariance + sigma**2 * np.eye(len(mean))
    filtered = alpha * covariance @ np.linalg.inv(total)
    return (mean + (x.numpy().reshape(len(x), -1) - alpha * mean) @ filtered.T).reshape(x.shape)


def without(data, positions):
    kept = np.setdiff1d(np.arange(len(data)), positions.numpy())
    return data.images[torch.from_numpy(kept)]


MODELS = {
    LOCAL: local_mean,
    WARM: lambda x, images, level: local_mean(x, images, level, 1.4),
    WIENER: wiener_mean,
}


def test_errors_are_those_over_the_images_that_are_left():
    data = training_set()
    found = calibrated(data, *MODELS)
    positions, noise = drawn(data)
    assert found.folds == len(positions) > 1 and found.held_out == 45
    for index, level in enumerate(found.levels):
        for trial, model in zip(level.trials, MODELS.values(), strict=True):
            errors, leaked = [], []
            for some, drawn_noise in zip(positions, noise, strict=True):
                truth = torch.from_numpy(values_of(data.images[some]))
                x = level.alpha * truth + level.sigma * drawn_noise[index]
                for images, into in ((without(data, some), errors), (data.images, leaked)):
                    answer = model(x, images, (level.alpha, level.sigma)).clip(-1, 1)
                    into += ((answer - truth.numpy()) ** 2).reshape(len(some), -1).mean(1).tolist()
            assert trial.images == len(errors) == 45
            # States are in float32, and so are the models.
            assert trial.error == pytest.approx(np.mean(errors), rel=2e-5)
            # With the fold in the posterior the error would be another one.
            assert np.mean(leaked) < 0.9 * np.mean(errors)


def test_restored_images_are_those_of_the_sampler_over_the_images_that_are_left():
    data = training_set()
    found = calibrated(data, LOCAL)
    positions, noise = drawn(data)
    level = found.levels[0]
    errors, energies, own = [], [], []
    for some, drawn_noise in zip(positions, noise, strict=True):
        rest = pf.TrainingSet(without(data, some))
        truth = data.subset(some).values()
        x = truth + level.sigma * drawn_noise[0].float()
        run = pf.sample(
            pf.LocalDenoiser(rest, 3), schedule=SCHEDULE, steps=2, x_T=x, progress=False
        )
        errors += pf.metrics.mse(run.images, truth).tolist()
        energies += pf.metrics.gradient_energy(run.images).tolist()
        own += pf.metrics.gradient_energy(truth).tolist()
    restored = level.trials[0].restored
    assert restored.error == pytest.approx(np.mean(errors), rel=1e-5)
    assert restored.sharpness == pytest.approx(np.mean(energies) / np.mean(own), rel=1e-5)
    assert (restored.excess, restored.deviation) == (0.0, 0.0)


def test_whole_runs_are_those_of_the_sampler_compared_from_the_noisiest_level():
    data, schedule = training_set(), pf.KarrasSchedule(0.1, 0.35)
    found = calibrated(data, LOCAL, WARM, steps=3, schedule=schedule)
    generator = torch.Generator().manual_seed(7)
    positions = held_out_positions(data, generator)
    for some in positions:
        # What levels are calibrated by, one after the other.
        for _ in range(3):
            torch.randn(len(some), *SHAPE, generator=generator)
    noise = [torch.randn(2 * len(some), *SHAPE, generator=generator) for some in positions]
    levels = [pf.NoiseLevel(level.alpha, level.sigma) for level in found.levels]
    levels.append(pf.NoiseLevel(1.0, 0.0))
    assert [run.posteriors for run in found.runs] == [((1.0, 0.0),), ((1.4, 0.0),)]
    # Of the last level all runs have the choice in common.
    last = found.run.choices[-1]
    assert [run.choices for run in found.runs] == [(0, 0, last), (1, 1, last)]
    numbers = [[], [], []]
    for run in found.runs:
        parts = [[], [], []]
        for some, drawn_noise in zip(positions, noise, strict=True):
            rest = pf.TrainingSet(without(data, some))
            truth = data.subset(some).values().repeat(2, 1, 1, 1)
            x = truth + levels[0].sigma * drawn_noise
            for place, number in enumerate(run.choices):
                model = found.candidates[number].build(rest)
                x, _ = pf.DDIM().step(model, x, levels[place], levels[place + 1])
            parts[0].append(pf.metrics.mse(x, truth))
            parts[1].append(pf.metrics.gradient_energy(x))
            parts[2].append(pf.metrics.gradient_energy(truth))
        for kept, part in zip(numbers, parts, strict=True):
            # Of each image the mean of two.
            kept.append(torch.cat([one.reshape(2, -1).mean(0) for one in part]))
    errors, energies, own = map(torch.stack, numbers)
    expected = compared(restoration, errors, energies)
    for place, run in enumerate(found.runs):
        told = run.restored
        assert told.error == pytest.approx(float(errors[place].mean()), rel=1e-5)
        sharpness = float(energies[place].mean() / own[place].mean())
        assert told.sharpness == pytest.approx(sharpness, rel=1e-5)
        assert told.excess == pytest.approx(float(expected.excess[place]), abs=1e-5)
        assert told.deviation == pytest.approx(float(expected.deviation[place]), abs=1e-5)


def test_runs_take_a_family_where_it_has_their_temperature():
    data, schedule = training_set(), pf.KarrasSchedule(0.1, 0.35)
    # Of another temperature alone, and the better model.
    patches = pf.Candidate("patch-set", window=3, temperature=1.4)
    worse = pf.Candidate("local", window=3, temperature=1e6)
    found = calibrated(data, worse, patches, steps=3, schedule=schedule)
    assert [run.choices[:2] for run in found.runs] == [(1, 1), (1, 1)]
    assert set(found.choices) == {patches}


def test_moments_of_what_is_left_are_exact():
    data = training_set(400)
    positions = held_out_positions(data, torch.Generator().manual_seed(0))
    for fold, some in zip(
        folds_of(data, positions, moments=True, progress=False), positions, strict=True
    ):
        expected = pf.Moments.from_data(without(data, some))
        assert torch.equal(fold.moments.covariance, expected.covariance)
        assert torch.equal(fold.moments.mean, expected.mean)


@pytest.mark.parametrize("count", [4, 5, 20, 42, 90, 500, 1280, 3000])
def test_folds_are_apart_and_small(count):
    data = training_set(count)
    positions = held_out_positions(data, torch.Generator().manual_seed(0))
    together = torch.cat(positions)
    assert len(together.unique()) == len(together) == min(64, count // 2)
    assert max(map(len, positions)) - min(map(len, positions)) <= 1
    largest = max(map(len, positions))
    assert largest <= max(1, count // 20) or len(positions) == 5
    assert len(positions) <= 5 and (len(positions) == 1) == (count >= 1280)


def test_folds_take_every_class_in_proportion():
    labels = torch.arange(1000) // 250
    data = training_set(1000, labels)
    positions = held_out_positions(data, torch.Generator().manual_seed(0))
    for some in positions:
        # A class of a quarter of the images, in folds of 32.
        assert data.labels[some].bincount().tolist() == [8, 8, 8, 8]
    unlabelled = held_out_positions(training_set(1000), torch.Generator().manual_seed(0))
    assert [len(some) for some in unlabelled] == [32, 32]


def test_images_of_a_file_are_left_out_without_a_copy(tmp_path, monkeypatch):
    path = tmp_path / "images.npy"
    images = training_set(300).images.numpy()
    np.save(path, images)
    written = path.read_bytes()
    mapped, resident = pf.TrainingSet.load(path), pf.TrainingSet(torch.from_numpy(images))
    # At both ends, too: the last images take the places of those before the end.
    positions = [torch.tensor([0, 5, 17, 298, 299]), torch.tensor([1, 2, 150])]
    monkeypatch.setenv("PYFLOCALITY_MEMORY_BUDGET", "4096")
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    for fold, some in zip(
        folds_of(mapped, positions, moments=True, progress=False), positions, strict=True
    ):
        rest = fold.rest.images
        assert mapped_file(rest).path == str(path) and mapped_file(rest).rewritten
        expected = without(resident, some)
        order = sorted(map(bytes, rest.flatten(1).numpy()))
        assert order == sorted(map(bytes, expected.flatten(1).numpy()))
        assert torch.equal(fold.images, resident.subset(some).values())
        # The file has other images than the map, and is larger than the budget.
        with trace_blocks() as blocks:
            answer = pf.LocalDenoiser(fold.rest, 3)(x, 0.5)
        assert blocks and not any(block.from_file for block in blocks)
        truth = pf.LocalDenoiser(pf.TrainingSet(expected), 3)(x, 0.5)
        torch.testing.assert_close(answer, truth, rtol=0, atol=3e-6)
        assert fold.moments.content_key() == pf.Moments.from_data(expected).content_key()
    assert path.read_bytes() == written
    assert Reader(mapped.images).from_file


def test_temperatures_share_passes():
    data = training_set(1300)
    pf.LocalDenoiser(data, 3)
    found = []
    for candidates in ([LOCAL], [LOCAL, WARM]):
        with pf.trace_backends() as calls:
            result = calibrated(data, *candidates, steps=3)
        found.append([operation for operation, _ in calls].count("window_posterior"))
        restored = [level.trials[0].restored is not None for level in result.levels]
        # The noisiest image tells too little to be restored.
        assert restored == [False, True, True]
    # At each of three levels the first images and the others, from one a step down, and by either
    # run two steps.
    assert found == [2 * 3 + 1 + 2, 2 * 3 + 1 + 4]


def test_work_is_what_was_counted(monkeypatch):
    data = training_set(1300)
    rows = []
    answers = Trained._of_leaves

    def counted(self, candidates, x, level):
        # Slopes take no passes of their own.
        warm = {(one.family, one.temperature) for one in candidates}
        rows.append(len(warm) * len(x))
        return answers(self, candidates, x, level)

    monkeypatch.setattr(Trained, "_of_leaves", counted)
    candidates = pf.calibration.default_candidates(SHAPE)
    calibrated(data, *candidates, steps=3)
    counts = counts_of(3, 64, candidates, 1)
    screened = counts.screened * sum(temperatures_of(candidates).values())
    # At two temperatures each, and the Wiener filter.
    families = {one.family for one in candidates if not one.parts}
    assert screened == 3 * 16 * (2 * len(families) - 1)
    assert screened + 3 * 2 * 48 < sum(rows) <= screened + counts.compared + counts.restored


def test_means_take_the_passes_of_their_parts():
    data = training_set(400)
    positions = held_out_positions(data, torch.Generator().manual_seed(0))
    (fold, *_) = folds_of(data, positions, moments=True, progress=False)
    level = pf.NoiseLevel(0.8, 0.4)
    trained = Trained(fold, [level], torch.Generator().manual_seed(1))
    patches = pf.Candidate("patch-set", window=4, temperature=1.4)
    mean = pf.Candidate("mean", parts=(WARM, patches))
    x = trained.noisy[0]
    with pf.trace_backends() as calls:
        answers = dict(trained.answers([LOCAL, WARM, patches, mean], x, level))
    assert sorted(name for name, _ in calls) == ["patch_set", "window_posterior"]
    expected = (answers[WARM].double() + answers[patches].double()) / 2
    torch.testing.assert_close(answers[mean].double(), expected, rtol=0, atol=1e-6)
    built = mean.build(fold.rest, fold.moments)(x, level)
    torch.testing.assert_close(built, answers[mean], rtol=0, atol=2e-6)


def test_slopes_and_temperatures_share_passes_and_answer_as_the_models_do():
    data = training_set(400)
    positions = held_out_positions(data, torch.Generator().manual_seed(0))
    (fold, *_) = folds_of(data, positions, moments=True, progress=False)
    level = pf.NoiseLevel(0.8, 0.4)
    trained = Trained(fold, [level], torch.Generator().manual_seed(1))
    for family, operation in (
        (LOCAL, "window_posterior"),
        (pf.Candidate("patch-set", window=4), "patch_set"),
        (pf.Candidate("pca-locality", threshold=0.05), "masked_posterior"),
    ):
        members = [
            dataclasses.replace(family, temperature=temperature, slope=slope)
            for temperature, slope in ((1.0, 0.0), (1.4, 0.25), (1.4, 0.5))
        ]
        x = trained.noisy[0]
        with pf.trace_backends() as calls:
            answers = dict(trained.answers(members, x, level))
        assert [name for name, _ in calls].count(operation) == 1
        for member in members:
            expected = member.build(fold.rest, fold.moments)(x, level)
            # Products of another batch round in another way.
            torch.testing.assert_close(answers[member], expected, rtol=0, atol=5e-6)


def test_differences_have_the_standard_error_of_paired_means():
    generator = torch.Generator().manual_seed(4)
    errors = torch.rand(3, 20, generator=generator, dtype=torch.float64)
    found = compared(mean_error, errors)
    best = int(errors.mean(1).argmin())
    differences = errors - errors[best]
    torch.testing.assert_close(found.excess, differences.mean(1), rtol=1e-12, atol=1e-15)
    expected = differences.std(1) / 20**0.5
    torch.testing.assert_close(found.deviation, expected, rtol=1e-12, atol=1e-15)


def test_a_quarter_of_the_sharpness_is_free_and_the_rest_counts_like_the_error():
    energies = torch.tensor([[1.0, 3.0], [0.5, 1.5], [4.0, 4.0], [1.5, 1.5]], dtype=torch.float64)
    errors = torch.tensor([[0.1, 0.3], [0.2, 0.2], [0.2, 0.2], [0.2, 0.2]], dtype=torch.float64)
    found = compared(restoration, errors, energies)
    # As sharp as the first, half as sharp, twice as sharp, just a quarter off.
    expected = torch.tensor([0.0, np.log(1.5), np.log(1.5), 0.0], dtype=torch.float64)
    torch.testing.assert_close(found.excess, expected, rtol=1e-12, atol=1e-14)
    # Without one of two images the other is all there is: half as sharp again.
    first = np.log(0.2) + np.log(1.5) - np.log(0.3)
    second = np.log(0.2) + np.log(1.5) - np.log(0.1)
    assert float(found.deviation[1]) == pytest.approx(abs(first - second) / 2, rel=1e-12)
    # Images without gradients are as sharp as one another.
    flat = restoration(errors.mean(1), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(flat, errors.mean(1).log())


def test_the_simplest_run_within_one_standard_error_is_chosen():
    candidates, data = (LOCAL, WARM), training_set()
    found = calibrated(data, *candidates, steps=3)

    def run(*results):
        runs = tuple(
            RunTrial(False, ((1.0, 0.0),), (place, place, place), Restored(0.1, 1.0, *result))
            for place, result in enumerate(results)
        )
        return dataclasses.replace(found, runs=runs)

    assert run((0.02, 0.03), (0.0, 0.0)).choices == (LOCAL,) * 3
    assert run((0.04, 0.03), (0.0, 0.0)).choices == (WARM,) * 3


def chosen(excess, deviation, restored=None, images=(64, 64, 64)):
    trials = [
        Trial(number, count, 0.1 + more, more, spread, None if told is None else Restored(*told))
        for number, (count, more, spread, told) in enumerate(
            zip(images, excess, deviation, restored or [None] * 3, strict=True)
        )
    ]
    return simplest(trials).candidate


def test_the_simplest_within_one_standard_error_is_chosen():
    # Nearer to the best than could not be chance; what could not, counts.
    assert chosen([0.01, 0.0, 0.02], [0.011, 0.0, 0.03]) == 0
    assert chosen([0.01, 0.0, 0.02], [0.009, 0.0, 0.03]) == 1
    assert chosen([1e-9, 0.0, 0.02], [0.0, 0.0, 0.03]) == 0
    # What was seen on few images is not compared with what was seen on all.
    assert chosen([0.0, 0.0, 0.02], [0.0, 0.0, 0.03], images=(16, 64, 64)) == 1
    # Who restored images is judged by that, and the others are out.
    restored = [None, (0.2, 0.9, 0.04, 0.03), (0.2, 0.9, 0.0, 0.0)]
    assert chosen([0.0, 0.0, 0.02], [0.0, 0.0, 0.03], restored) == 2
