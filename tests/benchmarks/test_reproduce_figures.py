"""Figures of the reproduction, on a tiny set with tiny networks: denoising, fields, pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import pyflocality as pf

pytest.importorskip("matplotlib", reason="the studies draw with matplotlib")

from matplotlib import pyplot as plt  # noqa: E402
from tiny_sets import SHAPE, write_network, write_sets  # noqa: E402

from pyflocality.benchmarks.command import bar  # noqa: E402
from pyflocality.benchmarks.publish import quality_tables  # noqa: E402
from pyflocality.benchmarks.reproduce import (  # noqa: E402
    denoising,
    draw,
    fields,
    methods,
    networks,
)
from pyflocality.benchmarks.reproduce.scores import summary  # noqa: E402

MIXED = methods.METHODS["pca-locality-batch-mean"].label


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three classes, and a network."""
    folder = tmp_path_factory.mktemp("figures")
    write_sets(folder)
    write_network(folder / "a.safetensors", 0)
    return folder


def loaded(folder):
    return methods.load_mixed(str(folder / "set.npz"), progress=False)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def by_model(report):
    return {(record["model"], record["t"]): record for record in report["results"]}


def interrupt_after(monkeypatch, module, name, times):
    """Calls of a function of a module; the one after so many is interrupted."""
    calls, plain = [], getattr(module, name)

    def counted(*arguments, **options):
        if len(calls) == times:
            raise KeyboardInterrupt
        calls.append(arguments)
        return plain(*arguments, **options)

    monkeypatch.setattr(module, name, counted)
    return calls


def denoising_arguments(folder, out, *more):
    source = str(folder / "set.npz")
    return [
        *("--source", source, "--test", source, "--out", str(out), "--samples", "2"),
        *("--threshold", "0.3", "--no-progress", *more),
    ]


def with_network(folder):
    return "--network", str(folder / "a.safetensors")


def test_denoising_of_test_images(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "LOADER_BATCH", 7)
    out = tmp_path / "denoising.json"
    assert denoising.main(denoising_arguments(folder, out, *with_network(folder))) == 0
    report = read(out)
    found = by_model(report)
    data = loaded(folder)
    clean = data.values(0, 2, dtype=torch.float64)
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    by_class = data.subset(data.labels.argsort(stable=True))
    options = {"dtype": torch.float64, "backend": "reference"}
    expected = {
        "Wiener": pf.WienerDenoiser(data),
        MIXED: pf.PCALocalityDenoiser(data, 0.3, 1.0, "batch_mean", 7, **options),
        f"{MIXED}, sorted by class": pf.PCALocalityDenoiser(
            by_class, 0.3, 1.0, "batch_mean", 7, **options
        ),
    }
    network = networks.load(folder / "a.safetensors")
    network.module.double()
    for t in (50, 400):
        alpha, sigma = pf.DDPMSchedule()(t)
        noisy = (alpha * clean + sigma * noise, sigma, alpha)
        theirs = pf.metrics.mse(network(*noisy).detach().clamp(-1, 1), clean)
        for name, model in expected.items():
            answer = model(*noisy).clamp(-1, 1)
            record, errors = found[name, t], pf.metrics.mse(answer, clean)
            assert record["mse"]["mean"] == pytest.approx(float(errors.mean()), rel=1e-4)
            # Of the same images: the error of the difference is that of paired numbers.
            told, less = record["minus"]["network A"], errors - theirs
            assert told["mean"] == pytest.approx(float(less.mean()), rel=1e-3, abs=1e-5)
            error = float(less.std(correction=1)) / 2**0.5
            assert told["standard_error"] == pytest.approx(error, rel=1e-3, abs=1e-5)
            squared = (answer.flatten(1)[:, None] - data.values().double().flatten(1)) ** 2
            nearest = float(squared.mean(-1).amin(1).mean())
            told = record["mse_to_nearest_training_image"]["mean"]
            assert told == pytest.approx(nearest, rel=1e-4)
    # The orders are told apart by far more than that.
    orders = [found[name, 400]["mse"]["mean"] for name in expected if name.startswith(MIXED)]
    assert orders[0] != pytest.approx(orders[1], rel=1e-2)
    # The test images are in the training set here: without noise the optimal denoiser knows them.
    assert found["optimal", 0]["mse"]["mean"] < 1e-9
    assert {name: len(one) for name, one in report["windows"].items()} == dict(
        zip(methods.CALIBRATED, (10, 10), strict=True)
    )
    assert report["left_out"] == []
    assert ("network A", 0) in found and (methods.METHODS["local"].label, 0) in found
    assert out.with_suffix(".png").stat().st_size > 10_000
    text = quality_tables.denoising(report)
    assert "MSE minus that of network A, image by image" in text
    assert report["bars"] == [] and "Too few test images" in text
    told = report | {"bars": [bar("a", 2.0, 1.0), bar("b", 2.0, least=1.0)]}
    text = quality_tables.denoising(told)
    assert "| a | 2 | at most 1 | MISSED |\n| b | 2 | at least 1 | reached |" in text


