"""Tables of the studies beside trained networks, as text for people, from their results files."""

from __future__ import annotations

from collections.abc import Sequence

from ..command import Record
from ..reproduce.scores import shown
from ..reproduce.table_text import bar_cells
from .results_files import NOT_MEASURED


def sweeps(report: Record) -> str:
    """r2 of every variant against each network, and what sets it apart from the exact model."""
    results, names = report["results"], [network["name"] for network in report["networks"]]
    rows = [
        ("networks", name, record)
        for name, record in results["networks_against_each_other"].items()
        if record["against"]
    ]
    for kind, result in results["sweeps"].items():
        rows += [(kind, value, record) for value, record in result.items()]
    head = ["sweep", "variant"]
    for name in names:
        head += [f"r2, {name}", f"r2 of all steps, {name}"]
        head += [f"minus exact, {name}", f"minus exact, of all steps, {name}"]
    head.append("gradient energy")
    lines = []
    for kind, value, record in rows:
        cells = [kind, value]
        for name in names:
            r2 = record["against"].get(name, {}).get("r2")
            minus = record.get("minus_exact", {}).get(name, {})
            told = [None, None] if r2 is None else [r2, r2["all_steps"]]
            told += [minus.get("final"), minus.get("all_steps")]
            cells += ["" if one is None else shown(one, 3) for one in told]
        lines.append([*cells, f"{record['gradient_energy'][-1]:.3f}"])
    note = (
        f"{report['data']['name']}, {report['samples'] * report['seeds']} samples of "
        f"{report['seeds']} seeds; mean ± standard error over them. Minus exact: r2 less that of "
        "the exact model at temperature 1, image by image; its threshold is "
        f"{report['threshold']:g}, for an aggregation that of the aggregation. Gradient energy: "
        "mean squared difference of neighbouring pixels at the end, which r2 does not see."
    )
    return f"{note}\n\n{_table(head, lines)}"


def diagnosis(report: Record) -> str:
    """The aggregations at the same noisy images, step by step."""
    why = report["results"]["why"]
    models = {name: steps for name, steps in why["models"].items() if name != "network"}
    head = ["t", "gradient energy, exact"]
    for name in models:
        head += [] if name == "exact" else [f"r2 minus exact, {name}", f"gradient energy, {name}"]
    lines = []
    for step, t in enumerate(why["timesteps"]):
        target = why["models"]["network"][step]["gradient_energy"]["mean"]
        cells = [str(t)]
        for name, steps in models.items():
            if name != "exact":
                cells.append(shown(steps[step]["r2_minus_exact"], 3))
            cells.append(f"{steps[step]['gradient_energy']['mean'] / target:.2f}")
        lines.append(cells)
    note = (
        f"{why['samples']} samples; the answers to the states of network A's runs against network "
        "A's own. r2 less that of the exact model, image by image, mean ± standard error; gradient "
        "energy over the network's."
    )
    return f"{note}\n\n{_table(head, lines)}"


def masks(report: Record) -> str:
    """How dense masks are at each threshold, and what they leave without inputs."""
    result = report["results"]["masks"]
    times = [one["t"] for one in next(iter(result.values()))]
    head = ["t", *(f"threshold {value}" for value in result)]
    lines = [
        [
            str(t),
            *(
                f"{100 * steps[k]['density']:.2g} % of inputs, "
                f"{100 * steps[k]['without_inputs']:.2g} % without"
                for steps in result.values()
            ),
        ]
        for k, t in enumerate(times)
    ]
    note = (
        "Share of the inputs that an output listens to, and of the outputs that vary over the "
        "images and have no input at all: those answer the mean of the training images."
    )
    return f"{note}\n\n{_table(head, lines)}"


def fields(report: Record) -> str:
    """Radius of sensitivity fields and their similarity with the first network's."""
    records = report["results"]
    names = list(dict.fromkeys(record["model"] for record in records))
    head = ["t"]
    for name in names:
        head += [f"radius, {name}"]
        head += [] if name == report["similarity_with"] else [f"cosine, {name}"]
    lines = []
    for t in dict.fromkeys(record["t"] for record in records):
        cells = [str(t)]
        for name in names:
            [one] = [one for one in records if (one["model"], one["t"]) == (name, t)]
            cells.append(_number(one["radius"], 2))
            if name != report["similarity_with"]:
                cells.append(_number(one["similarity"], 3))
        lines.append(cells)
    note = (
        f"{report['samples']} samples, {report['steps']} DDIM steps. Radius in pixels around the "
        f"centre; cosine similarity of the mean field with that of {report['similarity_with']}."
    )
    return f"{note}\n\n{_table(head, lines)}"


