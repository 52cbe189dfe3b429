"""Tables and figures, from the files of results; and the page of the documentation, which shows them.

    python experiments/mini/report.py

writes the tables in docs/miniature.md and its figures anew, from the results in this folder.
"""

from __future__ import annotations

import re
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(HERE.parent)]

import matplotlib as mpl  # noqa: E402

from mini.plan import (  # noqa: E402  # noqa: E402
    ALPHAS,
    CORPUS,
    FALCON,
    HELD_OUT,
    MEMORY,
    METHODS,
    QWEN,
    RECURRENT_LAYERS,
    TABLES,
    Row,
    Table,
    Training,
    Use,
)
from mini.results import Results  # noqa: E402
from welch import welch  # noqa: E402

RESULTS = HERE / "results"
PAGE = ROOT / "docs" / "miniature.md"
_BLOCK = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_COLUMNS = {
    "parameters": "parameters",
    "rate": "rate",
    "memory": "state left at the prompt's end",
    "pass@1": "pass@1, %",
    "p": "p against {}",
    "corpus": "loss on the corpus",
}


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def rates_of(results: Results, row: Row) -> list[float]:
    """What a row shows, in per cent, for each seed."""
    return [100 * share for share in results.values(row.training, row.use.name)]


def _memory(results: Results, row: Row) -> str:
    """The share of the state that is left, mean over seeds, of each layer that has one."""
    found = results.values(row.training, MEMORY.name)
    layers = zip(*(each["layers"] for each in found), strict=True)
    return " / ".join(f"{statistics.mean(shares):.2%}" for shares in layers)


def _cell(column: str, results: Results, row: Row, table: Table) -> str:
    values = rates_of(results, row)
    if not values:
        return ""
    if column == "parameters":
        number = results.values(row.training, "parameters")[0]
        return f"{number:,}" if number else ""
    if column == "rate":
        rate = results.rate(row.training)
        return "" if rate is None else f"{rate:g}" + (" *" if results.at_edge(row.training) else "")
    if column == "memory":
        return _memory(results, row)
    if column == "corpus":
        losses = results.values(row.training, CORPUS.name)
        return spread(losses, 2) if losses else ""
    if column == "p":
        reference = table.rows[table.reference]
        p = None if row is reference else welch(values, rates_of(results, reference))
        return "" if p is None else f"{p:.1g}"
    best = max(statistics.mean(found) for other in table.rows if (found := rates_of(results, other)))
    text = spread(values)
    return f"**{text}**" if statistics.mean(values) == best else text


