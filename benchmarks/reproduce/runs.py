"""Sampling runs: measured in a process of their own, kept on disk as they are finished."""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

import pyflocality as pf
from pyflocality._support.locks import remove_abandoned, replacing, twins_of
from pyflocality._support.memory import memory_bytes
from pyflocality._support.progress import progress_bar
from pyflocality.backends.selection import requested_backend

from ..command import Record
from ..machine import machine_facts
from . import methods, networks
from .methods import Settings

STEPS = 10


@dataclass(frozen=True, eq=False)
class Run:
    """What a model made of the starting noise.

    Attributes:
        x0: Its answers, clipped to [-1, 1]: float32 [steps, n, C, H, W] on the CPU; the last are
            the images.
        facts: Time, memory, backends and date of the run.
        x_t: The states that a network met on its own run, like `x0`; None of other runs.
    """

    x0: Tensor
    facts: Record
    x_t: Tensor | None = None


@dataclass(frozen=True)
class Request:
    """A run to be made.

    Attributes:
        settings: Settings of a method, or of a network.
        data: The training set, in memory; None for a network.
        moments: Its moments, where the method needs them.
        network: File of the network, where it is one.
        x_t: Starting noise [n, C, H, W].
        steps: Number of DDIM steps.
        progress: Whether to show a progress bar.
        device: Where to run; for a run in a process of its own, all else is on the CPU.
        calibration: The calibration, where the method needs one.
        states: States [steps, n, C, H, W] that are answered instead of those of an own run, whose
            starting noise is the first of them; None for an own run.
    """

    settings: Settings
    data: pf.TrainingSet | None
    moments: pf.Moments | None
    network: Path | None
    x_t: Tensor
    steps: int
    progress: bool
    device: torch.device
    calibration: pf.Calibration | None = None
    states: Tensor | None = None

    def on_device(self) -> Request:
        """The same with all that it is given on its device."""
        return replace(
            self,
            data=None if self.data is None else self.data.to(self.device),
            moments=None if self.moments is None else self.moments.to(self.device),
            x_t=self.x_t.to(self.device),
            states=None if self.states is None else self.states.to(self.device),
        )

    def denoiser(self) -> pf.Denoiser:
        """What runs."""
        if self.network is not None:
            return networks.load(self.network, self.device)
        if self.data is None:
            raise ValueError(f"`data` must be given for {self.settings['model']}")
        return methods.build(self.settings, self.data, self.moments, self.calibration)


def starting_noise(image_shape: tuple[int, int, int], samples: int, seed: int) -> Tensor:
    """Standard normal noise, float32 [samples, C, H, W], the same on every machine."""
    return torch.randn(samples, *image_shape, generator=torch.Generator().manual_seed(seed))


