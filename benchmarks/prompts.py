"""What the state of a prompt keeps of the prompt, in three tables.

python benchmarks/prompts.py [--seeds N] [--json FILE]

1. Random tiny models of the tests: how far the logits of a text are from those behind a prompt of 40 tokens, without
   the prompt and with its state, as KL(behind the prompt || without it). Nothing of the prompt is lost in a model of
   recurrent layers alone whose convolutions look at one token; the other models lose what the table says.
2. The model of the quickstart: greedy pass@1 with two of its own verified solutions in the context, and from their
   state, whose scale (alpha) is raised after it was made.
3. The same model: pass@1 after a few steps of training that starts from zeros, and from the state of two solutions.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "examples"), str(ROOT / "tests")]

from architectures import ARCHITECTURES, mixers  # noqa: E402
from timing import environment, report  # noqa: E402

from miniature.base import load_base, load_tokenizer  # noqa: E402
from miniature.evaluate import HELD_OUT, complete  # noqa: E402
from miniature.execute import passes  # noqa: E402
from miniature.sample import own_solutions  # noqa: E402
from miniature.task import EOS, Problem, problems  # noqa: E402
from peft_s0 import S0Config, state_from_prompt  # noqa: E402
from quickstart import SOLUTIONS, tune  # noqa: E402

ALPHAS = (1.0, 1.5, 2.0, 3.0, 4.0)
STEPS = (1, 2, 5, 10, 20)
PAIRS = 4
MODELS = {
    "mamba2": "recurrent",
    "falcon_mamba": "recurrent",
    "qwen3_5": "recurrent and attention",
    "falcon_h1": "recurrent and attention",
    "nemotron_h": "recurrent and attention",
}


@torch.no_grad()
def what_is_left(models: int = 8, prompt_tokens: int = 40, text_tokens: int = 24) -> list[dict[str, Any]]:
    """KL per token behind the first six tokens of a text, where the convolutions of the prompt no longer reach."""
    rows = []
    for row in ARCHITECTURES:
        if row.name not in MODELS:
            continue
        for looks_back in (True, False):
            totals = []
            for seed in range(models):
                base = row.build(seed)
                if not looks_back:
                    for mixer in mixers(base):
                        mixer.conv1d.weight[..., :-1] = 0
                generator = torch.Generator().manual_seed(seed)
                ids = torch.randint(3, 99, (1, prompt_tokens + text_tokens), generator=generator)
                prompt, text = ids.split([prompt_tokens, text_tokens], dim=1)
                behind = base(ids).logits[:, prompt_tokens:]
                without = divergence(behind, base(text).logits)
                totals.append((without, divergence(behind, state_from_prompt(base, None, prompt)(text).logits)))
            without, left = (statistics.mean(column) for column in zip(*totals, strict=True))
            rows.append(
                {
                    "model": row.name,
                    "layers": MODELS[row.name],
                    "convolution": "4 tokens" if looks_back else "1 token",
                    "KL without the prompt": f"{without:.1e}",
                    "KL with its state": f"{left:.1e}",
                    "left": f"{left / without:.0%}" if left > 1e-8 else "0, to rounding",
                }
            )
    return rows


def divergence(behind: Tensor, other: Tensor) -> float:
    """Mean KL of a token, from the seventh on."""
    behind, other = (logits[:, 6:].double().log_softmax(-1) for logits in (behind, other))
    return max(0.0, float((behind.exp() * (behind - other)).sum(-1).mean()))


def pass_at_1(model: nn.Module, context: str = "") -> float:
    """Share of the held-out problems whose greedy program passes when run."""
    bodies = complete(model, load_tokenizer(), [context + problem.prompt for problem in HELD_OUT])
    programs = [problem.prompt + body for problem, body in zip(HELD_OUT, bodies, strict=True)]
    return sum(passes(programs, [problem.tests for problem in HELD_OUT])) / len(HELD_OUT)


def solutions_of(seed: int) -> tuple[list[tuple[Problem, str]], list[str]]:
    """What the quickstart trains on, and prompts of two of these solutions each."""
    torch.manual_seed(seed)
    solutions = list(islice(own_solutions(load_base(), load_tokenizer(), problems("train", seed)), SOLUTIONS))
    texts = [problem.prompt + body + EOS for problem, body in solutions]
    return solutions, [one + other for one, other in zip(texts[::2], texts[1::2], strict=True)]


def by_alpha(prompt: str | list[str]) -> dict[float, float]:
    """Pass@1 from the state of a prompt, at several scales."""
    model = state_from_prompt(load_base(), load_tokenizer(), prompt)
    rates = {}
    for alpha in ALPHAS:
        model.set_alpha(alpha)
        rates[alpha] = pass_at_1(model)
    return rates


def shown(rates: list[float]) -> str:
    """Mean, and the range."""
    return f"{statistics.mean(rates):.1%} ({min(rates):.1%} to {max(rates):.1%})"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of solutions and training")
    parser.add_argument("--json", type=Path, help="also write the results to files that begin with this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def write(part: int, rows: list[dict[str, Any]]) -> None:
        file = None if options.json is None else options.json.with_suffix(f".{part}.json")
        report(rows, environment(), file)
        print(flush=True)

    write(1, what_is_left())

    base = pass_at_1(load_base())
    in_context: list[float] = []
    single: dict[float, list[float]] = {alpha: [] for alpha in ALPHAS}
    mean: dict[float, list[float]] = {alpha: [] for alpha in ALPHAS}
    trained: dict[tuple[str, int], list[float]] = {}
    for seed in range(options.seeds):
        solutions, pairs = solutions_of(seed)
        for pair in pairs[:PAIRS]:
            in_context.append(pass_at_1(load_base(), pair))
            for alpha, rate in by_alpha(pair).items():
                single[alpha].append(rate)
        for alpha, rate in by_alpha(pairs).items():
            mean[alpha].append(rate)
        for steps in STEPS:
            starts = {"zeros": {}, "two solutions": {"init_weights": "prompt", "init_prompt": pairs[0]}}
            for start, init in starts.items():
                config = S0Config(alpha=1.0, l2_lambda=5e-4, **init)
                with tempfile.TemporaryDirectory() as folder:
                    model, _ = tune(load_tokenizer(), solutions, config, 5e-3, steps, Path(folder), seed)
                trained.setdefault((start, steps), []).append(pass_at_1(model))
    rows = [
        {"start": "nothing", "pass@1 (range)": f"{base:.1%}"},
        {"start": "two solutions in the context", "pass@1 (range)": shown(in_context)},
    ]
    for name, rates in (("state of two solutions", single), (f"mean state of {len(pairs)} such prompts", mean)):
        for alpha in ALPHAS:
            rows.append({"start": f"{name}, alpha {alpha:g}", "pass@1 (range)": shown(rates[alpha])})
    write(2, rows)
    write(
        3,
        [
            {
                "steps": steps,
                "from zeros": shown(trained["zeros", steps]),
                "from the state of two solutions": shown(trained["two solutions", steps]),
            }
            for steps in STEPS
        ],
    )


if __name__ == "__main__":
    main()
