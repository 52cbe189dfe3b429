"""Tokens a second and memory on a GPU, at the sizes of Qwen3.5-4B and Falcon-H1-7B, with random weights in bfloat16.

    python benchmarks/gpu.py [--model qwen3_5_4b falcon_h1_7b] [--rounds N] [--device cuda] [--small] [--json FILE]

Base, S0 and LoRA (rank 24 on the attention projections) run in turns: prefill of one long row and of a left-padded
batch, decoding steps with 1, 8 and 32 rows, 32 rows with an adapter each, a training step of the paper's recipe (48
solutions of 256 tokens, 4 rows at a time) with its peak memory, and a switch of task. For decoding steps the table says
how many bytes a second they move, for weights and recurrent states, beside what the device's memory copies. `--small`
takes small models, to check the program itself.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from transformers import FalconH1Config, Qwen3_5TextConfig
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from overhead import ATTENTION, LORA, decode, lora, on_cache, prefill, tokens
from timing import clock, environment, interleave, parser, ratio, report

from peft_s0 import S0Config

SOLUTIONS, LENGTH, ROWS = 48, 256, 4
ADAPTERS = 32
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 512}


def qwen3_5_4b(small: bool) -> Any:
    """32 layers of which 24 recur, with states of [32, 128, 128]."""
    sizes = {"hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32, "vocab_size": 248320}
    return Qwen3_5TextConfig(
        **(SMALL if small else sizes),
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        tie_word_embeddings=True,
        pad_token_id=0,
    )


def falcon_h1_7b(small: bool) -> Any:
    """44 layers, all of which recur beside attention, with states of [24, 128, 256]."""
    sizes = {"hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 44, "vocab_size": 130048}
    return FalconH1Config(
        **(SMALL if small else sizes),
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=128,
        mamba_d_ssm=3072,
        mamba_n_heads=24,
        mamba_d_head=128,
        mamba_n_groups=1,
        mamba_d_state=256,
        mamba_chunk_size=256,
        pad_token_id=0,
    )


MODELS: dict[str, Callable[[bool], Any]] = {"qwen3_5_4b": qwen3_5_4b, "falcon_h1_7b": falcon_h1_7b}


def base(config: Any, device: str) -> nn.Module:
    """A random model in bfloat16, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def many(model: nn.Module) -> nn.Module:
    """S0 with an adapter for each of 32 rows."""
    tuned = get_peft_model(model, S0Config(init_weights=0.1), "task-0")
    for index in range(1, ADAPTERS):
        tuned.add_adapter(f"task-{index}", S0Config(init_weights=0.1))
    return tuned


Adapt = Callable[[nn.Module], nn.Module]
METHODS: dict[str, Adapt] = {"base": lambda model: model, "S0": many, LORA: partial(lora, ATTENTION)}
TRAINED: dict[str, Adapt] = {"S0": lambda model: get_peft_model(model, S0Config(init_weights=0.1)), LORA: METHODS[LORA]}


