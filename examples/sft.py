r"""Supervised tuning of initial states: TRL's script with S0's options.

The tiny model, on programs that it wrote itself and that passed when run, on one CPU core in half a minute:

    python examples/sft.py

Qwen3.5-4B, or tiiuae/Falcon-H1-7B-Instruct, by the paper's recipe, which is the default:

    python examples/sft.py \
        --model_name_or_path Qwen/Qwen3.5-4B \
        --dataset_name solutions.jsonl \
        --output_dir my-task

`solutions.jsonl` has one {"prompt": ..., "completion": ...} a line, text or messages; it may be a dataset on the Hub.
The loss is averaged over tokens, as trainers do; with `--average_over_examples` over solutions, as in the paper.

On several GPUs, `accelerate launch --config_file examples/accelerate/ddp.yaml examples/sft.py ...`; docs/distributed.md
has the other engines.

A run that was stopped goes on with `--resume_from_checkpoint my-task/checkpoint-15` and otherwise the same options.
`--help` lists them; `--config file.yaml` reads them from a file.
"""

from dataclasses import dataclass, field

import torch
from datasets import DatasetDict
from trl import ScriptArguments, SFTConfig, SFTTrainer, get_quantization_config

from arguments import PAPER, TINY, check_splits, load_data, parse_arguments, step_over_all
from miniature.base import load_base, load_tokenizer
from miniature.evaluate import compare
from miniature.sample import collect, own_solutions
from miniature.task import as_dataset, problems
from peft_s0 import S0Callback, push_to_hub
from peft_s0.training import average_over_examples

RECIPE = {
    **PAPER,
    "output_dir": "sft-output",
    "max_length": 2048,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": None,  # all solutions in each step
}
TINY = {**TINY, "per_device_train_batch_size": 48}
SOLUTIONS = 48
"""How many the tiny model is tuned on."""


@dataclass
class Script(ScriptArguments):
    """The script's own options."""

    average_over_examples: bool = field(
        default=False,
        metadata={"help": "Average the loss over examples, not tokens; with per_device_train_batch_size=1."},
    )


def write_solutions(seed: int) -> DatasetDict:
    """Lets the tiny model write solutions, and keeps those that pass when run."""
    torch.manual_seed(seed)
    candidates = own_solutions(load_base(), load_tokenizer(), problems("train", seed))
    return DatasetDict(train=as_dataset(collect(candidates, SOLUTIONS, "right solutions")))


def main() -> None:
    """Data, trainer, training, and what it has changed."""
    script, training, model, mixture, s0 = parse_arguments(SFTConfig, RECIPE, TINY, Script)
    tiny = model.model_name_or_path == TINY["model_name_or_path"]
    given = script.dataset_name or mixture.datasets
    data = load_data(script, mixture) if given else write_solutions(training.seed)
    check_splits(script, training, data)
    step_over_all(training, data[script.dataset_train_split])

    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if training.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model),
        peft_config=s0.config(),
        callbacks=[S0Callback()],
    )
    if script.average_over_examples:
        average_over_examples(trainer)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    if training.push_to_hub and trainer.is_world_process_zero():
        push_to_hub(trainer.model, trainer.hub_model_id, token=training.hub_token)
    if tiny and training.world_size == 1:
        compare(trainer.model, trainer.processing_class, training.output_dir)
    trainer.end()


if __name__ == "__main__":
    main()
