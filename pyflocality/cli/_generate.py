"""`pyflocality generate`: new images from a set of images."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyflocality._support.devices import parse_device
from pyflocality._support.outputs import Outputs
from pyflocality._support.paths import checked_path
from pyflocality._support.record import Stages, software
from pyflocality._support.streams import answer, listed
from pyflocality.cli import _generate_options as options
from pyflocality.cli import _options as common
from pyflocality.cli._checkpoint import KeptAnswers
from pyflocality.cli._denoisers import DenoiserOptions, SubsetOptions
from pyflocality.cli._errors import reported
from pyflocality.cli._generate_options import Sampling
from pyflocality.cli._models import (
    backends_record,
    data_record,
    draw,
    finished,
    given_options,
    moments_of,
    neighbour_record,
    neighbour_values,
    neighbours_of,
    sampling_record,
    with_eigenvectors,
)
from pyflocality.cli._options import SourceOptions, given_path
from pyflocality.cli._ranks import joined, split_in_force
from pyflocality.cli._record import ObservedDenoiser

if TYPE_CHECKING:
    from pyflocality import Moments, SampleResult, TrainingSet
    from pyflocality.ops.nearest import Neighbours
    from pyflocality.posterior.ranks import Ranks

# Denoisers that read the images themselves, and so the whole set.
_WHOLE_SET = ("ledoit-wolf", "nearest")


@dataclass(frozen=True)
class Plan:
    """A checked run: what to read, what to do and what to write."""

    source: SourceOptions
    denoiser: DenoiserOptions
    subset: SubsetOptions | None
    sampling: Sampling
    flip: bool
    moments: Path | None
    global_share: float | None
    split_over: str | None
    out: Path
    individual: bool
    trajectory: bool
    nearest: bool
    progress: bool

    def check(self) -> None:
        """Refuse everything that can be refused without the images."""
        self.source.check()
        self.denoiser.check()
        if self.subset is not None:
            self.subset.check(self.denoiser, flip=self.flip)
        self.sampling.check()
        if self.moments is not None and not self.needs_moments:
            raise ValueError(f"`moments` is of no use to the denoiser {self.denoiser.name}")
        if self.global_share is not None:
            self._check_share(self.global_share)
        if self.split_over is not None:
            self._check_ranks()

    def _check_share(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"`global_share` must lie in [0, 1], got {share}")
        if self.source.label is None:
            raise ValueError("`global_share` is of a class: it needs `label`")
        if self.denoiser.entry.needs_moments == "no":
            raise ValueError(f"`global_share` is of no use to the denoiser {self.denoiser.name}")

    def _check_ranks(self) -> None:
        """Refuse what several ranks cannot do."""
        if ":" in self.source.device:
            raise ValueError(
                "`device` must be cpu or cuda under torchrun, which gives each rank a GPU of its "
                f"own, got {self.source.device!r}"
            )
        if self.split_over == "samples":
            return
        whole = self.denoiser.name if self.denoiser.name in _WHOLE_SET else None
        if self.subset is not None:
            whole = "`subset`"
        if self.denoiser.given.get("aggregation") == "batch_mean":
            whole = "`aggregation` batch-mean"
        if whole is not None:
            raise ValueError(
                f"`split_over` must be samples for {whole}, which needs the whole set on every rank"
            )

    def part(self, data: TrainingSet) -> TrainingSet:
        """What this process searches of a set."""
        import torch.distributed as dist

        from pyflocality.distributed import shard

        if self.split_over != "images":
            return data
        if len(data) < dist.get_world_size():
            raise ValueError(
                f"`split_over` must be samples for {dist.get_world_size()} ranks and a set of "
                f"{len(data)} images"
            )
        return shard(data)

    @property
    def asked(self) -> dict[str, Any]:
        """What tells one run from another."""
        return {"command": "generate", **asdict(self), "progress": None}

    @property
    def needs_moments(self) -> bool:
        """Whether anything is made of moments."""
        by_subset = self.subset is not None and self.subset.needs_moments
        return self.denoiser.entry.needs_moments != "no" or by_subset

    @property
    def singles(self) -> list[Path]:
        """Files of the single images."""
        number = self.sampling.n if self.individual else 0
        return [self.out / f"sample-{index:03d}.png" for index in range(number)]

    @property
    def files(self) -> list[Path]:
        """Everything that is written, the record last."""
        names = ["samples.png", "samples.npy", *["trajectory.png"] * self.trajectory]
        return [*(self.out / name for name in names), *self.singles, self.out / "run.json"]


@reported(mask_threshold="threshold", batch_size="loader_batch")
def generate(
    source: common.Source,
    out: options.Out,
    denoiser: options.Denoiser = options.DenoiserName["pca-locality"],
    threshold: options.Threshold = None,
    window: options.Window = None,
    boundary: options.Boundary = None,
    temperature: options.Temperature = None,
    aggregation: options.Aggregation = None,
    loader_batch: options.LoaderBatch = None,
    subset: options.Subset = None,
    moments: options.MomentsFile = None,
    global_share: options.GlobalShare = None,
    split_over: options.SplitOver = None,
    backend: options.Backend = None,
    memory_budget: options.MemoryBudget = None,
    device: common.Device = "cpu",
    n: options.Count = 8,
    steps: options.Steps = 10,
    schedule: options.Schedule = options.ScheduleName["ddpm"],
    spacing: options.Spacing = None,
    sampler: options.Sampler = options.SamplerName["ddim"],
    seed: options.Seed = 0,
    resolution: common.Resolution = None,
    channels: common.Channels = None,
    split: common.Split = None,
    layout: common.Layout = None,
    label: common.Label = None,
    flip: options.Flip = False,
    nearest: options.Nearest = True,
    trajectory: options.Trajectory = True,
    individual: options.Individual = False,
    force: common.Force = False,
    as_json: common.Json = False,
    progress: common.Progress = True,
) -> None:
    """Make new images from a set of images, without training.

    Writes into the folder --out: samples.png (the images, each above the training image nearest
    to it), samples.npy (their values, float32 in [-1, 1]), trajectory.png (the way from noise to
    image) and run.json (settings, versions, timings). A run that was interrupted goes on behind
    its last finished step when it is started again with the same options.

    Started by torchrun, as in `torchrun --nproc-per-node 4 -m pyflocality generate SOURCE --out
    DIR -n 64`, the ranks share the work: see --split-over. Rank 0 alone writes files and prints.
    Start it again where a rank was lost.
    """
    given = given_options(
        window,
        threshold=threshold,
        boundary=boundary,
        temperature=temperature,
        aggregation=aggregation,
        loader_batch=loader_batch,
        backend=backend,
        memory_budget=memory_budget,
    )
    plan = Plan(
        SourceOptions(source, resolution, channels, split, label, device, layout),
        DenoiserOptions(denoiser.value, given),
        None if subset is None else SubsetOptions(subset.value),
        Sampling(
            n,
            steps,
            schedule.value,
            sampler.value,
            seed,
            None if spacing is None else spacing.value,
        ),
        flip,
        given_path(moments, "moments"),
        global_share,
        split_in_force(None if split_over is None else split_over.value),
        checked_path(out, "out"),
        individual,
        trajectory,
        nearest,
        progress,
    )
    plan.check()
    start = time.perf_counter()
    with joined() as ranks:
        if ranks is not None and ranks.rank > 0:
            _find(replace(plan, progress=False), Stages(announce=False), ranks)
            return
        with Outputs(plan.files, force=force, folder=plan.out, run=plan.asked) as outputs:
            record, kept = _run(plan, outputs, ranks)
            text = finished(record, start)
            outputs.temporary[plan.files[-1]].write_text(text + "\n", encoding="utf-8")
            outputs.commit()
            kept.forget()
    if as_json:
        answer(text, only_here=True)
    else:
        files = listed(plan.files[: -1 - len(plan.singles)] + plan.files[-1:])
        answer(f"{n} images in {time.perf_counter() - start:.1f} s: {files}", only_here=False)


@dataclass(frozen=True)
class _Found:
    """What a run came to, the same on every rank.

    `settings`, for the record, are those that the answers depend on; rank 0 alone has them.
    """

    data: TrainingSet
    settings: dict[str, Any]
    calls: list[dict[str, float]]
    kept: KeptAnswers
    result: SampleResult
    neighbours: Neighbours | None


def _run(plan: Plan, outputs: Outputs, ranks: Ranks | None) -> tuple[dict[str, Any], KeptAnswers]:
    """Load, sample and draw; the record of it, and the answers that were kept on the way."""
    from pyflocality import trace_backends

    stages = Stages(announce=plan.progress)
    with trace_backends() as backends:
        found = _find(plan, stages, ranks)
    _write(plan, outputs, found)
    neighbours = found.neighbours
    record = {
        "command": "generate",
        "source": asdict(plan.source),
        **found.settings,
        "moments": None if plan.moments is None else str(plan.moments),
        "sampling": sampling_record(plan.sampling, found.result.timesteps),
        "backends": backends_record(backends),
        "seconds": stages.seconds,
        "calls": found.calls,
        "resumed_calls": found.kept.found,
        "nearest": None if neighbours is None else neighbour_record(neighbours, found.data),
        "files": [path.name for path in plan.files],
    }
    return record, found.kept


def _find(plan: Plan, stages: Stages, ranks: Ranks | None) -> _Found:
    """Load and sample, on every rank alike."""
    from pyflocality import Moments
    from pyflocality.backends.selection import requested_backend
    from pyflocality.distributed import shard, split_samples

    given = None if plan.moments is None else Moments.load(plan.moments)
    with stages("load", f"loading {plan.source.source}"):
        everything = plan.source.load_all(progress=plan.progress).augmented(flip=plan.flip)
        data = plan.source.of_label(everything)
        searched = plan.part(data).to(parse_device(plan.source.device))
    moments = None
    if plan.needs_moments:
        moments = _moments(plan, everything, data, searched, given, stages)
    denoiser = plan.denoiser.build(searched, moments)
    over_subset = denoiser if plan.subset is None else plan.subset.build(denoiser, moments)
    observed = ObservedDenoiser(over_subset)
    # All that the answers depend on; rank 0 alone looks the answers up.
    settings, others = {}, {}
    if ranks is None or ranks.rank == 0:
        settings = {
            "data": data_record(data, flip=plan.flip),
            "denoiser": {"name": plan.denoiser.name, **plan.denoiser.in_force(denoiser)},
            "subset": None if plan.subset is None else plan.subset.in_force(over_subset),
            "global_share": plan.global_share,
            "ranks": ranks and {"count": ranks.count, "split_over": plan.split_over},
            "software": software(),
        }
        others = {
            "all_classes": None if plan.global_share is None else everything.content_key(),
            "moments": None if given is None else given.content_key(),
            "sampling": plan.sampling.settings,
            "backend": requested_backend(None),
        }
        if not plan.denoiser.depends_on_threads:
            others["software"] = settings["software"] | {"threads": None}
    asked = split_samples(observed) if plan.split_over == "samples" else observed
    kept = KeptAnswers(asked, plan.out, settings | others, ranks)
    with stages("sampling", f"sampling {plan.sampling.n} images in {plan.sampling.steps} steps"):
        result = draw(kept, plan.sampling, progress=plan.progress)
    neighbours = None
    if plan.nearest:
        budget = plan.denoiser.given.get("memory_budget")
        divided = plan.split_over == "samples" and len(searched) >= ranks.count
        scanned = shard(searched) if divided else searched
        neighbours = neighbours_of(result.images, scanned, budget, stages)
    return _Found(data, settings, observed.calls, kept, result, neighbours)


def _moments(
    plan: Plan,
    everything: TrainingSet,
    data: TrainingSet,
    searched: TrainingSet,
    given: Moments | None,
    stages: Stages,
) -> Moments:
    """What the denoiser is made of: the moments of the data, leaning on those of all classes."""
    if plan.global_share is None:
        return with_eigenvectors(moments_of(data, searched, given, stages), stages)
    # Both on the CPU, where moments of a file are.
    overall = moments_of(everything, plan.part(everything), given, stages)
    own = moments_of(data, plan.part(data), None, stages)
    return with_eigenvectors(own.blended(overall, plan.global_share), stages)


def _write(plan: Plan, outputs: Outputs, found: _Found) -> None:
    """Write values and pictures under their temporary names."""
    import numpy as np

    from pyflocality import pictures

    files = {path.name: temporary for path, temporary in outputs.temporary.items()}
    result, neighbours = found.result, found.neighbours
    images = result.images.cpu()
    nearest = None if neighbours is None else neighbour_values(neighbours, found.data)
    pictures.sample_sheet(images, nearest).save(files["samples.png"])
    np.save(files["samples.npy"], images.float().numpy())
    if plan.trajectory:
        strip = pictures.trajectory_strip(result.x_t, result.x0, result.timesteps)
        strip.save(files["trajectory.png"])
    for path, image in zip(plan.singles, images, strict=False):
        pictures.image_grid(image[None], pad=0, scale=1).save(files[path.name])