def test_denoising_goes_on_without_a_network(folder, tmp_path, monkeypatch):
    # Pictures take longer than all the rest.
    monkeypatch.setattr(denoising, "draw", lambda *_: None)
    out = tmp_path / "denoising.json"
    arguments = denoising_arguments(folder, out)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, denoising, "restore_once", 17)
        denoising.main(arguments)
    assert not out.exists()
    with monkeypatch.context() as patch:
        calls = interrupt_after(patch, denoising, "restore_once", -1)
        assert denoising.main(arguments) == 0
    names = list(dict.fromkeys(record["model"] for record in read(out)["results"]))
    absent = [methods.METHODS[one].label for one in ("local", "patch-set", "patch-set-linear")]
    absent.append(methods.METHODS["mixture"].label)
    assert len(names) == 8 and not set(absent) & set(names)
    assert len(calls) == 8 * len(denoising.TIMES) - 17
    assert read(out)["left_out"] == absent
    assert read(out)["windows"] == {} and read(out)["networks"] == []
    assert all(record["minus"] == {} for record in read(out)["results"])

    # At once it is the same, and so it is where nothing is left to do.
    whole = tmp_path / "whole.json"
    assert denoising.main(denoising_arguments(folder, whole)) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, denoising, "restore_once", 0)
        assert denoising.main([*arguments, "--force"]) == 0
    measures = ("model", "t", "noise_to_signal", *denoising._MEASURES)
    told = [
        [[record[name] for name in measures] for record in read(path)["results"]]
        for path in (out, whole)
    ]
    assert told[0] == told[1]
    # Other noise or another threshold is another thing to do.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, denoising, "restore_once", 0)
        denoising.main([*arguments, "--force", "--threshold", "0.2"])


def test_denoising_without_classes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(denoising, "draw", lambda *_: None)
    out = tmp_path / "denoising.json"
    arguments = [str(folder / "plain.npz") if "set.npz" in word else word
                 for word in denoising_arguments(folder, out)]  # fmt: skip
    assert denoising.main(arguments) == 0
    assert not any("sorted" in record["model"] for record in read(out)["results"])


def test_bars_end_at_the_floor():
    axis = plt.figure().subplots()
    told = [{"mean": mean, "standard_error": error} for mean, error in ((3.0, 1.0), (2.0, 5.0))]
    told.append({"mean": 1e-9, "standard_error": None})
    records = [{"noise_to_signal": float(k), "mse": t} for k, t in enumerate(told)]
    denoising._draw_line(axis, records, "mse", 0.5)
    [line] = axis.containers
    assert list(line.lines[0].get_ydata()) == [3, 2, 0.5]
    ends = [segment[:, 1].tolist() for segment in line.lines[2][0].get_segments()]
    assert ends == [[2, 4], [0.5, 7], [0.5, 0.5]]
    plt.close()


def fields_arguments(folder, out, *more):
    return [
        *("--source", str(folder / "set.npz"), *with_network(folder), "--out", str(out)),
        *("--no-progress", "--samples", "2", "--steps", "10", *more),
    ]


