"""What an adapter costs, step by step: the time of S0 and of LoRA to that of the base model.

    python benchmarks/overhead.py [--rounds N] [--only WORD] [--device cpu|cuda] [--compile] [--json FILE]

One random hybrid model of 8 layers for each method, all with the same weights. They run in turns: prefill (short, long,
a padded batch), decoding steps with 1, 8 and 32 rows, and training steps (padded and packed rows) with the bytes that a
step keeps for its backward pass; of S0 also with the rows one at a time. With `--compile` the decoding steps are also
measured under `torch.compile`.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Cache, DynamicCache, Qwen3_5ForCausalLM, Qwen3_5TextConfig, StaticCache
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from timing import clock, environment, interleave, parser, ratio, report

from peft_s0 import S0Config
from peft_s0.mixers import cache_argument
from peft_s0.probing import base_of

VOCABULARY = 512
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MIXERS = ["in_proj_qkv", "in_proj_z", "out_proj"]
STEPS = 8
LORA, LORA_EVERYWHERE = "LoRA r24, attention", "LoRA r24, attention and mixers"

Measurement = Callable[[nn.Module], float]


SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}


def base(device: str, **sizes: int) -> nn.Module:
    """A random hybrid model: 6 recurrent layers with states of [16, 64, 64], 2 of attention, or of other sizes."""
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(vocab_size=VOCABULARY, pad_token_id=0, **{**SIZES, **sizes})
    return Qwen3_5ForCausalLM(config).to(device).eval()


def lora(modules: list[str], model: nn.Module) -> nn.Module:
    """LoRA of the paper's best rank, with values that are not zero."""
    return get_peft_model(model, LoraConfig(r=24, target_modules=modules, init_lora_weights=False))


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "base": lambda model: model,
    "S0": lambda model: get_peft_model(model, S0Config(init_weights=0.1)),
    "S0, offset": lambda model: get_peft_model(model, S0Config(init_weights=0.1, variant="offset")),
    LORA: partial(lora, ATTENTION),
    LORA_EVERYWHERE: partial(lora, ATTENTION + MIXERS),
    "LoRA r24, merged": lambda model: lora(ATTENTION, model).merge_and_unload(),
}


def tokens(device: str, *shape: int) -> Tensor:
    """Random token ids."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(0)).to(device)


@torch.no_grad()
def prefill(ids: Tensor, mask: Tensor | None, model: nn.Module) -> float:
    """Milliseconds of the pass over a prompt."""
    with clock(ids.device) as elapsed:
        model(input_ids=ids, attention_mask=mask, use_cache=True)
    return elapsed()


def on_cache(model: nn.Module, cache: Cache) -> dict[str, Any]:
    """Arguments that let a call of a model go on with a cache."""
    return {cache_argument(type(base_of(model))): cache, "use_cache": True}


@torch.no_grad()
def decode(prompt: Tensor, compiled: bool, model: nn.Module) -> float:
    """Milliseconds of a step behind a prompt, the median of several."""
    if compiled:
        cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + STEPS + 1)
        step = _COMPILED.setdefault(id(model), torch.compile(model, fullgraph=True, dynamic=False))
    else:
        cache, step = DynamicCache(config=model.config), model
    call = on_cache(model, cache)
    model(input_ids=prompt, **call)
    times = []
    for _ in range(STEPS):
        with clock(prompt.device) as elapsed:
            step(input_ids=prompt[:, :1], **call)
        times.append(elapsed())
    return statistics.median(times)


_COMPILED: dict[int, Callable[..., object]] = {}


def train(inputs: dict[str, Tensor], model: nn.Module) -> float:
    """Milliseconds of a forward and a backward pass and an optimiser's step."""
    return train_on([inputs], model)


def train_on(parts: list[dict[str, Tensor]], model: nn.Module) -> float:
    """Milliseconds of an optimiser's step on a batch that comes in parts."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.0)
    with clock(parts[0]["input_ids"].device) as elapsed:
        model.train()
        for inputs in parts:
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        optimizer.step()
    model.eval().zero_grad()
    return elapsed()


def activations(inputs: dict[str, Tensor], model: nn.Module) -> float:
    """Megabytes that a training step keeps for its backward pass, beside the parameters; each storage counts once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        # The storage is held, so that its address is not given to another one.
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(**inputs, labels=inputs["input_ids"], use_cache=False)
    model.eval()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in parameters) / 1e6