def perform(request: Request) -> Run:
    """Make a run in this process.

    Its memory is how far the process grew at most, beyond what it held when images, moments and
    starting noise were there and nothing else: the resident set's peak, which Linux lets a process
    reset; None elsewhere. On a GPU it is the same of the memory that torch has allocated there.

    Preparation is the making of the model and of its masks; `seconds` are the model's answers. On
    a GPU another model of the same settings answers once before, at the first level, as kernels
    are compiled at their first use. That time is not counted, nor are copies of the images made
    then that kernels keep; their memory is.
    """
    request, device = request.on_device(), request.device
    _touch(request)
    growth = _memory_growth(device)
    if device.type == "cuda":
        _warm_up(request)
    with pf.trace_backends() as calls:
        clock = now(device)
        timed = _Timed(request.denoiser())
        built = now(device) - clock
        x_t, x0 = _answers(timed, request)
    memory = growth()
    met = request.network is not None and request.states is None
    return Run(
        x0.float().clamp(-1, 1).cpu(),
        {
            "seconds": [round(seconds, 4) for seconds in timed.seconds],
            "preparation_seconds": round(built + timed.preparing, 4),
            "extra_memory_bytes": memory,
            "backends": sorted({backend for _, backend in calls}) or ["torch"],
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": machine_facts()["commit"],
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
        x_t.cpu() if met else None,
    )


@torch.no_grad()
def _answers(denoiser: _Timed, request: Request) -> tuple[Tensor, Tensor]:
    """The states of each step, those that are given or those of an own run, and the answers."""
    if request.states is None:
        out = pf.sample(denoiser, x_T=request.x_t, steps=request.steps, progress=request.progress)
        return out.x_t, out.x0
    schedule = pf.DDPMSchedule()
    times = schedule.timesteps(request.steps).tolist()
    visits = list(zip(times, request.states, strict=True))
    answers = []
    for t, x in progress_bar(visits, description="states", enabled=request.progress):
        alpha, sigma = schedule(t)
        answers.append(denoiser(x, sigma, alpha))
    return request.states, torch.stack(answers)


@torch.no_grad()
def _warm_up(request: Request) -> None:
    """Make the model and let it answer once, at the first level."""
    schedule = pf.DDPMSchedule()
    alpha, sigma = schedule(schedule.timesteps(request.steps).tolist()[0])
    request.denoiser()(request.x_t, sigma, alpha)


def perform_apart(request: Request) -> Run:
    """The same in a new process, whose memory is that of this run alone, and which ends with us.

    Raises:
        ChildProcessError: The process was ended, as the system does where memory runs out.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            return pool.submit(perform, request).result()
        except KeyboardInterrupt:
            # Leaving the block would wait for a run that nobody wants any more.
            for process in multiprocessing.active_children():
                process.kill()
            raise
        except BrokenProcessPool:
            model = request.settings["model"]
            raise ChildProcessError(
                f"the process that ran {model} was ended, perhaps for want of memory"
            ) from None


def _end_with_parent() -> None:
    """Leave the terminal's signals to the parent, and end with it whatever ends it."""

    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


class KeptRuns:
    """Finished runs in a folder, found again by all that they depend on.

    Args:
        folder: Where they lie; it is made when the first is kept.
        common: Settings of all of them: what identifies the images, the noise and the steps.
        device: Where they are made. Runs hold times, so a GPU's name is part of what they depend
            on, and so is the backend that is in force now.
    """

    def __init__(self, folder: Path, common: Mapping[str, Any], device: torch.device) -> None:
        self.folder = folder
        self.common = {"pyflocality": pf.__version__, **common}
        # Nothing is added to what the CPU and "auto" give: there are runs that were kept before
        # there was a choice.
        backend = requested_backend(None)
        if backend != "auto":
            self.common["backend"] = backend
        if device.type != "cpu":
            self.common["device"] = device.type
        if device.type == "cuda":
            self.common["gpu"] = torch.cuda.get_device_name(device)

    def path(self, name: str, settings: Mapping[str, Any], suffix: str = ".npz") -> Path:
        """The file of some settings."""
        text = json.dumps({**self.common, "settings": settings}, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self.folder / f"{name.replace(' ', '-')}-{key}{suffix}"

    def get(self, name: str, settings: Settings, make: Callable[[], Run]) -> tuple[Run, bool]:
        """The run of some settings, and whether it was there already."""
        path = self.path(name, settings)
        kept = self._read(path)
        if kept is not None:
            return kept, True
        run = make()
        self._write(path, run)
        return run, False

    def _read(self, path: Path) -> Run | None:
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as archive:
                x_t = torch.from_numpy(archive["x_t"]) if "x_t" in archive else None
                x0, facts = torch.from_numpy(archive["x0"]), json.loads(str(archive["facts"]))
                return Run(x0, facts, x_t)
        except (ValueError, KeyError, OSError, EOFError, BadZipFile) as error:
            warnings.warn(f"{path} is damaged ({error}), made anew", stacklevel=3)
            return None

    def _write(self, path: Path, run: Run) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(twins_of(path))
        with replacing(path, 0o666) as file:
            met: dict[str, Any] = {} if run.x_t is None else {"x_t": run.x_t.numpy()}
            np.savez(file, x0=run.x0.numpy(), facts=json.dumps(run.facts), **met)


class _Timed:
    """A denoiser that notes the time of each call, and that of its masks apart."""

    def __init__(self, denoiser: pf.Denoiser) -> None:
        self.denoiser = denoiser
        self.image_shape, self.device = denoiser.image_shape, denoiser.device
        self.weights_at = getattr(getattr(denoiser, "denoiser", denoiser), "weights_at", None)
        self.seconds: list[float] = []
        self.preparing = 0.0

    def __call__(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        clock = now(x.device)
        if self.weights_at is not None:
            self.weights_at(sigma, alpha)
        self.preparing += now(x.device) - clock
        clock = now(x.device)
        answer = self.denoiser(x, sigma, alpha)
        self.seconds.append(now(x.device) - clock)
        return answer


def _touch(request: Request) -> None:
    """Read all that the run is given: memory that is shared counts from its first use on."""
    moments = request.moments
    given = [request.x_t] if request.data is None else [request.x_t, request.data.images]
    if moments is not None:
        given += [moments.mean, moments.covariance, *moments.eigh()]
    for tensor in given:
        tensor.max()


def now(device: torch.device) -> float:
    """Seconds of a clock, read when the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _memory_growth(device: torch.device) -> Callable[[], int | None]:
    """What tells how many bytes more than now were in use at most since; None if unknown."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - held
    if not _reset_peak():
        return lambda: None
    before = memory_bytes()["VmRSS"]
    return lambda: max(0, memory_bytes()["VmHWM"] - before)


def _reset_peak() -> bool:
    """Make the present size of this process its peak; False where that is not possible."""
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
        return True
    return False
