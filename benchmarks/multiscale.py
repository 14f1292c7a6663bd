"""How local may a denoiser be? Windows in the pixel domain against windows in a wavelet pyramid.

    python -m benchmarks.multiscale --output benchmarks/results/NAME.json
    python -m benchmarks.multiscale --output .. --mnist TRAIN.zip TEST.zip --networks FOLDER

The claim under test: a model that is global for a small low-pass image and local, conditioned on
the coarser image, for the details of each scale, keeps its quality down to small windows, where a
local model of the pixels loses it. Both kinds are posterior means over the same training images
here: `LocalDenoiser`, and `MultiscaleDenoiser` of two levels. Test images are other images of the
same kind. For every noise level and window: PSNR in and out, mean over the test images.

Sets: crops of 64x64 of scikit-learn's two photographs in grey, trained on the left two thirds of
each and tested on the rest; and two centred sets, disks and, where its files are given, MNIST.

The drop of a window is the PSNR of the best window of that domain, at that noise, less its own. A
window of w pixels of level j covers 2^j w pixels of the image: the table shows all windows, so
that equal footprints can be compared as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import pyflocality as pf
from pyflocality._support.progress import progress_bar

from .command import Record, Run, check_results, path_option, results_parser, write_json
from .studies.multiscale_plot import draw
from .studies.published_networks import published

WINDOWS = (3, 5, 9, 13, 23, 43)
PSNR_IN = (3.0, 7.0, 10.0, 15.0, 20.0, 25.0, 30.0)
LEVELS = 2
# The small low-pass image has a model without a window: the best of the global ones.
COARSE = "pca_locality"
SIDE = 64
_SEED = 0
_GREY = (0.299, 0.587, 0.114)

Model = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Case:
    """A training set and the test images, clean, [n, 1, H, W]."""

    name: str
    train: pf.TrainingSet
    clean: Tensor


def photographs(stride: int, tests: int) -> Case:
    """Grey crops of two photographs: the left part for training, the right for testing."""
    from sklearn.datasets import load_sample_images

    grey = [
        torch.tensor(image).float() @ torch.tensor(_GREY) for image in load_sample_images().images
    ]
    split = 440

    def crops(image: Tensor, stride: int) -> Tensor:
        windows = image.round().to(torch.uint8).unfold(0, SIDE, stride).unfold(1, SIDE, stride)
        return windows.reshape(-1, 1, SIDE, SIDE)

    train = torch.cat([crops(image[:, :split], stride) for image in grey])
    test = torch.cat([crops(image[:, split:], SIDE // 2) for image in grey])
    return Case("photographs, 64x64", pf.TrainingSet(train), _chosen(test, tests))


def disks(count: int, tests: int) -> Case:
    """Disks in the middle of their images: what far pixels show depends on each other."""
    images = pf.synthetic.disks(count + tests, 32, centred=True).images
    train = pf.TrainingSet(images[:count])
    return Case("centred disks, 32x32", train, images[count:])


def mnist(count: int, tests: int, paths: Sequence[Path]) -> Case:
    """MNIST's digits: some of the training images, some of the test images."""
    train, test = (pf.TrainingSet.load(path) for path in paths)
    few = torch.randperm(len(train), generator=torch.Generator().manual_seed(_SEED))[:count]
    return Case("MNIST, 28x28", train.subset(few.sort().values), _chosen(test.images, tests))


def _chosen(images: Tensor, count: int) -> Tensor:
    """Some images of a set, always the same, as values."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SEED))
    return pf.TrainingSet(images[order[:count]].clone()).values()


def models(case: Case, windows: Sequence[int]) -> dict[tuple[str, int], Callable[[], pf.Denoiser]]:
    """What makes the models of both domains, by domain and window.

    A window that is larger than what covers a band, or the image, is cut to that.
    """
    side = max(case.train.image_shape[1:])
    makers: dict[tuple[str, int], Callable[[], pf.Denoiser]] = {}
    for window in windows:
        widest = min(window, 2 * side - 1)
        makers["pixel", window] = partial(pf.LocalDenoiser, case.train, widest)
    for window in windows:
        widest = min(window, side - 1)
        makers["wavelet", window] = partial(
            pf.MultiscaleDenoiser, case.train, LEVELS, widest, coarse=COARSE
        )
    return makers


def global_models(case: Case) -> dict[str, Callable[[], pf.Denoiser]]:
    """The wavelet-domain model of window 5 with each global model of the low-pass image."""
    return {
        name: partial(pf.MultiscaleDenoiser, case.train, LEVELS, 5, coarse=name)
        for name in ("optimal", "wiener", "pca_locality")
    }


def yardsticks(case: Case, networks: Path | None) -> dict[str, Callable[[], pf.Denoiser]]:
    """Models without a window: classical shrinkage and trained networks."""
    shape = case.train.image_shape
    # Halved while sides are even and the low-pass image keeps 4 pixels.
    deepest = max(n for n in range(1, 9) if shape[1] % 2**n == 0 and shape[1] >> n >= 4)
    makers: dict[str, Callable[[], pf.Denoiser]] = {
        "Fourier Wiener": partial(pf.FourierWienerDenoiser, case.train),
        "wavelet thresholds (bayes)": partial(
            pf.WaveletShrinkageDenoiser, shape, deepest, rule="bayes"
        ),
        "optimal": partial(pf.OptimalDenoiser, case.train),
    }
    if networks is not None:
        makers |= {name: partial(_same, d) for name, d in published(networks, shape).items()}
    return makers


def _same(denoiser: pf.Denoiser) -> pf.Denoiser:
    return denoiser


def measure(denoiser: pf.Denoiser, clean: Tensor) -> list[float]:
    """Mean PSNR at each noise level, the same noise for every model."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(_SEED + 1))
    result = []
    for level in PSNR_IN:
        sigma = noise_level(level)
        with torch.no_grad():
            x0 = denoiser(clean + sigma * noise, sigma)
        result.append(float(pf.metrics.psnr(x0, clean).mean()))
    return result