def batches(device: str) -> dict[str, dict[str, Tensor]]:
    """Training batches of the same documents, 64 to 128 tokens long."""
    lengths = torch.linspace(64, 128, 8).long()
    mask = (torch.arange(128) < lengths.unsqueeze(1)).long().to(device)
    ids, positions = tokens(device, 8, 128), torch.cat([torch.arange(int(length)) for length in lengths])
    return {
        "padded": {"input_ids": ids, "attention_mask": mask},
        "packed": {"input_ids": ids[mask.bool()].unsqueeze(0), "position_ids": positions.unsqueeze(0).to(device)},
    }


def one_at_a_time(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The rows of a padded batch, without their pads."""
    lengths = batch["attention_mask"].sum(dim=1)
    return [{"input_ids": row[:length].unsqueeze(0)} for row, length in zip(batch["input_ids"], lengths, strict=True)]


def compare_layouts(model: nn.Module, device: str, rounds: int) -> list[dict[str, object]]:
    """S0's training step on the same documents: as batches, and one by one, as the paper's authors train."""
    layouts = {layout: [batch] for layout, batch in batches(device).items()}
    layouts["one at a time"] = one_at_a_time(layouts["padded"][0])
    times = interleave({layout: partial(train_on, parts, model) for layout, parts in layouts.items()}, rounds)
    rows = []
    for layout in layouts:
        median, low, high = ratio(times[layout], times["padded"])
        rows.append(
            {
                "8 x 64 to 128": layout,
                "ms": round(statistics.median(times[layout]), 2),
                "ratio to padded": round(median, 3),
                "quartiles": f"{low:.3f} to {high:.3f}",
            }
        )
    return rows


def measurements(device: str, compiled: bool) -> dict[str, Measurement]:
    """What is timed."""
    padded = batches(device)["padded"]
    timed: dict[str, Measurement] = {
        "prefill, 1 x 64": partial(prefill, tokens(device, 1, 64), None),
        "prefill, 1 x 1024": partial(prefill, tokens(device, 1, 1024), None),
        "prefill, 8 x 64 to 128, left-padded": partial(prefill, padded["input_ids"], padded["attention_mask"].flip(1)),
        **{f"decode, {rows} x 1": partial(decode, tokens(device, rows, 16), False) for rows in (1, 8, 32)},
    }
    if compiled:
        timed["decode, 1 x 1, compiled"] = partial(decode, tokens(device, 1, 16), True)
    return timed


def compare(
    measurement: str, measure: Measurement, models: dict[str, nn.Module], baseline: str, rounds: int
) -> list[dict[str, object]]:
    """One row for each model but the baseline."""
    times = interleave({method: partial(measure, model) for method, model in models.items()}, rounds)
    rows = []
    for method in models:
        if method != baseline:
            median, low, high = ratio(times[method], times[baseline])
            rows.append(
                {
                    "measured": measurement,
                    "method": method,
                    "ms": round(statistics.median(times[method]), 2),
                    f"ratio to {baseline}": round(median, 3),
                    "quartiles": f"{low:.3f} to {high:.3f}",
                }
            )
    return rows


def main() -> None:
    """Print the tables."""
    command = parser("What an adapter costs.", rounds=30)
    command.add_argument("--device", default="cpu", help="where the models run")
    command.add_argument("--compile", action="store_true", help="measure compiled decoding steps, too")
    command.add_argument(
        "--only", default="", metavar="WORD", help="of what is measured, what begins so: decode, prefill, train"
    )
    options = command.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    models = {method: adapt(base(options.device)).eval() for method, adapt in METHODS.items()}
    inference = [
        row
        for name, measure in measurements(options.device, options.compile).items()
        if name.startswith(options.only)
        for row in compare(name, measure, models, "base", options.rounds)
    ]
    trained = {method: model for method, model in models.items() if method not in ("base", "LoRA r24, merged")}
    training = []
    for layout, batch in batches(options.device).items() if "train".startswith(options.only) else ():
        rows = compare(f"train, 8 x 64 to 128, {layout}", partial(train, batch), trained, LORA, options.rounds)
        kept = {method: activations(batch, model) for method, model in trained.items()}
        training += [{**row, "kept, ratio": round(kept[row["method"]] / kept[LORA], 3)} for row in rows]
    tables = {"inference": inference, "training": training}
    if training:
        tables["layouts"] = compare_layouts(models["S0"], options.device, options.rounds)
    report({name: rows for name, rows in tables.items() if rows}, environment(options.device), options.json)


if __name__ == "__main__":
    main()
