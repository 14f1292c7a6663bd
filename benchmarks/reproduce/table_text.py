"""The table of a set as text for people, from the record that `reproduce` writes.

Columns that no row of a record has are named as not measured: older records have fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..command import Record
from .scores import shown

_WINDOWS_TOLD = (
    " Windows are those that follow network A at each noise level; ELS and bbELS take those of LS."
)
# What is told as memory, by the device.
MEMORY = {
    "cpu": "what the process needs",
    "cuda": "what torch's allocator of GPU memory holds",
}

# A cell of a row, given the name of a network where it is of one; None where there is nothing.
_Cell = Callable[[Record, str], str | None]


def markdown(record: Record) -> str:
    """The record as paragraphs and tables: against networks, of the images, at networks' states."""
    blocks = [_head(record), _against(record), _of_images(record)]
    blocks += [_at_states(record), _choices(record), _bars(record), _tail(record)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _head(record: Record) -> str:
    data, settings = record["data"], record["settings"]
    lines = [
        f"{data['name']}: {data['images']:,} images, {settings['samples']} samples, "
        f"{len(settings['timesteps'])} DDIM steps, threshold {settings['threshold']:g}. "
        "Mean ± standard error over the samples.",
        *(_told(network) for network in record["networks"]),
    ]
    missing = [
        what
        for what, key in (
            ("r2 at the networks' own states", "at_states"),
            ("paired differences", "minus"),
            ("gradient energy", "gradient_energy"),
            ("distance to training images", "nearest_image"),
        )
        if not any(row.get(key) for row in record["table"])
    ]
    if missing:
        lines.append(f"Not measured in this run: {', '.join(missing)}.")
    return "\n".join(lines)


def _told(network: Record) -> str:
    """How long a network was trained, as far as its file tells."""
    facts, name = network["facts"], network["name"]
    told = f"{name[:1].upper()}{name[1:]}: {network['parameters']:,} parameters"
    if {"steps", "batch"} <= facts.keys():
        told += f", {facts['steps']:,} training steps of {facts['batch']} images"
    return f"{told}."


def label_of(row: Record, record: Record) -> str:
    """What a row is called, with what sets its run apart from the others."""
    label: str = row["label"]
    if row["images"] is not None and row["images"] < record["data"]["images"]:
        label += f" ({row['images']:,} images)"
    if row["samples"] < record["settings"]["samples"]:
        label += f" ({row['samples']} samples)"
    if "extrapolated_seconds_per_step" in row:
        label += f", about {row['extrapolated_seconds_per_step']:,.0f} s / step for all"
    return label


def _against(record: Record) -> str:
    """Every model against every network: at the end, over all steps, and minus others."""
    columns = []
    for network in record["networks"]:
        name = network["name"]
        columns += [
            (f"MSE, {name}", name, _of("against", "mse", "final", digits=4)),
            (f"r2, {name}", name, _of("against", "r2", "final")),
            (f"r2 of all steps, {name}", name, _of("against", "r2", "all_steps")),
            (f"r2 at its states, {name}", name, _of("at_states", "r2", "all_steps")),
        ]
        others = dict.fromkeys(
            other for row in record["table"] for other in row.get("minus", {}).get(name, {})
        )
        for other in others:
            label = next(one["label"] for one in record["table"] if one["name"] == other)
            columns.append((f"r2 minus that of {label}, {name}", name, _of("minus", other=other)))
    return _table(record, columns)


def _of_images(record: Record) -> str:
    """What the images of each row are like, and what they cost."""
    return _table(
        record,
        [
            ("gradient energy", "", _gradient_energy),
            ("that on edges of 2x2 blocks, over that inside", "", _block_edges),
            ("rms to the nearest training image", "", _distance),
            ("training images", "", _recited),
            ("s / step", "", lambda row, _: f"{row['seconds_per_step']:.3g}"),
            ("memory, MB", "", _memory),
            ("backend", "", lambda row, _: ", ".join(row["backends"])),
        ],
    )


def _of(key: str, *path: str, digits: int = 3, other: str | None = None) -> _Cell:
    """A summary under a key and the name of a network."""

    def cell(row: Record, name: str) -> str | None:
        result = row.get(key, {}).get(name, {})
        for part in path if other is None else (other,):
            result = result.get(part, {})
        return shown(result, digits) if result else None

    return cell


def _gradient_energy(row: Record, _: str) -> str | None:
    told = row.get("gradient_energy")
    return None if told is None else shown(told, 4)


def _block_edges(row: Record, _: str) -> str | None:
    told = row.get("block_edges")
    return None if told is None else f"{told:.3f}"


def _distance(row: Record, _: str) -> str | None:
    told = row.get("nearest_image")
    return None if told is None else shown(told["rms"], 3)


def _recited(row: Record, _: str) -> str | None:
    told = row.get("nearest_image")
    return None if told is None else f"{told['number']} of {row['samples']}"


def _memory(row: Record, _: str) -> str:
    memory = row["extra_memory_bytes"]
    return "-" if memory is None else f"{memory / 1e6:,.0f}"


def _table(record: Record, columns: Sequence[tuple[str, str, _Cell]]) -> str:
    """A line for each row; columns that are empty everywhere are left out."""
    rows = record["table"]
    cells = [[cell(row, name) for row in rows] for _, name, cell in columns]
    kept = [k for k, column in enumerate(cells) if any(one is not None for one in column)]
    lines = [["model", *(columns[k][0] for k in kept)]]
    for place, row in enumerate(rows):
        lines.append([label_of(row, record), *(cells[k][place] or "" for k in kept)])
    return _lines(lines)


def _lines(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def _at_states(record: Record) -> str:
    """r2 of the answers to the first network's states against its own, step by step."""
    first = record["networks"][0]["name"]
    rows = [
        [label_of(row, record), *(shown(step, 3) for step in found["r2"]["steps"])]
        for row in record["table"]
        if (found := row.get("at_states", {}).get(first))
    ]
    if not rows:
        return ""
    times = record["settings"]["timesteps"]
    note = f"r2 of the answers to {first}'s own states against its answers, at each step:"
    return f"{note}\n\n{_lines([['model', *(f't = {t}' for t in times)], *rows])}"


def _choices(record: Record) -> str:
    """What held-out images chose."""
    told = record.get("calibration")
    if told is None:
        return ""
    chosen = "; ".join(f"t = {one['time']:g}: {one['model']}" for one in told["levels"])
    which = "" if told["of_these_images"] else " of another set"
    return (
        f"The calibrated model is of {told['held_out']} held-out images{which}, which no network "
        f"has a part in: {chosen}."
    )


def _bars(record: Record) -> str:
    """What is meant to be reached."""
    bars = record.get("bars")
    return _lines([["figure", "measured", "meant", ""], *map(bar_cells, bars)]) if bars else ""


def bar_cells(bar: Record) -> list[str]:
    """A bar as cells of a table: what, measured, meant, and whether it is reached."""
    meant = f"at least {bar['least']:g}" if "least" in bar else f"at most {bar['most']:g}"
    verdict = "reached" if bar["reached"] else "MISSED"
    return [bar["what"], f"{bar['value']:.3g}", meant, verdict]


def _tail(record: Record) -> str:
    machine = record["machine"]
    # Files from before there was a choice of the device do not tell.
    memory = record.get("memory", MEMORY["cpu"])
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    composed = {"pca-locality-linear", "patch-set-linear", "mixture", "calibrated"}
    made = ""
    if any(row["name"] in composed for row in record["table"]):
        made = ", but with those and the linear images of models that are made of others"
    lines = [
        f"Seconds are those of one denoiser call for all samples, without moments and masks{made}; "
        f"memory is {memory} beside images, moments and noise, at most."
        + (_WINDOWS_TOLD if record["windows"] else ""),
        f"{where}, {record['date'][:10]}, pyflocality "
        f"{machine['pyflocality']}, torch {machine['torch']}.",
    ]
    if any(row.get("gradient_energy") for row in record["table"]):
        lines.insert(
            0,
            "Gradient energy: mean squared difference of neighbouring values at the end, which r2 "
            "does not see. Training images: within a root mean square difference of 1/255.",
        )
    return "\n".join(lines)
