"""Make the pictures and tables of docs/reading-a-state.md: python docs/make_reading.py

Tunes the adapter of the quickstart (seed 0) on its tiny model and reads it with `peft_s0.analysis`. Prints the tables;
the pictures are written beside this file. A minute on one CPU core.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from itertools import islice
from pathlib import Path

import datasets
import matplotlib as mpl
import torch
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from miniature.base import load_base, load_tokenizer  # noqa: E402
from miniature.evaluate import HELD_OUT, answer  # noqa: E402
from miniature.sample import own_solutions  # noqa: E402
from miniature.task import problems  # noqa: E402
from peft_s0 import S0Config, analysis  # noqa: E402
from quickstart import SOLUTIONS, tune  # noqa: E402


def main() -> None:
    """Tune, read, draw."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()

    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    base = load_base()
    answers = answer(base, tokenizer, "base")
    solutions = list(islice(own_solutions(base, tokenizer, problems("train", 0)), SOLUTIONS))
    with tempfile.TemporaryDirectory() as folder:
        model, _ = tune(tokenizer, solutions, S0Config(alpha=1.0), 5e-3, 20, Path(folder), 0)
    tuned = answer(model, tokenizer, "S0")
    corrected = [
        problem for problem, was, now in zip(HELD_OUT, answers.verdicts, tuned.verdicts, strict=True) if now and not was
    ]
    prompts = [problem.prompt for problem in corrected]
    texts = [problem.prompt + body for problem, body in zip(HELD_OUT, tuned.bodies, strict=True)]

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    results = {
        "norms": analysis.norms(model),
        "memory": analysis.memory(model, tokenizer, texts[:16]),
        "influence": analysis.influence(model, tokenizer, texts, batch_size=32),
        f"divergence ({len(prompts)} corrected answers)": analysis.divergence(
            model, tokenizer, prompts, max_new_tokens=32, batch_size=64
        ),
    }
    print(f"pass@1: base {answers.rates['right']:.1%}, S0 {tuned.rates['right']:.1%}")
    lengths = [len(ids) for ids in tokenizer([problem.prompt for problem in HELD_OUT])["input_ids"]]
    print(f"prompts have {min(lengths)} to {max(lengths)} tokens")
    for (name, result), ax in zip(results.items(), axes.flat, strict=True):
        print(f"\n{name}\n{result}")
        result.plot(ax)
        ax.set_title(name)
        if name != "norms":
            ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "reading-a-state.png", dpi=85)


if __name__ == "__main__":
    main()