def denoising(report: Record) -> str:
    """MSE of test images restored in one step, and of the answers to the nearest training image."""
    records = report["results"]
    names = list(dict.fromkeys(record["model"] for record in records))
    times = list(dict.fromkeys(record["t"] for record in records))
    head = ["model", *(f"t = {t}" for t in times)]
    lines = []
    for name in names:
        of_model = {record["t"]: record for record in records if record["model"] == name}
        cells = [name]
        for t in times:
            error = of_model[t]["mse"]["mean"]
            nearest = of_model[t]["mse_to_nearest_training_image"]["mean"]
            cells.append(f"{error:.3g} / {nearest:.2g}")
        lines.append(cells)
    note = (
        f"{report['test']['images']} test images of {report['test']['name']}: MSE against the "
        "clean image / MSE of the answer against the training image nearest to it."
    )
    return f"{note}\n\n{_table(head, lines)}\n\n{_beside_networks(report)}"


def _beside_networks(report: Record) -> str:
    """Errors beside those of the first network, and what the calibrated model is meant to reach."""
    records, networks = report["results"], report["networks"]
    if not networks or not any("minus" in record for record in records):
        return f"Errors minus those of networks, image by image: {NOT_MEASURED}."
    first = networks[0]["name"]
    times = list(dict.fromkeys(record["t"] for record in records))
    lines = []
    for name in dict.fromkeys(record["model"] for record in records):
        told = {one["t"]: one["minus"].get(first) for one in records if one["model"] == name}
        if None not in told.values():
            lines.append([name, *(_difference(told[t]) for t in times)])
    note = f"MSE minus that of {first}, image by image, mean ± standard error:"
    parts = [note, _table(["model", *(f"t = {t}" for t in times)], lines)]
    if report["bars"]:
        parts.append("What the calibrated model is meant to reach:")
        rows = list(map(bar_cells, report["bars"]))
        parts.append(_table(["figure", "measured", "meant", ""], rows))
    else:
        parts.append("Too few test images to tell whether the calibrated model is close enough.")
    return "\n\n".join(parts)


def _difference(told: Record) -> str:
    """A difference of any size: three digits, and one of its standard error."""
    mean, deviation = told["mean"], told["standard_error"]
    return f"{mean:+.3g}" if deviation is None else f"{mean:+.3g} ± {deviation:.1g}"


def pattern(report: Record) -> str:
    """Mean of each model's field on a planted pattern over that beside it, by weight and step."""
    records = report["results"]
    known = ("wiener", "pca_locality", "network")
    models = [name for name in known if any(name in record for record in records)]
    weights = list(dict.fromkeys(record["gamma"] for record in records))
    head = ["t"]
    for gamma in weights:
        head += [f"SNR, weight {gamma:g}"] if gamma else []
        head += [f"{name.replace('_', ' ')}, weight {gamma:g}" for name in models]
    lines = []
    for t in dict.fromkeys(record["t"] for record in records):
        cells = [str(t)]
        for gamma in weights:
            [one] = [one for one in records if (one["gamma"], one["t"]) == (gamma, t)]
            cells += [f"{one['snr']:.2g}"] if gamma else []
            cells += [_number(one.get(name), 2) for name in models]
        lines.append(cells)
    trained = [network["facts"] for network in report.get("networks", [])]
    told = "; ".join(
        f"weight {facts.get('planted', 0.0):g}, width {facts['width']}, {facts['steps']:,} steps "
        f"of {facts['batch']} images"
        for facts in trained
    )
    note = (
        "Mean of a field on the pattern over its mean beside it, away from the output: 1 where a "
        "model does not know of the pattern. SNR: signal-to-noise ratio along the pattern, visible "
        "where it exceeds 0.1. Weight 0: the images as they are."
    )
    note += f" Networks: {told}." if told else ""
    return f"{note}\n\n{_table(head, lines)}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
