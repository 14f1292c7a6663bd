"""What commands write."""

from __future__ import annotations

FILES = ["run.json", "samples.npy", "samples.png", "trajectory.png"]


def small(source, out, *more):
    return ["generate", source, "--out", out, "--n", 3, "--steps", 4, "--no-progress", *more]
