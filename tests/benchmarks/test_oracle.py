"""The trained yardstick: its network, its files and its training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import pyflocality as pf
from pyflocality.benchmarks.oracle.train import Training, main
from pyflocality.benchmarks.oracle.unet import UNet
from pyflocality.benchmarks.reproduce.networks import check_networks

ROOT = Path(__file__).resolve().parents[2]

SMALL = [
    "--width",
    "8",
    "--multipliers",
    "1",
    "2",
    "--batch",
    "16",
    "--rate",
    "4e-3",
    "--device",
    "cpu",
]


@pytest.fixture
def images(tmp_path: Path) -> str:
    """A file of 50 images of 1 x 6 x 7 pixels, each of one grey."""
    import numpy as np

    greys = np.linspace(0, 255, 50).astype(np.uint8)
    path = tmp_path / "greys.npy"
    np.save(path, np.broadcast_to(greys[:, None, None], (50, 6, 7)))
    return str(path)


def train(source: str, out: Path, *more: str) -> UNet:
    assert main([source, "--out", str(out), "--no-progress", *SMALL, *more]) == 0
    return UNet.load(out / "unet.safetensors")


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 7, 9), (1, 1, 1)])
def test_a_saved_network_answers_as_before(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    unet = UNet(shape, 8, (1, 2, 2), blocks=1).eval()
    for value in unet.parameters():
        # float16 holds what the file keeps; zeros of fresh last layers would hide the network.
        value.data = (value.data + 0.05 * torch.randn_like(value)).half().float()
    x, t = torch.randn(3, *shape), torch.tensor([0, 500, 999])
    unet.save(tmp_path / "a", {"seed": 7})
    loaded = UNet.load(tmp_path / "a")
    assert loaded.facts == {"seed": 7}
    assert loaded.image_shape == shape
    assert torch.equal(loaded(x, t), unet(x, t))
    # The time is heard.
    assert not torch.allclose(unet(x, t), unet(x, t.flip(0)))


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("no network")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other")
    for name in ("text", "other"):
        with pytest.raises(ValueError, match=f"{name} is not a network of"):
            UNet.load(tmp_path / name)


def test_the_loss_is_the_error_of_v(images: str) -> None:
    data = pf.TrainingSet.load(images)
    training = Training(data, _options(images))
    batch, seed = data.values(0, 8), 3
    # A fresh network answers zero, so its loss is the mean square of v itself.
    generator = torch.Generator().manual_seed(seed)
    times = torch.randint(1000, (8,), generator=generator)
    noise = torch.randn(batch.shape, generator=generator).double()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha = (1 - betas).cumprod(0).sqrt()[times][:, None, None, None]
    v = alpha * noise - (1 - alpha**2).sqrt() * batch.double()
    expected = v.square().mean().item()
    assert training.loss(training.unet, batch, seed).item() == pytest.approx(expected, rel=1e-5)


def test_every_image_is_seen_once_an_epoch(images: str) -> None:
    training = Training(pf.TrainingSet.load(images), _options(images, batch=25))
    greys = [torch.cat([_next(training), _next(training)]).sort().values for _ in range(2)]
    everyone = training.values(torch.arange(50))[:, 0, 0, 0].sort().values
    assert torch.equal(greys[0], everyone)
    assert torch.equal(greys[1], everyone)


def test_training_learns_and_goes_on_as_if_never_stopped(images: str, tmp_path: Path) -> None:
    whole = train(images, tmp_path / "whole", "--steps", "60")
    train(images, tmp_path / "parts", "--steps", "25")
    parts = train(images, tmp_path / "parts", "--steps", "60")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    lines = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").open()]
    assert [line["steps"] for line in lines] == [25, 60]
    # Greys are easily told from noise: far below the error of a network that answers zero.
    assert lines[1]["probe_loss"] < 0.5
    assert parts.facts["steps"] == 60
    assert parts.facts["predicts"] == "v"
    assert str(tmp_path) not in json.dumps(parts.facts)

    schedule = pf.DDPMSchedule()
    denoiser = pf.NetworkDenoiser(parts, "v", takes=schedule, image_shape=parts.image_shape)
    data = pf.TrainingSet.load(images)
    alpha, sigma = schedule(200)
    clean = data.values()
    generator = torch.Generator().manual_seed(0)
    noisy = alpha * clean + sigma * torch.randn(clean.shape, generator=generator)
    before = (noisy / alpha - clean).square().mean()
    assert (denoiser(noisy, sigma, alpha) - clean).square().mean() < before / 2


def test_another_training_is_not_continued(
    images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(images, tmp_path / "out", "--steps", "2")
    before = (tmp_path / "out" / "state.pt").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        train(images, tmp_path / "out", "--steps", "4", "--seed", "1")
    assert stopped.value.code == 2
    assert "state.pt is of a training with seed = 0, not 1" in capsys.readouterr().err
    assert (tmp_path / "out" / "state.pt").read_bytes() == before


def test_wrong_options_are_named(
    images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, value, message in (
        ("--device", "gpu", "`device` must be cpu or cuda"),
        ("--device", "cuda:99", "`device` must be one of"),
        ("--planted", "0", "--planted must be in (0, 1], got 0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            train(images, tmp_path / "out", option, value)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _options(source: str, batch: int = 16) -> object:
    import argparse

    return argparse.Namespace(
        source=source, seed=0, width=8, multipliers=[1, 2], batch=batch, rate=5e-4, device="cpu"
    )


def _next(training: Training) -> torch.Tensor:
    greys = training.batch()[:, 0, 0, 0]
    training.steps += 1
    return greys


def test_networks_that_results_tell_of_are_there():
    folder = ROOT / "benchmarks" / "oracle" / "checkpoints"
    files = sorted(folder.glob("*.safetensors"))
    there = {network.path.name: network for network in check_networks(files)}
    kinds = ("reproduce", "sweeps", "fields", "denoising", "pattern")
    told = [
        network
        for path in (ROOT / "benchmarks" / "results").glob("*.json")
        if path.name.startswith(kinds)
        for network in json.loads(path.read_text(encoding="utf-8"))["networks"]
    ]
    assert told
    for network in told:
        assert network["sha256"] == there[network["file"]].sha256
    for name, network in there.items():
        assert network.path.stat().st_size < 20e6
        log = (folder / name).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(log[-1])["steps"] == network.facts["steps"]
