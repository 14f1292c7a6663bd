"""The report and the README's sections: made of results files alone, and equal to them."""

from __future__ import annotations

import html
import importlib
import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.publish.readme_sections import rewritten
from benchmarks.publish.report_figures import BASELINES, baselines_of, compared, intensity
from benchmarks.publish.results_files import FOLDER, cpu_results, latest, read_results

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("matplotlib", reason="the report draws with matplotlib")

COMMENT = "<!-- {} of {}: python -m benchmarks.report --readme README.md -->"


def write(folder: Path, name: str, content: dict) -> Path:
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def committed() -> dict:
    """What the committed file of the CPU suite holds, some of its cases alone."""
    found = json.loads(cpu_results(read_results(FOLDER)).path.read_text(encoding="utf-8"))
    chosen = [r for r in found["results"] if r["suite"] in ("optimal", "covariance", "scaling")]
    return found | {"results": chosen, "rates": RATES}


RATES = {"matmul_gflops_per_second": 100.0, "copy_gbytes_per_second": 10.0}


@pytest.fixture
def folder(committed, tmp_path) -> Path:
    """A folder of results files of the CPU suite and a study, the latter with a picture."""
    folder = tmp_path / "results"
    folder.mkdir()
    write(folder, "cpu-here-2020-01-01.json", committed)
    study = {"study": "memorize", "date": "2020-01-02T00:00:00", "machine": committed["machine"]}
    write(folder, "memorize-here-2020-01-02.json", study)
    picture = next(FOLDER.glob("eigenpairs-*.png"))
    shutil.copyfile(picture, folder / "memorize-here-2020-01-02.png")
    return folder


def page_of(folder: Path, out: Path) -> str:
    assert report.main(["--results", str(folder), "--out", str(out)]) == 0
    return (out / "index.html").read_text(encoding="utf-8")


def rows_of(page: str) -> list[list[str]]:
    """The cells of all rows of all tables."""
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [[html.unescape(c) for c in re.findall(r"<t[dh]>(.*?)</t[dh]>", row)] for row in rows]


def test_rows_of_the_page_are_those_of_the_file(folder, committed, tmp_path):
    rows = {row[2]: row for row in rows_of(page_of(folder, tmp_path / "page")) if len(row) > 2}
    records = compared(committed["results"])
    assert {record["op"] for record in records} == {"global_posterior", "covariance"}
    for record in records:
        row = rows[record["id"].rpartition("/")[2]]
        assert row[0] == f"{record['op']} (cpu)" and row[1] == "3x32x32"
        assert row[3] == f"{record['seconds']['median'] * 1e3:.3g}"
        name = "torch_cov" if record["op"] == "covariance" else "eager"
        column = 4 + list(BASELINES).index(name)
        assert row[column] == f"{record['yardsticks'][name]['ratio']['median']:.3g}"


def test_every_figure_names_where_it_comes_from(folder, committed, tmp_path):
    out = tmp_path / "page"
    page = page_of(folder, out)
    origins = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert len(origins) == len(re.findall("<img", page)) == 4
    commit, cpu = committed["machine"]["commit"][:12], committed["machine"]["cpu"]
    for told in origins:
        name = re.search(r'href="results/([^"]+)"', told)[1]
        assert (out / "results" / name).read_bytes() == (folder / name).read_bytes()
        assert commit in told and cpu in told and "<code>python -m benchmarks." in told
    assert "python -m benchmarks.studies memorize --out" in page and "--mnist ZIP" in page
    for source in re.findall(r'src="([^"]+)"', page):
        assert (out / source).read_bytes()[:4] == b"\x89PNG"
    assert not re.search(r'(src|href)="(https?:)?//', page)


def test_page_of_the_committed_results(tmp_path):
    report.write_page(read_results(FOLDER), tmp_path)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    linked = set(re.findall(r'href="results/([^"]+)"', page))
    assert linked == {path.name for path in FOLDER.glob("*.json")}
    for name in linked:
        assert (tmp_path / "results" / name).read_bytes() == (FOLDER / name).read_bytes()
    shown = re.findall(r'src="([^"]+)"', page)
    for source in shown:
        assert (tmp_path / source).read_bytes()[:4] == b"\x89PNG"
    # Those of the suites of speed are drawn for the page.
    beside = {path.name for path in FOLDER.glob("*.png")}
    assert {name for name in beside if not name.startswith(("cpu-", "gpu-"))} <= set(shown)


