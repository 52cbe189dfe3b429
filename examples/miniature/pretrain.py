"""Trains the base models of the examples and of experiments/mini: hybrids of some 0.7 M parameters.

    python examples/miniature/pretrain.py
    python examples/miniature/pretrain.py tiny-falcon-h1

The first trains the model of the examples, a Qwen3.5 with three recurrent layers and one of attention, in nine minutes
on one CPU core, and writes the folder `examples/models/tiny-qwen3.5`. The others are those of `MODELS`.

    python examples/miniature/pretrain.py qwen3.5-100m --device cuda

is for a GPU.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3_5TextConfig,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, the package is not on the path

from miniature.base import folder_of
from miniature.evaluate import HELD_OUT, pass_at
from miniature.task import MOST_FUNCTIONS, build_tokenizer, corpus

_WIDTH = 128


def _qwen(**common: object) -> Qwen3_5TextConfig:
    """Three recurrent layers and one of attention; states of 4 heads x 32 x 32."""
    return Qwen3_5TextConfig(
        hidden_size=_WIDTH,
        intermediate_size=224,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        **common,
    )


def _falcon(**common: object) -> FalconH1Config:
    """Three layers of attention and Mamba-2 side by side; states of 4 heads x 32 x 32."""
    return FalconH1Config(
        hidden_size=_WIDTH,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mamba_d_ssm=_WIDTH,
        mamba_n_heads=4,
        mamba_d_state=32,
        mamba_chunk_size=32,
        **common,
    )


def _falcon_weak_attention(**common: object) -> FalconH1Config:
    """The same, but what attention adds is scaled down: what is kept of a text must be kept in the states."""
    return _falcon(attention_out_multiplier=0.05, **common)


def _qwen_100m(**common: object) -> Qwen3_5TextConfig:
    """Nine recurrent layers and three of attention, in proportion to the real ones; states of 8 heads x 128 x 128."""
    return Qwen3_5TextConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=128,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        **common,
    )


@dataclass(frozen=True)
class Base:
    """What a base model is, and how it is trained.

    Args:
        config: Gives its config, from what all have in common.
        functions: The most functions of a document. With one, the hidden author is of no use to know.
        memory: Whether its recurrent layers start with long memories, or as transformers initialises them.
        seed: Of the initial weights and the corpus.
        batch: Functions in a step.
        learning_rate: The highest.
        warm_up: The share of the steps before it.
        deviation: Of the initial weights: about hidden_size ** -0.5.
        bfloat16: Whether it is kept, and its products are taken, in bfloat16. Weights in training are float32 all the
            same. For wide heads: in float32 the backward pass of flash-linear-attention's gated delta rule can ask for
            more shared memory than a GPU has.
    """

    config: Callable[..., PreTrainedConfig]
    functions: int = MOST_FUNCTIONS
    memory: bool = True
    seed: int = 0
    batch: int = 64
    learning_rate: float = 3e-3
    warm_up: float = 0.05
    deviation: float = 0.08
    bfloat16: bool = False


MODELS = {
    "tiny-qwen3.5": Base(_qwen),
    "tiny-falcon-h1": Base(_falcon),
    "qwen3.5-100m": Base(_qwen_100m, batch=128, learning_rate=6e-4, warm_up=0.1, deviation=0.03, bfloat16=True),
    # The controls of experiments/mini.
    "tiny-qwen3.5-seed-1": Base(_qwen, seed=1),
    "tiny-qwen3.5-no-author": Base(_qwen, functions=1),
    "tiny-qwen3.5-no-memory": Base(_qwen, memory=False),
    "tiny-falcon-h1-weak-attention": Base(_falcon_weak_attention),
}


def build_model(base: Base, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The untrained model."""
    config = base.config(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        initializer_range=base.deviation,  # transformers' 0.02 is meant for wide layers
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    if base.memory:
        for module in model.modules():
            if hasattr(module, "dt_bias"):
                _lengthen_memory(module)
    return model


@torch.no_grad()
def _lengthen_memory(mixer: torch.nn.Module) -> None:
    """Starts the heads of a recurrent layer with memories from a few tokens to a few thousand.

    A head multiplies its state by exp(-A softplus(dt_bias + ...)) at each token. As transformers initialises them,
    almost all heads forget within a token or two. Neither the author of a document nor a tuned initial state would
    reach the end of the prompt, and a short training hardly changes that. Hence the time steps of Mamba, log-uniform
    in [0.001, 0.1].
    """
    dt = torch.exp(torch.empty_like(mixer.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)))
    mixer.dt_bias.copy_(dt.expm1().log())  # the inverse of softplus


