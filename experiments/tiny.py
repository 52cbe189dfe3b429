"""The tiny model of the examples and problems for it, in HumanEval's schema: every table in minutes on a CPU core."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

from methods import Training
from miniature.base import FOLDER
from miniature.task import Problem, problems

NAME = "tiny"
FOLDER = FOLDER
PROBLEMS = 32
"""To collect from, and to evaluate on."""

NEW_TOKENS = 40


def _row(problem: Problem, number: int) -> dict[str, str]:
    tests = "\n    ".join(test.replace(f"{problem.name}(", "candidate(", 1) for test in problem.tests)
    return {
        "task_id": f"tiny/{number}",
        "prompt": problem.prompt,
        "test": f"def check(candidate):\n    {tests}\n",
        "entry_point": problem.name,
    }


def write_problems(data: Path) -> None:
    """Writes `DATA/humaneval/test.jsonl`: as in HumanEval, the first 80 to collect from and 84 held out."""
    file = data / "humaneval" / "test.jsonl"
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    chosen = [*islice(problems("train"), 80), *islice(problems("test"), 84)]
    file.write_text("".join(json.dumps(_row(problem, number)) + "\n" for number, problem in enumerate(chosen)))


def rescale(training: Training, alpha_in_use: float | None) -> tuple[Training, float | None]:
    """The training in the scale of the tiny model, which the paper's rate and alphas leave as it was.

    What is 0.07 there is 1 here, and the rate of S0 is five times higher.
    """
    if training.method not in ("s0", "offset"):
        return training, alpha_in_use
    scaled = 1.0 if training.alpha is None else round(training.alpha / 0.07, 3)
    changed = replace(training, alpha=scaled, learning_rate=training.learning_rate or 5e-3)
    return changed, None if alpha_in_use is None else round(alpha_in_use / 0.07, 3)
