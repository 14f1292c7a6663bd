"""The experiment on windows in two domains, and the published networks beside it."""

from __future__ import annotations

import json

import pytest
import torch

import pyflocality as pf
from benchmarks import multiscale
from benchmarks.studies.published_networks import Multiscale, published


def test_drops_and_verdict():
    record = {
        "pixel": {"5": [10.0, 20.0], "9": [14.0, 26.0]},
        "wavelet": {"5": [13.0, 21.0], "9": [13.5, 20.0]},
    }
    assert multiscale.drops(record["pixel"]) == {"5": [4.0, 6.0], "9": [0.0, 0.0]}
    found = multiscale.verdict(record)
    assert found["5"] == {
        "drops_less": 2,
        "of": 2,
        "mean_drop_pixel": 5.0,
        "mean_drop_wavelet": 0.25,
        "mean_gain": 2.0,
    }
    assert found["9"]["drops_less"] == 0 and found["9"]["mean_gain"] == pytest.approx(-3.25)


def test_measured_psnr_of_the_noisy_image_is_the_level_asked_for():
    class Same(pf.Denoiser):
        def __init__(self):
            super().__init__((1, 64, 64))

        device = torch.device("cpu")

        def _denoise(self, x, levels):
            return x

    clean = torch.zeros(4, 1, 64, 64)
    found = multiscale.measure(Same(), clean)
    assert found == pytest.approx(multiscale.PSNR_IN, abs=0.1)


def test_training_and_test_images_do_not_overlap():
    pytest.importorskip("sklearn")
    case = multiscale.photographs(64, 4)
    assert case.train.image_shape == (1, 64, 64) and case.clean.shape == (4, 1, 64, 64)
    test = pf.TrainingSet(((case.clean + 1) * 127.5).round().to(torch.uint8))
    nearest = pf.NearestDenoiser(case.train)(test.values(), 0.0)
    assert (nearest - case.clean).square().mean((1, 2, 3)).min() > 1e-4


@pytest.mark.slow
def test_quick_run_writes_results_and_picture(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    output = tmp_path / "results.json"
    assert multiscale.main(["--quick", "--output", str(output)]) == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["quick"] and len(report["results"]) == 2
    for record in report["results"]:
        assert set(record["pixel"]) == set(record["wavelet"]) == {"3", "5"}
        assert all(len(row) == len(report["psnr_in"]) for row in record["wavelet"].values())
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_published_networks_run_as_denoisers(shared_net):
    folder = shared_net("bfcnn_rf13.pt").parent
    shape = (1, 32, 32)
    clean = pf.synthetic.c_alpha(2, 32, 4.0).values()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    models, out = published(folder, shape), {}
    for name, denoiser in models.items():
        with torch.no_grad():
            out[name] = float(pf.metrics.psnr(denoiser(clean + 0.9 * noise, 0.9), clean).mean())
    # 6.9 dB of noise: the flat network sees 13 pixels only.
    assert out["flat network, 13"] > 22
    assert out["multi-scale network, 13"] > out["flat network, 13"] + 0.5


def test_the_multi_scale_network_is_made_of_its_parts(shared_net):
    network = Multiscale(shared_net("bfcnn_rf13.pt").parent).eval()
    x = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        clean = x - network(x)
        # Bias-free: an image of half the contrast is denoised to half the result.
        torch.testing.assert_close(0.5 * x - network(0.5 * x), 0.5 * clean, rtol=0, atol=1e-5)
        # Its block means are what its low-pass network says of the noisy ones.
        means = torch.nn.functional.avg_pool2d(x, 4)
        expected = means - network.low(means)
    found = torch.nn.functional.avg_pool2d(clean, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
