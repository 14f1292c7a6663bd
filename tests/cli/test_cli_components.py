"""`pyflocality moments` writes components beside moments, and `--moments` computes none again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import pyflocality as pf
from pyflocality import moments as room

IMAGES = torch.randint(
    256, (20, 1, 6, 6), generator=torch.Generator().manual_seed(3), dtype=torch.uint8
)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "tiny.npz"
    np.savez(path, images=IMAGES.numpy(), labels=np.arange(20) % 2)
    return path


@pytest.fixture
def no_solver(monkeypatch):
    """From here on no eigenvectors may be computed."""

    def forbid() -> None:
        def refused(*given: object, **options: object) -> None:
            raise AssertionError("eigenvectors were computed")

        monkeypatch.setattr(torch.linalg, "eigh", refused)

    return forbid


def wiener(source, out, *arguments):
    return [
        *("generate", source, "--denoiser", "wiener", "--n", 2, "--steps", 3, "--no-nearest"),
        *("--no-progress", "--out", out, *arguments),
    ]


@pytest.mark.parametrize("count", [20, 90])
def test_components_are_written_beside_moments(run, tmp_path, no_solver, count):
    images = torch.cat([IMAGES] * 4 + [255 - IMAGES[:10]])[:count]
    images[50:, 0, :3] = images[50:, 0, :3].flip(1)
    source, file = tmp_path / "set.npy", tmp_path / "m.safetensors"
    np.save(source, images.numpy())
    code, stdout, _ = run("moments", source, "--out", file, "--json", "--no-progress")
    record = json.loads(stdout)
    beside = tmp_path / "m.basis.safetensors"
    assert code == 0 and record["covariance"]
    assert record["files"] == [str(file), str(beside)]
    expected = pf.Basis.from_data(images)
    basis = pf.Basis.load(beside)
    assert basis.method == ("gram" if count == 20 else "covariance")
    assert basis.rank == expected.rank == record["rank"]
    assert torch.equal(basis.vectors, expected.vectors)
    assert pf.Moments.load(file).content_key() == pf.Moments.from_data(images).content_key()
    assert run(*wiener(source, tmp_path / "without"))[0] == 0
    no_solver()
    code, stdout, _ = run(*wiener(source, tmp_path / "with", "--moments", file, "--json"))
    assert code == 0
    assert json.loads(stdout)["seconds"]["components"] < 5
    results = [np.load(tmp_path / name / "samples.npy") for name in ("with", "without")]
    assert np.array_equal(*results)


def test_components_alone_where_no_covariance_fits(run, source, tmp_path, monkeypatch, no_solver):
    from pyflocality.moments import limits

    file = tmp_path / "m.safetensors"
    monkeypatch.setattr(limits, "totals_bytes", lambda data: 2**60)
    code, stdout, stderr = run("moments", source, "--out", file, "--no-progress")
    assert code == 0
    assert "components alone" in stdout and "m.basis" not in stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "tiny.npz"]
    assert pf.Basis.load(file).rank == 19
    assert run(*wiener(source, tmp_path / "without"))[0] == 0
    no_solver()
    assert run(*wiener(source, tmp_path / "with", "--moments", file))[0] == 0
    results = [np.load(tmp_path / name / "samples.npy") for name in ("with", "without")]
    assert np.array_equal(*results)
    code, _, stderr = run(
        *wiener(source, tmp_path / "shared", "--moments", file, "--global-share", 0.5, "--label", 1)
    )
    assert code == 2 and "holds components alone" in stderr


def test_whole_moments_are_not_made_where_components_do(run, source, tmp_path, monkeypatch):
    def refused(*given: object, **options: object) -> None:
        raise AssertionError("moments were made")

    monkeypatch.setattr(room.Moments, "from_data", refused)
    for name in ("wiener", "fourier", "ledoit-wolf"):
        arguments = wiener(source, tmp_path / name)
        arguments[3] = name
        assert run(*arguments)[0] == 0