def markdown(table: Table, results: Results) -> str:
    """One table. The best is bold."""
    columns = [column for column in table.columns if column != "p" or table.reference is not None]
    reference = "" if table.reference is None else table.rows[table.reference].title
    lines = [["", *(_COLUMNS[column].format(reference) for column in columns)], ["---"] * (len(columns) + 1)]
    lines += [[row.title, *(_cell(column, results, row, table) for column in columns)] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cost(results: Results) -> str:
    """What the run took, and where."""
    seconds = sum(head["cpu_seconds"] for head in results.heads.values())
    head = next(iter(results.heads.values()))
    versions = ", ".join(f"{name} {head['versions'][name]}" for name in ("torch", "transformers", "peft"))
    return f"Measured with {versions}, in {seconds / 60:.0f} minutes of one CPU core ({head['device']}).\n"


def tuning(results: Results) -> str:
    """How each method of the main tables did at each rate, on validation problems."""
    lines = [["", "tiny Qwen3.5", "tiny FalconH1"], ["---"] * 3]
    for row in TABLES["main"].rows:
        if not row.training.is_trained:
            continue
        cells = []
        for model in (QWEN, FALCON):
            training = Training(model, row.training.method)
            chosen = results.rate(training)
            tried = results.tuning(training)
            shown = ((f"{rate:g}: {share:.0%}", rate == chosen) for rate, share in tried.items())
            cells.append(", ".join(f"**{text}**" if best else text for text, best in shown))
        lines.append([row.title, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def blocks(results: Results) -> dict[str, str]:
    """All that the page shows, by name."""
    return {
        **{name: markdown(table, results) for name, table in TABLES.items()},
        "tuning": tuning(results),
        "cost": cost(results),
    }


def filled(page: str, results: Results) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: If it has a table that is not known.
    """
    known = blocks(results)

    def fill(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name not in known:
            raise ValueError(f"The page has a table {name!r}; there are {', '.join(known)}.")
        return f"{start}\n{known[name]}\n{end}"

    return _BLOCK.sub(fill, page)


_STATES, _WEIGHTS, _BOTH, _NONE = "#2a6f97", "#e09f3e", "#7a5195", "#9aa5b1"


def _colour(method: str) -> str:
    if "+" in method:
        return _BOTH
    if method.startswith(("s0", "offset", "both")):
        return _STATES
    return _WEIGHTS if METHODS[method].configs else _NONE


def _draw_main(results: Results, path: Path) -> None:
    """The main tables: a bar for each method, a dot for each seed."""
    from matplotlib import pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharey=True)
    for axes, name, title in zip(both, ("main", "main-falcon"), ("tiny Qwen3.5", "tiny FalconH1"), strict=True):
        for place, row in enumerate(TABLES[name].rows):
            values = rates_of(results, row)
            if not values:
                continue
            axes.barh(place, statistics.mean(values), 0.7, color=_colour(row.training.method), alpha=0.55)
            axes.plot(values, [place] * len(values), "|", color="black", markersize=7, markeredgewidth=0.9)
        axes.set(title=title, xlabel="greedy pass@1, %; each line a seed", xlim=(0, 103))
        axes.set_yticks(range(len(TABLES[name].rows)), [row.title for row in TABLES[name].rows])
        axes.spines[["top", "right"]].set_visible(False)
    both[0].invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _line(axes: Any, xs: Sequence[float], columns: Sequence[Sequence[float]], **style: Any) -> None:
    """A mean over seeds, and a band of one standard deviation; points without results are left out."""
    points = [(x, column) for x, column in zip(xs, columns, strict=True) if column]
    if not points:
        return
    places = [x for x, _ in points]
    means = [statistics.mean(column) for _, column in points]
    deviations = [statistics.stdev(column) if len(column) > 1 else 0.0 for _, column in points]
    low, high = zip(*((m - d, min(m + d, 100)) for m, d in zip(means, deviations, strict=True)), strict=True)
    (line,) = axes.plot(places, means, marker="o", markersize=4, **style)
    axes.fill_between(places, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def _draw_curves(results: Results, path: Path) -> None:
    """Alpha in use; how many solutions."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for model, colour, title in ((QWEN, _STATES, "tiny Qwen3.5"), (FALCON, _WEIGHTS, "tiny FalconH1")):
        points = {1.0: HELD_OUT, **{alpha: Use(alpha=alpha) for alpha in ALPHAS}}
        alphas = sorted(points)
        s0 = Training(model, "s0")
        columns = [rates_of(results, Row(s0, points[alpha])) for alpha in alphas]
        _line(left, alphas, columns, color=colour, label=title)
        base = rates_of(results, Row(Training(model, "base")))
        if base:
            left.axhline(base[0], color=colour, linestyle=":", linewidth=1)
    left.set(xscale="log", xlabel="alpha in use, of states trained at 1", ylabel="greedy pass@1, %", ylim=(0, 103))
    left.legend(frameon=False, title="dotted: base", loc="lower right")
    methods = dict.fromkeys(row.training.method for row in TABLES["data"].rows)
    for method, colour in zip(methods, ("#2a6f97", "#7fb7be", "#e09f3e", "#a63d40"), strict=True):
        rows = [row for row in TABLES["data"].rows if row.training.method == method]
        columns = [rates_of(results, row) for row in rows]
        _line(right, [row.training.solutions for row in rows], columns, color=colour, label=METHODS[method].label)
    right.set(xlabel="verified solutions, tiny Qwen3.5", xticks=[10, 25, 50])
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_layers(results: Results, path: Path) -> None:
    """Each layer alone: what is left of its state at the prompt's end, and what tuning it gives."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.8), layout="constrained")
    for model, colour, title in ((QWEN, _STATES, "tiny Qwen3.5"), (FALCON, _WEIGHTS, "tiny FalconH1")):
        for layer in RECURRENT_LAYERS:
            row = Row(Training(model, f"s0-layer-{layer}"))
            values, found = rates_of(results, row), results.values(row.training, MEMORY.name)
            if not values or not found:
                continue
            share = 100 * statistics.mean(each["layers"][0] for each in found)
            error = statistics.stdev(values) if len(values) > 1 else 0.0
            label = title if layer == RECURRENT_LAYERS[0] else None
            axes.errorbar(share, statistics.mean(values), error, fmt="o", color=colour, capsize=3, label=label)
            axes.annotate(f"layer {layer}", (share, statistics.mean(values)), (6, 5), textcoords="offset points")
    axes.set(xlabel="state left at the prompt's end, %", ylabel="greedy pass@1 of this layer alone, %", ylim=(0, 103))
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(results: Results, folder: Path) -> None:
    """All figures."""
    mpl.use("Agg")
    _draw_main(results, folder / "miniature.png")
    _draw_curves(results, folder / "miniature-curves.png")
    _draw_layers(results, folder / "miniature-layers.png")


def write_report(results: Path, folder: Path) -> None:
    """Writes `report.md` with all tables, and the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    read = Results(results)
    titles = {**{name: table.title for name, table in TABLES.items()}, "tuning": "Learning rates", "cost": "Cost"}
    sections = [f"## {titles[name]}\n\n{text}" for name, text in blocks(read).items()]
    figures = "".join(f"![]({name}.png)\n" for name in ("miniature", "miniature-curves", "miniature-layers"))
    heading = (
        "# S0 tuning in miniature\n\n± is the standard deviation over seeds; p is of Welch's t-test; * a rate at the "
        "edge of those that were tried.\n\n"
    )
    (folder / "report.md").write_text(f"{heading}{figures}\n" + "\n".join(sections))
    draw(read, folder)


def publish(results: Path) -> None:
    """Puts results in the place of the repository's, and makes its page anew."""
    if results != RESULTS:
        shutil.copytree(results, RESULTS, dirs_exist_ok=True)
    read = Results(RESULTS)
    PAGE.write_text(filled(PAGE.read_text(), read))
    draw(read, PAGE.parent)


if __name__ == "__main__":
    publish(RESULTS)