def test_fields_along_a_run(folder, tmp_path, capsys):
    out = tmp_path / "fields.json"
    assert fields.main(fields_arguments(folder, out)) == 0
    report = read(out)
    found = by_model(report)
    assert len(found) == 3 * 10 and set(report["seconds_by_model"]) == {m for m, _ in found}
    assert found["network A", 300]["similarity"] == pytest.approx(1)
    alpha, sigma = pf.DDPMSchedule()(300)
    covariance = pf.Moments.from_data(loaded(folder)).covariance
    inner = alpha**2 * covariance + sigma**2 * torch.eye(64, dtype=torch.float64)
    row = (alpha * covariance @ inner.inverse())[4 * 8 + 4].abs().reshape(1, 8, 8)
    record = found["Wiener filter", 300]
    assert record["largest"] == pytest.approx(float(row.max()), rel=1e-4)
    place = torch.arange(8, dtype=torch.float64) - 4
    squared = place[:, None] ** 2 + place**2
    expected = float(((squared * row[0]).sum() / row.sum()).sqrt())
    assert record["radius"] == pytest.approx(expected, rel=1e-4)
    told = [float(value) for value in record["field"].split()]
    np.testing.assert_allclose(told, row.flatten().numpy(), rtol=6e-4, atol=1e-6)
    other = np.array([float(value) for value in found["network A", 300]["field"].split()])
    cosine = other @ told / np.linalg.norm(other) / np.linalg.norm(told)
    assert record["similarity"] == pytest.approx(cosine, abs=1e-3)
    assert out.with_suffix(".png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        fields.main([*fields_arguments(folder, out, "--force")[:-2], "9", "--force"])
    assert "--steps must be at least 10, got 9" in capsys.readouterr().err


def test_fields_go_on(folder, tmp_path, monkeypatch):
    out, along = tmp_path / "fields.json", "sensitivity_along_run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, fields.analysis, along, 2)
        fields.main(fields_arguments(folder, out))
    assert not out.exists()

    def fail(*_):
        raise OSError("no space left")

    # A picture that cannot be drawn loses nothing.
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        calls = interrupt_after(patch, fields.analysis, along, -1)
        patch.setattr(fields, "draw", fail)
        fields.main(fields_arguments(folder, out))
    assert len(calls) == 1
    report = read(out)
    with monkeypatch.context() as patch:
        interrupt_after(patch, fields.analysis, along, 0)
        assert fields.main(fields_arguments(folder, out, "--force")) == 0
    assert read(out)["results"] == report["results"]
    assert out.with_suffix(".png").exists()
    whole = tmp_path / "whole.json"
    assert fields.main(fields_arguments(folder, whole)) == 0
    assert read(whole)["results"] == report["results"]


def test_field_of_zeros_and_of_no_numbers():
    zero, one = torch.zeros(1, 4, 4), torch.ones(1, 4, 4)
    assert fields.radius(zero, (2, 2)) is None and fields.similarity(zero, one) is None
    # Rows and columns lie at 2, 1, 0 and 1 pixels of the place.
    assert fields.radius(one, (2, 2)) == pytest.approx(3**0.5)
    times = torch.tensor([900, 0])
    values = torch.stack([zero, torch.full_like(zero, torch.nan)])[:, None]
    run = fields.SensitivityRun(values, times, times.double(), times.double(), ((0, 2, 2),))
    records = fields.compare({"model": run}, "model")
    json.dumps(records, allow_nan=False)
    assert [record["radius"] for record in records] == [None, None]
    figure = fields.draw({"model": run}, records)
    assert figure.axes[0].get_xlabel() == "r -  cos -"


def test_lines_are_told_apart():
    styles = [draw.line_style(k) for k in range(13)]
    assert len({(style["color"], style["marker"]) for style in styles}) == 13


def test_steps_picture(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def told(level):
        found = [
            summary(level + 0.02 * torch.randn(8, generator=generator).double()) for _ in range(10)
        ]
        return {"final": found[-1], "steps": found}

    networks = [f"network {letter}" for letter in "AB"]
    rows = [*networks, *(f"method {k}, with a name of some length" for k in range(11))]
    record = {
        "data": {"name": "waves"},
        "networks": [{"name": name} for name in networks],
        "settings": {"samples": 8, "timesteps": list(range(900, -1, -100))},
        "table": [
            {
                "name": name,
                "label": name,
                "against": {
                    # The last is out of the picture.
                    other: {"r2": told(-2.0 if k == 12 else 0.9 - 0.1 * k), "mse": told(0.2 + k)}
                    for other in networks
                    if other != name
                },
            }
            for k, name in enumerate(rows)
        ],
    }
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    draw.steps(record, tmp_path / "steps.png")
    assert 10_000 < (tmp_path / "steps.png").stat().st_size < 150_000
    [figure] = figures
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == rows
    box = legend.get_window_extent()
    assert not any(box.overlaps(axis.get_tightbbox()) for axis in figure.axes)
    top = figure.axes[0]
    assert top.get_ylim()[0] == -1 and "axis ends at -1" in top.get_ylabel()
    assert top.get_xlabel() == f"below the axis at some steps: {rows[-1]}"
    assert "standard error" in figure.get_suptitle()
    monkeypatch.undo()
    plt.close(figure)
