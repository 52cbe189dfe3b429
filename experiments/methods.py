"""What is tuned: the models of the paper, the methods, and each method's recipe. All of it is data."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, get_peft_config
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

import peft_s0  # noqa: F401  makes S0 known to PEFT
from peft_s0.mixers import find_mixer

MODELS = {
    "qwen3.5-0.8b": "Qwen/Qwen3.5-0.8B",
    "qwen3.5-2b": "Qwen/Qwen3.5-2B",
    "qwen3.5-4b": "Qwen/Qwen3.5-4B",
    "qwen3.5-9b": "Qwen/Qwen3.5-9B",
    "falcon-h1-7b": "tiiuae/Falcon-H1-7B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
}
"""The paper's models on the Hub."""


@dataclass(frozen=True)
class Family:
    """What LoRA needs to know of an architecture: the paper's targets and rate, the recurrent layers' projections."""

    attention: tuple[str, ...]
    mixers: tuple[str, ...]
    learning_rate: float


FAMILIES = {
    "qwen3_5": Family(("q_proj", "k_proj", "v_proj", "o_proj"), ("in_proj_qkv", "in_proj_z", "out_proj"), 5e-4),
    "falcon_h1": Family(("q_proj", "k_proj", "v_proj", "in_proj"), ("in_proj", "out_proj"), 1e-4),
}
"""By model type, without the suffix of its text-only class."""


@dataclass(frozen=True)
class Method:
    """How an adapter is made and trained.

    Args:
        config: The fields of its PEFT config. "target_modules" may name a field of `Family`.
        learning_rate: Constant; None for the family's.
        steps: Each over all solutions.
        max_grad_norm: The gradient is clipped to it.
    """

    config: dict[str, Any]
    learning_rate: float | None = 1e-3
    steps: int = 20
    max_grad_norm: float = 1.0


def _lora(rank: int, targets: str) -> Method:
    return Method({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}, None, 50)


METHODS = {
    "base": None,
    "s0": Method({"peft_type": "S0"}),
    "offset": Method({"peft_type": "S0", "variant": "offset"}),
    "lora-r24": _lora(24, "attention"),
    "lora-r48": _lora(48, "attention"),
    "lora-r64": _lora(64, "attention"),
    "lora-mixers": _lora(24, "mixers"),
    # For pure Transformers, which have no state: the control of the paper. It gives no recipe.
    "prefix": Method({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 16}),
}

LAYER_GROUPS = {"first": 0, "middle": 1, "last": 2}
"""Thirds of the recurrent layers: eight each of the 24 of Qwen3.5-4B."""


@dataclass(frozen=True)
class Training:
    """A method, and where a run departs from it.

    Args:
        method: A name in `METHODS`.
        learning_rate: In place of the method's.
        alpha: Scale of the states, in place of the default.
        train_alpha: The scale in training, if it is another: 1.0 as in the authors' code. None as in the paper.
        layers: A third of the recurrent layers, by its name in `LAYER_GROUPS`; None for all.
        solutions: How many to train on; None for all.
        virtual_tokens: Of a prefix.
    """

    method: str
    learning_rate: float | None = None
    alpha: float | None = None
    train_alpha: float | None = None
    layers: str | None = None
    solutions: int | None = None
    virtual_tokens: int | None = None

    @property
    def name(self) -> str:
        """Tells this training from any other, in the names of files."""
        changes = {name: value for name, value in vars(self).items() if value is not None and name != "method"}
        return "-".join([self.method, *(f"{name.replace('_', '')}={value}" for name, value in changes.items())])


@dataclass(frozen=True)
class Recipe:
    """A training made concrete for a model."""

    config: PeftConfig
    learning_rate: float
    steps: int
    max_grad_norm: float
    solutions: int | None = field(default=None)


def recurrent_layers(model: nn.Module) -> list[int]:
    """The numbers of the layers that have a recurrent state."""
    found = {
        int(match.group(1))
        for name, module in model.named_modules()
        if find_mixer(type(module)) is not None and (match := re.search(r"\blayers\.(\d+)\.", name))
    }
    return sorted(found)


def recipe(training: Training, model: nn.Module) -> Recipe:
    """What a training is on a model.

    Raises:
        ValueError: If LoRA's targets on the model are not known, or the model has no recurrent layers to choose from;
            for a prefix, if PEFT is older than transformers asks for.
    """
    method = METHODS[training.method]
    if method is None:
        raise ValueError("The base model is not trained.")
    config, learning_rate = {"task_type": "CAUSAL_LM", **method.config}, method.learning_rate
    if config["peft_type"] == "PREFIX_TUNING":
        # It is passed to the model as a cache, and under a name that is no longer in use it is not seen.
        check_peft_version(min_version=MIN_PEFT_VERSION)
    if config["peft_type"] == "LORA":
        model_type = model.config.model_type.removesuffix("_text")
        if model_type not in FAMILIES:
            raise ValueError(
                f"LoRA's targets are known for {sorted(FAMILIES)}, not for {model_type!r}: add it to FAMILIES."
            )
        family = FAMILIES[model_type]
        config["target_modules"] = list(getattr(family, config["target_modules"]))
        learning_rate = family.learning_rate
    if training.alpha is not None:
        config["alpha"] = training.alpha
    if training.train_alpha is not None:
        config["train_alpha"] = training.train_alpha
    if training.virtual_tokens is not None:
        config["num_virtual_tokens"] = training.virtual_tokens
    if training.layers is not None:
        layers = recurrent_layers(model)
        if len(layers) < len(LAYER_GROUPS):
            raise ValueError(f"The model has {len(layers)} recurrent layers, too few for thirds.")
        third, group = len(layers) // len(LAYER_GROUPS), LAYER_GROUPS[training.layers]
        start = group * third if training.layers != "last" else len(layers) - third
        config["layers_to_transform"] = layers[start : start + third]
    if training.learning_rate is not None:
        learning_rate = training.learning_rate
    assert learning_rate is not None
    return Recipe(get_peft_config(config), learning_rate, method.steps, method.max_grad_norm, training.solutions)
