"""What is imported, which backends there are, and what is said of those in force."""

from __future__ import annotations

import json
import subprocess
import sys

import pyflocality as pf


def test_a_backend_in_force_that_cannot_run_is_flagged(monkeypatch, capsys):
    monkeypatch.setattr(
        "pyflocality.backends.report.machine_reason", lambda name: "no" if name == "cuda" else None
    )
    for backend, flagged in (("cuda", True), ("triton", False), ("auto", False)):
        monkeypatch.setenv("PYFLOCALITY_BACKEND", backend)
        pf.show_config()
        assert ("PROBLEM: backend 'cuda' is asked for" in capsys.readouterr().out) == flagged


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
