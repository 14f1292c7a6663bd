"""Choice of the backend: precedence, errors, observation, imports."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import pyflocality as pf
from pyflocality import _backends
from pyflocality._backends import Call, Implementation, reason, requested_backend, select

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


def imported_modules() -> set[str]:
    code = "import json, sys, pyflocality; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    return set(json.loads(output))


def test_import_is_light():
    loaded = {name.partition(".")[0] for name in imported_modules()}
    assert "torch" in loaded
    heavy = {"triton", "cupy", "matplotlib", "sklearn", "scipy", "diffusers", "PIL", "tqdm"}
    # torch itself may load some of them where they are installed.
    code = "import json, sys, torch; print(json.dumps(sorted(sys.modules)))"
    by_torch = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    by_torch = {name.partition(".")[0] for name in json.loads(by_torch)}
    assert not (loaded & heavy) - by_torch
    assert not loaded & {"safetensors", "typer", "rich"} - by_torch
    assert "pyflocality._C" not in imported_modules()
    assert "pyflocality.kernels" not in imported_modules()


def test_import_with_torch_and_numpy_alone():
    code = (
        "import sys\n"
        "for name in ('tqdm', 'PIL', 'safetensors', 'typer', 'rich', 'sklearn', 'matplotlib',"
        " 'triton', 'cupy'):\n"
        "    sys.modules[name] = None\n"
        "import pyflocality as pf, torch\n"
        "data = pf.TrainingSet(torch.randint(0, 256, (9, 1, 4, 4), dtype=torch.uint8))\n"
        "out = pf.sample(pf.PCALocalityDenoiser(data), 2, steps=2, progress=False)\n"
        "assert out.images.shape == (2, 1, 4, 4)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
