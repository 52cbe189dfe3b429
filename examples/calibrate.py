"""Choosing alpha on held-out data, on the task of the quickstart: a minute on one CPU core, no network.

    python examples/calibrate.py

States are tuned with the paper's recipe in the convention of its authors' code: bare, to be scaled afterwards. At the
default alpha of 0.07, which is for far wider models, they do next to nothing here. It takes no second training to find
another: alpha is chosen by the loss on held-out solutions, by pass@1 on held-out problems, and then layer by layer.
What was chosen is judged on problems that neither training nor choosing has seen.
"""

import argparse
import json
import warnings
from itertools import islice
from pathlib import Path

import datasets
import torch
import transformers
from matplotlib.figure import Figure
from peft import PeftModel

from miniature.base import load_base, load_tokenizer
from miniature.evaluate import answer, solve
from miniature.sample import collect, own_solutions
from miniature.task import EOS, problems
from peft_s0 import S0Config, calibrate_alpha
from quickstart import SOLUTIONS, show_table, tune

GRID = [0.035, 0.07, 0.14, 0.28, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0]
PROBLEMS = 128
"""How many held-out problems pass@1 is measured on while alpha is chosen."""


def main() -> None:
    """Tunes, chooses alpha in three ways, and compares them on the test problems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("calibrate-output"), help="folder for all that is written")
    parser.add_argument("--seed", type=int, default=0, help="of problems, samples and adapters")
    parser.add_argument("--figure", type=Path, help="where the figure goes; by default into the folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the model is too small for more
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    seed, output = arguments.seed, arguments.output
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer, base = load_tokenizer(), load_base()

    # Solutions to tune on, others to choose alpha by, and problems nobody has solved yet.
    stream = problems("train", seed)
    solutions = collect(own_solutions(base, tokenizer, stream), 2 * SOLUTIONS, "right solutions")
    tuning, held_out = solutions[:SOLUTIONS], solutions[SOLUTIONS:]
    unsolved = list(islice(stream, PROBLEMS))
    rows = []
    for problem, body in held_out:
        prompt, whole = (tokenizer(text)["input_ids"] for text in (problem.prompt, problem.prompt + body + EOS))
        rows.append({"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]})

    def pass_at_1(model: PeftModel) -> float:
        return sum(solve(model, tokenizer, unsolved)[1]) / len(unsolved)

    def test(name: str) -> str:
        return f"{answer(model, tokenizer, name).rates['right']:.1%}"

    model, _ = tune(tokenizer, tuning, S0Config(train_alpha=1.0), 1e-3, 20, output / "states", seed)
    tested = {"base model": ("0", f"{answer(base, tokenizer, 'base').rates['right']:.1%}")}
    tested["the default"] = ("0.07", test("alpha 0.07"))
    model.set_alpha(1.0)
    tested["as in training"] = ("1", test("alpha 1"))

    by_loss = calibrate_alpha(model, rows, GRID, batch_size=SOLUTIONS)
    tested["by loss"] = (f"{by_loss.best:g}", test("by loss"))
    by_score = calibrate_alpha(model, pass_at_1, GRID)
    tested["by pass@1"] = (f"{by_score.best:g}", test("by pass@1"))
    layered = calibrate_alpha(model, rows, [by_loss.best], per_layer=1, batch_size=SOLUTIONS)
    alphas = [layered.best] if isinstance(layered.best, float) else layered.best.values()
    tested["by loss, layer by layer"] = (", ".join(f"{alpha:g}" for alpha in alphas), test("layer by layer"))
    model.save_pretrained(output / "states")

    learning = S0Config(alpha=1.0, learn_alpha=True)
    model, _ = tune(tokenizer, tuning, learning, 1e-3, 20, output / "learnt", seed)
    learnt = [layer.alpha("default") for layer in model.base_model.tuner_layers()]
    tested["learnt with the states, from 1"] = (", ".join(f"{alpha:.3f}" for alpha in learnt), test("learnt"))

    for title, result in (("loss", by_loss), ("pass@1", by_score), ("loss, layer by layer", layered)):
        print(f"\n{title}\n{result}")
        result.save(output / f"{title.replace(', ', '-').replace(' ', '-').replace('@', '-at-')}.json")
    show_table(["alpha chosen", "alpha", "pass@1, test"], [[name, *values] for name, values in tested.items()])
    (output / "tested.json").write_text(json.dumps(tested, indent=2) + "\n")

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    by_loss.plot(left).set_title(f"loss on {len(rows)} held-out solutions")
    by_score.plot(right).set_title(f"greedy pass@1 on {PROBLEMS} held-out problems")
    right.set_ylabel("pass@1")
    place = arguments.figure or output / "alpha.png"
    figure.savefig(place, dpi=160)
    print(f"The figure is {place}, everything else in {output}.")


if __name__ == "__main__":
    main()
