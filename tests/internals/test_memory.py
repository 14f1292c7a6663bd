"""The memory that is there, by files as Linux has them, and jobs that it cannot hold."""

from __future__ import annotations

import pytest

from pyflocality._support import memory
from pyflocality._support.memory import (
    available_memory,
    check_memory,
    ignoring_memory,
    memory_bytes,
    peak_memory_bytes,
)

GIB = 2**30


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def meminfo(available):
    kilobytes = available // 1024
    return f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: {kilobytes} kB\nHugePages: 0\n"


def second(place, limit, current=0, cached=0):
    """The files of a group of version 2."""
    group = f"sys/fs/cgroup/{place}"
    stat = f"anon 5\nactive_file {cached // 2}\ninactive_file {cached - cached // 2}\n"
    return {
        f"{group}/memory.max": f"{limit}\n",
        f"{group}/memory.current": f"{current}\n",
        f"{group}/memory.stat": stat,
    }


def test_the_machine_alone(tmp_path):
    write(tmp_path, {"proc/meminfo": meminfo(3 * GIB)})
    assert available_memory(tmp_path) == 3 * GIB


def test_a_group_leaves_its_limit_less_its_use_but_for_cached_files(tmp_path):
    write(tmp_path, {"proc/meminfo": meminfo(8 * GIB), "proc/self/cgroup": "0::/job/step\n"})
    write(tmp_path, second("job/step", "max", GIB))
    assert available_memory(tmp_path) == 8 * GIB
    write(tmp_path, second("job/step", 4 * GIB, 3 * GIB, 2 * GIB))
    assert available_memory(tmp_path) == 3 * GIB
    # A group can be over a limit that was lowered.
    write(tmp_path, second("job/step", 4 * GIB, 5 * GIB))
    assert available_memory(tmp_path) == 0


def test_groups_around_the_own_one_limit_it_too(tmp_path):
    write(tmp_path, {"proc/meminfo": meminfo(8 * GIB), "proc/self/cgroup": "0::/job/step\n"})
    write(tmp_path, second("job/step", 4 * GIB) | second("job", 2 * GIB))
    assert available_memory(tmp_path) == 2 * GIB
    write(tmp_path, second("", GIB))
    assert available_memory(tmp_path) == GIB


def test_a_container_that_knows_the_hosts_path_alone(tmp_path):
    """Version 1: the group is mounted as the topmost one, and another controller is passed over."""
    lines = "9:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n1:name=systemd:/\n0::/\n"
    write(tmp_path, {"proc/meminfo": meminfo(8 * GIB), "proc/self/cgroup": lines})
    top = "sys/fs/cgroup/memory"
    write(
        tmp_path,
        {
            f"{top}/memory.limit_in_bytes": f"{3 * GIB}\n",
            f"{top}/memory.usage_in_bytes": f"{2 * GIB}\n",
            f"{top}/memory.stat": "active_file 7\ntotal_active_file 0\n"
            f"total_inactive_file {GIB}\n",
        },
    )
    assert available_memory(tmp_path) == 2 * GIB


def test_this_machine():
    there, kinds = available_memory(), memory_bytes()
    assert there is not None and there > 2**24
    assert 0 < kinds["VmRSS"] <= peak_memory_bytes()


def test_a_job_that_does_not_fit_is_refused_with_what_would_run(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 2_000_000_000)
    check_memory(2_000_000_000, "the covariance")
    with pytest.raises(MemoryError) as refused:
        check_memory(9_600_000_000, "the covariance of 34596 values", "take fewer")
    told = "the covariance of 34596 values takes 9.6 GB of memory, and 2 GB are there: take fewer"
    assert str(refused.value) == told
    with ignoring_memory():
        check_memory(10**18, "the covariance")
        with ignoring_memory(False):
            check_memory(10**18, "the covariance")
    with ignoring_memory(False), pytest.raises(MemoryError):
        check_memory(10**18, "the covariance")
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    check_memory(10**18, "the covariance")
