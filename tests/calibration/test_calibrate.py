"""Models chosen by held-out images: the choice, its file, and the denoiser that follows it."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import pytest
import torch
from truth import random_images

import pyflocality as pf

SHAPE = (1, 6, 6)
SCHEDULE = pf.KarrasSchedule(0.1, 1.0)
LOCAL = pf.Candidate("local", window=3)
PATCHES = pf.Candidate("patch-set", window=5, temperature=1.4)
WIENER = pf.Candidate("wiener")
PCA = pf.Candidate("pca-locality", threshold=0.05)
RUN = {"schedule": SCHEDULE, "steps": 3, "progress": False}


def training_set(count=120, dtype=torch.uint8):
    return pf.TrainingSet(random_images(torch.Generator().manual_seed(1), count, SHAPE, dtype))


@pytest.fixture(scope="module")
def data():
    return training_set()


@pytest.fixture(scope="module")
def calibration(data):
    return pf.calibrate(data, candidates=[LOCAL, PATCHES, WIENER, PCA], **RUN)


def test_a_calibration_tells_what_it_did(data, calibration):
    alphas, sigmas = SCHEDULE(SCHEDULE.timesteps(3))
    assert [level.alpha for level in calibration.levels] == alphas.tolist()
    assert [level.sigma for level in calibration.levels] == sigmas.tolist()
    assert calibration.content_key == data.content_key()
    assert (calibration.images, calibration.held_out, calibration.seed) == (120, 60, 0)
    assert calibration.versions["pyflocality"] == pf.__version__
    assert [run.posteriors for run in calibration.runs] == [((1.0, 0.0),), ((1.4, 0.0),)]
    assert calibration.run in calibration.runs
    for place, (level, choice) in enumerate(
        zip(calibration.levels, calibration.choices, strict=True)
    ):
        assert [trial.candidate for trial in level.trials] == [0, 1, 2, 3]
        assert calibration.chosen[place] == level.trials[calibration.run.choices[place]]
        assert choice == calibration.candidates[calibration.chosen[place].candidate]
        least = min(trial.error for trial in level.trials)
        for trial in level.trials:
            assert trial.images == 60
            assert trial.excess == pytest.approx(trial.error - least, abs=1e-12)
            assert trial.deviation >= 0.0


def test_the_same_seed_chooses_the_same(data, calibration):
    assert pf.calibrate(data, candidates=calibration.candidates, **RUN) == calibration
    other = pf.calibrate(data, candidates=calibration.candidates, seed=1, **RUN)
    assert other.levels != calibration.levels


def test_of_equals_the_simplest_is_chosen(data):
    # Windows and patches that cover the image from everywhere are the same model.
    one, other = pf.Candidate("local", window=11), pf.Candidate("patch-set", window=6)
    for candidates in ([one, other], [other, one]):
        found = pf.calibrate(data, candidates=candidates, **RUN)
        assert set(found.choices) == {candidates[0]}
        for level in found.levels:
            # To rounding.
            assert max(trial.excess for trial in level.trials) < 1e-6


def test_a_better_model_wins_over_a_simpler_one(data):
    # The best linear model against the mean of all images, which is what a warm posterior answers.
    warm = pf.Candidate("local", window=11, temperature=1e9)
    found = pf.calibrate(data, candidates=[warm, WIENER], **RUN)
    assert set(found.choices) == {WIENER}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sets_of_numbers_choose_as_bytes_do(calibration, dtype):
    values = training_set().values(dtype=dtype)
    found = pf.calibrate(pf.TrainingSet(values), candidates=calibration.candidates, **RUN)
    assert found.choices == calibration.choices
    for one, other in zip(found.levels, calibration.levels, strict=True):
        for trial, expected in zip(one.trials, other.trials, strict=True):
            assert trial.error == pytest.approx(expected.error, rel=1e-4)


def test_sets_of_few_images_and_augmented_ones(data):
    few = pf.calibrate(data.subset(range(4)), candidates=[PCA, WIENER, LOCAL], **RUN)
    assert (few.images, few.held_out, few.folds) == (4, 2, 2)
    mirrored = pf.calibrate(data.augmented(flip=True), candidates=[LOCAL], **RUN)
    assert mirrored.content_key == data.augmented(flip=True).content_key()
    # Mirrored copies of held-out images are left out, too: none is answered by itself.
    alone = pf.calibrate(data, candidates=[LOCAL], **RUN)
    assert mirrored.levels[-1].trials[0].error > 0.5 * alone.levels[-1].trials[0].error


def test_files(calibration, tmp_path):
    path = tmp_path / "calibration.json"
    calibration.save(path)
    assert pf.Calibration.load(path) == calibration
    with pytest.raises(FileExistsError, match="force=True"):
        calibration.save(path)
    calibration.save(path, force=True)
    content = json.loads(path.read_text())
    assert content["candidates"][1] == {"model": "patch-set", "window": 5, "temperature": 1.4}
    assert content["versions"]["torch"] == torch.__version__
    with pytest.raises(FileNotFoundError):
        pf.Calibration.load(tmp_path / "none.json")


def altered(content, *place, value):
    content = copy.deepcopy(content)
    inside = content
    for key in place[:-1]:
        inside = inside[key]
    if value is None:
        del inside[place[-1]]
    else:
        inside[place[-1]] = value
    return content


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("format",), "pyflocality window table", "does not hold a calibration"),
        (("version",), 1, "version 1 .* reads version 3"),
        (("seed",), None, "has no 'seed'"),
        (("further",), 1, "unknown 'further'"),
        (("images",), 0, "'images' must be a positive"),
        (("image_shape",), [1, 6], "'image_shape'"),
        (("versions",), {"torch": 2}, "'versions'"),
        (("candidates",), [], "'candidates'"),
        (("candidates", 1), {"model": "local", "window": 3}, "twice"),
        (("candidates", 1), {"model": "unheard"}, "`model`"),
        (("candidates", 1), {"model": "local", "window": 3, "depth": 1}, "depth"),
        (("levels", 0, "sigma"), -1.0, "'sigma' must be"),
        (("levels", 0, "sigma"), True, "'sigma' must be"),
        (("levels", 0, "trials"), [{}], "has no 'candidate'"),
        (("levels", 0, "trials", 1, "candidate"), 0, "one of each"),
        (("levels", 0, "trials", 1, "error"), "0.1", "'error' must be"),
        (("levels", 0, "trials", 1, "restored"), {"error": 0.1}, "has no 'sharpness'"),
        (("levels", 0, "chosen"), 0, "unknown 'chosen'"),
        (("runs",), [], "'runs'"),
        (("runs", 0, "means"), 1, "'means' must be"),
        (("runs", 0, "posteriors"), [[1.0]], "'posteriors' must be pairs"),
        (("runs", 0, "choices"), [0, 1], "each of 3 levels"),
        (("runs", 0, "choices"), [0, 1, 4], "one of 4 candidates"),
        (("runs", 0, "choices"), [0, 1, -1], "'choices' must be"),
        (("runs", 0, "restored"), {"error": 0.1}, "has no 'sharpness'"),
        (("chosen",), 9, "does not follow"),
    ],
)
def test_damaged_files(calibration, tmp_path, place, value, words):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(altered(calibration.as_json(), *place, value=value)))
    with pytest.raises(ValueError, match=words):
        pf.Calibration.load(path)
    path.write_text(json.dumps(calibration.as_json())[:-2])
    with pytest.raises(ValueError, match="does not hold a calibration"):
        pf.Calibration.load(path)


def test_candidates():
    assert str(PATCHES) == "patch-set, window 5, temperature 1.4"
    assert str(WIENER) == "wiener"
    for wrong, error, words in (
        ({"model": "local"}, ValueError, "`window` must be given for local"),
        ({"model": "wiener", "window": 3}, ValueError, "`window` is no setting of wiener"),
        ({"model": "wiener", "temperature": 2.0}, ValueError, "`temperature` is no setting"),
        ({"model": "pca-locality", "threshold": 0.0}, ValueError, "`threshold` must be above 0"),
        ({"model": "local", "window": 3, "temperature": 0.0}, ValueError, "`temperature`"),
        ({"model": "local", "window": 2.5}, TypeError, "`window`"),
    ):
        with pytest.raises(error, match=words):
            pf.Candidate(**wrong)
    assert pf.Candidate("local", window=3) == LOCAL


def test_means_of_candidates(data, tmp_path):
    mean = pf.Candidate("mean", parts=[LOCAL, PATCHES])
    assert str(mean) == "1/2 of local, window 3 and 1/2 of patch-set, window 5, temperature 1.4"
    assert (mean.takes_moments, pf.Candidate("mean", parts=[LOCAL, PCA]).takes_moments) == (0, 1)
    found = pf.calibrate(data, candidates=[mean], **RUN)
    found.save(tmp_path / "means.json")
    assert pf.Calibration.load(tmp_path / "means.json") == found
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2))
    expected = (LOCAL.build(data)(x, 0.3) + PATCHES.build(data)(x, 0.3)) / 2
    torch.testing.assert_close(pf.CalibratedDenoiser(data, found)(x, 0.3), expected)
    for parts, error, words in (
        ([LOCAL], ValueError, "`parts` must be two or more"),
        ([LOCAL, pf.Candidate("local", window=3, temperature=2.0)], ValueError, "differ in more"),
        ([LOCAL, mean], ValueError, "`parts` must hold no means"),
        ([LOCAL, 3], TypeError, "`parts` must hold Candidate"),
        ((), ValueError, "`parts` must be given for mean"),
    ):
        with pytest.raises(error, match=words):
            pf.Candidate("mean", parts=parts)
    with pytest.raises(ValueError, match="`candidates` holds .*`window`"):
        wide = pf.Candidate("mean", parts=[LOCAL, pf.Candidate("patch-set", window=9)])
        pf.calibrate(data, candidates=[wide], **RUN)


def test_what_cannot_be_calibrated(data):
    for wrong, error, words in (
        ({"candidates": []}, ValueError, "`candidates` must hold one"),
        ({"candidates": [LOCAL, LOCAL]}, ValueError, "twice"),
        ({"candidates": [3]}, TypeError, "`candidates` must hold Candidate"),
        (
            {"candidates": [pf.Candidate("local", window=4)]},
            ValueError,
            "`candidates` holds local, window 4: `window`",
        ),
        ({"seed": -1}, ValueError, "`seed`"),
        ({"steps": 0}, ValueError, "`steps`"),
        ({"schedule": 3}, TypeError, "`schedule`"),
    ):
        with pytest.raises(error, match=words):
            pf.calibrate(data, **{"candidates": [LOCAL], "progress": False} | wrong)
    with pytest.raises(ValueError, match="`data` must have at least 4 images"):
        pf.calibrate(data.subset(range(3)), progress=False)


def test_nothing_is_said_of_a_quick_one(data, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Also of so few images that covariances are mostly noise.
        pf.calibrate(data.subset(range(8)), candidates=[PCA], **RUN | {"progress": True})
    assert capfd.readouterr().err == ""


def test_the_denoiser_is_the_chosen_model_of_the_nearest_level(data, calibration):
    denoiser = pf.CalibratedDenoiser(data, calibration)
    assert set(denoiser.candidates) == set(calibration.choices)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2))
    for level, choice in zip(calibration.levels, calibration.choices, strict=True):
        model = choice.build(data, pf.Moments.from_data(data))
        # A little off in sigma / alpha, and the same in another alpha.
        for sigma, alpha in ((1.1 * level.sigma, 1.0), (0.5 * level.sigma, 0.5)):
            assert torch.equal(denoiser(x, sigma, alpha), model(x, sigma, alpha))


def test_levels_outside_are_told_once(data, calibration):
    denoiser = pf.CalibratedDenoiser(data, calibration)
    x = torch.zeros(1, *SHAPE)
    with pytest.warns(UserWarning, match="sigma / alpha 90 lies outside .* from 0.1 to 1"):
        far = denoiser(x, 90.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = denoiser(x, 90.0)
        denoiser(x, 0.0)
    first = calibration.choices[0].build(data)
    assert torch.equal(far, again) and torch.equal(far, first(x, 90.0))


def test_another_set_is_told_and_another_shape_refused(data, calibration):
    with pytest.warns(UserWarning, match="of another set, of 120 images"):
        pf.CalibratedDenoiser(data.subset(range(60)), calibration)
    with pytest.raises(ValueError, match="`calibration` must be of images of shape"):
        pf.CalibratedDenoiser(pf.TrainingSet(torch.full((5, 1, 4, 4), -0.5)), calibration)
    with pytest.raises(TypeError, match="`calibration`"):
        pf.CalibratedDenoiser(data, 3)


def test_it_is_copied_and_pickled(data, calibration):
    denoiser = pf.CalibratedDenoiser(data, calibration)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2))
    for twin in (copy.deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser))):
        assert torch.equal(twin(x, 0.3), denoiser(x, 0.3))
        assert twin.calibration == calibration


def test_moments_are_made_once_for_all_models(data, monkeypatch):
    made = []
    from_data = pf.Moments.from_data
    monkeypatch.setattr(
        pf.Moments, "from_data", lambda *given, **more: made.append(1) or from_data(*given, **more)
    )
    found = pf.calibrate(data, candidates=[WIENER, PCA], **RUN)
    # Of the whole set, and of each fold.
    assert len(made) == 1 + found.folds


def test_figure(calibration, tmp_path):
    pytest.importorskip("matplotlib")
    figure = calibration.plot()
    steps, criterion, energy, runs = figure.axes
    assert len(steps.containers) == len(calibration.candidates)
    restored = [t for level in calibration.levels for t in level.trials if t.restored is not None]
    assert len(criterion.containers) == len(restored) > 0
    assert energy.get_xscale() == "log"
    assert [label.get_text() for label in runs.get_yticklabels()] == list(
        map(str, calibration.runs)
    )
    assert len(runs.containers) == len(calibration.runs)
    figure.savefig(tmp_path / "figure.png")
