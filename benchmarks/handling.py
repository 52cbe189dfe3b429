"""What it takes to import the package, and to switch between adapters.

    python benchmarks/handling.py [--rounds 200] [--imports 15] [--json FILE]

Imports run in processes of their own, in turns: `peft` after torch and transformers, and `peft_s0` after all of them.
Switches are `set_adapter` on models of 32 layers, 24 of them recurrent, with 2, 8 and 32 adapters: S0 in the recurrent
layers, LoRA in the projections of the 8 layers of attention, LoRA in those of all 32.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from overhead import ATTENTION, MIXERS, base
from timing import environment, interleave, parser, report

from peft_s0 import S0Config

ADAPTERS = (2, 8, 32)
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "S0": S0Config,
    "LoRA, attention": partial(LoraConfig, r=24, target_modules=ATTENTION),
    "LoRA, attention and mixers": partial(LoraConfig, r=24, target_modules=ATTENTION + MIXERS),
}
# Of which only the number of layers counts.
TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
SCRIPT = """
import time
import {first}
from transformers import AutoModelForCausalLM
start = time.process_time()
import {second}
print(time.process_time() - start)
"""


def imported(first: str, second: str) -> float:
    """Milliseconds that importing one thing takes after another, in a new process."""
    script = SCRIPT.format(first=first, second=second)
    # Compiled once, as installed packages are.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=environment)
    return 1e3 * float(run.stdout)


def switch(model: nn.Module, names: Any) -> float:
    """Microseconds of a switch."""
    start = time.process_time_ns()
    model.set_adapter(next(names))
    return (time.process_time_ns() - start) / 1e3


def quartiles(times: list[float]) -> str:
    """As all tables show them."""
    low, _, high = statistics.quantiles(times, n=4)
    return f"{low:.1f} to {high:.1f}"


def imports(rounds: int) -> list[dict[str, Any]]:
    """The table of imports."""
    candidates = {
        "peft, after transformers": partial(imported, "torch", "peft"),
        "peft_s0, after peft": partial(imported, "peft", "peft_s0"),
    }
    return [
        {"import": name, "ms": round(statistics.median(times), 1), "quartiles": quartiles(times)}
        for name, times in interleave(candidates, rounds, warmup=1).items()
    ]


def switches(rounds: int) -> list[dict[str, Any]]:
    """The table of switches."""
    models = {
        method: get_peft_model(base("cpu", **TINY), config(), "task-0").eval() for method, config in CONFIGS.items()
    }
    rows = []
    for number in ADAPTERS:
        for method, model in models.items():
            for other in range(len(model.peft_config), number):
                model.add_adapter(f"task-{other}", CONFIGS[method]())
        names = {method: cycle(["task-1", "task-0"]) for method in models}
        candidates = {method: partial(switch, model, names[method]) for method, model in models.items()}
        for method, times in interleave(candidates, rounds).items():
            us = statistics.median(times)
            rows.append({"adapters": number, "method": method, "us": round(us, 1), "quartiles": quartiles(times)})
    return rows


def main() -> None:
    """Print the tables."""
    command = parser("What it takes to import the package, and to switch between adapters.", rounds=200)
    command.add_argument("--imports", type=int, default=15, help="how many times each import is timed")
    options = command.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    tables = {"imports": imports(options.imports), "switches": switches(options.rounds)}
    report(tables, environment(), options.json)


if __name__ == "__main__":
    main()
