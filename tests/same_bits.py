"""Whether two installations of pyflocality answer the same bits, on this machine.

    python tests/same_bits.py BEFORE/bin/python AFTER/bin/python [--threads 2] [--only WORD]

Both interpreters answer the same questions through public names: every denoiser with its
derivatives and log-sum-exps over several sets, batches and levels; every operation on every backend
that is there; moments, masks, schedules, samplers, wavelets, synthetic sets, analysis; and files
that the commands write. What differs is listed, with the largest difference, and the exit status is
1. Bits differ between processors and releases of torch, so this compares installations and is no
test.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

Answers = dict[str, np.ndarray]
SHAPES = {"grey": (1, 9, 8), "colour": (3, 8, 8)}
COUNTS = {"grey": 37, "colour": 40}


def generator(seed: int) -> torch.Generator:
    """A generator of a seed."""
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def sets() -> Iterator[tuple[str, object]]:
    """Training sets: bytes, floats, and with mirrored and shifted copies."""
    import pyflocality as pf

    for name, shape in SHAPES.items():
        smooth = noise(COUNTS[name], *shape, seed=3).cumsum(-1).cumsum(-2)
        levels = (smooth / smooth.abs().amax((1, 2, 3), keepdim=True) + 1.0) * 127.5
        stored = levels.round().clamp(0, 255).to(torch.uint8)
        yield name, pf.TrainingSet(stored)
        yield f"{name} floats", pf.TrainingSet(levels / 127.5 - 1.0)
    # Eighteen of every image.
    yield "copies", pf.TrainingSet(stored[:5]).augmented(flip=True, shifts=1)


def denoisers(data: object, backend: str | None) -> Iterator[tuple[str, Callable[[], object]]]:
    """Makers of every kind of denoiser over a set."""
    import pyflocality as pf

    options = {"backend": backend}
    values = data.num_values
    soft = torch.rand(values, values, generator=generator(1))
    make = functools.partial
    yield "optimal", make(pf.OptimalDenoiser, data, 1.3, **options)
    yield "nearest", make(pf.NearestDenoiser, data, **options)
    yield "local", make(pf.LocalDenoiser, data, 3, **options)
    yield "local table", make(pf.LocalDenoiser, data, [(0.1, 1), (0.7, 5)], **options)
    few = data.subset(range(4))
    yield "equivariant", make(pf.EquivariantDenoiser, few, 3, **options)
    yield "equivariant broken", make(pf.EquivariantDenoiser, few, 3, "broken", **options)
    yield "patch set", make(pf.PatchSetDenoiser, data, 3, **options)
    yield "patch set masks", make(pf.PatchSetDenoiser, data, masks=near_masks(data), **options)
    yield "pca", make(pf.PCALocalityDenoiser, data, 0.1, **options)
    yield "pca signed", make(pf.PCALocalityDenoiser, data, 0.0, **options)
    batches = {"aggregation": "batch_mean", "batch_size": 16}
    yield "pca batch mean", make(pf.PCALocalityDenoiser, data, 0.1, **batches, **options)
    yield "filtered", make(pf.FilteredPosteriorDenoiser, data, soft[:9], soft[:9], **options)
    if backend is None:
        yield "wiener", make(pf.WienerDenoiser, data)
        yield "wiener rank", make(pf.WienerDenoiser, data, 5)
        yield "fourier", make(pf.FourierWienerDenoiser, data)
        yield "ledoit wolf", make(pf.LedoitWolfDenoiser, data)
        yield "noise trained", make(pf.NoiseTrainedDenoiser, data, 2, generator=generator(2))
        yield "gaussian mixture", make(pf.GaussianMixtureDenoiser, data, [(0.1, 0.0), (0.7, 0.3)])
        yield "shrinkage", make(pf.WaveletShrinkageDenoiser, data.image_shape, 0)
    if data.augmentation is None:
        local = functools.partial(pf.LocalDenoiser, data, 3, **options)
        yield "golden", lambda: pf.GoldenSubset(local(), 9, 18, pool_resolution=2)
        optimal = functools.partial(pf.OptimalDenoiser, data, **options)
        yield "certified", lambda: pf.CertifiedSubset(optimal(), 1e-3)
        shares = [(0.1, (0.3, 0.7)), (0.7, (1.0, 0.0))]
        yield "locally linear", lambda: pf.LocallyLinearDenoiser(local(), 0.3)
        yield "mixture", lambda: pf.MixtureDenoiser([local(), optimal()], shares)
    if data.image_shape[1:] == (8, 8):
        yield "multiscale", make(pf.MultiscaleDenoiser, data, 2, 3, **options)
        yield "shrinkage two", make(pf.WaveletShrinkageDenoiser, data.image_shape, 2)


def near_masks(data: object) -> torch.Tensor:
    """The pixels around every pixel."""
    rows, columns = (torch.arange(side) for side in data.image_shape[1:])
    near = [(place[:, None] - place).abs() <= 1 for place in (rows, columns)]
    return near[0][:, None, :, None] & near[1][None, :, None, :]


def of_denoisers(answers: Answers) -> None:
    """Estimates, jvp, vjp, gradients and log-sum-exps."""
    mixed = torch.tensor([0.05, 0.6, 0.6, 4.0, 40.0], dtype=torch.float64)
    signal = torch.tensor([1.0, 0.8, 0.8, 0.3, 0.1], dtype=torch.float64)
    for name, data in sets():
        for backend in (None, "reference"):
            for kind, make in denoisers(data, backend):
                key = f"{name} | {kind} | {backend}"
                try:
                    denoiser = make()
                except (TypeError, ValueError) as error:
                    record(answers, f"{key} | refused", str(error))
                    continue
                x = noise(5, *data.image_shape, seed=5)
                for words, sigma, alpha in (
                    ("number", 0.4, 0.9),
                    ("zero", 0.0, 1.0),
                    ("mixed", mixed, signal),
                ):
                    ask(answers, f"{key} | {words}", denoiser, x, sigma, alpha)
                if backend is None:
                    ask(answers, f"{key} | double", denoiser, x.double()[:2], 0.4, 0.9)
                    ask(answers, f"{key} | half", denoiser, x.half()[:1], 0.4, 0.9)


def ask(answers: Answers, key: str, denoiser: object, x: torch.Tensor, *level: object) -> None:
    """All that a denoiser answers for a batch."""
    directions = noise(3, *x.shape, seed=6, dtype=x.dtype)

    def gradient() -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        denoiser(leaf, *level).square().sum().backward()
        return leaf.grad

    record_result(answers, f"{key} | mean", lambda: denoiser(x, *level))
    record_result(answers, f"{key} | jvp", lambda: denoiser.jvp(x, directions, *level))
    record_result(answers, f"{key} | vjp", lambda: denoiser.vjp(x, directions, *level))
    record_result(answers, f"{key} | backward", gradient)
    if hasattr(denoiser, "log_sum_exp"):
        record_result(answers, f"{key} | lse", lambda: denoiser.log_sum_exp(x, *level))


def of_operations(answers: Answers) -> None:
    """Every operation, with small chunks and budgets, on every backend that is there."""
    from pyflocality import ops

    for name, data in sets():
        x = noise(3, *data.image_shape, seed=7)
        directions = noise(2, *x.shape, seed=8)
        values = data.num_values
        mask = torch.rand(values, values, generator=generator(4)) < 0.2
        queries = {
            "global_posterior": (),
            "window_posterior": (5,),
            "equivariant_posterior": (3,),
            "masked_posterior": (mask,),
            "filtered_posterior": (mask[:7].float(), mask[:7].float()),
        }
        sigma = torch.tensor([0.2, 1.0, 9.0])
        for backend in ("reference", "cpu"):
            for chunk in (None, 3):
                options = {
                    "backend": backend,
                    "chunk_size": chunk,
                    "augmentation": data.augmentation,
                }
                for stem, query in queries.items():
                    for variant in ("mean", "jvp", "vjp"):
                        run = getattr(ops, f"{stem}_{variant}", None)
                        if run is None:
                            continue
                        asked = () if variant == "mean" else (directions,)
                        few = 5 if stem == "equivariant_posterior" else len(data.images)
                        arguments = (x, *asked, data.images[:few], *query, sigma, 0.9)
                        key = f"{name} | {stem}_{variant} | {backend} | {chunk}"
                        record_result(answers, key, functools.partial(run, *arguments, **options))
                key = f"{name} | {{}} | {backend} | {chunk}"
                call = (x, data.images)
                patch_set = functools.partial(ops.patch_set_mean, *call, 3, sigma, 0.9, **options)
                record_result(answers, key.format("patch_set"), patch_set)
                near = functools.partial(ops.nearest_images, *call, 0.9, k=4, **options)
                record_result(answers, key.format("nearest"), near)
                for words, query in (("", {}), ("w", {"window": 3}), ("m", {"weights": mask})):
                    lse = functools.partial(ops.posterior_log_sum_exp, *call, sigma, 0.9)
                    lse = functools.partial(lse, **query, **options)
                    record_result(answers, key.format(f"log_sum_exp {words}"), lse)


def of_the_rest(answers: Answers) -> None:
    """Moments, masks, schedules, conversions, samplers, analysis, wavelets, synthetic sets."""
    import pyflocality as pf
    from pyflocality import metrics, synthetic, wavelets
    from pyflocality import noise as conversions

    for name, data in sets():
        of_a_set(answers, name, data)
    schedules = pf.DDPMSchedule(), pf.CosineSchedule(), pf.KarrasSchedule(), pf.FlowSchedule()
    for schedule in schedules:
        name = type(schedule).__name__
        times = schedule.timesteps(7)
        record(answers, f"{name} | times", times)
        for time in times.tolist():
            record_result(answers, f"{name} | {time}", functools.partial(schedule, time))
    x, x0 = noise(2, 3, 4, 4, seed=1), noise(2, 3, 4, 4, seed=2)
    for word in ("x0_from_noise", "x0_from_v", "noise_from_x0", "v_from_x0", "score_from_x0"):
        record(answers, word, getattr(conversions, word)(x, x0, 0.3, 0.8))
    for wavelet in ("haar", "db2"):
        with contextlib.suppress(ValueError):
            low, details = wavelets.decompose(noise(2, 3, 16, 16), 2, wavelet)
            record(answers, wavelet, [low, *details, wavelets.reconstruct(low, details, wavelet)])
    record(answers, "disks", synthetic.disks(5, 16, generator=generator(5)).images)
    record(answers, "c_alpha", synthetic.c_alpha(5, 16, generator=generator(5)).images)
    for word in ("cosine_similarity", "mse", "psnr", "r2"):
        record(answers, word, getattr(metrics, word)(x, x0))


def of_a_set(answers: Answers, name: str, data: object) -> None:
    """Moments, masks, samples and analysis of a set."""
    import pyflocality as pf
    from pyflocality import analysis, masks

    record(answers, f"{name} | content key", data.content_key)
    moments = pf.Moments.from_data(data)
    for part in ("mean", "covariance", "count", "content_key"):
        value = getattr(moments, part)
        record(answers, f"{name} | moments {part}", value() if callable(value) else value)
    record_result(answers, f"{name} | eigh", moments.eigh)
    weights = masks.pca_locality_weights(moments, 0.5, 0.8, 0.05)
    record(answers, f"{name} | masks", weights.dense(torch.float32))
    optimal = pf.OptimalDenoiser(data)
    for sampler in ("ddim", "heun", "euler"):
        schedule = pf.KarrasSchedule() if sampler != "ddim" else pf.DDPMSchedule()
        options = {"steps": 4, "sampler": sampler, "schedule": schedule, "progress": False}
        run = pf.sample(optimal, 3, generator=generator(1), **options)
        record(answers, f"{name} | {sampler}", run)
    x = noise(2, *data.image_shape, seed=9)
    pca = pf.PCALocalityDenoiser(data, 0.1, moments=moments)
    local = pf.LocalDenoiser(data, 3)
    climb = {"max_steps": 4, "progress": False}
    calls = {
        "sensitivity": lambda: analysis.sensitivity(pca, x, 0.5, 0.8, pixel=(0, 2, 3)),
        "spectrum": lambda: analysis.jacobian_spectrum(pca, x[:1], 0.5, 0.8, 4),
        "trace": lambda: analysis.jacobian_trace(
            pca, x, 0.5, 0.8, probes=3, generator=generator(3)
        ),
        "memorization": lambda: analysis.memorization(data.values()[:3], data),
        "ascent": lambda: pf.ascend(local, 2, generator=generator(4), **climb),
    }
    for words, call in calls.items():
        record_result(answers, f"{name} | {words}", call)


@contextlib.contextmanager
def working_in(folder: str) -> Iterator[None]:
    """Work in a folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def of_commands(answers: Answers) -> None:
    """The files of commands, without what tells times and versions."""
    from pyflocality import cli

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, working_in(folder):
        np.save("set.npy", rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8))
        for words in (
            "generate set.npy --out g --n 2 --steps 3 --seed 1",
            "generate set.npy --out l --n 2 --steps 3 --denoiser local --window 3",
            "compare set.npy --out c --n 1 --steps 2",
            "moments set.npy --out m.safetensors",
            "spectrum set.npy --out s --k 2",
            "sensitivity set.npy --out f --steps 3",
            "memorize set.npy --out r --steps 2 --n 2",
            "pack set.npy p",
        ):
            shown = io.StringIO()
            with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
                try:
                    cli.main(words.split())
                    code = 0
                except SystemExit as stop:
                    code = stop.code or 0
            record(answers, f"{words} | exit", int(code))
            if code:
                record(answers, f"{words} | error", shown.getvalue())
        for path in sorted(Path().rglob("*")):
            if path.is_file() and path.suffix != ".json":
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                record(answers, f"file {path.as_posix()}", digest)