def _loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[str], bfloat16: bool = False
) -> torch.Tensor:
    """The mean over the tokens of a batch."""
    batch = tokenizer(documents, padding=True, padding_side="right", return_tensors="pt").to(model.device)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
        return model(**batch, labels=labels, use_cache=False).loss


def steps_within(
    seconds: float, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: Base, batches: int = 20
) -> int:
    """How many steps a time allows, from that of some batches after as many others; weights stay as they are."""
    start = 0.0
    for number, documents in enumerate(islice(corpus(base.seed, base.functions, base.batch), 2 * batches)):
        if number == batches:
            start = time.perf_counter()
        _loss(model, tokenizer, documents, base.bfloat16).backward()
        sum(weight.grad.sum() for weight in model.parameters()).item()  # waits for the device
        model.zero_grad()
    return int(seconds * batches / (time.perf_counter() - start))


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: Base, steps: int, learning_rate: float, seed: int
) -> None:
    """Trains in place, each step on one fresh batch of the corpus."""
    decayed = [weight for weight in model.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if weight.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=steps, pct_start=base.warm_up, cycle_momentum=False
    )
    model.train()
    documents_of_steps = islice(corpus(seed, base.functions, base.batch), steps)
    progress = tqdm(documents_of_steps, total=steps, desc="pretraining", unit="batch")
    for step, documents in enumerate(progress):
        loss = _loss(model, tokenizer, documents, base.bfloat16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if step % 100 == 0 or step == steps - 1:
            progress.write(f"step {step}: loss {loss.item():.3f}")


def main(words: list[str] | None = None) -> None:
    """Trains, saves and measures a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=[*MODELS], default="tiny-qwen3.5")
    parser.add_argument("--output", type=Path, help="folder to write, in place of the model's own")
    parser.add_argument("--steps", type=int, default=1000, help="batches of functions")
    parser.add_argument("--minutes", type=float, help="take no more steps than this time allows")
    parser.add_argument("--learning-rate", type=float, help="the highest, in place of the model's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--problems", type=int, default=len(HELD_OUT), help="that pass@1 and pass@16 are taken on")
    parser.add_argument("--seed", type=int, help="of the initial weights and the corpus, in place of the model's own")
    arguments = parser.parse_args(words)

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    base = MODELS[arguments.model]
    seed = base.seed if arguments.seed is None else arguments.seed
    output = arguments.output or folder_of(arguments.model)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(base, tokenizer).to(arguments.device)
    print(f"{model.num_parameters():,} parameters, vocabulary of {len(tokenizer)}")
    learning_rate = arguments.learning_rate or base.learning_rate
    steps = arguments.steps
    if arguments.minutes is not None:
        steps = min(steps, steps_within(60 * arguments.minutes, model, tokenizer, base))
    start = time.perf_counter()
    train(model, tokenizer, base, steps, learning_rate, seed)
    print(f"{steps} steps in {time.perf_counter() - start:.0f} s", flush=True)
    model.to(torch.bfloat16 if base.bfloat16 else torch.float16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    size = sum(file.stat().st_size for file in output.iterdir())
    print(f"{output}: {size / 1e6:.2f} MB")

    if model.device.type == "cpu":
        model.float()  # the stored weights, in a precision that a CPU is fast at
    for k in (1, 16):
        share = pass_at(k, model, tokenizer, HELD_OUT[: arguments.problems], f"pass@{k}")
        print(f"pass@{k}: {share:.1%}", flush=True)


if __name__ == "__main__":
    main()
