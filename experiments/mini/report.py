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

from mini import plan  # noqa: E402
from mini.plan import CORPUS, FALCON, HELD_OUT, LARGE, MEMORY, METHODS, QWEN, TABLES, Row, Table, Training  # noqa: E402
from mini.results import Results  # noqa: E402
from welch import welch  # noqa: E402

RESULTS = HERE / "results"
PAGE = ROOT / "docs" / "miniature.md"
_BLOCK = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_COLUMNS = {
    "parameters": "parameters",
    "rate": "rate",
    "memory": "state left at the prompt's end, %",
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
    """How much of the state is left, mean over seeds, of each layer that has one."""
    found = results.values(row.training, MEMORY.name)
    layers = zip(*(each["layers"] for each in found), strict=True)
    return " / ".join(f"{100 * statistics.mean(shares):.0f}" for shares in layers)


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


def _lines(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in Markdown, the first of them the heads of the columns."""
    head, *body = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *body))


def markdown(table: Table, results: Results) -> str:
    """One table. The best is bold."""
    columns = [column for column in table.columns if column != "p" or table.reference is not None]
    reference = "" if table.reference is None else table.rows[table.reference].title
    heads = ["", *(_COLUMNS[column].format(reference) for column in columns)]
    return _lines(
        [heads, *([row.title, *(_cell(column, results, row, table) for column in columns)] for row in table.rows)]
    )


def cost(results: Results) -> str:
    """What the runs took, and where."""
    lines = []
    for device in dict.fromkeys(head["device"] for head in results.heads.values()):
        heads = [head for head in results.heads.values() if head["device"] == device]
        versions = ", ".join(f"{name} {heads[0]['versions'][name]}" for name in ("torch", "transformers", "peft"))
        minutes = sum(head["cpu_seconds"] for head in heads) / 60
        models = ", ".join(name for name, head in results.heads.items() if head["device"] == device)
        date = max(head["date"] for head in heads)[:10]
        lines.append(f"- {minutes:.0f} minutes of one CPU core: {models} on {device}, {date}, {versions}\n")
    return "".join(lines)


def tuning(results: Results) -> str:
    """How each method of the main tables did at each rate, on validation problems."""
    models = {model: title for model, title in _TITLES.items() if model in results.heads}
    lines = [["", *models.values()]]
    for row in TABLES["main"].rows:
        if not row.training.is_trained:
            continue
        cells = []
        for model in models:
            training = Training(model, row.training.method)
            chosen = results.rate(training)
            tried = results.tuning(training)
            shown = ((f"{rate:g}: {share:.0%}", rate == chosen) for rate, share in tried.items())
            cells.append(", ".join(f"**{text}**" if best else text for text, best in shown))
        lines.append([row.title, *cells])
    return _lines(lines)


def blocks(results: Results) -> dict[str, str]:
    """All that the page can show, by name: of what there are results."""
    tables = {name: markdown(table, results) for name, table in TABLES.items() if _has_results(table, results)}
    return {**tables, "tuning": tuning(results), "cost": cost(results)}


def _has_results(table: Table, results: Results) -> bool:
    return any(rates_of(results, row) for row in table.rows)


def filled(page: str, results: Results) -> str:
    """The page with its tables made anew; those without results stay empty.

    Raises:
        ValueError: If it has a table that is not known.
    """
    known = blocks(results)

    def fill(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name not in known and name not in TABLES:
            raise ValueError(f"The page has a table {name!r}; there are {', '.join([*TABLES, *known])}.")
        return f"{start}\n{known[name]}\n{end}" if name in known else start + end

    return _BLOCK.sub(fill, page)


_STATES, _WEIGHTS, _BOTH, _NONE = "#2a6f97", "#e09f3e", "#7a5195", "#9aa5b1"


def _colour(method: str) -> str:
    if "+" in method:
        return _BOTH
    if method.startswith(("s0", "offset", "both")):
        return _STATES
    return _WEIGHTS if METHODS[method].configs else _NONE


_TITLES = {QWEN: "tiny Qwen3.5", FALCON: "tiny FalconH1", LARGE: "Qwen3.5 of 100 M"}


def _draw_main(results: Results, path: Path) -> None:
    """The main tables: a bar for each method, a line for each seed."""
    from matplotlib import pyplot as plt

    shown = {model: table for name, model in _MAIN_TABLES.items() if _has_results(table := TABLES[name], results)}
    methods = list(dict.fromkeys(row.training.method for table in shown.values() for row in table.rows))
    figure, all_axes = plt.subplots(
        1, len(shown), figsize=(2 + 3.6 * len(shown), 4.4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, (model, table) in zip(all_axes[0], shown.items(), strict=True):
        for row in table.rows:
            values, place = rates_of(results, row), methods.index(row.training.method)
            if values:
                axes.barh(place, statistics.mean(values), 0.7, color=_colour(row.training.method), alpha=0.55)
                axes.plot(values, [place] * len(values), "|", color="black", markersize=7, markeredgewidth=0.9)
        axes.set(title=_TITLES[model], xlabel="greedy pass@1, %; each line a seed", xlim=(0, 103))
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0, 0].set_yticks(range(len(methods)), [METHODS[method].label for method in methods])
    all_axes[0, 0].invert_yaxis()
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
    """Alpha in use; how many solutions; each layer alone, and what is left of its state at the prompt's end."""
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3.6), layout="constrained", sharey=True)
    for model, colour in ((QWEN, _STATES), (LARGE, _BOTH)):
        points = {1.0: HELD_OUT, **{alpha: plan.Use(alpha=alpha) for alpha in plan.ALPHAS}}
        alphas, s0 = sorted(points), Training(model, "s0")
        columns = [rates_of(results, Row(s0, points[alpha])) for alpha in alphas]
        _line(left, alphas, columns, color=colour, label=_TITLES[model])
    left.set(xscale="log", xlabel="alpha in use, of states trained at 1", ylabel="greedy pass@1, %", ylim=(0, 103))
    rows = [*TABLES["data"].rows]
    methods = dict.fromkeys(row.training.method for row in rows)
    for method, colour in zip(methods, ("#2a6f97", "#7fb7be", "#e09f3e"), strict=True):
        own = [row for row in rows if row.training.method == method]
        columns = [rates_of(results, row) for row in own]
        _line(middle, [row.training.solutions for row in own], columns, color=colour, label=METHODS[method].label)
    middle.set(xlabel="verified solutions, tiny Qwen3.5", xticks=[10, 25, plan.SOLUTIONS])
    for layer in plan.RECURRENT_LAYERS:
        row = Row(Training(QWEN, f"s0-layer-{layer}"))
        values, found = rates_of(results, row), results.values(row.training, MEMORY.name)
        if values and found:
            share = statistics.mean(each["layers"][0] for each in found)
            right.bar(layer, statistics.mean(values), 0.6, color=_STATES, alpha=0.55)
            right.plot([layer] * len(values), values, "_", color="black", markersize=9)
            right.annotate(f"{share:.0%} left", (layer, 4), ha="center")
    right.set(xlabel="the layer that is tuned alone, tiny Qwen3.5;\nhow much of its state the prompt leaves")
    right.set_xticks(plan.RECURRENT_LAYERS)
    base = rates_of(results, Row(Training(QWEN, "base")))
    for axes in (left, middle, right):
        if base:
            axes.axhline(base[0], color="black", linestyle=":", linewidth=1, label="base")
        axes.spines[["top", "right"]].set_visible(False)
        if axes is not right and axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="center right" if axes is middle else "lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


