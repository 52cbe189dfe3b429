"""Timing side by side: what all benchmarks share.

A machine is never quiet. So the candidates run in turns, in another order each round, and are compared within a round;
of these ratios the median counts. Time is that of the processor on one thread, so that other processes do not count,
but for the caches they share. Absolute times are shown for their size only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def interleave(candidates: dict[str, Callable[[], float]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Run every candidate once a round.

    Args:
        candidates: functions that return a time.
        rounds: how many times each one counts.
        warmup: rounds before these.

    Returns:
        For each candidate its times, one for each round.
    """
    order, times = list(candidates), {name: [] for name in candidates}
    shuffle = random.Random(0).shuffle
    for round_ in range(-warmup, rounds):
        shuffle(order)
        for name in order:
            elapsed = candidates[name]()
            if round_ >= 0:
                times[name].append(elapsed)
    return times


def ratio(times: list[float], baseline: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratios, round by round."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(times, baseline, strict=True)], n=4)
    return median, low, high


@contextmanager
def clock(device: torch.device) -> Iterator[Callable[[], float]]:
    """Times what runs inside it: the processor's time on a CPU, the wall's on an accelerator, once it is idle.

    Yields:
        A function that returns the milliseconds.
    """
    if device.type == "cpu":
        now = time.process_time
    else:

        def now() -> float:
            torch.accelerator.synchronize(device)
            return time.perf_counter()

    start, end = now(), 0.0
    yield lambda: 1e3 * (end - start)
    end = now()


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a figure depends on."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": date.today().isoformat(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "cpu": names[0].partition(": ")[2] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The command line of a benchmark, to which it may add its own arguments."""
    command = argparse.ArgumentParser(description=description)
    command.add_argument("--rounds", type=int, default=rounds, help="how many times each candidate is timed")
    command.add_argument("--json", type=Path, help="also write the results to this file")
    return command


def show(rows: list[dict[str, Any]]) -> None:
    """Print a Markdown table."""
    print(f"| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row.values())} |")


def report(tables: dict[str, list[dict[str, Any]]], conditions: dict[str, Any], file: Path | None) -> None:
    """Print Markdown tables and what they were measured under, and write both to a file if one is given."""
    for rows in tables.values():
        show(rows)
        print()
    versions = ", ".join(f"{name} {number}" for name, number in conditions["versions"].items())
    print(
        f"{conditions['date']}, {conditions['cpu']}, {conditions['threads']} thread of {conditions['cores']} cores, "
        f"load {conditions['load']} at the end; {versions}."
    )
    if file is not None:
        file.write_text(json.dumps({"conditions": conditions, "tables": tables}, indent=2) + "\n")
