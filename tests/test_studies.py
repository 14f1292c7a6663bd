"""The studies run at tiny sizes and write what they promise."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("matplotlib", reason="studies draw with matplotlib")
pytest.importorskip("scipy", reason="spectra need SciPy")
pytest.importorskip("sklearn", reason="quick studies run on scikit-learn's sets")

from benchmarks.studies import disks, pattern, regularity  # noqa: E402
from benchmarks.studies.__main__ import STUDIES, main  # noqa: E402


@pytest.mark.parametrize("study", STUDIES)
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