_MAIN_TABLES = {"main": QWEN, "main-falcon": FALCON, "main-large": LARGE}


def draw(results: Results, folder: Path) -> None:
    """All figures of which there are results."""
    mpl.use("Agg")
    if any(_has_results(TABLES[name], results) for name in _MAIN_TABLES):
        _draw_main(results, folder / "miniature.png")
        _draw_curves(results, folder / "miniature-curves.png")


def write_report(results: Path, folder: Path) -> None:
    """Writes `report.md` with all tables, and the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    read = Results(results)
    titles = {**{name: table.title for name, table in TABLES.items()}, "tuning": "Learning rates", "cost": "Cost"}
    sections = [f"## {titles[name]}\n\n{text}" for name, text in blocks(read).items()]
    draw(read, folder)
    figures = "".join(f"![]({path.name})\n" for path in sorted(folder.glob("*.png")))
    heading = (
        "# S0 tuning in miniature\n\n± is the standard deviation over seeds; p is of Welch's t-test; * a rate at the "
        "edge of those that were tried.\n\n"
    )
    (folder / "report.md").write_text(f"{heading}{figures}\n" + "\n".join(sections))


def publish(results: Path) -> None:
    """Puts results in the place of the repository's, and makes its page anew."""
    if results != RESULTS:
        shutil.copytree(results, RESULTS, dirs_exist_ok=True)
    read = Results(RESULTS)
    PAGE.write_text(filled(PAGE.read_text(), read))
    draw(read, PAGE.parent)


if __name__ == "__main__":
    publish(RESULTS)
