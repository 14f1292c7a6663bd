"""Choice of the backend: precedence, errors, observation, imports."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pyflocality as pf
from pyflocality.backends import selection as _backends
from pyflocality.backends.report import configuration
from pyflocality.backends.selection import (
    OPERATIONS,
    UNPROVEN,
    Implementation,
    reason,
    requested_backend,
    select,
)
from pyflocality.posterior.call import Call
from pyflocality.posterior.sharded import ShardedImages

CPU = Call(torch.device("cpu"))


@pytest.fixture
def op(monkeypatch):
    """An operation with an implementation that only serves float64 and one that serves all."""
    table = {
        "cpu": Implementation(
            "math", "sqrt", lambda call: None if call.dtype == torch.float64 else "float64 only"
        ),
        "reference": Implementation("math", "exp"),
    }
    monkeypatch.setitem(_backends.OPERATIONS, "probe", table)
    return "probe"


def test_auto_takes_the_first_that_can_serve(op):
    assert select(op, Call(torch.device("cpu"), torch.float64)).__name__ == "sqrt"
    assert select(op, CPU).__name__ == "exp"


def test_what_runs_by_name_only_is_passed_over_and_can_be_named(op, monkeypatch, caplog):
    table = {
        "cpu": Implementation("math", "sqrt", by_name_only="nobody has tried it"),
        "reference": Implementation("math", "exp"),
    }
    monkeypatch.setitem(OPERATIONS, "probe", table)
    with caplog.at_level(logging.DEBUG, "pyflocality"):
        assert select(op, CPU).__name__ == "exp"
    assert "probe: backend cpu passed over: nobody has tried it" in caplog.messages
    assert select(op, CPU, "cpu").__name__ == "sqrt"
    with pf.use_backend("cpu"):
        assert select(op, CPU).__name__ == "sqrt"
    assert configuration()["by_name_only"]["probe"] == {"cpu": "nobody has tried it"}


def test_a_named_backend_is_never_replaced(op):
    with pytest.raises(pf.BackendUnavailableError, match="float64 only") as caught:
        select(op, CPU, "cpu")
    assert caught.value.backend == "cpu" and caught.value.op == "probe"
    assert caught.value.available == ("reference",)
    assert caught.value.reason == reason(op, "cpu", CPU) == "float64 only"


def test_precedence(op, monkeypatch):
    assert requested_backend(None) == "auto"
    monkeypatch.setenv("PYFLOCALITY_BACKEND", "cpu")
    assert requested_backend(None) == "cpu"
    with pf.use_backend("reference"):
        assert requested_backend(None) == "reference"
        assert requested_backend("triton") == "triton"
        with pf.use_backend("auto"):
            assert requested_backend(None) == "auto"
        assert requested_backend(None) == "reference"
    assert requested_backend(None) == "cpu"


def test_use_backend_as_a_statement():
    chosen = pf.use_backend("reference")
    try:
        assert requested_backend(None) == "reference"
    finally:
        chosen.__exit__(None, None, None)
    assert requested_backend(None) == "auto"


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="`backend` must be one of 'auto', 'reference', 'cpu'"):
        pf.use_backend("gpu")
    monkeypatch.setenv("PYFLOCALITY_BACKEND", "cpuu")
    with pytest.raises(ValueError, match="PYFLOCALITY_BACKEND"):
        requested_backend(None)


def test_trace_records_what_ran(op):
    with pf.trace_backends() as calls:
        select(op, CPU)
        select(op, Call(torch.device("cpu"), torch.float64))
    select(op, CPU)
    assert calls == [("probe", "reference"), ("probe", "cpu")]


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_gpu_backends_say_why_not_and_what_to_do(backend):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    why_not = _backends.machine_reason(backend)
    assert "pip install" in why_not or "torch sees no CUDA device" in why_not
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(pf.BackendUnavailableError, match="cannot run global_posterior"):
        pf.ops.global_posterior_mean(x, x, 0.5, backend=backend)


@pytest.fixture(params=["triton", "cuda"])
def named(request):
    """A backend that this machine lacks, a model that it serves elsewhere, and its noisy images."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    data = pf.TrainingSet(torch.arange(2 * 3 * 16).reshape(6, 1, 4, 4).to(torch.uint8))
    models = {
        "triton": lambda data, **more: pf.OptimalDenoiser(data, **more),
        "cuda": lambda data, **more: pf.LocalDenoiser(data, window=3, **more),
    }
    with pf.use_backend(request.param):
        yield request.param, models[request.param], data, torch.zeros(2, 1, 4, 4)


def assert_refused(backend, call):
    with pytest.raises(pf.BackendUnavailableError) as caught:
        call()
    assert caught.value.backend == backend
    assert caught.value.reason == _backends.machine_reason(backend)
    assert "reference" in caught.value.available


def test_a_missing_backend_is_refused_by_models_and_their_derivatives(named):
    backend, model, data, x = named
    denoiser = model(data)
    assert_refused(backend, lambda: denoiser(x, 0.5))
    assert_refused(backend, lambda: denoiser.jvp(x, x[None], 0.5))
    assert_refused(backend, lambda: denoiser.vjp(x, x[None], 0.5))
    assert_refused(backend, lambda: denoiser(x.clone().requires_grad_(), 0.5))
    assert_refused(backend, lambda: torch.func.jacrev(lambda z: denoiser(z, 0.5))(x))
    assert_refused(backend, lambda: pf.sample(denoiser, 1, steps=1, progress=False))
    assert_refused(backend, lambda: torch.compile(denoiser, backend="eager")(x, 0.5))


