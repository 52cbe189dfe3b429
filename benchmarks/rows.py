"""What a different adapter for each row costs: the time of a batch with N adapters to that of the batch with one.

python benchmarks/rows.py [--rounds N] [--json FILE]

A batch of 32 rows runs through a hybrid model of 8 layers, in a prefill of 16 tokens and in decoding steps of
`generate()`. The baseline is the same batch with one adapter, chosen by `set_adapter`; against it stand `adapter_names`
with 1, 2, 8 and 32 different adapters, for S0 and for LoRA of rank 24 on the attention projections.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from time import process_time

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from timing import environment, interleave, parser, ratio, report

from peft_s0 import S0Config

ROWS, TOKENS, STEPS = 32, 16, 6
ADAPTERS = (1, 2, 8, 32)


def build(method: str) -> PeftModel:
    """A random hybrid model with 32 random adapters: 6 recurrent layers, states of 16 KiB, and 2 of attention."""
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        pad_token_id=0,
        eos_token_id=511,
    )
    model = Qwen3_5ForCausalLM(config).eval()
    adapter = {
        "S0": partial(S0Config, init_weights=0.1),
        "LoRA": partial(
            LoraConfig, r=24, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False
        ),
    }[method]
    tuned = get_peft_model(model, adapter(task_type="CAUSAL_LM"), "task-0")
    for i in range(1, max(ADAPTERS)):
        tuned.add_adapter(f"task-{i}", adapter(task_type="CAUSAL_LM"))
    return tuned.eval().requires_grad_(False)


class Clock(StoppingCriteria):
    """Notes when each step of `generate()` ends; never stops it."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """No row stops."""
        self.ends.append(process_time())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@torch.no_grad()
def prefill(model: PeftModel, ids: torch.Tensor, names: dict[str, list[str]]) -> float:
    """Milliseconds of one forward pass."""
    start = process_time()
    model(input_ids=ids, use_cache=True, **names)
    return 1e3 * (process_time() - start)


@torch.no_grad()
def decode(model: PeftModel, ids: torch.Tensor, names: dict[str, list[str]]) -> float:
    """Milliseconds of a step behind the prompt, the median of several."""
    clock = Clock()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=STEPS + 1,
        min_new_tokens=STEPS + 1,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
        **names,
    )
    return 1e3 * statistics.median(b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False))


def main() -> None:
    """Print the table."""
    options = parser("Cost of a different adapter for each row.", rounds=40).parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    ids = torch.randint(1, 500, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    models = {method: build(method) for method in ("S0", "LoRA")}
    candidates = {}
    for method, model in models.items():
        model.set_adapter("task-0")
        for phase in (prefill, decode):
            candidates[method, phase.__name__, 0] = partial(phase, model, ids, {})
            for count in ADAPTERS:
                names = list(chain.from_iterable([f"task-{i}"] * (ROWS // count) for i in range(count)))
                candidates[method, phase.__name__, count] = partial(phase, model, ids, {"adapter_names": names})
    times = interleave(candidates, options.rounds)
    rows = []
    for method, phase, count in candidates:
        if count == 0:
            continue
        baseline = times[method, phase, 0]
        median, low, high = ratio(times[method, phase, count], baseline)
        rows.append(
            {
                "method": method,
                "phase": phase,
                "adapters": count,
                "one adapter, ms": round(statistics.median(baseline), 2),
                "N adapters, ms": round(statistics.median(times[method, phase, count]), 2),
                "ratio": round(median, 3),
                "quartiles": f"{low:.3f} to {high:.3f}",
            }
        )
    report({"rows": rows}, environment(), options.json)


if __name__ == "__main__":
    main()
