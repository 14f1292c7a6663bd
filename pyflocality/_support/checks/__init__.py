"""Argument checks shared by every public entry point.

Each function either returns the argument in its canonical form or raises `ValueError` /
`TypeError` naming the argument, what was expected and what came. They run before any work, cost no
pass over data that they have seen before, and never fail in another way, whatever they are given.
Values that Python cannot look at, under `torch.vmap` and while a call is compiled, are left for
the check of the values that they stand for.

Paths are checked by `pyflocality._support.paths`.
"""

from __future__ import annotations

from pyflocality._support.checks.describing import describe
from pyflocality._support.checks.levels import (
    LARGEST,
    Noisy,
    check_level,
    check_levels,
    check_magnitude,
    check_noise,
    check_noisy,
    check_one_level,
    check_single_level,
)
from pyflocality._support.checks.noise_level import LevelLike, NoiseLevel, as_pair
from pyflocality._support.checks.numeric import (
    check_count,
    check_positive,
    check_real,
    check_rounds,
    check_within_memory,
)
from pyflocality._support.checks.objects import (
    check_callable,
    check_choice,
    check_flag,
    check_float_dtype,
    check_generator,
    check_instance,
    check_sequence,
    check_text,
)
from pyflocality._support.checks.shapes import (
    Pixel,
    check_device,
    check_image_shape,
    check_pixel,
    check_size,
)
from pyflocality._support.checks.tensors import (
    FLOAT_DTYPES,
    REAL_DTYPES,
    check_batch,
    check_directions,
    check_finite,
    check_float_tensor,
    check_tensor,
    known_finite,
)

__all__ = [
    "FLOAT_DTYPES",
    "LARGEST",
    "Noisy",
    "NoiseLevel",
    "Pixel",
    "REAL_DTYPES",
    "LevelLike",
    "as_pair",
    "check_batch",
    "check_callable",
    "check_choice",
    "check_count",
    "check_device",
    "check_directions",
    "check_finite",
    "check_flag",
    "check_float_dtype",
    "check_float_tensor",
    "check_generator",
    "check_image_shape",
    "check_instance",
    "check_level",
    "check_levels",
    "check_magnitude",
    "check_noise",
    "check_noisy",
    "check_one_level",
    "check_pixel",
    "check_positive",
    "check_real",
    "check_rounds",
    "check_sequence",
    "check_single_level",
    "check_size",
    "check_tensor",
    "check_text",
    "check_within_memory",
    "describe",
    "known_finite",
]
