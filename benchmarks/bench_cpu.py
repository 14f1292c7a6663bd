"""The cases of the CPU suite under pytest-benchmark, without their yardsticks.

    pytest benchmarks/bench_cpu.py --benchmark-only [--quick] [--cifar10 ZIP]

For comparing one commit with another (`--benchmark-save`, `--benchmark-compare`); ratios to
yardsticks are what `benchmarks.cpu_suite` is for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyflocality as pf

from .kernels.registry import Case
from .kernels.runner import assert_backend, check_workload, torch_threads
from .kernels.sets import BenchmarkSet
from .kernels.workloads import make_workload

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


def test_case(case: Case, data: BenchmarkSet, benchmark: BenchmarkFixture) -> None:
    with torch_threads(case.threads):
        workload = make_workload(case, data)
        check_workload(workload)
        benchmark.group = case.suite
        work = workload.work()
        if work is not None:
            benchmark.extra_info.update(flops=work.flops, bytes=work.bytes)
        with pf.trace_backends() as calls:
            benchmark.pedantic(workload.run, rounds=case.repetitions, iterations=1, warmup_rounds=1)
        assert_backend(case, calls)
