"""`python -m benchmarks.large_images`: its sets, its commands watched from outside, its parts."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the sets are crops of scikit-learn's photographs")

from benchmarks import large_images  # noqa: E402
from benchmarks.large.crops import crops, enlarged, write_pngs  # noqa: E402
from benchmarks.large.parts import PARTS, PUBLISHED, bar  # noqa: E402
from benchmarks.large.watched import CommandFailedError, watched  # noqa: E402


def test_crops_are_different_and_always_the_same():
    images = crops(101, 16)
    assert images.shape == (101, 3, 16, 16) and images.dtype == np.uint8
    assert np.array_equal(images, crops(101, 16))
    assert len({image.tobytes() for image in images}) == 101


def test_files_hold_the_crops(tmp_path):
    import pyflocality as pf

    images = crops(5, 8)
    write_pngs(images, tmp_path / "set")
    data = pf.TrainingSet.load(tmp_path / "set", progress=False)
    assert np.array_equal(data.images.numpy(), images)


def test_images_of_a_set_are_enlarged(tmp_path):
    images = np.zeros((9, 3, 4, 5), np.uint8)
    images[:] = np.arange(9)[:, None, None, None]
    np.save(tmp_path / "set.npy", images)
    found = enlarged(tmp_path / "set.npy", 4, 7)
    assert found.shape == (4, 3, 7, 7) and found.dtype == np.uint8
    # Different ones, in their order.
    assert np.all(np.diff(found[:, 0, 0, 0].astype(int)) > 0)
    assert np.all(found == found[:, :1, :1, :1])


@pytest.mark.skipif(sys.platform != "linux", reason="memory is looked at in /proc")
def test_a_command_is_watched_from_outside():
    """Two stages, of which the second holds 200 MB for half a second."""
    code = (
        "import sys, time\n"
        "print('one', file=sys.stderr, flush=True); time.sleep(0.4)\n"
        "print('two', file=sys.stderr, flush=True); held = bytearray(200_000_000)\n"
        "held[::4096] = b'1' * len(held[::4096]); time.sleep(0.5); del held\n"
        "print('answer')"
    )
    seen = watched(["-c", code], {})
    assert seen.output == "answer\n" and [line for _, line in seen.marks] == ["one", "two"]
    assert seen.peak_bytes > 200e6 and seen.peaks[1] > 200e6 > seen.peaks[0] > 0
    # A line is marked when it is read, which may be late: their order is all that is sure.
    assert 0 < seen.marks[0][0] < seen.marks[1][0] < seen.seconds and seen.seconds > 0.9


def test_a_command_that_fails_is_told():
    with pytest.raises(CommandFailedError, match="no such thing"):
        watched(["-c", "raise SystemExit('no such thing')"], {})


def test_variables_reach_the_command():
    seen = watched(["-c", "import os; print(os.environ['OF_A_TEST'])"], {"OF_A_TEST": "here"})
    assert seen.output == "here\n"


def test_bars():
    assert bar("seconds", 3.0, 4.0)["reached"] and not bar("seconds", 4.1, 4.0)["reached"]


def run(tmp_path, *words):
    out = tmp_path / "large.json"
    code = large_images.main(["--quick", "--out", str(out), *words])
    return code, json.loads(out.read_text(encoding="utf-8"))


def test_one_part_alone_and_kept(tmp_path, monkeypatch):
    code, report = run(tmp_path, "--only", "many")
    part = report["parts"]["many"]
    assert code == 0 and report["quick"] and not report["complete"]
    assert [one["reached"] for one in part["bars"]] == [True] * 3
    assert part["runs"]["nothing cached"]["peak_bytes"] > 50e6
    beside = part["beside"]
    published = beside["published"]["seconds_per_step_and_image"]
    assert published == pytest.approx(24.9 / 128) and PUBLISHED["samples"] == 128
    here = beside["here"]
    assert here["seconds_per_step_and_image"] == pytest.approx(here["seconds_per_step"] / 2)
    assert len(beside["differs"]) == 4
    # Started again it runs what is missing alone, and goes on behind what fails.
    ran = []

    def pretend(name):
        def work(work):
            ran.append(name)
            if name == "ways":
                raise CommandFailedError("no such thing")
            return {"bars": []}

        return work

    monkeypatch.setattr(large_images, "PARTS", {name: pretend(name) for name in PARTS})
    code, again = run(tmp_path)
    assert code == 1 and ran == [name for name in PARTS if name != "many"]
    assert again["parts"]["many"] == part and "ways" not in again["parts"]
    assert not again["complete"]
    # Parts of another commit stay beside one that is asked for, and are measured again otherwise.
    file = tmp_path / "large.json"
    again["parts"]["many"]["commit"] = "another"
    file.write_text(json.dumps(again), encoding="utf-8")
    ran.clear()
    code, beside = run(tmp_path, "--only", "cached")
    assert code == 0 and ran == ["cached"]
    assert beside["parts"]["many"] == again["parts"]["many"]
    ran.clear()
    code, anew = run(tmp_path)
    assert code == 1 and ran == ["ways", "many"]
    assert anew["parts"]["many"]["commit"] != "another"


def test_wrong_files_are_refused(tmp_path):
    other = tmp_path / "other.json"
    other.write_text('{"suite": "cpu"}', encoding="utf-8")
    for words in (
        ["--out", str(tmp_path / "none" / "file.json")],
        ["--out", str(other)],
        ["--out", str(tmp_path / "file.json"), "--cifar10", str(tmp_path / "none.zip")],
        ["--out", str(tmp_path / "file.json"), "--only", "no-such-part"],
    ):
        with pytest.raises(SystemExit):
            large_images.main(words)


@pytest.mark.slow
def test_every_part(tmp_path):
    pytest.importorskip("matplotlib")
    code, report = run(tmp_path)
    assert code == 0 and report["complete"] and set(report["parts"]) == set(PARTS)
    assert (tmp_path / "large.png").stat().st_size > 5000
    parts = report["parts"]
    assert all(one["agree"] for one in parts["ways"]["sets"])
    for size in parts["foreseen"]["sizes"]:
        assert not size["missing_stages"] and all(one["bounded"] for one in size["stages"])
    assert {one["name"] for one in parts["side-256"]["plan_of_eight_samples"]["stages"]} >= {
        "masks",
        "steps",
    }
    # Less the import of torch, which takes now more and now less.
    assert -2 < parts["cached"]["seconds_before_first_step"] < 30
