"""`pyflocality reproduce`: the table of the papers for a set of images."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from typing import Annotated

import typer

from pyflocality._support.memory import ignoring_memory
from pyflocality._support.paths import checked_path
from pyflocality._support.streams import answer, listed
from pyflocality.cli._errors import reported
from pyflocality.cli._groups import MODEL, Group
from pyflocality.cli._options import Device, FolderOptions, IgnoreMemory, Seed, Source


@dataclass(frozen=True, kw_only=True)
class _Machine(Group):
    """Where models run, and what they may take there."""

    heading = MODEL

    device: Device = "cpu"
    ignore_memory: IgnoreMemory = False


@dataclass(frozen=True, kw_only=True)
class _Equivariant(Group):
    """How much of the set and of the samples equivariant models take."""

    heading = MODEL

    els_images: Annotated[
        int,
        typer.Option(help="equivariant models: images that are searched, drawn at random."),
    ] = 2000
    els_samples: Annotated[int, typer.Option(help="equivariant models: images that are made.")] = 32


@reported()
def reproduce(
    *,
    results: FolderOptions,
    source: Source,
    network: Annotated[
        list[str],
        typer.Option(
            metavar="PATH",
            help="Trained network, a .safetensors file of benchmarks.oracle. Given several "
            "times, each is a target, and windows are calibrated by the first.",
            show_default=False,
        ),
    ],
    threshold: Annotated[
        float,
        typer.Option(
            help="Threshold of PCA locality. Published: 0.005 for MNIST, 0.05 for CIFAR-10.",
            rich_help_panel=MODEL,
        ),
    ] = 0.005,
    samples: Annotated[int, typer.Option(help="Images that every model makes.")] = 128,
    seed: Seed = 0,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Which of optimal, gaussian-mixture, wiener, local, equivariant, "
            "equivariant-broken, pca-locality, pca-locality-linear, pca-locality-batch-mean, "
            "golden, golden-random, patch-set, patch-set-linear, mixture, calibrated, multiscale "
            "and nearest; all if not given.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="calibrated: the choices, as `pyflocality calibrate` writes them; made if not "
            "given.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    equivariant: _Equivariant,
    machine: _Machine,
) -> None:
    """Fill the table of the papers: every model against trained networks, from the same noise.

    Ten DDIM steps; MSE and r2 of each model's images and of its denoised images at every step
    against each network's, and of its answers to the states of each network's run, with standard
    errors, paired where models are compared; how sharp images are and how near to training
    images; time per step and peak memory. The calibrated model is chosen by held-out images: no
    network has a part in it. Writes into the folder --out: reproduce.json, table.md, samples.png
    and steps.png. Finished runs are kept in its folder `runs`: an interrupted command goes
    on where it ended.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("this needs matplotlib: pip install 'pyflocality[plot]'")
    from pyflocality.benchmarks.reproduce import methods as known
    from pyflocality.benchmarks.reproduce import table, table_text

    names = tuple(known.METHODS)
    if methods is not None:
        names = tuple(name.strip() for name in methods.split(","))
    plan = table.Plan(
        source,
        tuple(checked_path(file, "network") for file in network),
        checked_path(results.out, "out"),
        threshold,
        samples,
        seed,
        names,
        equivariant.els_images,
        equivariant.els_samples,
        results.force,
        results.progress,
        machine.device,
        None if calibration is None else checked_path(calibration, "calibration"),
    )
    with ignoring_memory(machine.ignore_memory):
        record = table.reproduce(plan)
    if results.as_json:
        text = json.dumps(record, indent=2, allow_nan=False)
    else:
        text = table_text.markdown(record) + "\n" + listed(plan.files)
    answer(text, only_here=results.as_json)
