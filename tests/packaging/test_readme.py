"""What README and CONTRIBUTING say is so."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.publish.readme_sections import rewritten
from benchmarks.publish.results_files import FOLDER, read_results
from pyflocality import cli, denoisers
from pyflocality.backends import configuration

ROOT = Path(__file__).resolve().parents[2]

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(language):
    """Code blocks of the README."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def generate_commands(text=README):
    """Words after `pyflocality` of every command that generates, in code blocks and spans."""
    found = re.findall(r"pyflocality (generate [^`]*?--out\s+[a-z]+)", text)
    return [command.split() for command in found]


def table(header):
    """Rows of the README's table whose first column has this header, split into cells."""
    lines = README.split(f"| {header} |", 1)[1].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def code(cell):
    """The words in backticks of a cell."""
    return re.findall(r"`([^`]+)`", cell)


def test_python_runs_as_printed(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the README's example reads scikit-learn's digits")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), scope)
    lines = printed.getvalue().splitlines()
    assert lines[0] == "torch.Size([8, 1, 8, 8]) torch.Size([10, 8, 1, 8, 8])"
    errors = {line.split()[0]: float(line.split()[1]) for line in lines[1:]}
    assert list(errors) == ["OptimalDenoiser", "WienerDenoiser", "LocalDenoiser"]
    # The optimal denoiser knows these images; the noise alone would leave sigma^2 / alpha^2 = 1.5.
    assert errors["OptimalDenoiser"] < min(errors["WienerDenoiser"], errors["LocalDenoiser"]) < 0.5


def test_first_command_leaves_the_picture_of_the_readme(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the README's command reads scikit-learn's digits")
    monkeypatch.chdir(tmp_path)
    (command,) = generate_commands(blocks("bash")[0])
    assert cli.main([*command, "--no-progress"]) == 0
    for name in ("samples.png", "trajectory.png", "samples.npy", "run.json"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    with Image.open("out/samples.png") as made, Image.open(ROOT / "docs/digits.png") as shown:
        difference = np.asarray(made, np.int16) - np.asarray(shown, np.int16)
    # Machines differ in rounding, which may flip a mask entry, and in fonts. Another seed gives 40.
    assert np.abs(difference).mean() < 3


def test_every_generate_command_runs(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the README's commands read scikit-learn's sets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-images").mkdir()
    for index in range(3):
        pixels = np.full((40, 48), 100 * index, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "my-images" / f"{index}.png")
    commands = generate_commands()
    assert len(commands) == 3
    for command in commands:
        quick = ["--n", "1", "--steps", "1", "--force", "--no-progress"]
        assert cli.main([*command, *quick]) == 0, command


def test_tables_list_what_there_is():
    rows = table("denoiser")
    public = {name: getattr(denoisers, name) for name in denoisers.__all__}
    classes = {name: thing for name, thing in public.items() if inspect.isclass(thing)}
    models = {name for name, thing in classes.items() if issubclass(thing, denoisers.Denoiser)}
    assert {name for row in rows for name in code(row[0])} == models - {"Denoiser"}
    assert all(len(row) == 3 for row in rows)
    listed = {code(name)[0]: set(code(operations)) for name, _, operations in table("backend")}
    operations = configuration()["operations"]
    for backend in {name for served in operations.values() for name in served} | set(listed):
        expected = {name for name, served in operations.items() if backend in served}
        assert listed.get(backend) == expected, backend


def test_environment_variables_are_those_of_the_code():
    documented = set(re.findall(r"^\| `(PYFLOCALITY_[A-Z_]+)`", CONTRIBUTING, re.MULTILINE))
    sources = [ROOT / "setup.py", ROOT / "tests" / "conftest.py"]
    sources += (ROOT / "pyflocality").rglob("*.py")
    used = set()
    for path in sources:
        text = path.read_text(encoding="utf-8")
        used |= set(re.findall(r'environ(?:\.get\(|\[)"(PYFLOCALITY_[A-Z_]+)"', text))
    assert documented == used


def test_links_and_pictures_are_there():
    for page in (README, CONTRIBUTING):
        for target in re.findall(r"\]\(([^)#]+)\)", page):
            if not target.startswith("http"):
                assert (ROOT / target).is_file(), target
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert len(pictures) >= 2
    for target in pictures:
        assert (ROOT / target).stat().st_size < 150_000


def test_figures_are_those_of_the_results_file():
    speed = README.split("## Speed", 1)[1].split("\n## ", 1)[0]
    [name] = re.findall(r"\]\((benchmarks/results/cpu[^)]+\.json)\)", speed)
    results = json.loads((ROOT / name).read_text(encoding="utf-8"))
    measured = {entry["what"]: entry["value"] for entry in results["summary"]}
    assert not results["quick"] and results["complete"]
    assert results["date"][:10] in speed and results["machine"]["cpu"] in speed
    rows = table("figure")
    assert len(rows) >= 5
    for figure, value in rows:
        assert value == f"{measured[figure]:.3g}"


def test_marked_sections_are_what_the_report_writes():
    for name, heading in (("speed", "Speed"), ("quality", "Quality")):
        assert f"\n## {heading}\n\n<!-- Begin of {name}: " in README
    assert rewritten(README, read_results(FOLDER)) == README


def test_findings_are_those_of_the_results_files():
    path = ROOT / "docs" / "findings.md"
    text = path.read_text(encoding="utf-8")
    studies = ("sweeps", "diagnosis", "masks", "fields", "denoising", "denoising_cifar10")
    for name in ("table", *studies):
        assert text.count(f"<!-- Begin of {name}: ") == 1
    assert rewritten(text, read_results(FOLDER)) == text
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(pictures) >= 4
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (path.parent / target).is_file(), target
