"""Fails where S0 has become slower than it was: ratios measured side by side, each with a bound.

    python benchmarks/ratios.py [--rounds 12] [--tries 5] [--json FILE]

takes less than a minute. Times would depend on the machine, ratios hardly do. The bounds leave room for noise and for
small models, whose Python takes a larger share: what S0 costs is in `overhead.py` and `gpu.py`, and what little it runs
in a step is counted in tests/test_cost.py. A ratio above its bound is measured further, with all rounds together,
before it counts.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from overhead import LORA_EVERYWHERE, METHODS, base, batches, decode, prefill, tokens, train
from timing import environment, interleave, parser, ratio, report

from peft_s0 import S0Config

ADAPTERS, BOUND = 8, 1.15


@dataclass(frozen=True)
class Bound:
    """A ratio that is not to grow.

    Args:
        what: what is measured.
        of: returns the time of S0.
        to: returns the time that it is compared with.
        against: what that is.
        at_most: the bound.
    """

    what: str
    of: Callable[[], float]
    to: Callable[[], float]
    against: str
    at_most: float

    def judge(self, rounds: int, tries: int) -> dict[str, Any]:
        """Measure until the ratio is within its bound, at most so many times.

        Returns:
            A row of the table; `held` says whether it was.
        """
        times: dict[str, list[float]] = {"of": [], "to": []}
        for _ in range(tries):
            for name, more in interleave({"of": self.of, "to": self.to}, rounds, warmup=1).items():
                times[name] += more
            median, low, high = ratio(times["of"], times["to"])
            if median <= self.at_most:
                break
        return {
            "measured": self.what,
            "against": self.against,
            "S0, ms": round(statistics.median(times["of"]), 2),
            "ratio": round(median, 3),
            "quartiles": f"{low:.3f} to {high:.3f}",
            "at most": self.at_most,
            "held": median <= self.at_most,
        }


@torch.no_grad()
def mixed(names: list[str], model: nn.Module) -> float:
    """Milliseconds of a batch's prefill, each row from the state of its own adapter."""
    return prefill(tokens("cpu", len(names), 32), None, partial(model, adapter_names=names))


def bounds() -> list[Bound]:
    """What is measured."""
    plain, s0, lora = (METHODS[method](base("cpu")).eval() for method in ("base", "S0", LORA_EVERYWHERE))
    several = METHODS["S0"](base("cpu")).eval()
    for number in range(1, ADAPTERS):
        several.add_adapter(f"task-{number}", S0Config(init_weights=0.1))
    padded = batches("cpu")["padded"]
    few = {name: tensor[::7] for name, tensor in padded.items()}
    names = list(several.peft_config)
    return [
        # Two hooks a layer.
        Bound("decode, 1 x 1", partial(step, s0), partial(step, plain), "base", BOUND),
        # A state to scale.
        Bound("prefill, 1 x 128", partial(row, s0), partial(row, plain), "base", BOUND),
        # Gates to hold at pads.
        Bound(
            "prefill, 2 x 64 to 128, left-padded",
            partial(prefill, few["input_ids"], few["attention_mask"].flip(1), s0),
            partial(prefill, few["input_ids"], few["attention_mask"].flip(1), plain),
            "base",
            BOUND,
        ),
        # States to gather.
        Bound(
            f"prefill, {ADAPTERS} x 32, {ADAPTERS} adapters",
            partial(mixed, names, several),
            partial(mixed, names[:1] * len(names), several),
            "one adapter",
            BOUND,
        ),
        # The backward pass down to the first layer, for both, and no gradients of weights.
        Bound("train, 2 x 128", partial(train, few, s0), partial(train, few, lora), LORA_EVERYWHERE, BOUND),
    ]


def step(model: nn.Module) -> float:
    """Milliseconds of a decoding step."""
    return decode(tokens("cpu", 1, 16), False, model)


def row(model: nn.Module) -> float:
    """Milliseconds of a prefill."""
    return prefill(tokens("cpu", 1, 128), None, model)


def main(words: list[str] | None = None) -> int:
    """Print the table.

    Returns:
        1 if a ratio is above its bound, else 0.
    """
    command = parser("Whether S0 has become slower than it was.", rounds=12)
    command.add_argument("--tries", type=int, default=5, help="how often a ratio above its bound is measured")
    options = command.parse_args(words)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    rows = [bound.judge(options.rounds, options.tries) for bound in bounds()]
    report({"ratios": rows}, environment(), options.json)
    above = [row["measured"] for row in rows if not row["held"]]
    for name in above:
        print(f"above its bound: {name}")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