def noise_level(psnr: float) -> float:
    """The noise level in [-1, 1] of a PSNR: 2 * 10^(-psnr / 20)."""
    return 2.0 * 10.0 ** (-psnr / 20.0)


def drops(out: dict[str, list[float]]) -> dict[str, list[float]]:
    """By how much each window's PSNR lies below the best window's, at each noise level."""
    best = [max(column) for column in zip(*out.values(), strict=True)]
    return {w: [top - own for top, own in zip(best, row, strict=True)] for w, row in out.items()}


def verdict(record: Record) -> Record:
    """For each window: at how many noise levels the wavelet domain drops less, and the means."""
    pixel, wavelet = drops(record["pixel"]), drops(record["wavelet"])
    result = {}
    for window in record["pixel"]:
        pairs = list(zip(pixel[window], wavelet[window], strict=True))
        result[window] = {
            "drops_less": sum(b < a for a, b in pairs),
            "of": len(pairs),
            "mean_drop_pixel": sum(a for a, _ in pairs) / len(pairs),
            "mean_drop_wavelet": sum(b for _, b in pairs) / len(pairs),
            "mean_gain": sum(record["wavelet"][window]) / len(pairs)
            - sum(record["pixel"][window]) / len(pairs),
        }
    return result


def run_case(case: Case, windows: Sequence[int], networks: Path | None) -> Record:
    """All measurements of a set."""
    record: Record = {
        "name": case.name,
        "train": len(case.train),
        "test": len(case.clean),
        "shape": list(case.train.image_shape),
        "content_key": case.train.content_key(),
        "pixel": {},
        "wavelet": {},
        "yardsticks": {},
        "coarse": {},
        "seconds": {},
    }
    jobs = [("yardsticks", name, make) for name, make in yardsticks(case, networks).items()]
    jobs += [("coarse", name, make) for name, make in global_models(case).items()]
    jobs += [(domain, str(w), make) for (domain, w), make in models(case, windows).items()]
    for group, name, make in progress_bar(jobs, description=case.name):
        start = time.perf_counter()
        record[group][name] = measure(make(), case.clean)
        record["seconds"][f"{group} {name}"] = time.perf_counter() - start
    record["verdict"] = verdict(record)
    return record


def table(record: Record) -> str:
    """The measurements of a set as text."""
    lines = [
        f"{record['name']}: {record['train']} training images, {record['test']} test images",
        "PSNR in".ljust(34) + "".join(f"{level:7.0f}" for level in PSNR_IN),
    ]
    labels = {
        "yardsticks": "{}",
        "pixel": "pixel domain, window {}",
        "wavelet": "wavelet domain, window {}",
        "coarse": "wavelet, 5, low-pass {}",
    }
    for group, label_of in labels.items():
        for name, row in record[group].items():
            label = label_of.format(name)
            lines.append(label.ljust(34) + "".join(f"{value:7.2f}" for value in row))
    for window, mean in record["verdict"].items():
        lines.append(
            f"window {window}: wavelet domain drops less at {mean['drops_less']} of {mean['of']} "
            f"noise levels; mean drop {mean['mean_drop_pixel']:.2f} dB in pixels, "
            f"{mean['mean_drop_wavelet']:.2f} dB in wavelets; mean gain {mean['mean_gain']:+.2f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit code."""
    parser = results_parser("multiscale", (__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--mnist",
        type=path_option,
        nargs=2,
        metavar=("TRAIN", "TEST"),
        help="sets of MNIST's images",
    )
    parser.add_argument("--networks", type=path_option, help="folder of the published networks")
    parser.add_argument("--quick", action="store_true", help="few images: the numbers mean nothing")
    options = parser.parse_args(arguments)
    check_results(parser, options)
    windows, tests = ((3, 5), 2) if options.quick else (WINDOWS, 24)
    begun, results = Run(), []
    cases = [photographs(64 if options.quick else 4, tests)]
    cases.append(disks(200 if options.quick else 10_000, tests))
    if options.mnist is not None:
        cases.append(mnist(200 if options.quick else 20_000, tests, options.mnist))
    for case in cases:
        results.append(run_case(case, windows, options.networks))
        print(table(results[-1]), end="\n\n", flush=True)
    report = begun.report(
        results=results,
        suite="multiscale",
        quick=options.quick,
        psnr_in=list(PSNR_IN),
        sigma=[noise_level(level) for level in PSNR_IN],
        levels=LEVELS,
        coarse=COARSE,
    )
    write_json(report, options.out)
    drawn = options.out.with_suffix(".png")
    draw(report, drawn)
    print(options.out, drawn)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
