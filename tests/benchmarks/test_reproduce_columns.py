"""What `pyflocality reproduce` tells besides errors, and its calibrated model, on tiny sets."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from reproduced import loaded, truth

import pyflocality as pf
from pyflocality import cli

pytest.importorskip("matplotlib", reason="the command draws with matplotlib")

from tiny_sets import COUNT, SHAPE  # noqa: E402

from pyflocality.benchmarks.reproduce import (  # noqa: E402
    calibrated,
    denoising,
    methods,
    networks,
    runs,
    table,
    table_text,
)
from pyflocality.benchmarks.reproduce.scores import block_edges, summary  # noqa: E402

SAMPLES = 3
NETWORKS = {"network A": "a.safetensors", "network B": "b.safetensors"}
CANDIDATES = (
    pf.Candidate("wiener"),
    pf.Candidate("pca-locality", threshold=0.3),
    pf.Candidate("patch-set", window=3, temperature=1.4, slope=0.25),
)


@pytest.fixture
def here(monkeypatch):
    """Runs are made in this process, and counted; pictures, which take long, are left out."""
    made = []

    def perform(request):
        made.append(request.settings["model"])
        return runs.perform(request)

    monkeypatch.setattr(table, "perform_apart", perform)
    monkeypatch.setattr(table.draw, "steps", lambda _, path: path.touch())
    return made


def record_of(folder, out, capsys, *more):
    files = (word for file in NETWORKS.values() for word in ("--network", str(folder / file)))
    arguments = ["reproduce", str(folder / "set.npz"), "--out", str(out), *files]
    arguments += ["--samples", str(SAMPLES), "--threshold", "0.3", "--no-progress", "--json"]
    assert cli.main([*arguments, *map(str, more)]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def sets_calibration(folder, tmp_path):
    """A calibration of the images in the order of their file, in a file."""
    data = pf.TrainingSet.load(folder / "set.npz", progress=False)
    path = tmp_path / "choices.json"
    pf.calibrate(data, candidates=CANDIDATES, progress=False).save(path)
    return path


def in_float64(folder, calibration):
    """The models of rows in float64, by the names of rows."""
    data = loaded(folder)
    options = {"dtype": torch.float64, "backend": "reference"}
    pca = pf.PCALocalityDenoiser(data, 0.3, **options)
    warm = pf.PCALocalityDenoiser(data, 0.3, methods.SLOPE_TEMPERATURE, **options)
    key = data.content_key()
    return {
        "pca-locality": pca,
        "pca-locality-linear": pf.LocallyLinearDenoiser(warm, methods.SLOPE),
        "gaussian-mixture": pf.GaussianMixtureDenoiser(data, methods.GAMMA, **options),
        "calibrated": pf.CalibratedDenoiser(data, replace(calibration, content_key=key), **options),
    }


def test_columns_hold_float64_truth(folder, here, tmp_path, capsys):
    file = sets_calibration(folder, tmp_path)
    expected = in_float64(folder, pf.Calibration.load(file))
    names = ",".join(expected)
    given = ("--methods", names, "--calibration", file)
    record = record_of(folder, tmp_path / "out", capsys, *given)
    rows = {row["name"]: row for row in record["table"]}
    noise = torch.randn(SAMPLES, *SHAPE, generator=torch.Generator().manual_seed(0))
    schedule = pf.DDPMSchedule()
    flat = loaded(folder).values(dtype=torch.float64).flatten(1)
    own, r2 = {}, {}
    for target, path in NETWORKS.items():
        network = networks.load(folder / path)
        network.module.double()
        own[target] = pf.sample(network, x_T=noise.double(), steps=10, progress=False)
    for name, model in expected.items():
        x0 = torch.from_numpy(truth(model, noise)).reshape(10, SAMPLES, *SHAPE)
        told = rows[name]["gradient_energy"]["mean"]
        energy = float(pf.metrics.gradient_energy(x0[-1]).mean())
        assert told == pytest.approx(energy, rel=2e-3, abs=2e-3)
        assert rows[name]["block_edges"] == pytest.approx(block_edges(x0[-1]), rel=2e-2)
        distances = (x0[-1].flatten(1)[:, None] - flat).square().mean(-1).amin(1).sqrt()
        nearest = rows[name]["nearest_image"]
        assert nearest["rms"]["mean"] == pytest.approx(float(distances.mean()), abs=2e-3)
        assert nearest["number"] == int((distances <= 1 / 255).sum())
        for target, run in own.items():
            answers = run.x0.clamp(-1, 1)
            r2[name, target] = pf.metrics.r2(x0[-1], answers[-1])
            steps = rows[name]["at_states"][target]["r2"]["steps"]
            for t, x, y, step in zip(run.timesteps.tolist(), run.x_t, answers, steps, strict=True):
                alpha, sigma = schedule(t)
                values = pf.metrics.r2(model(x, sigma, alpha).clamp(-1, 1), y)
                assert step["mean"] == pytest.approx(float(values.mean()), rel=5e-3, abs=5e-3)
    # Far apart, so that taking one for the other would be seen.
    ends = {name: float(r2[name, "network A"].mean()) for name in expected}
    assert min(np.diff(sorted(ends.values()))) > 0.005, ends
    for target, other in (("network A", "network B"), ("network B", "network A")):
        r2[other, target] = pf.metrics.r2(
            *(own[one].x0[-1].clamp(-1, 1) for one in (other, target))
        )
        for name in (other, *expected):
            minus = rows[name]["minus"][target]
            others = ["pca-locality", other]
            assert list(minus) == [one for one in others if one != name]
            for one, told in minus.items():
                difference = r2[name, target] - r2[one, target]
                assert told["mean"] == pytest.approx(float(difference.mean()), abs=5e-3)
                error = float(difference.std(correction=1)) / SAMPLES**0.5
                assert told["standard_error"] == pytest.approx(error, rel=2e-2, abs=5e-3)
    # A run, and answers to the states of both networks; of these themselves, to the other's.
    assert here == [*["network"] * 4, *(name for name in methods.METHODS if name in expected
                                        for _ in range(3))]  # fmt: skip


def test_the_optimal_model_recites(folder, here, tmp_path, capsys):
    record = record_of(folder, tmp_path / "out", capsys, "--methods", "optimal,wiener,nearest")
    number = {row["name"]: row["nearest_image"]["number"] for row in record["table"]}
    assert number == {
        **dict.fromkeys(NETWORKS, 0), "optimal": SAMPLES, "wiener": 0, "nearest": SAMPLES,
    }  # fmt: skip
    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert f"| {SAMPLES} of {SAMPLES} |" in text and "Not measured" not in text


def test_a_calibration_of_a_file_is_of_the_images_in_any_order(folder, here, tmp_path, capsys):
    file = sets_calibration(folder, tmp_path)
    given = ("--methods", "calibrated", "--calibration", file)
    record = record_of(folder, tmp_path / "out", capsys, *given)
    told = record["calibration"]
    assert (told["file"], told["of_these_images"], told["images"]) == (file.name, True, COUNT)
    choices = pf.Calibration.load(file).choices
    assert [level["model"] for level in told["levels"]] == list(map(str, choices))
    settings = record["table"][-1]["settings"]
    assert [choice for _, choice in settings["choices"]] == [one.as_json() for one in choices]
    # Of others it is told; of other shapes it is refused before any run, as without its model.
    foreign = tmp_path / "foreign.json"
    replace(pf.Calibration.load(file), content_key="0" * 64).save(foreign)
    given = ("--methods", "calibrated", "--calibration", foreign, "--force")
    record = record_of(folder, tmp_path / "out", capsys, *given)
    assert not record["calibration"]["of_these_images"]
    assert "held-out images of another set" in table_text.markdown(record)
    replace(pf.Calibration.load(file), image_shape=(1, 4, 4)).save(foreign, force=True)
    here.clear()
    arguments = ["reproduce", str(folder / "set.npz"), "--out", str(tmp_path / "none")]
    arguments += ["--network", str(folder / "a.safetensors"), "--calibration", str(foreign)]
    assert cli.main([*arguments, "--methods", "calibrated"]) == 2
    assert "images of shape (1, 8, 8)" in capsys.readouterr().err
    assert cli.main([*arguments, "--methods", "wiener"]) == 2
    assert "`--methods` does not name" in capsys.readouterr().err
    assert here == []


def test_a_calibration_is_made_once(folder, here, tmp_path, capsys, monkeypatch):
    plain, made = pf.calibrate, []

    def few(data, **options):
        made.append(options["seed"])
        return plain(data, candidates=CANDIDATES, **options)

    monkeypatch.setattr(calibrated.pf, "calibrate", few)
    for _ in range(2):
        given = ("--methods", "calibrated", "--force", "--seed", 4)
        record = record_of(folder, tmp_path / "out", capsys, *given)
    # Not the seed of the noise on which models are compared.
    assert made == [5] and record["calibration"]["seed"] == 5
    assert record["calibration"]["file"] is None and record["calibration"]["of_these_images"]
    assert [bar["what"].partition(":")[0] for bar in record["bars"]] == [
        "r2 at the end, network A", "gradient energy", "gradient energy",
    ]  # fmt: skip


def test_columns_that_are_not_there_are_told(folder, here, tmp_path, capsys):
    record = record_of(folder, tmp_path / "out", capsys, "--methods", "wiener,optimal")
    whole = table_text.markdown(record)
    for key in ("calibration", "bars"):
        del record[key]
    for row in record["table"]:
        for key in ("at_states", "minus", "gradient_energy", "block_edges", "nearest_image"):
            del row[key]
    text = table_text.markdown(record)
    assert "Not measured" not in whole
    assert (
        "Not measured in this run: r2 at the networks' own states, paired differences, gradient "
        "energy, distance to training images." in text
    )
    for words in ("at its states", "own states against", "| gradient energy", "minus that of"):
        assert words in whole and words not in text


def test_bars_of_the_table():
    def row(name, r2, energy):
        against = {"network A": {"r2": {"final": {"mean": r2}}}}
        return {"name": name, "against": against, "gradient_energy": {"mean": energy}}

    rows = [row("network A", None, 0.1), row("network B", 0.9, 0.2), row("calibrated", 0.85, 0.13)]

    class Data:
        name = "mnist-train.zip"

        def __len__(self):
            return 60_000

    names = list(NETWORKS)
    bars = table._bars(rows, Data(), names)
    told = [(round(bar["value"], 6), bar["reached"]) for bar in bars]
    assert told == [(0.85, True), (0.05, False), (0.3, False), (0.35, False)]
    assert bars[0]["least"] == 0.84
    rows[-1] = row("calibrated", 0.83, 0.16)
    assert [bar["reached"] for bar in table._bars(rows, Data(), names)] == [
        *(False, False, False, True)
    ]
    Data.name = "fashion.zip"
    assert len(table._bars(rows, Data(), names)) == 3
    assert table._bars(rows[:2], Data(), names) == []


def test_bars_of_denoising():
    label = methods.METHODS["calibrated"].label
    records = []
    for t, mine in ((0, 9.0), (100, 1.09), (200, 1.05), (300, 1.02), (400, 1.05), (900, 1.4)):
        records.append({"model": "network A", "t": t, "mse": summary(torch.ones(4)), "minus": {}})
        less = {"mean": mine - 1, "standard_error": 0.1}
        own = {"model": label, "t": t, "mse": {"mean": mine}, "minus": {"network A": less}}
        records.append(own)
    assert denoising.bars(records, ["network A"], 255) == []
    bars = denoising.bars(records, ["network A"], 256)
    told = [(round(bar["value"], 6), bar["most"], bar["reached"]) for bar in bars]
    assert told == [
        *((1.09, 1.1, True), (1.05, 1.03, False), (1.02, 1.03, True), (0.5, 1.0, True)),
        (4.0, 1.0, False),
    ]


def test_checkpoints_without_an_architecture_are_refused_by_name(tmp_path):
    path = tmp_path / "ckpt_epoch_200.pt"
    torch.save({"model_state_dict": {"head.weight": torch.zeros(3)}}, path)
    with pytest.raises(ValueError, match=r"ckpt_epoch_200.pt is a checkpoint of torch.save"):
        networks.check_networks([path])


def test_edges_of_blocks():
    """Of blocks of one value each all differences lie on edges; of a ramp none stand out."""
    ramp = torch.arange(6.0).reshape(1, 1, 1, 6).expand(2, 1, 6, 6)
    assert block_edges(ramp + ramp.mT) == 1
    wavy = torch.tensor([0.0, 1, 3, 4, 6, 7])
    # Steps of one inside blocks and of two between them.
    assert block_edges((wavy + wavy[:, None])[None, None]) == pytest.approx(4)
    blocks = torch.randn(3, 1, 4, 4).repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert block_edges(blocks) is None
    assert block_edges(torch.randn(1, 1, 2, 2)) is None