def test_a_missing_backend_is_refused_for_every_kind_of_set(named, tmp_path):
    backend, model, data, x = named
    np.save(tmp_path / "set.npy", data.images.numpy())
    mapped = pf.TrainingSet.load(tmp_path / "set.npy", progress=False)
    for some in (mapped, data.augmented(flip=True)):
        assert_refused(backend, lambda some=some: model(some)(x, 0.5))
    assert_refused(backend, lambda: model(data, memory_budget=1000)(x, 0.5))
    ranks = SimpleNamespace(rank=0, count=1)
    sharded = ShardedImages.of(data.images, ranks)
    mean = pf.ops.global_posterior_mean
    if backend == "cuda":
        mean = lambda x, images, sigma: pf.ops.window_posterior_mean(x, images, 3, sigma)  # noqa: E731
    assert_refused(backend, lambda: mean(x, sharded, 0.5))


def test_kernels_for_gpus_say_what_they_cannot_serve(monkeypatch):
    """Were there a GPU, with the tensors on it: the reasons behind those of the machine."""
    monkeypatch.setattr(_backends, "machine_reason", lambda backend: None)
    images, x = torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.zeros(1, 1, 4, 4)
    with pytest.raises(
        pf.BackendUnavailableError, match="it serves CUDA tensors, these are on cpu"
    ):
        pf.ops.global_posterior_mean(x, images, 0.5, backend="triton")
    monkeypatch.setattr(_backends, "_device_reason", lambda backend, device: None)
    facts = {"images_dtype": torch.uint8, "image_shape": (1, 4, 4)}
    for op, table in OPERATIONS.items():
        for backend in {"triton", "cuda"} & set(table):
            assert reason(op, backend, Call(CPU.device, facts=facts)) is None
            if op == "covariance":
                continue
            refused = {
                "mirrored or shifted": Call(CPU.device, facts=facts | {"augmented": True}),
                "computes in float32": Call(CPU.device, torch.float64, facts=facts),
                "has no derivative": Call(CPU.device, requires_grad=True, facts=facts),
            }
            for why, call in refused.items():
                assert why in reason(op, backend, call), (op, backend)
            shared = reason(op, backend, Call(CPU.device, facts=facts | {"ranks": object()}))
            two_scans = op in ("patch_set", "window_posterior_vjp")
            assert (shared is not None) == two_scans, (op, shared)
            floats = Call(CPU.device, facts=facts | {"images_dtype": torch.float32})
            assert (reason(op, backend, floats) is None) == (backend == "cuda"), op


def test_tensors_on_a_cpu_look_for_no_gpu(monkeypatch):
    """Not even for kernels that "auto" takes; it was looked for at each call."""
    asked, serve = [], _backends.machine_reason

    def noted(backend: str) -> str | None:
        asked.append(backend)
        return serve(backend)

    monkeypatch.setattr(_backends, "machine_reason", noted)
    facts = {"images_dtype": torch.uint8, "image_shape": (1, 4, 4)}
    for op, table in OPERATIONS.items():
        proven = {name: dataclasses.replace(one, by_name_only=None) for name, one in table.items()}
        monkeypatch.setitem(OPERATIONS, op, proven)
        select(op, Call(CPU.device, facts=facts))
    assert set(asked) <= {"cpu", "reference"} and len(asked) >= len(OPERATIONS)


def test_every_implementation_is_there():
    for table in OPERATIONS.values():
        for implementation in table.values():
            # Not loaded: a kernel's module imports Triton.
            source = Path(importlib.util.find_spec(implementation.file).origin)
            assert f"def {implementation.function}(" in source.read_text(encoding="utf-8")


def test_cpu_backend_explains_a_missing_extension(monkeypatch):
    monkeypatch.setattr(
        _backends, "native_module", lambda: (_ for _ in ()).throw(ImportError("no _C"))
    )
    why_not = _backends.machine_reason("cpu")
    assert "no _C" in why_not and "C++17 compiler" in why_not


def test_every_operation_has_a_reference_and_real_functions():
    for name, table in _backends.OPERATIONS.items():
        assert "reference" in table, name
        assert callable(table["reference"].load())


def test_show_config(capsys):
    pf.show_config()
    text = capsys.readouterr().out
    for word in ("pyflocality", "torch", "reference", "cpu", "triton", "cuda", "memory budget"):
        assert word in text
    for op, by_name in configuration()["by_name_only"].items():
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [op]]
        for backend, why in by_name.items():
            assert f"{backend} (by name only)" in line
            (told,) = [line for line in text.splitlines() if line.startswith("by name only:")]
            assert why in told and backend in told
            assert "PYFLOCALITY_BACKEND=" in told and "pf.use_backend(" in told


def test_no_cuda_device_comes_with_a_cure(monkeypatch):
    monkeypatch.setattr(_backends.importlib.util, "find_spec", lambda package: package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version, cure in ((None, "install a build of torch with CUDA"), ("12.8", "nvidia-smi")):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert cure in _backends.machine_reason("triton")


def test_kernels_that_no_gpu_has_run_give_one_reason():
    told = {why for by_name in configuration()["by_name_only"].values() for why in by_name.values()}
    assert told <= {UNPROVEN}
