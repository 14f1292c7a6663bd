"""Options and cases of the pytest-benchmark suites."""

from __future__ import annotations

import pytest

from .command import path_option
from .kernels.registry import FULL, QUICK, Plan, cases
from .kernels.sets import BenchmarkSet


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the suites."""
    parser.addoption(
        "--cifar10",
        type=path_option,
        help="zip of CIFAR-10's training images; synthetic without it",
    )
    parser.addoption("--quick", action="store_true", help="tiny sizes: the numbers mean nothing")


def _plan(config: pytest.Config) -> Plan:
    return QUICK if config.getoption("--quick") else FULL


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per case, under the case's name."""
    if "case" in metafunc.fixturenames:
        result = cases(_plan(metafunc.config))
        metafunc.parametrize("case", result, ids=[case.id for case in result])


@pytest.fixture(scope="session")
def data(pytestconfig: pytest.Config) -> BenchmarkSet:
    """The set that all cases run on."""
    plan = _plan(pytestconfig)
    return BenchmarkSet.build(plan.images, plan.shape, pytestconfig.getoption("--cifar10"))
