"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

TESTS = Path(__file__).resolve().parent
# What tests of several rooms share.
sys.path.insert(0, str(TESTS / "helpers"))
# Where the tests find `benchmarks`; behind everything else, so that an installed pyflocality wins
# over the one of the checkout.
sys.path.append(str(TESTS.parent))

# Where there is no GPU, Triton kernels run in Triton's interpreter. It must be chosen before
# Triton is imported, for its own functions too, and some libraries import it with themselves.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Workers of pytest-xdist share the cores.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _WORKERS = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // _WORKERS))

SHARED = TESTS.parents[1] / "shared"


REQUIRE_GOLDEN = os.environ.get("PYFLOCALITY_REQUIRE_GOLDEN") == "1"
LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """What whoever runs the tests may hand to them."""
    parser.addoption(
        "--built",
        metavar="FOLDER",
        type=Path,
        help="the sdist and the wheel of this checkout, which the tests else build themselves",
    )


# Kernels of GPUs run in an interpreter or a simulator where there is none, and benchmarks in
# processes of their own.
_SLOW_FOLDERS = () if torch.cuda.is_available() else ("kernels/triton", "kernels/cuda")
_SLOW_FOLDERS += ("benchmarks",)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of some folders as slow."""
    for item in items:
        if item.path.is_relative_to(TESTS):
            folder = item.path.parent.relative_to(TESTS).as_posix()
            if folder.startswith(_SLOW_FOLDERS):
                item.add_marker(pytest.mark.slow)


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count the tests that are left out; each worker of pytest-xdist leaves out the same."""
    count = sum(item.get_closest_marker("slow") is not None for item in items)
    if count:
        stash = items[0].config.stash
        stash[LEFT_OUT] = stash.get(LEFT_OUT, 0) + count


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that prints how many were left out here."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Hear it from a worker."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say what was left out, and how to run it."""
    count = config.stash.get(LEFT_OUT, 0)
    if count:
        terminalreporter.write_line(f'{count} slow tests were left out: -m "" runs them too')


def _shared_file(*parts: str) -> Path:
    """A file of the shared folder beside the checkout."""
    path = SHARED.joinpath(*parts)
    if not path.is_file():
        message = f"{path} is missing: it lies beside the checkout where parity is tested"
        if REQUIRE_GOLDEN:
            pytest.fail(message)
        pytest.skip(message)
    return path


@pytest.fixture
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """Load a file of the published codes' answers: name -> arrays by key."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(_shared_file("golden", name)) as archive:
            return dict(archive)

    return load


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """Path of an image set of the shared folder."""
    return lambda name: _shared_file("data", name)


@pytest.fixture
def shared_net() -> Callable[[str], Path]:
    """Path of a trained network of the shared folder."""
    return lambda name: _shared_file("nets", name)


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[float], None]]:
    """Has Ctrl-C pressed after some seconds, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timers = []

    def press(seconds: float) -> None:
        timers.append(threading.Timer(seconds, signal.raise_signal, (signal.SIGINT,)))
        timers[-1].start()

    yield press
    for timer in timers:
        timer.join()
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make this process a rank of a job whose store is there, without torchrun."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}

    def become(rank: int) -> None:
        for name, value in (job | {"RANK": str(rank)}).items():
            monkeypatch.setenv(name, value)

    become.store = store
    return become


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(20250911)


@pytest.fixture(scope="session", autouse=True)
def _outside_the_checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Work in an empty folder: `python -c` and `python -m` look for modules there first.

    In the checkout they would find sources without the extension that is installed.
    """
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def _clean_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Keep the user's settings and cache out of the tests."""
    for name in [key for key in os.environ if key.startswith("PYFLOCALITY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYFLOCALITY_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