def record_result(answers: Answers, key: str, call: Callable[[], object]) -> None:
    """Enter what a call answers, or the words of its refusal."""
    try:
        record(answers, key, call())
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        record(answers, f"{key} | refused", f"{type(error).__name__}: {error}")


def record(answers: Answers, key: str, value: object) -> None:
    """Enter a value, part by part."""
    if isinstance(value, torch.Tensor):
        answers[key] = value.detach().resolve_conj().numpy().copy()
    elif isinstance(value, str):
        answers[key] = np.frombuffer(value.encode(), np.uint8)
    elif isinstance(value, (bool, int, float, np.ndarray)):
        answers[key] = np.asarray(value)
    elif isinstance(value, (tuple, list)):
        for number, part in enumerate(value):
            record(answers, f"{key} [{number}]", part)
    elif hasattr(value, "__dict__"):
        for name in sorted(vars(value)):
            record(answers, f"{key}.{name}", getattr(value, name))


QUESTIONS = (of_denoisers, of_operations, of_the_rest, of_commands)


def answer(path: str, threads: int, only: str) -> None:
    """Answer all questions in this process and write them to a file."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    # Without the native kernels both would answer by plain torch.
    importlib.import_module("pyflocality._C")

    answers: Answers = {}
    for questions in QUESTIONS:
        if only in questions.__name__:
            questions(answers)
    np.savez(path, **answers)


def compare(before: Answers, after: Answers) -> list[str]:
    """What differs, a line for each."""
    lines = [f"only before: {key}" for key in before.keys() - after.keys()]
    lines += [f"only after: {key}" for key in after.keys() - before.keys()]
    for key in before.keys() & after.keys():
        a, b = before[key], after[key]
        if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
            lines.append(f"{key}: {difference(a, b)}")
    return sorted(lines)


def difference(a: np.ndarray, b: np.ndarray) -> str:
    """How two answers differ."""
    if a.dtype == np.uint8 and a.ndim == 1 and b.dtype == np.uint8:
        return f"{a.tobytes()!r} became {b.tobytes()!r}"
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{a.dtype} {a.shape} became {b.dtype} {b.shape}"
    with np.errstate(all="ignore"):
        return f"by up to {np.nanmax(np.abs(a.astype(complex) - b.astype(complex))):.3g}"


def main() -> int:
    """Ask both installations and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("interpreters", nargs=2, metavar="PYTHON", help="before and after")
    parser.add_argument("--threads", type=int, default=2, help="threads of each")
    parser.add_argument("--only", default="", help="some of the questions, such as of_operations")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for number, python in enumerate(options.interpreters):
            path = os.path.join(folder, f"{number}.npz")
            # A cache of its own: masks made by one would be the other's answer.
            environment = {**os.environ, "PYFLOCALITY_CACHE_DIR": os.path.join(folder, str(number))}
            command = [os.path.abspath(python), os.path.abspath(__file__)]
            words = ["--answer", path, str(options.threads), options.only]
            subprocess.run([*command, *words], check=True, cwd=folder, env=environment)
            with np.load(path) as file:
                results.append(dict(file))
    lines = compare(*results)
    refused = sum(key.endswith("refused") for key in results[0])
    print(f"{len(results[0])} answers, {refused} of them refusals; {len(lines)} differ")
    print(*lines, sep="\n")
    return int(bool(lines))


if __name__ == "__main__":
    # The folder of this file is not where anything is imported from.
    sys.path = [
        place for place in sys.path if Path(place or ".").resolve() != Path(__file__).parent
    ]
    if sys.argv[1:2] == ["--answer"]:
        answer(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        sys.exit(main())