def recipe_step(batches: list[Tensor], model: nn.Module) -> float:
    """Milliseconds of one optimiser step: every batch forward and backward, then Adam."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    model.train()
    with clock(batches[0].device) as elapsed:
        for batch in batches:
            (model(input_ids=batch, labels=batch, use_cache=False).loss / len(batches)).backward()
        optimizer.step()
    model.eval().zero_grad()
    return elapsed()


@torch.no_grad()
def mixed(ids: Tensor, model: nn.Module) -> float:
    """Milliseconds of a prefill in which each row has an adapter of its own."""
    with clock(ids.device) as elapsed:
        model(input_ids=ids, use_cache=True, adapter_names=[f"task-{index}" for index in range(len(ids))])
    return elapsed()


def switch(model: nn.Module) -> float:
    """Milliseconds between one task and another that is loaded, the mean of a hundred switches."""
    start = time.perf_counter()
    for index in range(100):
        model.set_adapter(f"task-{index % 2}")
    return 1e3 * (time.perf_counter() - start) / 100


def copy_rate(device: str) -> float:
    """Bytes a second that the memory reads and writes in a large copy, the best of several."""
    source = torch.empty(2**28 if torch.device(device).type == "cpu" else 2**32, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        with clock(source.device) as elapsed:
            target.copy_(source)
        best = min(best, elapsed())
    return 2 * source.nbytes / (1e-3 * best)


@torch.no_grad()
def moved(model: nn.Module, rows: int) -> int:
    """Bytes that a decoding step cannot do without: each weight once, each recurrent state out of memory and back."""
    cache = transformers.DynamicCache(config=model.config)
    ids = torch.ones(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    model(input_ids=ids, **on_cache(model, cache))
    states = [state for layer in cache.layers for state in getattr(layer, "recurrent_states", {}).values()]
    return sum(weight.nbytes for weight in model.parameters()) + 2 * rows * sum(state.nbytes for state in states)


def rows_of(
    name: str, measured: str, count: int, times: dict[str, list[float]], size: int | None = None, rate: float = 1.0
) -> list[dict[str, object]]:
    """A row of the table for each method.

    Args:
        name: the model.
        measured: what was measured.
        count: how many tokens it processes.
        times: milliseconds of each round, by method.
        size: the bytes that it has to move, None where that does not bound it.
        rate: the bytes a second that the memory copies.
    """
    found = []
    for method, each in times.items():
        median, low, high = ratio(each, times[next(iter(times))])
        milliseconds = statistics.median(each)
        found.append(
            {
                "model": name,
                "measured": measured,
                "method": method,
                "ms": round(milliseconds, 2),
                "tokens/s": round(1e3 * count / milliseconds),
                "ratio": round(median, 3),
                "quartiles": f"{low:.3f} to {high:.3f}",
                "of copy rate": "" if size is None else f"{1e3 * size / milliseconds / rate:.1%}",
            }
        )
    return found


def measure(name: str, device: str, small: bool, rounds: int) -> list[dict[str, object]]:
    """The table of a model's inference."""
    config = MODELS[name](small)
    config.vocab_size = max(config.vocab_size, 512)
    models = {method: adapt(base(config, device)).eval() for method, adapt in METHODS.items()}
    models["S0"].set_adapter("task-0")
    weights = sum(parameter.numel() for parameter in models["base"].parameters())
    rate = copy_rate(device)
    print(f"{name}: {weights / 1e9:.2f} billion weights; memory copies {rate / 1e9:.0f} GB/s", flush=True)
    row, batch = (1, 2048), (8, 512)
    mask = (torch.arange(batch[1]) >= batch[1] - torch.linspace(256, 512, 8).long().unsqueeze(1)).long().to(device)
    timed: dict[str, tuple[int, partial[float]]] = {
        "prefill, 1 x 2048": (2048, partial(prefill, tokens(device, *row), None)),
        "prefill, 8 x 256 to 512": (int(mask.sum()), partial(prefill, tokens(device, *batch), mask)),
        **{f"decode, {rows} rows": (rows, partial(decode, tokens(device, rows, 64), False)) for rows in (1, 8, 32)},
    }
    inference = []
    for measured, (count, run) in timed.items():
        times = interleave({method: partial(run, model) for method, model in models.items()}, rounds)
        size = moved(models["base"], count) if run.func is decode else None
        inference += rows_of(name, measured, count, times, size, rate)
    ids = tokens(device, ADAPTERS, 128)
    candidates = {"S0, one adapter": partial(prefill, ids, None), "S0, 32 adapters": partial(mixed, ids)}
    times = interleave({key: partial(run, models["S0"]) for key, run in candidates.items()}, rounds)
    inference += rows_of(name, "prefill, 32 x 128", ids.numel(), times)
    print(f"{name}: a switch takes {1e3 * switch(models['S0']):.0f} us", flush=True)
    return inference


def measure_training(name: str, device: str, small: bool) -> Iterator[dict[str, object]]:
    """The table of a model's training, a row for each method."""
    batches = list(tokens(device, SOLUTIONS, LENGTH).split(ROWS))
    for method, adapt in TRAINED.items():
        model = adapt(base(MODELS[name](small), device))
        weights = sum(parameter.numel() for parameter in model.get_base_model().parameters())
        on_gpu = torch.device(device).type == "cuda"
        recipe_step(batches[:1], model)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            resident = torch.cuda.memory_allocated()
        each = [recipe_step(batches, model) for _ in range(3)]
        peak = (torch.cuda.max_memory_allocated() - resident) / 1e9 if on_gpu else float("nan")
        yield {
            "model": name,
            "method": method,
            "step, s": round(statistics.median(each) / 1e3, 2),
            "20 steps, s": round(20 * statistics.median(each) / 1e3, 1),
            "peak beside weights, GB": round(peak, 2),
            "weights, GB": round(2 * weights / 1e9, 2),
        }


def main() -> None:
    """Print the tables."""
    command = parser("Tokens a second and memory on a GPU.", rounds=10)
    command.add_argument("--model", nargs="+", choices=[*MODELS], default=[*MODELS])
    command.add_argument("--device", default="cuda")
    command.add_argument("--small", action="store_true", help="small models, to check the program")
    command.add_argument("--no-training", action="store_true", help="inference only")
    options = command.parse_args()
    logging.set_verbosity_error()
    tables: dict[str, list[dict[str, object]]] = {}
    for name in options.model:
        tables[f"{name}, inference"] = measure(name, options.device, options.small, options.rounds)
        # At once: what is measured is not lost with a machine.
        report(tables, environment(options.device), options.json)
        if not options.no_training:
            training = tables[f"{name}, training"] = []
            for row in measure_training(name, options.device, options.small):
                training.append(row)
                report(tables, environment(options.device), options.json)


if __name__ == "__main__":
    main()
