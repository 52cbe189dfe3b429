"""What all jobs have left, in one file for each model: a line for each job, the first says what made them."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import records
from mini.plan import Training

_DIGITS = 5


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return value


def _replace_file(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
    part.replace(path)


def write_results(jobs: Path, folder: Path) -> None:
    """Gathers the records of jobs into `FOLDER/MODEL.jsonl`."""
    for model in sorted(path for path in jobs.iterdir() if path.is_dir()):
        lines: list[dict[str, Any]] = []
        found = [records.read(path) for path in sorted(model.glob("*.json"))]
        collecting = sum(record["result"]["cpu_seconds"] for record in found if "training" not in record["arguments"])
        found = [record for record in found if "training" in record["arguments"]]
        for record in found:
            arguments, result = record["arguments"], record["result"]
            shown = {name: arguments[name] for name in ("rate", "seed", "tuning")}
            lines.append({**arguments["training"], **shown, "result": _rounded(result)})
        if not found:
            continue
        newest = max(found, key=lambda record: record["date"])
        head = {name: newest[name] for name in ("date", "device", "versions")}
        counts = {name: newest["arguments"][name] for name in ("held_out", "validation", "documents", "texts")}
        cpu = collecting + sum(record["result"]["cpu_seconds"] for record in found)
        _replace_file(folder / f"{model.name}.jsonl", [{**head, **counts, "cpu_seconds": round(cpu)}, *lines])


class Results:
    """What the files of a folder say.

    Args:
        folder: Of `write_results`.
    """

    def __init__(self, folder: Path) -> None:
        self.heads: dict[str, dict[str, Any]] = {}
        self._lines: dict[Training, list[dict[str, Any]]] = {}
        names = asdict(Training("", "")).keys()
        for path in sorted(folder.glob("*.jsonl")):
            self.heads[path.stem], *lines = map(json.loads, path.read_text().splitlines())
            for line in lines:
                training = Training(**{name: line.pop(name) for name in names})
                self._lines.setdefault(training, []).append(line)

    def _of(self, training: Training, tuning: bool) -> list[dict[str, Any]]:
        lines = [line for line in self._lines.get(training, []) if line["tuning"] == tuning]
        return sorted(lines, key=lambda line: line["seed"])

    def values(self, training: Training, quantity: str) -> list[Any]:
        """A quantity of a training, for each seed that has it."""
        return [line["result"][quantity] for line in self._of(training, False) if quantity in line["result"]]

    def rate(self, training: Training) -> float | None:
        """The learning rate that was chosen; None if nothing is trained or nothing was run."""
        rates = {line["rate"] for line in self._of(training, False)}
        if len(rates) > 1:
            raise ValueError(f"{training.name}: trained at the rates {sorted(rates)}, of which one was chosen.")
        return rates.pop() if rates else None

    def at_edge(self, training: Training) -> bool:
        """Whether the chosen rate is the lowest or highest that was tried."""
        tried = training.rates
        return self.rate(training) in (min(tried), max(tried))

    def tuning(self, training: Training) -> dict[float, float]:
        """The share of validation problems solved at each rate that was tried, mean over seeds."""
        found: dict[float, list[float]] = {}
        for line in self._of(training.tuning, True):
            found.setdefault(line["rate"], []).append(line["result"]["held-out"])
        return {rate: statistics.mean(shares) for rate, shares in sorted(found.items())}
