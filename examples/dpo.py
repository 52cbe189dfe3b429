r"""DPO of initial states: TRL's script with S0's options.

The tiny model, on pairs of its own programs, one that passed when run and one that failed, on one CPU core in half a
minute:

    python examples/dpo.py

Qwen3.5-4B, or tiiuae/Falcon-H1-7B-Instruct:

    python examples/dpo.py \
        --model_name_or_path Qwen/Qwen3.5-4B \
        --dataset_name pairs.jsonl \
        --output_dir my-task

`pairs.jsonl` has one {"prompt": ..., "chosen": ..., "rejected": ...} a line, text or messages; it may be a dataset on
the Hub. The defaults are those of the paper's supervised tuning; it says nothing of DPO.

A run that was stopped goes on with `--resume_from_checkpoint my-task/checkpoint-15` and otherwise the same options.
`--help` lists them; `--config file.yaml` reads them from a file.
"""

import torch
from datasets import Dataset, DatasetDict
from trl import DPOConfig, DPOTrainer, get_quantization_config

from arguments import PAPER, TINY, check_splits, load_data, parse_arguments, step_over_all
from miniature.base import load_base, load_tokenizer
from miniature.evaluate import compare
from miniature.sample import collect, own_pairs
from miniature.task import problems
from peft_s0 import S0Callback, push_to_hub

RECIPE = {
    **PAPER,
    "output_dir": "dpo-output",
    "max_length": 2048,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": None,  # all pairs in each step
}
TINY = {**TINY, "per_device_train_batch_size": 48}
PAIRS = 48
"""How many the tiny model is tuned on."""


def write_pairs(seed: int) -> DatasetDict:
    """Lets the tiny model write programs, and pairs one that passes when run with one that fails."""
    torch.manual_seed(seed)
    candidates = own_pairs(load_base(), load_tokenizer(), problems("train", seed))
    rows = [
        {"prompt": problem.prompt, "chosen": right, "rejected": wrong}
        for problem, right, wrong in collect(candidates, PAIRS, "right and wrong programs")
    ]
    return DatasetDict(train=Dataset.from_list(rows))


def main() -> None:
    """Data, trainer, training, and what it has changed."""
    script, training, model, mixture, s0 = parse_arguments(DPOConfig, RECIPE, TINY)
    tiny = model.model_name_or_path == TINY["model_name_or_path"]
    given = script.dataset_name or mixture.datasets
    data = load_data(script, mixture) if given else write_pairs(training.seed)
    check_splits(script, training, data)
    step_over_all(training, data[script.dataset_train_split])

    trainer = DPOTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if training.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model),
        peft_config=s0.config(),
        callbacks=[S0Callback()],
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    if training.push_to_hub and trainer.is_world_process_zero():
        push_to_hub(trainer.model, trainer.hub_model_id, token=training.hub_token)
    if tiny:
        compare(trainer.model, trainer.processing_class, training.output_dir)
    trainer.end()


if __name__ == "__main__":
    main()
