"""Runs the experiments of a table of the paper: collects solutions, trains, evaluates, and writes the report.

    python experiments/run.py main --allow-code-execution

What is done is kept and not repeated: a run that was stopped goes on with the same command. See README.md.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import datasets
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))  # the sandbox and the tiny model

import sandbox
import tiny
from methods import MODELS, Training
from paper import TABLES, Setting
from report import write_report
from steps import Bench, bench_of, evaluate
from tasks import TASKS


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = f"{', '.join(TABLES)}, or all; none: only the report"
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=tables)
    parser.add_argument("--model", help="in place of the paper's: 'tiny', a folder, a name on the Hub or in MODELS")
    parser.add_argument("--task", choices=[*TASKS], help="in place of the paper's")
    parser.add_argument("--seeds", type=int, help="the most for a setting, in place of as many as in the paper")
    parser.add_argument("--problems", type=int, help="the most to collect from, and to evaluate on")
    parser.add_argument("--output", type=Path, default=Path("paper-output"), help="folder for all that is written")
    parser.add_argument("--data", type=Path, help="folder with TASK/SPLIT.jsonl, in place of the Hub")
    parser.add_argument("--databases", type=Path, help="folder 'database' of Spider's archive")
    parser.add_argument(
        "--convention", choices=["paper", "code"], default="paper", help="alpha in training: alpha, or 1"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="of the model; bfloat16 but on a CPU")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts that are answered at a time")
    parser.add_argument("--new-tokens", type=int, help="of the longest answer, in place of the task's")
    parser.add_argument("--allow-code-execution", action="store_true", help="run the programs that the model writes")
    parser.add_argument("--unconfined", action="store_true", help="even if the system cannot keep them apart")
    arguments = parser.parse_args(words)
    if unknown := {*arguments.tables} - {*TABLES, "all"}:
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    return arguments


def plan(arguments: argparse.Namespace, setting: Setting) -> tuple[str, str, Training, float | None]:
    """A setting as it is run: model, task, training, alpha in use."""
    model, task = arguments.model or setting.model, arguments.task or setting.task
    training, alpha_in_use = setting.training, setting.alpha_in_use
    if model == tiny.NAME:
        training, alpha_in_use = tiny.rescale(training, alpha_in_use)
    if arguments.convention == "code" and training.method == "s0":
        training = Training(**{**vars(training), "train_alpha": 1.0})
    return model, task, training, alpha_in_use


def bench(arguments: argparse.Namespace, model: str, task: str) -> Bench:
    """Where the settings of a model and a task are run."""
    is_tiny = model == tiny.NAME
    name = str(tiny.FOLDER) if is_tiny else MODELS.get(model, model)
    return bench_of(
        task,
        model_name=name,
        label=model.replace("/", "--").strip("-"),
        output=arguments.output,
        data=arguments.data or (arguments.output / "problems" if is_tiny else None),
        databases=arguments.databases,
        device="cpu" if is_tiny else arguments.device,
        dtype=getattr(torch, arguments.dtype or ("float32" if is_tiny or arguments.device == "cpu" else "bfloat16")),
        batch_size=64 if is_tiny else arguments.batch_size,
        new_tokens=arguments.new_tokens or (tiny.NEW_TOKENS if is_tiny else None),
        problems=arguments.problems or (tiny.PROBLEMS if is_tiny else None),
    )


def main(words: list[str] | None = None) -> None:
    """All settings of the chosen tables, then the report on all that is in the folder."""
    arguments = parse(words)
    tables = list(TABLES) if "all" in arguments.tables else arguments.tables
    settings = [setting for table in tables for setting in TABLES[table].settings]
    planned = [(setting, *plan(arguments, setting)) for setting in settings]
    if any(TASKS[task].runs_answers for _, _, task, *_ in planned):
        sandbox.allow(arguments.allow_code_execution, arguments.unconfined)
    if arguments.model == tiny.NAME and arguments.data is None:
        if {task for _, _, task, *_ in planned} != {"humaneval"}:
            raise SystemExit("The tiny model only knows Python functions: add --task humaneval.")
        tiny.write_problems(arguments.output / "problems")
        torch.set_num_threads(1)  # the model is too small for more
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # of loading weights
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)

    benches: dict[tuple[str, str], Bench] = {}
    for setting, model, task, training, alpha_in_use in planned:
        if (model, task) not in benches:
            for other in benches.values():
                other.close()  # one model in memory at a time
            benches[model, task] = bench(arguments, model, task)
        for seed in range(min(setting.seeds, arguments.seeds or setting.seeds)):
            record = evaluate(benches[model, task], training, seed, alpha_in_use, setting.samples)
            print(f"{model}, {task}, {setting.label}, seed {seed}: pass@1 {record['result']['pass@1']:.1%}", flush=True)
    rows = {table: [(setting, *plan(arguments, setting)) for setting in TABLES[table].settings] for table in TABLES}
    write_report(rows, lambda model, task: bench(arguments, model, task), arguments.output / "report")
    print(f"Tables and figures are in {arguments.output / 'report'}.")


if __name__ == "__main__":
    main()
