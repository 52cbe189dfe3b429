"""S0 tuning in a minute, on one CPU core and without a network.

    python examples/quickstart.py

A tiny hybrid model (three recurrent layers, one of attention) can write short Python functions, but at a bare prompt it
falls into a bad habit: it forgets parentheses. We let it write solutions, keep those that pass when run, and tune on
them nothing but the initial states of its recurrent layers. LoRA is trained on the same solutions for comparison. The
tuned states are saved, loaded in a fresh process, and exchanged for those of a second task.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import datasets
import matplotlib as mpl
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from miniature.base import load_base, load_tokenizer
from miniature.evaluate import HELD_OUT, Answers, answer
from miniature.sample import collect, own_solutions
from miniature.task import Problem, as_dataset, is_one_line, problems
from peft_s0 import S0Config  # importing the package is all it takes for PEFT to know S0

SOLUTIONS = 48
"""How many verified solutions an adapter is tuned on."""

Solution = tuple[Problem, str]


def tune(
    tokenizer: PreTrainedTokenizerBase,
    solutions: list[Solution],
    peft_config: PeftConfig,
    learning_rate: float,
    steps: int,
    folder: Path,
    seed: int,
) -> tuple[PeftModel, dict[str, float]]:
    """Tunes an adapter with TRL, all solutions in each step, and saves it in `folder`."""
    trainer = SFTTrainer(
        model=load_base(),
        args=SFTConfig(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=SOLUTIONS,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            seed=seed,
            use_cpu=True,
            disable_tqdm=False,
            bf16=False,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=as_dataset(solutions),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.model.save_pretrained(folder)
    trainable, _ = trainer.model.get_nb_trainable_parameters()
    size = (folder / "adapter_model.safetensors").stat().st_size
    return trainer.model, {"trainable parameters": trainable, "file bytes": size, "tuning seconds": seconds}


def microseconds_to_switch(model: PeftModel, names: list[str], rounds: int = 200) -> float:
    """Median time of `set_adapter`."""
    times = []
    for _ in range(rounds):
        for name in names:
            start = time.perf_counter()
            model.set_adapter(name)
            times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def show_table(columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table, first column left-aligned."""
    lines = [columns, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    print()
    for line in lines:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]))
    print()


