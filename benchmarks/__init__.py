"""Benchmarks: a registry of cases, one runner, results as JSON.

Every case is checked against the reference before it is timed, the backend that ran is asserted,
and times are ratios to a yardstick that ran in turns with it in the same process.
"""
