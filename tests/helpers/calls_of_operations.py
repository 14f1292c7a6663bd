"""Operations, noise conversions and the masks: functions of tensors."""

from __future__ import annotations

import functools

import torch
from calls_common import (
    KINDS,
    SHAPE,
    Call,
    images,
    noisy,
)
from wrong_values import (
    Kind,
    count,
    level,
    only,
    tensor,
)

import pyflocality as pf


def operations() -> dict[str, Call]:
    batch = {"x": noisy(2, *SHAPE), "images": images(), "sigma": 0.5, "alpha": 0.9}
    directions = noisy(3, 2, *SHAPE)
    weights = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) > 0.5
    fewer = torch.rand(5, 64, generator=torch.Generator().manual_seed(0))
    none = {name: KINDS[name] for name in ()}
    entries = {}

    def add(name: str, further: dict[str, object], **kinds: Kind) -> None:
        function = getattr(pf.ops, name)
        given = dict(batch)
        if name.endswith("_jvp"):
            given["tangents"] = directions
        if name.endswith("_vjp"):
            given["cotangents"] = directions
        if name.endswith(("_jvp", "_vjp")):
            kinds["sigma"] = level(zero=False)
        given |= further
        entries[f"ops.{name}"] = Call(function, functools.partial(dict, given), none | kinds)

    add("global_posterior_mean", {})
    add("global_posterior_jvp", {})
    for kind in ("mean", "jvp", "vjp"):
        add(f"window_posterior_{kind}", {"window": 3})
        add(f"equivariant_posterior_{kind}", {"window": 3}, window=count(1, 8))
        add(f"masked_posterior_{kind}", {"weights": weights})
        add(f"filtered_posterior_{kind}", {"weights": fewer, "responses": fewer.sqrt()})
    add("patch_set_mean", {"window": 3}, window=count(1, 8))
    add(
        "posterior_log_sum_exp",
        {"window": 3},
        sigma=level(zero=False),
        window=count(1, 15, optional=True),
        weights=only(lambda v: v is None),
    )
    nearest = {"x": batch["x"], "images": batch["images"], "alpha": 0.9, "k": 2}
    entries["ops.nearest_images"] = Call(
        pf.ops.nearest_images, functools.partial(dict, nearest), {"k": count(1, 12)}
    )

    def sums() -> dict[str, object]:
        return {
            "images": images().flatten(1),
            "gram": torch.zeros(64, 64, dtype=torch.int64),
            "total": torch.zeros(64, dtype=torch.int64),
        }

    only_int64 = tensor(dtypes={"int64": 0})
    entries["ops.accumulate_covariance"] = Call(
        pf.ops.accumulate_covariance,
        sums,
        {"images": tensor(dtypes={"uint8": 0}), "gram": only_int64, "total": only_int64},
    )
    return entries
