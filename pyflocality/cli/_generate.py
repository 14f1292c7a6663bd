"""`pyflocality generate`: new images from a set of images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyflocality._support.devices import parse_device
from pyflocality._support.memory import ignoring_memory
from pyflocality._support.paths import checked_path
from pyflocality._support.record import Stages, software
from pyflocality._support.streams import answer, listed
from pyflocality.cli._denoisers import DENOISERS, SUBSETS, SubsetOptions, model_in_force
from pyflocality.cli._errors import reported
from pyflocality.cli._foreseen import hold, jobs_of
from pyflocality.cli._groups import OneOf
from pyflocality.cli._options import (
    DENOISERS_HELP,
    DeviceSourceOptions,
    EveryModelOptions,
    FolderOptions,
    SamplingOptions,
    given_path,
)
from pyflocality.cli._quick import Quick, says_nothing
from pyflocality.cli._ranks import is_first, joined, split_in_force
from pyflocality.cli._recited import recited_line, recited_record, recited_samples
from pyflocality.cli._recorded import RecordedDenoiser
from pyflocality.cli._samples import SHOWN, SHOWN_WAYS, Samples, SamplesFile, make_samples
from pyflocality.cli._work import (
    Work,
    check_stored,
    components_of,
    data_record,
    foretell_few_images,
    moments_of,
    neighbour_record,
    neighbour_values,
    neighbours_of,
    text_of,
    working,
)

if TYPE_CHECKING:
    from torch import Tensor

    from pyflocality import Basis, Moments, TrainingSet
    from pyflocality.planner import Job
    from pyflocality.posterior.ranks import Ranks

# Denoisers that read the images themselves, and so the whole set.
_WHOLE_SET = ("ledoit-wolf", "nearest")


@dataclass(frozen=True, kw_only=True)
class Model(EveryModelOptions):
    """One model, and what of the set it searches."""

    denoiser: Annotated[
        str | None,
        typer.Option(
            help=f"Which model. {DENOISERS_HELP}. calibrated if --calibration is given; "
            "pca-locality if another option says something of the model; if none does, calibrated "
            "by held-out images in a moment, once for a set."
        ),
        OneOf(*DENOISERS),
    ] = None
    subset: Annotated[
        str | None,
        typer.Option(
            help="Search part of the images. golden: the nearest to each noisy image, a twentieth "
            "to a tenth of the set, without a bound on the difference; certified, for optimal: "
            "until the rest holds at most a thousandth of the posterior, proven."
        ),
        OneOf(*SUBSETS),
    ] = None
    global_share: Annotated[
        float | None,
        typer.Option(
            help="With --label: weight, from 0 to 1, of the covariance of the images of all "
            "classes in that of the class, which is mostly noise where the class has few images. "
            "--moments are then those of all classes. 0 if not given."
        ),
    ] = None

    split_over: Annotated[
        str | None,
        typer.Option(
            help="Under torchrun, what the ranks divide among them. images: every rank searches "
            "its part of the training images; samples: every rank makes its part of the --n "
            "images, with all training images in its memory or mapped. images if not given."
        ),
        OneOf("images", "samples"),
    ] = None

    @property
    def is_open(self) -> bool:
        """Whether no option names a model or sets one."""
        named = (self.denoiser, self.subset, self.global_share, self.moments)
        return all(one is None for one in named) and says_nothing(self.given)


@dataclass(frozen=True, kw_only=True)
class _Results(FolderOptions):
    """What is drawn beside the images."""

    nearest: Annotated[
        bool, typer.Option(help="Draw under each image the training image nearest to it.")
    ] = True
    trajectory: Annotated[bool, typer.Option(help="Draw the way from noise to image.")] = True
    individual: Annotated[
        bool, typer.Option("--individual", help="Also write every image to a file of its own.")
    ] = False


class _Plan:
    """A run: what to read, what to do and what to write."""

    def __init__(
        self,
        source: DeviceSourceOptions,
        model: Model,
        sampling: SamplingOptions,
        results: _Results,
    ) -> None:
        self.source, self.model, self.sampling, self.results = source, model, sampling, results
        # Where the model is open, that of a run without a calibration until there is one.
        self.denoiser = model_in_force(model.denoiser, model.given)
        self.calibrated: str | None = None
        self.subset = None if model.subset is None else SubsetOptions(model.subset)
        self.moments = given_path(model.moments, "moments")
        self.split_over = split_in_force(model.split_over)
        self.out = checked_path(results.out, "out")
        names = ["samples.png", "samples.npy", *["trajectory.png"] * results.trajectory]
        number = sampling.n if results.individual else 0
        self.singles = [self.out / f"sample-{index:03d}.png" for index in range(number)]
        # The record last.
        self.files = [*(self.out / name for name in names), *self.singles, self.out / "run.json"]

    @property
    def needs_moments(self) -> bool:
        """Whether anything is made of moments."""
        by_subset = self.subset is not None and self.subset.needs_moments
        return self.denoiser.needs_moments or by_subset

    def check(self) -> None:
        """Refuse everything that can be refused without the images."""
        self.source.check()
        self.denoiser.check()
        if self.subset is not None:
            self.subset.check(self.denoiser, flip=self.model.flip)
        self.sampling.check()
        if self.moments is not None and not self.needs_moments:
            raise ValueError(f"`moments` is of no use to the denoiser {self.denoiser.name}")
        if self.model.global_share is not None:
            self._check_share(self.model.global_share)
        if self.split_over is not None:
            self._check_ranks()

    def _check_share(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"`global_share` must lie in [0, 1], got {share}")
        if self.source.label is None:
            raise ValueError("`global_share` is of a class: it needs `label`")
        if not self.denoiser.needs_moments:
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

    def jobs(self, data: TrainingSet, moments: Moments | Basis | None) -> list[Job]:
        """The run, as it is planned."""
        return jobs_of(
            data,
            self.denoiser,
            self.sampling,
            nearest=self.results.nearest,
            moments=moments,
            # No rank has the products of all pairs of images, and blended ones have none.
            of_moments=self.model.global_share is not None or self.split_over == "images",
        )

    def settle(self, data: TrainingSet, stages: Stages, ranks: Ranks | None) -> None:
        """Calibrate the model where it is open."""
        if self.model.is_open:
            quick = Quick(data, self.denoiser.given, self.sampling)
            device = parse_device(self.source.device)
            self.denoiser, self.calibrated = quick.settled(stages, ranks, device)

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


@reported(mask_threshold="threshold", batch_size="loader_batch")
def generate(
    *, results: _Results, model: Model, sampling: SamplingOptions, source: DeviceSourceOptions
) -> None:
    """Make new images from a set of images, without training.

    Writes into the folder --out: samples.png (the images, each above the training image nearest
    to it, framed where it is one: the first 256), samples.npy (their values, float32 in [-1, 1]),
    trajectory.png (the way from noise to image) and run.json (settings, versions, timings). A run
    that was interrupted goes on behind its last finished step when it is started again with the
    same options.

    Started by torchrun, as in `torchrun --nproc-per-node 4 -m pyflocality generate SOURCE --out
    DIR -n 64`, the ranks share the work: see --split-over. Rank 0 alone writes files and prints.
    Start it again where a rank was lost.
    """
    plan, start = _Plan(source, model, sampling, results), time.perf_counter()
    if not is_first():
        # What can be wrong so far rank 0 finds, and tells, before it joins the others.
        with ignoring_memory(model.ignore_memory), joined() as ranks:
            _sampled(plan, Stages(announce=False), ranks, lambda images: None, progress=False)
        return
    plan.check()
    asked = asdict(source), asdict(model), asdict(sampling), results.nearest, plan.split_over
    with (
        ignoring_memory(model.ignore_memory),
        working("generate", plan.files, results, asked, folder=plan.out) as work,
        joined() as ranks,
    ):
        path, singles = plan.out / "samples.npy", map(work.temporary, plan.singles)
        with SamplesFile(work.temporary(path), sampling.n, singles) as file:
            sampled = _sampled(plan, work.stages, ranks, file.write, progress=results.progress)
        _write_pictures(plan, work, sampled)
        record = work.finish(source, _told(plan, work, sampled))
        sampled.recorded.forget()
    if results.as_json:
        answer(text_of(record), only_here=True)
    else:
        files = listed(plan.files[: -1 - len(plan.singles)] + plan.files[-1:])
        seconds = time.perf_counter() - start
        instead = plan.denoiser.entry.instead
        recited = recited_line(record["recited"], sampling.n, instead, "samples.png")
        if sampling.n > SHOWN:
            recited += f"\nsamples.png has the first {SHOWN} of them"
        answer(f"{sampling.n} images in {seconds:.1f} s: {files}\n{recited}", only_here=False)


@dataclass(frozen=True)
class _Sampled:
    """What a run came to, the same on every rank.

    `settings`, for the record, are those that the answers depend on; rank 0 alone has them.
    """

    data: TrainingSet
    settings: dict[str, Any]
    recorded: RecordedDenoiser
    samples: Samples

    @property
    def recited(self) -> Tensor | None:
        """Which samples are training images, bool [n]; None where nobody looked."""
        neighbours = self.samples.neighbours
        return None if neighbours is None else recited_samples(neighbours, self.data)


def _sampled(
    plan: _Plan,
    stages: Stages,
    ranks: Ranks | None,
    write: Callable[[Tensor], None],
    *,
    progress: bool,
) -> _Sampled:
    """Load and sample, on every rank alike; `write` takes the samples as they come."""
    from pyflocality.distributed import shard, split_samples
    from pyflocality.moments.basis import stored_source

    stored = None if plan.moments is None else stored_source(plan.moments)
    with stages("load", f"loading {plan.source.source}"):
        everything = plan.source.load_all(progress=progress).augmented(flip=plan.model.flip)
        data = plan.source.of_label(everything)
        searched = plan.part(data).to(parse_device(plan.source.device))
    check_stored(data if plan.model.global_share is None else everything, stored)
    plan.settle(data, stages, ranks)
    if plan.model.global_share is None:
        foretell_few_images(data if stored is None else stored, [plan.denoiser])
    hold(plan.jobs(data, stored), announce=stages.announce)
    moments = _moments(plan, everything, data, stored, stages)
    whole = plan.denoiser.build(searched, moments, stages)
    if plan.subset is not None and plan.subset.needs_moments:
        moments = components_of(searched if moments is None else moments, stages)
    denoiser = whole if plan.subset is None else plan.subset.build(whole, moments)
    divides = ranks is not None and plan.split_over == "samples"
    recorded = RecordedDenoiser(
        denoiser, ask=split_samples(denoiser) if divides else None, ranks=ranks
    )
    settings: dict[str, Any] = {}
    others: dict[str, Any] = {}
    if ranks is None or ranks.rank == 0:
        settings = {
            "data": data_record(data, flip=plan.model.flip),
            "denoiser": {"name": plan.denoiser.name, **plan.denoiser.in_force(whole)},
            "subset": None if plan.subset is None else plan.subset.in_force(denoiser),
            "global_share": plan.model.global_share,
            # How masks are made.
            "way": getattr(whole, "way", None),
            "ranks": ranks and {"count": ranks.count, "split_over": plan.split_over},
        }
        others = _further(plan, everything, stored)
    recorded.keep_in(plan.out, settings | others)
    look = None
    if plan.results.nearest:
        scanned = searched
        if ranks is not None and divides and len(searched) >= ranks.count:
            scanned = shard(searched)
        look = partial(
            neighbours_of, data=scanned, memory_budget=plan.model.memory_budget, stages=stages
        )
    samples = make_samples(
        recorded,
        plan.sampling,
        look,
        write,
        stages,
        ways=SHOWN_WAYS if plan.results.trajectory else 0,
        progress=progress,
    )
    return _Sampled(data, settings, recorded, samples)


def _further(
    plan: _Plan, everything: TrainingSet, stored: Moments | Basis | None
) -> dict[str, Any]:
    """What else the answers depend on, which the record tells elsewhere or not at all."""
    from pyflocality.backends.selection import requested_backend

    threads = {} if plan.denoiser.depends_on_threads else {"threads": None}
    return {
        "all_classes": None if plan.model.global_share is None else everything.content_key(),
        "moments": None if stored is None else stored.content_key(),
        "sampling": plan.sampling.settings,
        "backend": requested_backend(None),
        "software": software() | threads,
    }


def _moments(
    plan: _Plan,
    everything: TrainingSet,
    data: TrainingSet,
    stored: Moments | Basis | None,
    stages: Stages,
) -> Moments | Basis | None:
    """What is at hand of moments before the denoiser asks: those of a file, or a class's blend."""
    from pyflocality import Moments

    if plan.model.global_share is None:
        return stored
    if stored is not None and not isinstance(stored, Moments):
        raise ValueError(
            "`moments` must be moments for `global_share`, which blends covariances: "
            f"{plan.moments} holds components alone"
        )
    # Both on the CPU, where moments of a file are.
    overall = moments_of(plan.part(everything), stages) if stored is None else stored
    return moments_of(plan.part(data), stages).blended(overall, plan.model.global_share)


