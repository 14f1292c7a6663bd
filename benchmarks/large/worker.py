"""A run of PCA locality stage by stage, each announced on standard error, for a parent to watch.

    python -m benchmarks.large.worker SOURCE SAMPLES STEPS THRESHOLD [ONLY]

prints what the masks add up, for each level, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

MARK = "stage: "
# Schedules of more bits take minutes to be made again and looked at.
_WHOLE_BYTES = 2**30


def _mark(stage: str) -> None:
    print(MARK + stage, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; returns the exit code."""
    path, *numbers = sys.argv[1:] if arguments is None else arguments
    samples, steps, threshold = int(numbers[0]), int(numbers[1]), float(numbers[2])
    only = [int(number) for number in numbers[3:]]
    import torch

    import pyflocality as pf
    from pyflocality.kernels.cpu.masked_posterior import schedules
    from pyflocality.moments.mask_source import chosen_way
    from pyflocality.ops import nearest_images

    _mark("decoding")
    data = pf.TrainingSet.load(path, progress=False)
    way = chosen_way(len(data), data.num_values)
    source: pf.Moments | pf.Basis
    if way == "gram":
        _mark("components")
        source = pf.Basis.from_data(data, method="gram")
    else:
        _mark("moments")
        source = pf.Moments.from_data(data)
        if way == "eigenvectors":
            _mark("components")
            source.basis()
    denoiser = pf.PCALocalityDenoiser(data, threshold, moments=source)
    schedule = pf.DDPMSchedule()
    times = schedule.timesteps(steps).tolist()
    levels = [pf.NoiseLevel(*map(float, schedule(t))) for t in times]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, *data.image_shape, generator=generator)
    shares = []
    for level in [levels[number] for number in only] or levels:
        _mark("masks")
        weights = denoiser.weights_at(level)
        _mark("steps")
        denoiser(x, level)
        _mark("looking")
        if data.num_values**2 // 8 <= _WHOLE_BYTES:
            terms = sum(tree.terms for _, tree in schedules(weights, data.image_shape))
            shares.append(terms / data.num_values**2)
    _mark("nearest images")
    nearest_images(x, data.images)
    _mark("end")
    print(json.dumps({"mask_shares": shares}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
