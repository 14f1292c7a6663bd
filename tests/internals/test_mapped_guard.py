"""Files that are cut short while they are read from the map: an error after the read, no signal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

native = pytest.importorskip("pyflocality._C")
pytestmark = pytest.mark.skipif(
    not hasattr(signal, "SIGBUS"), reason="mapped files cannot be cut short here"
)
# A page of images and more lie behind what is left.
COUNT, LEFT = 900, 10_000

# The file is cut after the first check, before anything is read; every reader has to notice.
READERS = """
import contextlib, json, os, sys
import numpy as np
import torch
import pyflocality as pf
from pyflocality.storage import mapped as _mapped
from pyflocality.storage.mapped import MappedFile
from pyflocality.storage.reader import Reader
from pyflocality.ops import accumulate_covariance, global_posterior_mean

folder, count, left = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
# Finite also where four bytes are taken for a float.
values = np.random.default_rng(3).integers(0, 64, (count, 2, 16, 16), dtype=np.uint8)
x = torch.zeros(1, 2, 16, 16)
t = torch.zeros(1, 1, 2, 16, 16)

def tensors():
    return torch.zeros(512, 512, dtype=torch.int64), torch.zeros(512, dtype=torch.int64)

def floats_of(data):
    return data.images.view(torch.float32)

def golden(data):
    return pf.GoldenSubset(pf.OptimalDenoiser(data), k_min=5, k_max=20)

def scan(make, backend, method="__call__"):
    def prepare(data):
        denoiser = make(data, backend=backend)
        extra = {"__call__": (), "jvp": (t,), "vjp": (t,)}[method]
        return lambda: getattr(denoiser, method)(x, *extra, 1.0)
    return prepare

def prepared(make):
    def prepare(data):
        denoiser = make(data)
        denoiser(x, 1.0)
        return lambda: denoiser(x, 1.0)
    return prepare

READERS = {
    "values": lambda data: lambda: data.values(),
    "values in float64": lambda data: lambda: data.values(600, 700, dtype=torch.float64),
    "subset": lambda data: lambda: data.subset([3, 880, 700]),
    "cast": lambda data: lambda: Reader(data.images).checked(data.images.double),
    "content key": lambda data: data.content_key,
    "moments": lambda data: lambda: pf.Moments.from_data(data),
    "moments, update": lambda data: lambda: pf.Moments().update(data.images),
    "covariance": lambda data: lambda: accumulate_covariance(data.images.flatten(1), *tensors()),
    "covariance, reference": lambda data: lambda: accumulate_covariance(
        data.images.flatten(1), *tensors(), backend="reference"),
    "blocks": lambda data: lambda: [block.sum() for block in Reader(data.images).blocks(50)],
    "indexing": lambda data: lambda: Reader(data.images).at(torch.tensor([880, 3])),
    "wiener": lambda data: lambda: pf.WienerDenoiser(data),
    "wiener of low rank": lambda data: lambda: pf.WienerDenoiser(data, rank=4),
    "nearest": prepared(pf.NearestDenoiser),
    "golden": prepared(golden),
    "golden, cold": lambda data: lambda: golden(data)(x, 1.0),
    "certified": lambda data: lambda: pf.CertifiedSubset(pf.OptimalDenoiser(data)).index,
    "batch means": prepared(
        lambda data: pf.PCALocalityDenoiser(data, 0.05, aggregation="batch_mean", batch_size=100)),
    "flipped": prepared(lambda data: pf.OptimalDenoiser(data.augmented(flip=True))),
    "floats": lambda data: lambda: global_posterior_mean(x[..., :4], floats_of(data), 1.0),
    "moments of floats": lambda data: lambda: pf.Moments.from_data(floats_of(data)),
    "masked": prepared(lambda data: pf.PCALocalityDenoiser(data, 0.05)),
}
for backend in ("cpu", "reference"):
    for name, make in {
        "optimal": pf.OptimalDenoiser,
        "window": lambda data, **o: pf.LocalDenoiser(data, 3, **o),
        "patch set": lambda data, **o: pf.PatchSetDenoiser(data, 3, **o),
        "equivariant": lambda data, **o: pf.EquivariantDenoiser(data, 3, **o),
    }.items():
        READERS[f"{name}, {backend}"] = scan(make, backend)
    for method in ("jvp", "vjp"):
        READERS[f"window, {method}, {backend}"] = scan(
            lambda data, **o: pf.LocalDenoiser(data, 3, **o), backend, method)

check = MappedFile.check
for number, (name, prepare) in enumerate(READERS.items()):
    path = os.path.join(folder, f"{number}.npy")
    np.save(path, values)
    data = pf.TrainingSet.load(path, progress=False)
    read = prepare(data)
    cut = []
    def cutting(self):
        check(self)
        if not cut:
            cut.append(True)
            os.truncate(path, left)
    MappedFile.check = cutting
    print(name, flush=True, file=sys.stderr)
    try:
        read()
        answer = "nothing noticed"
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    MappedFile.check = check
    try:
        data.values(0, 1)
        answer += " (forgotten)"
    except ValueError:
        pass
    print(json.dumps([name, path, bool(cut), answer]), flush=True)
    os.unlink(path)
"""


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )


def test_every_reader_ends_with_an_error_that_names_the_file(tmp_path):
    found = run(READERS, tmp_path, COUNT, LEFT)
    assert found.returncode == 0, found.stderr[-2000:]
    answers = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(answers) > 30
    for name, path, cut, answer in answers:
        assert cut, (name, answer)
        expected = f"ValueError: {path}: the file of a memory-mapped training set was changed (it "
        assert answer.startswith(f"{expected}has {LEFT} bytes"), (name, answer)
        assert "forgotten" not in answer, name


GUARDED = """
import importlib.util, mmap, os, signal, sys, threading
import numpy as np