def test_pictures_are_those_of_the_file_and_of_no_other(tmp_path):
    machine = {"machine": {}, "date": "2020-01-01"}
    for stem in ("cpu", "cpu-2core", "cpu-2core-why", "cpu-2"):
        write(tmp_path, f"{stem}.json", machine)
    for stem in ("cpu-2core", "cpu-2core-steps", "cpu-2core-why", "cpu-2core-why-samples", "cpu-a"):
        (tmp_path / f"{stem}.png").touch()
    found = {one.path.stem: one.pictures for one in read_results(tmp_path)}
    assert found == {
        "cpu": {"a": tmp_path / "cpu-a.png"},
        "cpu-2": {},
        "cpu-2core": {
            "": tmp_path / "cpu-2core.png",
            "steps": tmp_path / "cpu-2core-steps.png",
        },
        "cpu-2core-why": {
            "": tmp_path / "cpu-2core-why.png",
            "samples": tmp_path / "cpu-2core-why-samples.png",
        },
    }


def test_what_did_not_run_is_said(folder, committed, tmp_path):
    record = next(r for r in committed["results"] if r["suite"] == "optimal")
    others = {name: m for name, m in record["yardsticks"].items() if not name.startswith("keops")}
    missing = {"keops": "not installed: no package 'pykeops'"}
    changed = {**record, "yardsticks": others, "missing": missing}
    write(folder, "cpu-here-2020-01-01.json", committed | {"results": [changed]})
    page = page_of(folder, tmp_path / "page")
    (row,) = [row for row in rows_of(page) if row[0] == "global_posterior (cpu)"]
    assert row[4 + list(BASELINES).index("keops")] == "not installed"
    # One case is no curve.
    assert 'src="scaling.png"' not in page


def test_gpus_are_not_yet_measured_until_they_are(folder, committed, tmp_path):
    rows = rows_of(page_of(folder, tmp_path / "page"))
    assert ["global_posterior", "not yet measured"] in rows
    machine = committed["machine"] | {"gpu": "NVIDIA H100"}
    gpu = {"suite": "gpu", "date": "2020-01-03T00:00:00", "machine": machine}
    marks = {"copy": {"ratio": {"median": 1.5}}, "eager": {"failed": "no memory"}}
    measured = {"id": "a/b", "op": "a", "status": "ok", "seconds": {"median": 0.0125}}
    failed = {"id": "c/d", "op": "c", "status": "failed"}
    gpu["results"] = [measured | {"yardsticks": marks}, failed]
    write(folder, "gpu-h100-2020-01-03.json", gpu)
    page = page_of(folder, tmp_path / "with")
    assert ["a/b", "12.5", "copy 1.5"] in rows_of(page) and ["c/d", "failed", ""] in rows_of(page)
    assert "NVIDIA H100; 2020-01-03" in page and "not yet measured</td>" not in page


def test_fastest_of_a_family_counts():
    ratios = {"eager_patches": 9.0, "eager_differences": 4.0, "compiled_patches": 2.0, "x": 1.0}
    record = {"yardsticks": {name: {"ratio": {"median": r}} for name, r in ratios.items()}}
    found = {name: mark["ratio"]["median"] for name, mark in baselines_of(record).items()}
    assert found == {"eager": 4.0, "compiled": 2.0}
    assert intensity({"flops": 12, "bytes": 4}) == 3


def test_newest_whole_run_counts(folder, committed):
    later = {"date": "2031-01-01T00:00:00"}
    write(folder, "cpu-a.json", committed | later)
    write(folder, "cpu-b.json", committed | {"date": "2032-01-01T00:00:00", "quick": True})
    write(folder, "cpu-c.json", committed | {"date": "2033-01-01T00:00:00", "complete": False})
    results = read_results(folder)
    assert cpu_results(results).path.name == "cpu-a.json"
    assert latest(results, "gpu", on_gpu=True) is None


@pytest.mark.parametrize("name", ["speed", "quality"])
def test_only_what_is_marked_is_rewritten(folder, name):
    begin, end = COMMENT.format("Begin", name), COMMENT.format("End", name)
    text = f"# Title\n\nbefore\n{begin}\nstale\n{end}\nafter | 7 |\n"
    found = rewritten(text, read_results(folder))
    assert found.startswith(f"# Title\n\nbefore\n{begin}\n") and "stale" not in found
    assert found.endswith(f"\n{end}\nafter | 7 |\n")
    # Once more changes nothing.
    assert rewritten(found, read_results(folder)) == found


def test_rows_of_the_readme_are_those_of_the_file(folder, committed):
    text = f"{COMMENT.format('Begin', 'speed')}\n{COMMENT.format('End', 'speed')}\n"
    libraries = ("torch.compile", "torch's attention", "KeOps", "faiss")
    own = [e for e in committed["summary"] if not any(n in e["what"] for n in libraries)]
    extra = {"what": "optimal, B = 8: times faster than KeOps", "value": 12.345}
    changed = committed | {"summary": [*own, extra]}
    write(folder, "cpu-here-2020-01-01.json", changed)
    found = rewritten(text, read_results(folder))
    rows = dict(re.findall(r"^\| (.*?) \| ([\d.e+]+) \|$", found, re.MULTILINE))
    measured = {entry["what"]: entry["value"] for entry in changed["summary"]}
    assert len(rows) == 12 and rows[extra["what"]] == "12.3"
    assert all(value == f"{measured[figure]:.3g}" for figure, value in rows.items())
    assert "`python -m benchmarks.cpu_suite --out results.json --cifar10 ZIP`" in found.replace(
        "\n", " "
    )
    assert "GPUs: not yet measured." in found
    write(folder, "cpu-here-2020-01-01.json", committed | {"summary": []})
    with pytest.raises(ValueError, match="cpu-here-2020-01-01.json: the summary has no figure"):
        rewritten(text, read_results(folder))


@pytest.mark.parametrize(
    "text",
    [
        "nothing is marked",
        COMMENT.format("Begin", "speed"),
        f"{COMMENT.format('End', 'speed')}\n{COMMENT.format('Begin', 'speed')}\n",
        f"{COMMENT.format('Begin', 'speed')}\n{COMMENT.format('End', 'speed')}\n" * 2,
    ],
)
def test_marks_that_are_wrong_are_an_error(folder, text):
    with pytest.raises(ValueError, match="README.md: expected"):
        rewritten(text, read_results(folder))


def told(mean: float) -> dict:
    return {"mean": mean, "standard_error": 0.01, "median": mean}


NETWORKS = [
    {"name": f"network {letter}", "file": file, "parameters": 7, "facts": {}}
    for letter, file in (("A", "a.safetensors"), ("B", "b.st"))
]


@pytest.fixture
def reproduced(folder, committed) -> dict:
    """A record of `pyflocality reproduce` of two methods, with its two pictures in the folder."""
    scores = {
        name: {"final": told(0.25), "all_steps": told(0.5), "steps": [told(0.25)]}
        for name in ("mse", "r2")
    }
    row = {"samples": 4, "seconds_per_step": 1.5, "extra_memory_bytes": None, "backends": ["cpu"]}
    row["against"] = {network["name"]: scores for network in NETWORKS}
    optimal = row | {"name": "optimal", "label": "optimal <b>", "images": 60}
    few = row | {"name": "equivariant", "label": "ELS", "images": 20, "samples": 2}
    record = {
        "command": "reproduce",
        "date": "2020-01-04T00:00:00",
        "machine": committed["machine"],
        "data": {"name": "mnist.zip", "images": 60},
        "networks": NETWORKS,
        "settings": {"samples": 4, "timesteps": [900], "threshold": 0.005, "seed": 3},
        "windows": {},
        "table": [row | {"name": "network A", "label": "A", "images": None}, optimal, few],
    }
    write(folder, "reproduce-mnist-2020-01-04.json", record)
    for name in ("samples", "steps"):
        shutil.copyfile(
            folder / "memorize-here-2020-01-02.png",
            folder / f"reproduce-mnist-2020-01-04-{name}.png",
        )
    return record


def test_table_of_models_is_that_of_reproduce(folder, reproduced, tmp_path):
    from benchmarks.reproduce.table_text import markdown

    page = page_of(folder, tmp_path / "page")
    line = next(line for line in markdown(reproduced).splitlines() if "optimal" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == "optimal <b>" and cells in rows_of(page)
    command = (
        "pyflocality reproduce mnist.zip --network a.safetensors --network b.st --threshold 0.005 "
        "--samples 4 --seed 3 --methods optimal,equivariant --els-images 20 --els-samples 2 "
        "--out DIR"
    )
    assert f"<code>{command}</code>" in page
    for name, caption in (("samples", "Images from the same noise"), ("steps", "r2 and MSE")):
        picture = f"reproduce-mnist-2020-01-04-{name}.png"
        assert (tmp_path / "page" / picture).read_bytes() == (folder / picture).read_bytes()
        assert re.search(f'src="{picture}" alt="{caption}.*\n<figcaption>{caption}', page)


def test_table_of_models_on_other_pages(folder, reproduced):
    from benchmarks.reproduce.table_text import markdown

    def section_of(name: str, page: str) -> tuple[str, list[str]]:
        """A marked section as it is written, and its pictures."""
        marks = [COMMENT.format(edge, name).replace("README.md", page) for edge in ("Begin", "End")]
        section = rewritten("\n".join([*marks, ""]), read_results(folder))
        assert re.findall("<!--.*-->", section) == marks
        return section, re.findall(r"!\[[^\]]+\]\(([^)]+)\)", section)

    picture = "benchmarks/results/reproduce-mnist-2020-01-04-{}.png"
    section, pictures = section_of("table", "docs/findings.md")
    assert [line for line in markdown(reproduced).splitlines() if "optimal" in line][0] in section
    assert "pyflocality reproduce mnist.zip --network a.safetensors" in section.replace("\n", " ")
    assert "](../benchmarks/results/reproduce-mnist-2020-01-04.json)" in section
    assert pictures == ["../" + picture.format("steps"), "../" + picture.format("samples")]
    section, pictures = section_of("quality", "README.md")
    row = "| ELS (20 images) (2 samples) | 0.2500 ± 0.0100 | 0.250 ± 0.010 | 0.500 ± 0.010 | 1.5 |"
    assert row in section and "4 images of each model" in section
    assert pictures == [picture.format("samples")]
    marks = COMMENT.format("Begin", "speed"), COMMENT.format("End", "speed").replace("READ", "SEE")
    with pytest.raises(ValueError, match="marks of one page, got README.md, SEEME.md"):
        rewritten("\n".join(marks), read_results(folder))


def test_command_of_reproduce_is_read_as_it_was_meant(folder, reproduced, monkeypatch):
    from pyflocality import cli
    from pyflocality.benchmarks.reproduce import table

    plans = []

    def keep(plan) -> dict:
        plans.append(plan)
        return reproduced

    monkeypatch.setattr(table, "reproduce", keep)
    found = latest(read_results(folder), "reproduce")
    assert cli.main(found.command.split()[1:]) == 0
    [plan] = plans
    write(folder, "reproduce-mnist-2020-01-04.json", reproduced | {"device": "cuda"})
    on_gpu = latest(read_results(folder), "reproduce").command
    assert on_gpu == found.command.replace(" --out", " --device cuda --out")
    assert [path.name for path in plan.networks] == ["a.safetensors", "b.st"]
    assert (plan.source, plan.threshold, plan.samples, plan.seed) == ("mnist.zip", 0.005, 4, 3)
    assert plan.methods == ("optimal", "equivariant") and plan.device == "cpu"
    assert (plan.els_images, plan.els_samples) == (20, 2)


def diagnosed() -> dict:
    step = {"gradient_energy": told(0.5), "r2_minus_exact": told(-0.25)}
    models = {name: [step] for name in ("network", "exact", "batch_mean 512")}
    return {
        "why": {"samples": 16, "timesteps": [900], "models": models},
        "masks": {"0.005": [{"t": 900, "density": 0.125, "without_inputs": 0.5}]},
    }


# What studies beside networks write besides what all of them do.
BESIDE = {
    "sweeps": {
        "data": {"name": "mnist.zip"},
        "seeds": 1,
        "results": {"networks_against_each_other": {}, "sweeps": {}} | diagnosed(),
    },
    "denoising": {
        "test": {"name": "test.zip", "images": 3},
        "results": [
            {
                "model": "optimal",
                "t": 20,
                "mse": told(0.25),
                "mse_to_nearest_training_image": told(0.0),
            }
        ],
    },
    "fields": {
        "similarity_with": "network A",
        "results": [
            {"model": "network A", "t": 20, "radius": 2.5, "similarity": 1.0},
            {"model": "Wiener filter", "t": 20, "radius": None, "similarity": 0.875},
        ],
        "steps": 50,
    },
}


@pytest.mark.parametrize(
    ("kind", "own"),
    [("sweeps", {"seeds": 5}), ("denoising", {}), ("fields", {"steps": 70})],
)
def test_studies_beside_networks(kind, own, folder, committed, tmp_path, monkeypatch):
    study = importlib.import_module("benchmarks.reproduce.study")
    module = importlib.import_module(f"benchmarks.reproduce.{kind}")
    record = {
        "study": kind,
        "date": "2020-01-05T00:00:00",
        "machine": committed["machine"],
        "networks": NETWORKS,
        "threshold": 0.007,
        "samples": 9,
        **BESIDE[kind],
        **own,
    }
    write(folder, f"{kind}-here.json", record)
    found = latest(read_results(folder), kind)

    class Read(Exception):
        pass

    def start(self, arguments) -> None:
        raise Read(self.parser.parse_args(arguments))

    monkeypatch.setattr(study.Study, "start", start)
    python, option, name, *words = found.command.split()
    assert (python, option, name) == ("python", "-m", module.__name__)
    with pytest.raises(Read) as read:
        module.main(words)
    (options,) = read.value.args
    expected = own | {"threshold": 0.007, "samples": 9}
    assert {name: getattr(options, name) for name in expected} == expected
    assert [path.name for path in options.network] == ["a.safetensors", "b.st"]
    assert options.out == Path(f"benchmarks/results/{kind}-here.json")

    page = page_of(folder, tmp_path / "page")
    section = page.split("<h2>Quality against trained networks</h2>")[1].split("<h2>")[0]
    assert html.escape(module.__doc__.splitlines()[0]) in section
    assert f"<code>{found.command}</code>" in section and "not yet measured" in section
    assert f"{kind}-here" not in page.split("<h2>Studies</h2>")[1].split("<h2>")[0]


def test_table_of_the_sweeps_is_that_of_the_file(folder, committed, tmp_path):
    def record(*means: float) -> dict:
        """r2 at the end and over all steps against network A, then against network B."""
        ends = {"network A": means[:2], "network B": means[2:]}
        return {
            "against": {
                name: {"r2": told(pair[0]) | {"all_steps": told(pair[1])}, "mse": told(7)}
                for name, pair in ends.items()
                if pair
            },
            "gradient_energy": [0.5, 0.125],
        }

    batch = record(0.6, 0.7, 0.8, 0.9)
    batch["minus_exact"] = {"network A": {"final": told(-0.125), "all_steps": told(-0.25)}}
    results = {
        "networks_against_each_other": {"network B": record(0.97, 0.98)},
        "sweeps": {"aggregation": {"exact": record(0.1, 0.2, 0.3, 0.4), "batch_mean 128": batch}},
    } | diagnosed()
    report_of = {
        "study": "sweeps",
        "date": "2020-01-05T00:00:00",
        "machine": committed["machine"],
        "data": {"name": "mnist.zip"},
        "networks": NETWORKS,
        "threshold": 0.005,
        "samples": 32,
        "seeds": 3,
        "results": results,
    }
    write(folder, "sweeps-here.json", report_of)
    for name in ("", "-why", "-samples"):
        shutil.copyfile(folder / "memorize-here-2020-01-02.png", folder / f"sweeps-here{name}.png")
    page = page_of(folder, tmp_path / "page")
    assert "96 samples of 3 seeds; mean ± standard error" in page
    assert all(f'src="sweeps-here{name}.png"' in page for name in ("", "-why", "-samples"))

    def row(kind: str, value: str, *pairs: tuple) -> list[str]:
        """Cells: "" for None, and no cells of differences where there are none."""
        cells = [
            "" if mean is None else f"{mean:.3f} ± 0.010"
            for place, pair in enumerate(pairs)
            for mean in pair
        ]
        return [kind, value, *cells, "0.125"]

    none = (None, None)
    rows = rows_of(page)
    assert ["900", "1.00", "-0.250 ± 0.010", "1.00"] in rows
    assert ["900", "12 % of inputs, 50 % without"] in rows
    assert row("networks", "network B", (0.97, 0.98), none, none, none) in rows
    assert row("aggregation", "exact", (0.1, 0.2), none, (0.3, 0.4), none) in rows
    less = (-0.125, -0.25)
    assert row("aggregation", "batch_mean 128", (0.6, 0.7), less, (0.8, 0.9), none) in rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected results files"),
        ({"broken.json": "{"}, "broken.json: expected JSON"),
        ({"other.json": "[1]"}, "other.json: expected a results file"),
        ({"a.json": '{"machine": {}, "date": "x"}'}, "a whole run of `python -m benchmarks"),
    ],
)
def test_missing_and_broken_files_are_named(content, message, tmp_path, capsys):
    for name, text in content.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        report.main(["--results", str(tmp_path), "--out", str(tmp_path / "page")])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_a_page_is_not_overwritten(folder, tmp_path, capsys):
    out = tmp_path / "page"
    page_of(folder, out)
    (out / "index.html").write_text("kept", encoding="utf-8")
    words = ["--results", str(folder), "--out", str(out)]
    with pytest.raises(SystemExit):
        report.main(words)
    assert "--force" in capsys.readouterr().err
    assert (out / "index.html").read_text(encoding="utf-8") == "kept"
    assert report.main([*words, "--force"]) == 0
    assert (out / "index.html").read_text(encoding="utf-8") != "kept"