def _told(plan: _Plan, work: Work, sampled: _Sampled) -> dict[str, Any]:
    """What is told of the run."""
    neighbours = sampled.samples.neighbours
    return {
        **sampled.settings,
        "moments": None if plan.moments is None else str(plan.moments),
        "calibrated": plan.calibrated,
        "sampling": plan.sampling.settings | {"timesteps": plan.sampling.timesteps.tolist()},
        "backends": work.backends_by_operation(),
        "calls": sampled.recorded.calls,
        "resumed_calls": sampled.recorded.resumed,
        "resumed_samples": sampled.recorded.resumed_samples,
        "nearest": None if neighbours is None else neighbour_record(neighbours, sampled.data),
        "recited": recited_record(sampled.recited),
    }


def _write_pictures(plan: _Plan, work: Work, sampled: _Sampled) -> None:
    """Draw pictures under their temporary names."""
    from pyflocality import pictures

    samples, recited = sampled.samples, sampled.recited
    shown, nearest = samples.images, None
    if samples.neighbours is not None:
        nearest = neighbour_values(samples.neighbours, sampled.data, len(shown))
    marked = None if recited is None else recited[: len(shown)]
    sheet = pictures.sample_sheet(shown, nearest, marked=marked)
    sheet.save(work.temporary(plan.out / "samples.png"))
    way = samples.way
    if way is not None:
        times = plan.sampling.timesteps[way.steps]
        strip = pictures.trajectory_strip(way.x_t, way.x0, times, SHOWN_WAYS)
        strip.save(work.temporary(plan.out / "trajectory.png"))