def draw(results: dict, path: Path) -> None:
    """Two bar charts: S0 beside LoRA, and two S0 adapters on one model."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"base": "#9aa5b1", "S0": "#2a6f97", "LoRA": "#e09f3e"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")

    methods = results["methods"]
    bars = left.bar(
        list(methods), [100 * row["pass@1"] for row in methods.values()], 0.6, color=[colours[name] for name in methods]
    )
    left.bar_label(bars, fmt="%.1f %%", padding=3)
    left.set_xticks(
        range(len(methods)),
        [
            f"{name}\n{row['trainable parameters']:,} parameters" if row["trainable parameters"] else f"{name}\nfrozen"
            for name, row in methods.items()
        ],
    )
    left.set_ylabel("greedy pass@1, %")
    left.set_title(f"{SOLUTIONS} verified solutions, {len(HELD_OUT)} held-out problems")

    tasks = results["tasks"]
    shades = ("#9aa5b1", "#2a6f97", "#7fb7be")
    for position, (name, row) in enumerate(tasks.items()):
        places = [metric + 0.28 * (position - 1) for metric in range(len(row))]
        bars = right.bar(places, [100 * rate for rate in row.values()], 0.26, label=name, color=shades[position])
        right.bar_label(bars, fmt="%.0f", padding=3)
    right.set_xticks(range(len(tasks["base"])), list(tasks["base"]))
    right.set_ylabel("held-out problems, %")
    right.set_title("Two S0 adapters on one model")
    right.legend(loc="upper center", ncols=3, frameon=False)

    for axes, top in ((left, 112), (right, 125)):
        axes.set_ylim(0, top)
        axes.set_yticks(range(0, 101, 20))
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.grid(alpha=0.25)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def check(folder: Path) -> None:
    """What the fresh process does: loads model and adapter from disk, prints its answers as JSON."""
    model = PeftModel.from_pretrained(load_base(), folder)
    print(json.dumps(asdict(answer(model, load_tokenizer(), "fresh process"))))


def answer_in_fresh_process(folder: Path) -> Answers:
    """Runs this file again with `--check`."""
    command = [sys.executable, __file__, "--check", str(folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Answers(**json.loads(output.splitlines()[-1]))


def main() -> None:
    """The whole story, from the frozen model to two adapters on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart-output"), help="folder for all that is written")
    parser.add_argument("--seed", type=int, default=0, help="of problems, samples and adapters")
    parser.add_argument("--check", type=Path, metavar="ADAPTER", help="only load this adapter and print its answers")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # the model is too small for more
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # of loading weights; those of training stay
    datasets.disable_progress_bars()
    if arguments.check:
        check(arguments.check)
        return

    start = time.perf_counter()
    seed, output = arguments.seed, arguments.output
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer = load_tokenizer()
    base = load_base()
    base_answers = answer(base, tokenizer, "base")

    # The data: what the frozen model itself got right.
    stream = problems("train", seed)
    solutions = collect(own_solutions(base, tokenizer, stream), SOLUTIONS, "right solutions")

    # Tuning. LoRA has the paper's settings. S0 has its 20 steps and its penalty, but the paper's alpha of 0.07 and
    # learning rate of 1e-3 are for far wider models: the first leaves this one as it was, the second sometimes does.
    s0 = S0Config(alpha=1.0, l2_lambda=5e-4)
    s0_model, s0_cost = tune(tokenizer, solutions, s0, 5e-3, 20, output / "right", seed)
    s0_answers = answer(s0_model, tokenizer, "S0")

    lora = LoraConfig(r=24, lora_alpha=48, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    lora_model, lora_cost = tune(tokenizer, solutions, lora, 5e-4, 50, output / "lora", seed)
    lora_answers = answer(lora_model, tokenizer, "LoRA")

    nothing = {"trainable parameters": 0, "file bytes": 0, "tuning seconds": 0.0}
    methods = {
        "base": {"pass@1": base_answers.rates["right"], **nothing},
        "S0": {"pass@1": s0_answers.rates["right"], **s0_cost},
        "LoRA": {"pass@1": lora_answers.rates["right"], **lora_cost},
    }
    show_table(
        ["", "pass@1", "trainable parameters", "file, kB", "tuning, s"],
        [
            [
                name,
                f"{row['pass@1']:.1%}",
                f"{row['trainable parameters']:,}",
                f"{row['file bytes'] / 1e3:.0f}",
                f"{row['tuning seconds']:.1f}",
            ]
            for name, row in methods.items()
        ],
    )

    # The saved adapter, read by a process that knows nothing of this one.
    fresh = answer_in_fresh_process(output / "right")
    same = sum(here == there for here, there in zip(s0_answers.bodies, fresh.bodies, strict=True))
    print(f"\nS0 pass@1 here {s0_answers.rates['right']!r}, in a fresh process {fresh.rates['right']!r};", end=" ")
    print(f"{same} of {len(HELD_OUT)} programs are the same.\n")
    if fresh != s0_answers:
        raise SystemExit("The adapter that was loaded is not the one that was saved.")

    # A second task, with solutions of its own: right, and in one line.
    candidates = own_solutions(base, tokenizer, stream, is_one_line)
    short_solutions = collect(candidates, SOLUTIONS, "right one-line solutions")
    tune(tokenizer, short_solutions, s0, 5e-3, 20, output / "one-line", seed)

    # Both on one frozen model. Exchanging them touches no weight.
    model = PeftModel.from_pretrained(base, output / "right", adapter_name="right")
    model.load_adapter(output / "one-line", adapter_name="one-line")
    answers = {"base": base_answers}
    for name in ("right", "one-line"):
        model.set_adapter(name)
        answers[name] = answer(model, tokenizer, f"adapter {name!r}")
    example = base_answers.verdicts.index(False)
    print(f"\n{HELD_OUT[example].prompt}")
    for name, given in answers.items():
        print(f"\n    # {name}: {'passes' if given.verdicts[example] else 'fails'}{given.bodies[example]}")
    tasks = {name: given.rates for name, given in answers.items()}
    show_table(
        ["adapter", *base_answers.rates],
        [[name, *(f"{rate:.1%}" for rate in row.values())] for name, row in tasks.items()],
    )
    switch = microseconds_to_switch(model, ["right", "one-line"])
    print(f"set_adapter takes {switch:.0f} microseconds.")

    results = {
        "seed": seed,
        "held-out problems": len(HELD_OUT),
        "methods": methods,
        "pass@1 in a fresh process": fresh.rates["right"],
        "same programs in a fresh process": same,
        "tasks": tasks,
        "microseconds to switch": switch,
        "seconds": time.perf_counter() - start,
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(results, output / "quickstart.png")
    print(f"Results and figure in {output}, {results['seconds']:.0f} seconds.")


if __name__ == "__main__":
    main()
