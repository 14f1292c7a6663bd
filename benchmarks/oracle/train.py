"""Train the U-Net that analytical denoisers are measured against.

    python -m benchmarks.oracle.train mnist-train.zip --out mnist-seed0 --seed 0 --minutes 10

It trains until the minutes or the steps are up and leaves in the folder --out

    unet.safetensors   the moving average of the parameters, float16, with facts about the training
    log.jsonl          a line at every checkpoint: steps, seconds, losses
    state.pt           all that the training goes on from when it is started again

The learning rate is constant and the average takes the place of its decay, so a training can be
prolonged at any time by another call. Batches and noise depend on the seed and the number of the
step alone: a training that was stopped at a checkpoint continues as if it had not been.

With --planted GAMMA the images bear the pattern of the study `pattern`, with this weight.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor, nn

import pyflocality as pf
from pyflocality._support.devices import parse_device
from pyflocality._support.progress import progress_bar
from pyflocality.storage.reader import training_values

from ..command import Record, path_option
from ..machine import machine_facts
from .planted import WEIGHTS, planted
from .unet import UNet

EMA = 0.999
WARM_UP = 100
PROBE = 256


class Training:
    """A network, its average, and where they are on their way."""

    def __init__(self, data: pf.TrainingSet, options: argparse.Namespace) -> None:
        self.data, self.options = data, options
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        self.unet = UNet(data.image_shape, options.width, tuple(options.multipliers))
        self.unet.to(self.device)
        self.average = copy.deepcopy(self.unet).eval()
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), options.rate, weight_decay=0.0)
        self.steps, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.schedule = pf.DDPMSchedule()

    @property
    def settings(self) -> Record:
        """What a state must agree with to be continued."""
        names = ["seed", "width", "multipliers", "batch", "rate"]
        names += [] if self.options.planted is None else ["planted"]
        facts = {"data": self.data.name, "images": len(self.data), "key": self.data.content_key()}
        return facts | {name: getattr(self.options, name) for name in names}

    def loss(self, network: nn.Module, batch: Tensor, seed: int) -> Tensor:
        """Mean squared error of v at random times, which with the noise follow from a seed."""
        generator = torch.Generator().manual_seed(seed)
        clean = batch.to(self.device)
        times = torch.randint(1000, (len(batch),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        levels = [self.schedule(int(t)) for t in times]
        alpha, sigma = torch.tensor(levels, device=self.device)[:, :, None, None, None].unbind(1)
        noisy, target = alpha * clean + sigma * noise, alpha * noise - sigma * clean
        with torch.autocast(self.device.type, torch.bfloat16):
            predicted = network(noisy, times.to(self.device))
        return (predicted.float() - target).square().mean()

    def batch(self) -> Tensor:
        """The next images of an order that is drawn anew whenever no whole batch is left."""
        size = min(self.options.batch, len(self.data))
        epoch, number = divmod(self.steps, len(self.data) // size)
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.data), generator=generator)
        return self.values(order[number * size : (number + 1) * size])

    def values(self, rows: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        return training_values(self.data.images[rows.to(self.data.device)], torch.float32)

    def step(self) -> None:
        """One step of the optimizer and of the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.rate * min(1.0, (self.steps + 1) / WARM_UP)
        seed = self.options.seed * 1_000_000_007 + self.steps
        # Dropout draws from torch's own generator.
        torch.manual_seed(seed)
        loss = self.loss(self.unet, self.batch(), seed)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        decay = min(EMA, (self.steps + 1) / (self.steps + 10))
        self.steps += 1
        with torch.no_grad():
            parameters = zip(self.average.parameters(), self.unet.parameters(), strict=True)
            for kept, current in parameters:
                kept.lerp_(current, 1 - decay)

    def save(self, folder: Path) -> None:
        """Write network, log and state, each in place of the last only once it is whole."""
        with torch.no_grad():
            count = min(PROBE, len(self.data))
            # From everywhere: sets are often sorted by class.
            spread = torch.arange(count) * (len(self.data) // count)
            probe = self.loss(self.average, self.values(spread), 0).item()
        line = {
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "loss": sum(self.losses) / max(len(self.losses), 1),
            "probe_loss": probe,
        }
        self.losses = []
        facts = {
            **self.settings,
            **line,
            "predicts": "v",
            "ema": EMA,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine_facts(),
        }
        state = {
            "settings": self.settings,
            "unet": self.unet.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "seconds": self.seconds,
        }
        part = folder / "part"
        with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        self.average.save(part, facts)
        os.replace(part, folder / "unet.safetensors")
        torch.save(state, part)
        os.replace(part, folder / "state.pt")

    def restore(self, path: Path) -> None:
        """Go on from a state, if it is of the same training.

        Raises:
            ValueError: The state is of another training.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        kept, own = state["settings"], self.settings
        # The weight first: with another one the images differ, too.
        for name in ("planted", *own):
            if kept.get(name) != own.get(name):
                raise ValueError(
                    f"{path} is of a training with {name} = {kept.get(name)!r}, "
                    f"not {own.get(name)!r}: choose another --out"
                )
        self.unet.load_state_dict(state["unet"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.seconds = state["steps"], state["seconds"]

    def run(self, folder: Path) -> None:
        """Train until the steps or the minutes are up, with a checkpoint now and then."""
        options = self.options
        start, saved = time.perf_counter() - self.seconds, time.perf_counter()
        steps = range(self.steps, options.steps)
        for _ in progress_bar(steps, description="training", enabled=options.progress):
            if options.minutes is not None and self.seconds > 60 * options.minutes:
                break
            self.step()
            now = time.perf_counter()
            self.seconds = now - start
            if now - saved > options.every:
                self.save(folder)
                saved = now
        if self.losses:
            self.save(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, or go on; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.oracle.train")
    parser.add_argument("source", help="the images, as TrainingSet.load takes them; 8-bit")
    parser.add_argument(
        "--out", type=path_option, required=True, help="folder to write or to go on in"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100_000, help="steps to train, all told")
    parser.add_argument("--minutes", type=float, help="minutes to train, all told")
    parser.add_argument("--width", type=int, default=64, help="channels at full resolution")
    parser.add_argument("--multipliers", type=int, nargs="+", default=[1, 2, 2])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--every", type=float, default=300, help="seconds between checkpoints")
    told = " and ".join(f"{weight:g}" for weight in WEIGHTS if weight)
    parser.add_argument(
        "--planted",
        type=float,
        help=f"weight of the planted pattern, in (0, 1]; the study takes {told}",
    )
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    options = parser.parse_args(arguments)
    if options.planted is not None and not 0 < options.planted <= 1:
        parser.error(f"--planted must be in (0, 1], got {options.planted:g}")
    try:
        options.device = parse_device(options.device)
        data = pf.TrainingSet.load(options.source)
        if options.planted is not None:
            data = planted(data, options.planted)
        data = data.to(options.device)
        if data.dtype != torch.uint8:
            raise ValueError(
                f"`source` must be 8-bit images, those of {data.name} are {data.dtype}"
            )
        training = Training(data, options)
        options.out.mkdir(parents=True, exist_ok=True)
        if (options.out / "state.pt").exists():
            training.restore(options.out / "state.pt")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    training.run(options.out)
    print(f"written: {options.out / 'unet.safetensors'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
