r"""GRPO of initial states: TRL's script with S0's options, and a reward that runs the generated programs.

The tiny model, on one CPU core in half a minute:

    python examples/grpo.py

Qwen3.5-4B, or tiiuae/Falcon-H1-7B-Instruct:

    python examples/grpo.py \
        --model_name_or_path Qwen/Qwen3.5-4B \
        --dataset_name problems.jsonl \
        --chat_template_kwargs '{"enable_thinking": false}' \
        --output_dir my-task

`problems.jsonl` has one {"prompt": ..., "tests": ["assert total(3) == 12", ...]} a line; it may be a dataset on the
Hub. A value must be of the right type as well: 12.0 is not 12. If the prompt is text, the program is the prompt and
what the model adds to it. If it is messages, the program is the last block of Python in the model's answer. The
defaults are those of the paper's supervised tuning; it says nothing of GRPO.

WARNING. The programs of a capable model run on this machine. `sandbox/__init__.py` says what is kept from them, which
is less where the system does not allow namespaces, which a warning then tells: there, run this script in a container
made for it or a virtual machine.

A run that was stopped goes on with `--resume_from_checkpoint my-task/checkpoint-15` and otherwise the same options.
`--help` lists them; `--config file.yaml` reads them from a file.
"""

from itertools import islice

from datasets import Dataset, DatasetDict, IterableDataset
from trl import GRPOConfig, GRPOTrainer, get_quantization_config

import sandbox
from arguments import PAPER, TINY, check_splits, load_data, parse_arguments
from fences import last_block
from miniature.evaluate import compare
from miniature.execute import calls_and_values, passes
from miniature.task import problems
from peft_s0 import S0Callback, push_to_hub

RECIPE = {
    **PAPER,
    "output_dir": "grpo-output",
    "num_generations": 8,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 16,
}
TINY = {
    **TINY,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 32,
}
PROBLEMS = 512
"""How many are posed to the tiny model."""

Text = str | list[dict[str, str]]


def program_of(prompt: Text, completion: Text) -> str:
    """The program that a completion gives: a continuation of the prompt, or a block of code in an answer."""
    if isinstance(completion, str):
        return f"{prompt}{completion}"
    return last_block(completion[-1]["content"], "py")


def passes_tests(prompts: list[Text], completions: list[Text], tests: list[list[str]], **_: object) -> list[float]:
    """The reward: 1 for a program that passes all its tests when run, else 0."""
    programs = [program_of(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
    return [float(passed) for passed in passes(programs, tests)]


def check(data: Dataset | IterableDataset) -> None:
    """Refuses data without tests that can be read, before a model is loaded."""
    if isinstance(data, IterableDataset):
        return  # not read ahead of the training
    if missing := {"prompt", "tests"} - {*data.column_names}:
        raise ValueError(
            f"The data must have the columns prompt and tests; {sorted(missing)} not in {data.column_names}."
        )
    for tests in data["tests"]:
        calls_and_values(tests)


def pose_problems(seed: int) -> DatasetDict:
    """Problems for the tiny model."""
    rows = [{"prompt": problem.prompt, "tests": problem.tests} for problem in islice(problems("train", seed), PROBLEMS)]
    return DatasetDict(train=Dataset.from_list(rows))


def main() -> None:
    """Data, trainer, training, and what it has changed."""
    script, training, model, mixture, s0 = parse_arguments(GRPOConfig, RECIPE, TINY)
    tiny = model.model_name_or_path == TINY["model_name_or_path"]
    given = script.dataset_name or mixture.datasets
    data = load_data(script, mixture) if given else pose_problems(training.seed)
    check_splits(script, training, data)
    check(data[script.dataset_train_split])
    if not tiny:
        sandbox.allow(allowed=True, unconfined=True)  # says what is kept from programs here, and what is not

    trainer = GRPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=passes_tests,
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
