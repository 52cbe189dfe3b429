"""The command line of the example scripts: TRL's own, with S0's arguments where TRL has LoRA's."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from peft import PeftConfig
from transformers import TrainingArguments
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_dataset

from miniature.base import FOLDER
from peft_s0 import S0Config

PAPER: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_steps": 20,
    "max_grad_norm": 1.0,
    "router_aux_loss_coef": 0.0,  # of a mixture of experts, whose routers are frozen
    "dtype": "bfloat16",
    "logging_steps": 1,
    "save_steps": 5,
    "save_total_limit": 2,
}
"""The paper's recipe, whose alpha and penalty are S0Config's defaults; and checkpoints often, for a step is long."""

TINY: dict[str, Any] = {
    "model_name_or_path": str(FOLDER),
    "dtype": "float32",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    # The paper's rate of 1e-3 and alpha of 0.07 are for far wider models: they leave this one as it was.
    "learning_rate": 5e-3,
    "s0_alpha": 1.0,
}
"""What differs for the tiny model, which is there if no other is named."""


@dataclass
class Length:
    """How long to train, as far as it is said."""

    max_steps: int | None = None
    num_train_epochs: float | None = None


def _start(text: str) -> bool | float | str:
    """A value of init_weights."""
    words = {"true": True, "false": False, "prompt": "prompt"}
    return words[text.lower()] if text.lower() in words else float(text)


def _argument_type(hint: Any) -> Any:
    """What one option can give of a field's types. A YAML file passed with --config can give the others."""
    choices = get_args(hint)
    if get_origin(hint) is dict:
        return json.loads
    lists = [choice for choice in choices if get_origin(choice) is list]
    if lists == [list[Any]]:
        return str | None
    if lists:
        return lists[0] | None
    return _start if {bool, float} <= {*choices} else hint


_HINTS = get_type_hints(S0Config)
_FIELDS = [
    (
        f"s0_{own.name}",
        _argument_type(_HINTS[own.name]),
        field(default=own.default, default_factory=own.default_factory, metadata=own.metadata),
    )
    for own in fields(S0Config)
    if own.name not in {inherited.name for inherited in fields(PeftConfig)}
]


class S0Arguments(make_dataclass("S0Fields", _FIELDS)):
    """The fields of S0Config as options: --s0_alpha, --s0_rank, ..., as TRL has --lora_alpha, --lora_r, ..."""

    _argument_group_name = "S0"

    def config(self) -> S0Config:
        """The config; its own checks name what is wrong."""
        values = {name.removeprefix("s0_"): value for name, value in asdict(self).items()}
        for name in ("target_modules", "exclude_modules"):
            # An option gives a list. One value that is no plain name is a regular expression.
            if isinstance(values[name], list) and len(values[name]) == 1 and not re.fullmatch(r"[\w.]+", *values[name]):
                (values[name],) = values[name]
        return S0Config(task_type="CAUSAL_LM", **values)


def parse_arguments(
    training_type: type[TrainingArguments],
    recipe: dict[str, Any],
    tiny: dict[str, Any],
    script_type: type[ScriptArguments] = ScriptArguments,
) -> tuple[ScriptArguments, TrainingArguments, ModelConfig, DatasetMixtureConfig, S0Arguments]:
    """The arguments of a script, from the command line and the file named there with --config.

    Args:
        training_type: The trainer's config.
        recipe: Defaults.
        tiny: Defaults that go before these if no model is named.
        script_type: The options of the script itself.

    Raises:
        ValueError: For LoRA's --use_peft, which is not for these scripts, or a model without data.
    """
    # What decides on the defaults of the rest: the model, and whether epochs are asked for.
    first = TrlParser((ModelConfig, Length), add_help=False, allow_abbrev=False)
    model, length, _ = first.parse_args_and_config(return_remaining_strings=True)
    named = model.model_name_or_path is not None
    parser = TrlParser((script_type, training_type, ModelConfig, DatasetMixtureConfig, S0Arguments))
    parser.set_defaults_with_config(**{**recipe, **({} if named else tiny)})
    if length.num_train_epochs is not None and length.max_steps is None:
        parser.set_defaults(max_steps=-1)  # the recipe's would go before them
    script, training, model, mixture, s0 = parser.parse_args_and_config()
    if not named:
        torch.set_num_threads(1)  # the tiny model is too small for more
    if model.use_peft:
        raise ValueError("--use_peft is LoRA, for which TRL has scripts of its own; the states' options are --s0_...")
    if named and not (script.dataset_name or mixture.datasets):
        raise ValueError(
            f"Name the data for {model.model_name_or_path}: --dataset_name, a file or a dataset on the Hub."
        )
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    return script, training, model, mixture, s0


def load_data(script: ScriptArguments, mixture: DatasetMixtureConfig) -> DatasetDict:
    """The data that the arguments name: a mixture, a JSON-lines file, or a dataset on the Hub or in a folder."""
    if mixture.datasets:
        return get_dataset(mixture)
    if Path(script.dataset_name).suffix in (".json", ".jsonl"):
        return load_dataset("json", data_files=script.dataset_name, streaming=script.dataset_streaming)
    return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


def check_splits(script: ScriptArguments, training: TrainingArguments, data: DatasetDict) -> None:
    """Refuses data without the split to train on, or to evaluate on if that was asked for."""
    needed = {"train": script.dataset_train_split}
    if training.eval_strategy != "no":
        needed["test"] = script.dataset_test_split
    for option, split in needed.items():
        if split not in data:
            raise ValueError(
                f"The data have no split {split!r}, found {[*data]}: name one with --dataset_{option}_split. A folder "
                "with train.jsonl and test.jsonl has both."
            )


def step_over_all(training: TrainingArguments, data: Dataset | IterableDataset) -> None:
    """Lets each step see all rows, as in the paper, unless --gradient_accumulation_steps says otherwise."""
    if training.gradient_accumulation_steps is None:
        if isinstance(data, IterableDataset):
            raise ValueError("The length of a streamed dataset is not known; set --gradient_accumulation_steps.")
        rows_at_once = training.train_batch_size * training.world_size
        training.gradient_accumulation_steps = math.ceil(len(data) / rows_at_once)