# Without torch, which takes seconds to import.
spec = importlib.util.spec_from_file_location("_C", sys.argv[2])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
MappedGuard = native.MappedGuard

def caught():
    with open("/proc/self/status") as status:
        (mask,) = [line.split()[1] for line in status if line.startswith("SigCgt")]
    return bool(int(mask, 16) >> (signal.SIGBUS - 1) & 1)

def mapped(size=64 * mmap.PAGESIZE, left=mmap.PAGESIZE, cut=True):
    path = os.path.join(sys.argv[1], f"{len(os.listdir(sys.argv[1]))}.bin")
    with open(path, "wb") as file:
        file.write(b"\\1" * size)
    array = np.memmap(path, np.uint8, "r")
    if cut:
        os.truncate(path, left)
    return array

def guard_of(array):
    return MappedGuard(array.ctypes.data, array.nbytes)
"""


def guarded(program: str, folder) -> str:
    found = run(GUARDED + program, folder, native.__file__)
    assert found.returncode == 0, (found.returncode, found.stderr[-2000:])
    return found.stdout


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_the_handler_is_there_while_something_is_guarded_and_only_then(tmp_path):
    program = """
array, other = mapped(), mapped(cut=False)
before = caught()
guard, twin = guard_of(array), guard_of(array)
third = guard_of(other)
print(before, caught(), guard.lost)
print(int(array.sum()) == mmap.PAGESIZE, guard.lost, twin.lost, third.lost)
guard.release(); guard.release()
print(caught(), twin.lost)
twin.release()
print(caught(), int(other.sum()) == other.nbytes)
del third
print(caught())
again = guard_of(array)
print(caught(), again.lost, array[-1])
"""
    assert guarded(program, tmp_path).split() == (
        "False True False True True True False True True True True False True False 0".split()
    )


def test_many_threads_may_find_the_end_at_once(tmp_path):
    program = """
size = 3000 * mmap.PAGESIZE
array = mapped(size, left=5 * mmap.PAGESIZE)
barrier, sums = threading.Barrier(8), []
def work(number):
    guard = guard_of(array)
    barrier.wait()
    sums.append(int(array[::-1][number::8].sum()))
    barrier.wait()
    assert guard.lost
    guard.release()
threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(sum(sums) == 5 * mmap.PAGESIZE)
"""
    assert guarded(program, tmp_path) == "True\n"


@pytest.mark.parametrize(
    "before",
    [
        "",
        "import faulthandler; faulthandler.enable()",
        "signal.signal(signal.SIGBUS, signal.SIG_IGN)",
    ],
)
def test_other_addresses_are_passed_on(tmp_path, before):
    """Whoever reads a map of his own that was cut short dies as he did before."""
    program = f"""
{before}
array, foreign = mapped(), mapped()
guard = guard_of(array)
assert array[-1] == 0
print("on", flush=True)
foreign[-1]
"""
    found = run(GUARDED + program, tmp_path, native.__file__)
    assert found.stdout == "on\n" and found.returncode == -signal.SIGBUS
    assert ("Bus error" in found.stderr) == ("faulthandler" in before)


def test_a_handler_that_was_there_gets_what_is_sent_and_is_back_afterwards(tmp_path):
    program = """
seen = []
signal.signal(signal.SIGBUS, lambda *_: seen.append(len(seen)))
array = mapped()
with_guard = guard_of(array)
os.kill(os.getpid(), signal.SIGBUS)
print(seen, array[-1], with_guard.lost)
with_guard.release()
os.kill(os.getpid(), signal.SIGBUS)
print(seen)
"""
    assert guarded(program, tmp_path) == "[0] 0 True\n[0, 1]\n"


def test_a_handler_installed_on_top_stays_there(tmp_path):
    program = """
seen = []
first, second, third = mapped(), mapped(), mapped()
guard = guard_of(first)
assert first[-1] == 0
signal.signal(signal.SIGBUS, lambda *_: seen.append(len(seen)))
guard.release()
os.kill(os.getpid(), signal.SIGBUS)
guard = guard_of(second)
print(seen, second[-1], guard.lost)
os.kill(os.getpid(), signal.SIGBUS)
guard.release()
os.kill(os.getpid(), signal.SIGBUS)
for _ in range(20):
    guard = guard_of(third)
    signal.signal(signal.SIGBUS, lambda *_: seen.append(len(seen)))
    guard.release()
os.kill(os.getpid(), signal.SIGBUS)
print(seen)
"""
    assert guarded(program, tmp_path) == "[0] 0 True\n[0, 1, 2, 3]\n"


def test_a_file_that_is_cut_short_while_it_is_converted(tmp_path, monkeypatch):
    """Nothing of it gets into the cache."""
    import pyflocality as pf
    from pyflocality.sources import arrays, cache

    monkeypatch.setattr(cache, "MIN_IMAGES", 10)
    path, convert, converted = tmp_path / "images.npy", arrays.convert_array, []
    np.save(path, np.full((COUNT, 3, 16, 16), 7, np.uint8))

    def cutting(image, *arguments):
        converted.append(image.sum())
        if len(converted) == 100:
            os.truncate(path, LEFT)
        return convert(image, *arguments)

    monkeypatch.setattr(arrays, "convert_array", cutting)
    with pytest.raises(ValueError, match=re.escape(f"{path}: the file")):
        pf.TrainingSet.load(path, channels=1, cache_dir=tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []
