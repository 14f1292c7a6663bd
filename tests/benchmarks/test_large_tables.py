"""The section on large images: what the results file has, and what it lacks by name."""

from __future__ import annotations

from pathlib import Path

from benchmarks.publish import large_tables
from benchmarks.publish.readme_sections import rewritten
from benchmarks.publish.results_files import Results

MARK = "<!-- {} of large: python -m benchmarks.report --readme README.md -->"
SHAPE = [3, 64, 64]
STEP = {
    "seconds_per_step": 20.0,
    "samples": 8,
    "seconds_per_step_and_image": 2.5,
    "machine": "this one",
    "aggregation": "exact",
    "set": "crops",
}
REPORT = {
    "suite": "large_images",
    "date": "2020-01-05T00:00:00",
    "machine": {"cores": 2, "cpu": "a processor"},
    "parts": {
        "many": {
            "shape": SHAPE,
            "bars": [
                {"what": "seconds of ten steps", "value": 223.456, "most": 150.0},
                {"what": "peak bytes", "value": 6.125e9, "most": 8e9},
            ],
            "beside": {"here": STEP, "published": STEP | {"set": "AFHQ"}, "differs": ["a", "b"]},
        },
        "ways": {
            "sets": [
                {
                    "images": 1500,
                    "shape": SHAPE,
                    "entries": 9437184,
                    "most_different_entries": {"gram, full": 3},
                    "agree": False,
                }
            ]
        },
        "foreseen": {
            "sizes": [
                {
                    "images": 2000,
                    "shape": SHAPE,
                    "stages": [
                        {
                            "name": "masks",
                            "foreseen_seconds": 30.0,
                            "measured_seconds": 28.25,
                            "foreseen_bytes": 2e9,
                            "measured_bytes": 1.25e9,
                        }
                    ],
                }
            ]
        },
    },
}


def section(report: dict | None) -> str:
    text = f"{MARK.format('Begin')}\n{MARK.format('End')}\n"
    results = [] if report is None else [Results(Path("large-here-2020-01-05.json"), report)]
    return rewritten(text, results)


def test_rows_are_those_of_the_file():
    text = section(REPORT)
    job = "3x64x64: 15,000 images, eight samples in ten steps"
    assert f"| {job} | seconds of ten steps | 223 s | 150 s |" in text
    assert f"| {job} | peak memory | 6.12 GB | 8 GB |" in text
    assert "| AFHQ | 8 | 20 | 2.5 | this one | exact |" in text and "What differs: a; b." in text
    assert "| 2,000 x 3x64x64 | masks | 30 s | 28.2 s | 2.00 GB | 1.25 GB |" in text
    assert "| 1,500 x 3x64x64 | 9,437,184 | gram, full: 3 | NO |" in text
    assert "2 cores of a processor, 2020-01-05" in text.replace("\n", " ")


def test_parts_that_have_not_run_are_named():
    text = section(REPORT | {"parts": {}})
    assert text.count("not yet measured") == len(large_tables.PARTS) + 2
    assert "Large images and long jobs: not yet measured." in section(None)
