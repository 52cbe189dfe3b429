"""All tables and figures, from the JSON files of the runs: the paper's figures beside ours, blank where none is.

`python experiments/run.py`, without a table, writes nothing else.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

import records
from methods import Training
from paper import BASE, TABLES, Published, Setting, Table
from steps import Bench, result_path
from welch import welch

Planned = tuple[Setting, str, str, Training, float | None]
"""A setting as it is run: with model, task, training and alpha in use."""


@dataclass(frozen=True)
class Figures:
    """What the seeds of a setting gave, in per cent; the gain over the base model, if that was run, in points."""

    values: dict[str, list[float]]

    def mean(self, quantity: str) -> float | None:
        """Over seeds; None where nothing was run."""
        found = self.values.get(quantity)
        return statistics.mean(found) if found else None

    def spread(self, quantity: str) -> float | None:
        """The standard deviation over seeds; None for fewer than two."""
        found = self.values.get(quantity, [])
        return statistics.stdev(found) if len(found) > 1 else None


def figures_of(planned: Planned, bench_of: Callable[[str, str], Bench]) -> Figures:
    """What the files of a setting say."""
    setting, model, task, training, alpha_in_use = planned
    bench = bench_of(model, task)
    paths = [result_path(bench, training, seed, alpha_in_use, setting.samples) for seed in range(setting.seeds)]
    results = [records.read(path)["result"] for path in paths if path.exists()]
    quantities = [name for name in ("pass@1", "pass@5", "pass@10") if any(name in result for result in results)]
    values = {name: [100 * result[name] for result in results] for name in quantities}
    base = result_path(bench, BASE, 0, None, setting.samples)
    if results and base.exists() and training.method != "base":
        zero = 100 * records.read(base)["result"]["pass@1"]
        values["gain"] = [value - zero for value in values["pass@1"]]
    return Figures(values)


def published_of(table: Table, setting: Setting) -> dict[str, Published]:
    """The paper's figures; a gain is also the difference of two rates of the same table."""
    found = {figure.quantity: figure for figure in setting.published}
    base = next((row for row in table.settings if row.training == BASE and row.published), None)
    if base is not None and setting.training != BASE and "pass@1" in found and "gain" not in found:
        figure = found["pass@1"]
        found["gain"] = Published("gain", figure.value - base.published[0].value, figure.spread)
    return found


def _text(quantity: str, value: float | None, spread: float | None) -> str:
    if value is None:
        return ""
    number = f"{value:+.1f}" if quantity == "gain" else f"{value:.1f}"
    return number if spread is None else f"{number} ± {spread:.1f}"


def markdown(table: Table, rows: list[tuple[Setting, Figures]]) -> str:
    """One table."""
    quantities = [*table.quantities, "gain"]
    units = {"gain": "gain, points"}
    header = [""]
    for name in quantities:
        header += [f"{units.get(name, f'{name}, %')}: {who}" for who in ("paper", "ours")]
    header.append("seeds")
    against = next((figures for setting, figures in rows if setting.label == table.reference), None)
    if against is not None:
        header.append(f"p against {table.reference}")
    lines = [header, ["---"] * len(header)]
    for setting, figures in rows:
        published = published_of(table, setting)
        line = [setting.label]
        for name in quantities:
            paper = published.get(name)
            line.append("" if paper is None else _text(name, paper.value, paper.spread))
            line.append(_text(name, figures.mean(name), figures.spread(name)))
        line.append(str(len(figures.values.get("pass@1", [])) or ""))
        if against is not None:
            p = None
            if setting.label != table.reference:
                p = welch(figures.values.get("pass@1", []), against.values.get("pass@1", []))
            line.append("" if p is None else f"{p:.2g}")
        lines.append(line)
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {table.title}\n\n{text}\n" + (f"\n{table.note}\n" if table.note else "")


def draw(table: Table, rows: list[tuple[Setting, Figures]], ours: str, path: Path) -> None:
    """Bars of the paper's figures beside ours, of the models `ours`, with deviations over seeds; as PNG and SVG."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [(setting, figures, published_of(table, setting)) for setting, figures in rows]
    if len(table.quantities) > 1:
        bars = [(f"{row[0].label}\n{name}", name, row) for name in table.quantities for row in shown]
    else:
        by_gain = any("gain" in published for *_, published in shown)
        name = "gain" if by_gain else "pass@1"
        bars = [(row[0].label, name, row) for row in shown if not (by_gain and row[0].training == BASE)]
    figure, axes = plt.subplots(figsize=(max(5.0, 1.1 * len(bars)), 4.2), layout="constrained")
    for offset, who, colour in ((-0.19, "paper", "#9aa5b1"), (0.19, "ours", "#2a6f97")):
        places, values, spreads = [], [], []
        for place, (_, name, (_, figures, published)) in enumerate(bars):
            own = (figures.mean(name), figures.spread(name))
            theirs = (published[name].value, published[name].spread) if name in published else (None, None)
            value, spread = theirs if who == "paper" else own
            if value is not None:
                places.append(place + offset)
                values.append(value)
                spreads.append(spread or 0.0)
        drawn = axes.bar(places, values, 0.36, yerr=spreads, capsize=3, label=who, color=colour)
        axes.bar_label(drawn, fmt="%.1f", padding=3, fontsize=8)
    axes.set_xticks(range(len(bars)), [label.replace(", ", ",\n") for label, *_ in bars], fontsize=8)
    axes.set_ylabel("gain over the base model, points" if bars[0][1] == "gain" else "held-out problems, %")
    axes.set_title(f"{table.title}\nours: {ours}", fontsize=10, wrap=True)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    for suffix in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{suffix}"), dpi=140)
    plt.close(figure)


def write_report(rows: dict[str, list[Planned]], bench_of: Callable[[str, str], Bench], folder: Path) -> None:
    """Writes `report.md` with all tables, and a figure for each."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for name, planned in rows.items():
        table = TABLES[name]
        found = [(row[0], figures_of(row, bench_of)) for row in planned]
        ours = ", ".join(dict.fromkeys(f"{model} on {task}" for _, model, task, *_ in planned))
        draw(table, found, ours, folder / name)
        sections.append(f"{markdown(table, found)}\nOurs: {ours}.\n\n![{table.title}]({name}.png)\n")
    heading = (
        "# S0 tuning: the paper's figures and ours\n\n"
        "pass@1 is greedy unless samples are named; ± is the standard deviation over seeds; p is of Welch's t-test.\n\n"
    )
    (folder / "report.md").write_text(heading + "\n".join(sections))
