"""What an adapter costs as the work grows: longer rows, more rows, more layers.

    python benchmarks/scaling.py [--rounds 5] [--device cpu|cuda] [--json FILE] [--figure FILE.png]

Random hybrid models of 8 layers, or as many as the table says, one in four of them attention. Each of three series
grows by one thing: the tokens of a single row, the rows of 128 tokens, the layers under a row of 128 tokens. Base, S0
and LoRA (rank 24, on attention's projections, and on the mixers' as well) run in turns: a prefill, a training step, and
the bytes that the step keeps for its backward pass. Takes some fifteen minutes on a CPU.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from overhead import LORA, LORA_EVERYWHERE, METHODS, activations, base, prefill, tokens, train
from timing import environment, interleave, parser, ratio, report

LAYERS = 8
# States of [4, 32, 32] in three of four layers.
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
SERIES = {
    "tokens": [{"tokens": tokens} for tokens in (128, 256, 512, 1024, 2048, 4096, 8192)],
    "rows": [{"rows": rows} for rows in (1, 2, 4, 8, 16, 32)],
    "layers": [{"layers": layers} for layers in (4, 8, 16, 32)],
}
COMPARED = ("base", "S0", LORA, LORA_EVERYWHERE)


def measure(size: dict[str, int], device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """The rows of the table for one size of the work."""
    sizes = {**SMALL, "num_hidden_layers": size.get("layers", LAYERS)}
    models = {method: METHODS[method](base(device, **sizes)).eval() for method in COMPARED}
    ids = tokens(device, size.get("rows", 1), size.get("tokens", 128))
    timed = {
        "prefill": (partial(prefill, ids, None), COMPARED, "base"),
        "train": (partial(train, {"input_ids": ids}), COMPARED[1:], LORA),
    }
    for phase, (run, methods, baseline) in timed.items():
        times = interleave({method: partial(run, models[method]) for method in methods}, rounds, warmup=1)
        for method in methods:
            median, low, high = ratio(times[method], times[baseline])
            kept = round(activations({"input_ids": ids}, models[method]), 1) if phase == "train" else ""
            yield {
                **{
                    name: size.get(name, default)
                    for name, default in (("tokens", 128), ("rows", 1), ("layers", LAYERS))
                },
                "phase": phase,
                "method": method,
                "ms": round(statistics.median(times[method]), 1),
                "against": baseline,
                "ratio": round(median, 3),
                "quartiles": f"{low:.3f} to {high:.3f}",
                "kept, MB": kept,
            }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each size: S0's milliseconds and their ratios, of medians, and the megabytes of each method."""
    sizes: dict[tuple[int, ...], dict[tuple[str, str], dict[str, Any]]] = {}
    for row in rows:
        size = (row["tokens"], row["rows"], row["layers"])
        sizes.setdefault(size, {})[row["phase"], row["method"]] = row
    return [
        {
            **dict(zip(("tokens", "rows", "layers"), size, strict=True)),
            "prefill, ms": found["prefill", "S0"]["ms"],
            "to base": _ratio(found, "prefill", "base"),
            "train, ms": found["train", "S0"]["ms"],
            "to LoRA, attention": _ratio(found, "train", LORA),
            "to LoRA, all": _ratio(found, "train", LORA_EVERYWHERE),
            "kept by S0, LoRA, LoRA all; MB": " / ".join(
                f"{found['train', method]['kept, MB']:.0f}" for method in COMPARED[1:]
            ),
        }
        for size, found in sizes.items()
    ]


def _ratio(found: dict[tuple[str, str], dict[str, Any]], phase: str, method: str) -> float:
    return round(found[phase, "S0"]["ms"] / found[phase, method]["ms"], 2)


def draw(tables: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """The curves: milliseconds of both phases, and megabytes kept, over each series."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(3, len(tables), squeeze=False)
    for column, (series, rows) in enumerate(tables.items()):
        drawn = (("prefill", "ms"), ("train", "ms"), ("train", "kept, MB"))
        for axis, (phase, quantity) in zip(axes[:, column], drawn, strict=True):
            for method, mark in zip(COMPARED, ("ks-", "C0o-", "C1^-", "C3v-"), strict=True):
                chosen = [row for row in rows if row["phase"] == phase and row["method"] == method]
                axis.plot([row[series] for row in chosen], [row[quantity] for row in chosen], mark, label=method)
            axis.set(xscale="log", yscale="log", xlabel=series, ylabel=f"{phase}, {quantity.removeprefix('kept, ')}")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.minorticks_off()
            axis.set_xticks([size[series] for size in SERIES[series]])
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(COMPARED), frameon=False
    )
    figure.savefig(file, dpi=100)


def main() -> None:
    """Print the tables, and draw the figure."""
    command = parser("What an adapter costs as the work grows.", rounds=5)
    command.add_argument("--device", default="cpu", help="where the models run")
    command.add_argument("--figure", type=Path, help="PNG file for the curves; needs matplotlib")
    options = command.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    tables = {
        series: [row for size in sizes for row in measure(size, options.device, options.rounds)]
        for series, sizes in SERIES.items()
    }
    report({series: summary(rows) for series, rows in tables.items()}, environment(options.device), None)
    if options.json is not None:
        options.json.write_text(
            json.dumps({"conditions": environment(options.device), "tables": tables}, indent=2) + "\n"
        )
    if options.figure is not None:
        draw(tables, options.figure)


if __name__ == "__main__":
    main()
