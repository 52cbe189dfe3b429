"""What the tests of trainers share: a tokenizer, data, arguments, and what must hold when a trainer is done."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from architectures import Architecture
from datasets import Dataset
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Trainer
from trl import SFTConfig, SFTTrainer

from peft_s0 import S0Config

ARGUMENTS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 0,
}
"""For every trainer; their own defaults are for larger models and a GPU."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{% generation %}w4 {{ message.content }} <eos>{% endgeneration %} "
    "{% else %}w3 {{ message.content }} {% endif %}"
    "{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, w3 to w127, and a chat template that marks what the assistant says."""
    words = {f"w{i}": i for i in range(3, 128)} | {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def words(count: int, seed: int) -> str:
    """So many random words."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(5, 120, (count,), generator=generator).tolist())


def token_rows(rows: int = 8, shortest: int = 4) -> Dataset:
    """Tokens and labels of rows of different lengths; the first two tokens of each have no label."""
    ids = [[int(word[1:]) for word in words(shortest + 2 * i, seed=i).split()] for i in range(rows)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, -100, *row[2:]] for row in ids]})


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Dataset) -> float:
    """Cross-entropy, the mean over all tokens with a label, from each row by itself."""
    losses = []
    for row in rows:
        logits, labels = model(torch.tensor([row["input_ids"]])).logits[0], torch.tensor(row["labels"])
        losses.append(cross_entropy(logits[:-1], labels[1:], reduction="none")[labels[1:] != -100])
    return float(torch.cat(losses).mean())


def weights(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the states and offsets of the adapter that is trained."""
    kinds = ("s0_state.default", "s0_offset.default")
    return [parameter for name, parameter in model.named_parameters() if any(kind in name for kind in kinds)]


def copies(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Their values as they are now."""
    return [parameter.detach().clone() for parameter in parameters]


def states(trainer: Trainer) -> list[Tensor]:
    """The values of the states that a trainer has."""
    return copies(weights(trainer.model))


def logged(trainer: Trainer, name: str = "loss") -> list[float]:
    """The values that a trainer logged, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def train(trainer: Trainer) -> None:
    """Train, and check that every entry of the states moved and nothing else did, to the last bit."""
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = {
        name: bool((parameter != before[name]).all())
        if parameter.requires_grad
        else not torch.equal(parameter, before[name])
        for name, parameter in trainer.model.named_parameters()
    }
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert {name for name, yes in moved.items() if yes} == trained


def sft(architecture: Architecture, folder: Path, config: S0Config | None = None, **arguments: Any) -> SFTTrainer:
    """TRL's SFTTrainer on a tiny model.

    Args:
        architecture: of the model.
        folder: where the trainer writes.
        config: the adapter's; by default alpha is 1.
        arguments: of SFTConfig, in place of the defaults here; and `train_dataset`, `eval_dataset`, `callbacks`,
            `trainer_class`.
    """
    made_for_trainer = {
        name: arguments.pop(name)
        for name in ("train_dataset", "eval_dataset", "callbacks", "compute_loss_func")
        if name in arguments
    }
    trainer_class = arguments.pop("trainer_class", SFTTrainer)
    return trainer_class(
        model=arguments.pop("model", None) or architecture.build(),
        args=SFTConfig(output_dir=str(folder), **{**ARGUMENTS, "gradient_checkpointing": False, **arguments}),
        processing_class=tokenizer(),
        peft_config=S0Config(alpha=1.0) if config is None else config,
        **{"train_dataset": token_rows(), **made_for_trainer},
    )


def twin(trainer: Trainer, architecture: Architecture) -> PeftModel:
    """A model of its own with the states that a trainer has now, in training mode.

    No deep copy, since TRL's trainers give their model a forward method that stays with the original.
    """
    made = get_peft_model(architecture.build(), copy.deepcopy(trainer.model.peft_config["default"]))
    set_peft_model_state_dict(made, get_peft_model_state_dict(trainer.model))
    return made.train()


def reload(trainer: Trainer, architecture: Architecture, folder: Path) -> PeftModel:
    """What comes back when the adapter that a trainer saved is loaded on a fresh model."""
    trainer.save_model(str(folder))
    return PeftModel.from_pretrained(architecture.build(), folder)
