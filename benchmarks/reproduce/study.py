"""What the commands of this package share: options, what they are checked for, and records."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

import pyflocality as pf
from pyflocality._support.devices import parse_device

from ..command import Record, Run, check_results, path_option, results_parser, write_json
from ..kernels.gpu_machine import gpu_facts
from ..machine import machine_facts
from . import methods, networks
from .networks import Network
from .runs import KeptRuns


class Study:
    """A command: reads its options, loads what it needs, and writes one results file.

    Args:
        name: The module's name in this package.
        samples: How many samples there are if not given.
        about: What the samples are.
        needs_network: Whether there must be a network.
        positive_threshold: Whether a threshold of 0 is refused.

    Attributes:
        parser: Takes further options before `start`.
        options: What was asked for.
        device: Where the models run.
        data: The training set, in a random order and on that device.
        trained: The networks.
        progress: Whether to show progress bars.
    """

    options: argparse.Namespace
    device: torch.device
    data: pf.TrainingSet
    trained: list[Network]
    progress: bool

    def __init__(
        self,
        name: str,
        samples: int,
        about: str,
        *,
        needs_network: bool = True,
        positive_threshold: bool = False,
    ) -> None:
        self.name, self._begun = name, Run()
        self._positive_threshold = positive_threshold
        self.parser = results_parser(f"reproduce.{name}")
        add = self.parser.add_argument
        add("--source", required=True, help="training images")
        add(
            "--network",
            type=path_option,
            action="append",
            required=needs_network,
            default=[],
            help="trained network; given several times, the first is the one that is followed",
        )
        add("--threshold", type=float, default=0.005, help="of PCA locality")
        add("--samples", type=int, default=samples, help=about)
        add("--device", default="cpu", help="cpu, or cuda with or without a number")
        add("--no-progress", action="store_true", help="no progress bars")

    def start(self, arguments: Sequence[str] | None) -> None:
        """Read and check the options, then load images and networks."""
        self.options = options = self.parser.parse_args(arguments)
        self.progress = not options.no_progress
        check_results(self.parser, options)
        for name, value in vars(options).items():
            if isinstance(value, int) and value < 1 and not isinstance(value, bool):
                self.parser.error(f"--{name} must be at least 1, got {value}")
        if not 0 <= options.threshold < 1:
            self.parser.error(f"--threshold must be in [0, 1), got {options.threshold}")
        if self._positive_threshold and options.threshold == 0:
            self.parser.error("--threshold must be positive: its multiples are compared")
        try:
            self.device = parse_device(options.device)
            if options.network:
                networks.check_networks(options.network)
            data = methods.load_mixed(options.source, progress=self.progress)
            shape = data.image_shape
            self.trained = (
                networks.check_networks(options.network, shape) if options.network else []
            )
        except (ValueError, FileNotFoundError) as error:
            self.parser.error(str(error))
        self.data = data.to(self.device)

    @functools.cached_property
    def moments(self) -> pf.Moments:
        """Moments of the training set."""
        return pf.Moments.from_data(self.data, progress=self.progress)

    def kept(self, **common: object) -> KeptRuns:
        """Where finished runs lie, found by the images and what else all of them have in common."""
        common = {"images": self.data.content_key(), **common}
        return KeptRuns(self.options.out.with_suffix(".runs"), common, self.device)

    def write(self, results: object, **further: object) -> Record:
        """Write the results with all that they depend on."""
        report = self._begun.report(
            study=self.name,
            machine=facts_of(self.device),
            device=str(self.device),
            data=data_record(self.data),
            networks=[network.record() for network in self.trained],
            threshold=self.options.threshold,
            samples=self.options.samples,
            **further,
            results=results,
        )
        write_json(report, self.options.out)
        return report

    def picture(self, name: str = "") -> Path:
        """The file of a picture beside the results."""
        out: Path = self.options.out.with_suffix("")
        return out.with_name(f"{out.name}{name}.png")


def facts_of(device: torch.device) -> Record:
    """Machine and versions, with those of the GPU where that is the device."""
    return machine_facts() | (gpu_facts(device.index or 0) if device.type == "cuda" else {})


def data_record(data: pf.TrainingSet) -> Record:
    """What a results file tells of the images."""
    return {
        "name": data.name,
        "images": len(data),
        "image_shape": list(data.image_shape),
        "order": "random, the same every time; content_key is of the images in this order",
        "content_key": data.content_key(),
    }
