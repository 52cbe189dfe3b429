"""What it costs to have many tasks on one model, on a CPU.

    python benchmarks/bank.py [--json FILE]

The states are those of Qwen3.5-4B, 24 layers of [32, 128, 128]; the rest of the model is tiny, since none of these
operations computes with it. Times are medians over interleaved repetitions on one thread, with the 10th and the 90th
percentile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from peft_s0 import S0Config, S0Layer, StateBank

# Twice as many tasks as slots, used in turn: each is a miss.
TASKS = [f"task-{i}" for i in range(8)]
CAPACITY = 4

Operation = tuple[Callable[[], object], Callable[[object], object]]
"""What is done before the clock runs, and what is timed; the second is given what the first returns."""


def build() -> PreTrainedModel:
    """A model with the states of Qwen3.5-4B and little else."""
    config = Qwen3_5TextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        pad_token_id=0,
    )
    return Qwen3_5ForCausalLM(config).eval()


def save_tasks(folder: Path) -> None:
    """An adapter with random states for each task."""
    for task in TASKS:
        get_peft_model(build(), S0Config(init_weights=1.0)).save_pretrained(folder / task)


def states_file(folder: Path) -> Path:
    """The file of a saved adapter's states."""
    return folder / "adapter_model.safetensors"


def forget(folder: Path) -> None:
    """Drop a task's file from the page cache, so that it comes from the disk."""
    file = os.open(states_file(folder), os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def operations(folder: Path) -> tuple[dict[str, Operation], dict[str, float]]:
    """What is timed, and the megabytes of a task."""
    models = [PeftModel.from_pretrained(build(), folder / TASKS[0]) for _ in range(3)]
    models[0].load_adapter(folder / TASKS[1], "second")
    states = [get_peft_model_state_dict(models[0], adapter_name=name) for name in ("default", "second")]
    states = [{name: state.clone() for name, state in state.items()} for state in states]
    banks = [StateBank(model, CAPACITY, host) for model, host in zip(models, ("disk", "cpu", "disk"), strict=True)]
    for bank in banks:
        for task in TASKS:
            bank.add(task, folder / task)
    on_disk, in_memory, resident = banks
    adapters, contents = cycle(["second", "default"]), cycle(states)
    tasks = {name: cycle(TASKS) for name in ("memory", "disk", "swap", "load", "add")}

    def use(bank: StateBank, task: str) -> None:
        with bank.use([task]):
            pass

    def next_cold() -> str:
        task = next(tasks["disk"])
        forget(folder / task)
        return task

    def next_new() -> str:
        if "added" in resident:
            resident.remove("added")
        return next(tasks["add"])

    def next_free_name() -> str:
        if "loaded" in models[2].peft_config:
            models[2].delete_adapter("loaded")
        return next(tasks["load"])

    hits = cycle(TASKS[:CAPACITY])
    timed: dict[str, Operation] = {
        "set_adapter": (lambda: next(adapters), models[0].set_adapter),
        "bank: task in a slot": (lambda: next(hits), lambda task: use(resident, task)),
        "bank: task in CPU memory": (lambda: next(tasks["memory"]), lambda task: use(in_memory, task)),
        "bank: task on disk, file cached": (lambda: next(tasks["disk"]), lambda task: use(on_disk, task)),
        "bank: task on disk, not cached": (next_cold, lambda task: use(on_disk, task)),
        "bank.add, file cached": (next_new, lambda task: resident.add("added", folder / task)),
        "hotswap_adapter, file cached": (
            lambda: folder / next(tasks["swap"]),
            lambda path: models[0].hotswap_adapter(path, "second"),
        ),
        "set_peft_model_state_dict, CPU memory": (
            lambda: next(contents),
            lambda state: set_peft_model_state_dict(models[1], state),
        ),
        "load_adapter, file cached": (
            next_free_name,
            lambda task: models[2].load_adapter(folder / task, "loaded"),
        ),
    }
    slots = [layer.slots.states for layer in models[0].modules() if isinstance(layer, S0Layer)]
    sizes = {
        "in a slot": sum(states[0].nbytes for states in slots) / 1e6,
        "on disk": states_file(folder / TASKS[0]).stat().st_size / 1e6,
    }
    return timed, sizes


def measure(timed: dict[str, Operation], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each repetition; the first few rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for repetition in range(-len(TASKS), repetitions):
        for name, (prepare, run) in timed.items():
            argument = prepare()
            start = time.perf_counter()
            run(argument)
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    """Measure, print, and write the figures to a file if one is given."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--repetitions", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_tasks(Path(folder))
        timed, sizes = operations(Path(folder))
        seconds = measure(timed, arguments.repetitions)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    print(f"{processor()}, one thread, {versions}, {arguments.repetitions} repetitions\n")
    print(f"| {'24 layers of [32, 128, 128]':<38} | median | 10 % to 90 % |")
    print("| --- | --- | --- |")
    figures = {}
    for name, times in seconds.items():
        deciles = statistics.quantiles(times, n=10)
        low, median, high = (1e3 * value for value in (deciles[0], statistics.median(times), deciles[-1]))
        figures[name] = {"median_ms": median, "p10_ms": low, "p90_ms": high}
        print(f"| {name:<38} | {median:.2f} ms | {low:.2f} to {high:.2f} ms |")
    print(f"\nA task takes {sizes['in a slot']:.1f} MB in its slot and {sizes['on disk']:.1f} MB on disk.")
    print(f"In 8 GB of device memory are {int(8000 / sizes['in a slot']) - 1} slots, beside one of zeros.")
    if arguments.json:
        report = {"cpu": processor(), "versions": versions, "repetitions": arguments.repetitions}
        arguments.json.write_text(json.dumps({**report, "times": figures, "megabytes": sizes}, indent=2) + "\n")


if __name__ == "__main__":
    main()
