"""The studies run at tiny sizes and write what they promise."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("matplotlib", reason="studies draw with matplotlib")
pytest.importorskip("scipy", reason="spectra need SciPy")
pytest.importorskip("sklearn", reason="quick studies run on scikit-learn's sets")

import numpy as np  # noqa: E402

import pyflocality as pf  # noqa: E402
from benchmarks.oracle.train import main as train  # noqa: E402
from benchmarks.oracle.unet import UNet  # noqa: E402
from benchmarks.studies import disks, pattern, regularity  # noqa: E402
from benchmarks.studies.__main__ import STUDIES, main  # noqa: E402
from pyflocality import synthetic  # noqa: E402

SLOW = pytest.mark.slow
# Studies whose quick run takes longest.
LONG = ("pattern", "planner")


@pytest.mark.parametrize(
    "study", [pytest.param(name, marks=SLOW if name in LONG else ()) for name in STUDIES]
)
def test_quick_run(study, tmp_path):
    out = tmp_path / "study.json"
    assert main([study, "--quick", "--out", str(out)]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["study"] == study and report["quick"] and report["results"]
    assert (tmp_path / "study.png").stat().st_size > 5000
    with pytest.raises(SystemExit):
        main([study, "--quick", "--out", str(out)])
    assert json.loads(out.read_text(encoding="utf-8")) == report


def test_full_studies_ask_for_their_data(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["memorize", "--out", str(tmp_path / "study.json")])
    assert "--mnist is required" in capsys.readouterr().err


def trained_on(source, out, gamma=None):
    """A network of no training at all, whose file tells of one."""
    options = ["--steps", "1", "--batch", "2", "--width", "8", "--multipliers", "1"]
    options += [] if gamma is None else ["--planted", str(gamma)]
    assert (
        train([str(source), "--out", str(out), "--no-progress", "--device", "cpu", *options]) == 0
    )
    return out / "unet.safetensors"


@SLOW
def test_networks_of_planted_images(tmp_path, capsys):
    source = tmp_path / "set.npy"
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.save(source, images)
    data = pf.TrainingSet.load(source)
    plain, planted = trained_on(source, tmp_path / "a"), trained_on(source, tmp_path / "b", 0.5)
    facts = UNet.load(planted).facts
    assert facts["planted"] == 0.5 and "planted" not in UNet.load(plain).facts
    cross = pattern.cross(32)
    blended = synthetic.inject_pattern(data, cross, 0.5)
    assert facts["key"] == blended.content_key() != UNet.load(plain).facts["key"]

    out = tmp_path / "study.json"
    command = ["pattern", "--quick", "--cifar10", str(source), "--out", str(out)]
    assert main([*command, "--network", str(plain), "--network", str(planted)]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert [one["facts"].get("planted") for one in report["networks"]] == [None, 0.5]
    found = {(one["gamma"], one["t"]): one for one in report["results"]}
    assert [key for key, one in found.items() if "network" in one] == [
        *((0.0, 500), (0.0, 100)),
        *((0.5, 500), (0.5, 100)),
    ]
    # The share of a network, along with what it is of, by other means.
    unet = UNet.load(planted).double()
    alpha, sigma = pf.DDPMSchedule()(500)
    noise = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    x = (alpha * data.values(0, 4) + sigma * noise).double().requires_grad_()
    x0 = alpha * x - sigma * unet(x, torch.full((4,), 500))
    (rows,) = torch.autograd.grad(x0[:, 1, 8, 8].sum(), x)
    share = pattern.share_on_pattern(rows.abs().mean(0)[1], cross, (8, 8))
    assert share > 0.1 and found[0.5, 500]["network"] == pytest.approx(share, rel=1e-3)

    tenth, grey = trained_on(source, tmp_path / "c", 0.1), tmp_path / "grey.npy"
    np.save(grey, images[..., 0])
    with pytest.raises(SystemExit):
        trained_on(source, tmp_path / "c", 0.5)
    assert "training with planted = 0.1, not 0.5" in capsys.readouterr().err
    again = ["--force", "--network", str(planted)]
    for arguments, message in (
        ([*command, *again, "--network", str(planted)], "each network once"),
        ([*command[:3], str(tmp_path / "other.npy"), *command[4:], *again], "was not trained on"),
        (["disks", "--quick", "--out", str(out), *again], "takes none"),
        ([*command, "--force", "--network", str(tenth)], "each of the weights 0, 0.5 of this run"),
        ([*command[:3], str(grey), *command[4:], "--force"], "of 3x32x32 images, those of"),
    ):
        np.save(tmp_path / "other.npy", images[::-1])
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
    assert json.loads(out.read_text(encoding="utf-8")) == report


def test_principal_cosines():
    basis = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64)).Q.T
    turned = basis[:2] * 0.6 + basis[4:6] * 0.8
    cosines = disks.principal_cosines(basis[:3], torch.cat([turned, basis[2:3]]))
    expected = torch.tensor([1.0, 0.6, 0.6], dtype=torch.float64)
    torch.testing.assert_close(cosines, expected)


def test_slope_of_a_power_law():
    sigmas = (0.1, 0.2, 0.4)
    assert regularity._slope(sigmas, [s**1.5 for s in sigmas]) == pytest.approx(0.75)


def test_share_on_the_pattern():
    cross = pattern.cross(32)
    assert cross.sum() == 64
    field = 0.1 + 0.2 * cross
    # A field that is large around the output and nowhere else tells nothing of the pattern.
    field[8:24, 8:24] = 5.0
    assert pattern.share_on_pattern(field, cross, (16, 16)) == pytest.approx(3.0, rel=1e-5)
    assert pattern.share_on_pattern(torch.ones(32, 32), cross, (16, 16)) == pytest.approx(1.0)
