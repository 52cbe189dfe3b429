"""What a state offset costs, which is read at every step: times of the variants to that of the base model.

python benchmarks/offset.py [--rounds N] [--json FILE]

Two hybrid models of 8 layers, one of each of the two recurrences that take offsets, in a prefill of 128 tokens and in
decoding steps of `generate()`, a single row. "initial" is a state that is learnt to start from, "offset" a tensor that
is added whenever the state is read, "both" one of each.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path
from time import process_time

import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    StoppingCriteriaList,
)
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from rows import Clock
from timing import environment, interleave, parser, ratio, report

from peft_s0 import S0Config

TOKENS, STEPS = 128, 8
VARIANTS = ("base", "initial", "offset", "both")
COMMON = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "pad_token_id": 0,
    "eos_token_id": 511,
}


def gated_delta_rule() -> PreTrainedModel:
    """6 recurrent layers with states of 8 x 64 x 64, and 2 of attention."""
    heads = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
    sizes = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**COMMON, **heads, **sizes))


def mamba2() -> PreTrainedModel:
    """8 recurrent layers with states of 8 x 64 x 64, each with attention beside it."""
    sizes = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_ssm": 512, "mamba_d_state": 64, "mamba_n_groups": 1}
    return FalconH1ForCausalLM(FalconH1Config(**COMMON, **sizes))


MODELS = {"gated delta rule": gated_delta_rule, "Mamba-2": mamba2}


def build(model: str, variant: str) -> nn.Module:
    """A random model, with random states or offsets of a variant."""
    torch.manual_seed(0)
    base = MODELS[model]().eval().requires_grad_(False)
    return base if variant == "base" else get_peft_model(base, S0Config(variant=variant, init_weights=0.1)).eval()


@torch.no_grad()
def prefill(model: nn.Module, ids: torch.Tensor) -> float:
    """Milliseconds of one forward pass."""
    start = process_time()
    model(input_ids=ids, use_cache=True)
    return 1e3 * (process_time() - start)


@torch.no_grad()
def decode(model: nn.Module, ids: torch.Tensor) -> float:
    """Milliseconds of a step behind the prompt, the median of several."""
    clock = Clock()
    model.generate(
        input_ids=ids[:, :16],
        attention_mask=torch.ones_like(ids[:, :16]),
        max_new_tokens=STEPS + 1,
        min_new_tokens=STEPS + 1,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return 1e3 * statistics.median(b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False))


def shown(times: list[float], baseline: list[float]) -> str:
    """A ratio with its quartiles."""
    median, low, high = ratio(times, baseline)
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Print the table."""
    options = parser("Cost of a state offset.", rounds=30).parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    ids = torch.randint(1, 500, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    candidates = {}
    for recurrence in MODELS:
        models = {variant: build(recurrence, variant) for variant in VARIANTS}
        for phase in (prefill, decode):
            for variant, model in models.items():
                candidates[recurrence, phase.__name__, variant] = partial(phase, model, ids)
    times = interleave(candidates, options.rounds)
    rows = []
    for recurrence, phase, variant in candidates:
        own = times[recurrence, phase, variant]
        base, initial = (times[recurrence, phase, other] for other in ("base", "initial"))
        if variant != "base":
            rows.append(
                {
                    "recurrence": recurrence,
                    "phase": phase,
                    "variant": variant,
                    "base, ms": round(statistics.median(base), 2),
                    "ms": round(statistics.median(own), 2),
                    "to base": shown(own, base),
                    "to initial": "" if variant == "initial" else shown(own, initial),
                }
            )
    report({"offsets": rows}, environment(), options.json)


if __name__ == "__main__":
    main()
