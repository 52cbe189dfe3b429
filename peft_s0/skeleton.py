"""A model without its weights: enough to know its recurrent layers, and to hold an adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .config import load_config


def without_weights(base_model: PreTrainedModel | str | Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model's modules with all parameters on the meta device.

    Args:
        base_model: the model, which stays as it is, or its folder or Hub id, of which the config alone is read.
        trust_remote_code: whether code of the model's repository may be run.

    Raises:
        TypeError: if it is neither a model of transformers nor a name.
        ValueError: if it already has adapters.
    """
    if isinstance(base_model, (str, Path)):
        config = AutoConfig.from_pretrained(str(base_model), trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    if getattr(base_model, "peft_config", None):
        raise ValueError(
            f"This {type(base_model).__name__} has adapters. Pass the base model alone, before get_peft_model or after "
            "unload(), or its name."
        )
    if not isinstance(base_model, PreTrainedModel):
        raise TypeError(
            "The base model must be a model of transformers, its folder or its Hub id, got "
            f"{type(base_model).__name__}."
        )
    with torch.device("meta"):
        return type(base_model)(copy.deepcopy(base_model.config))


def load_without_weights(
    adapter: str | Path,
    base_model: PreTrainedModel | str | Path | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PeftModel:
    """A saved adapter on its base model, of which nothing but the config is needed.

    Args:
        adapter: folder or Hub id of the adapter.
        base_model: see `without_weights`. None: the one that the adapter names.
        trust_remote_code: see `without_weights`.
        options: `subfolder`, `revision`, `token` and the like, for the adapter on the Hub.

    Returns:
        A model in eval mode whose only adapter is "default".

    Raises:
        ValueError: if it is no S0 adapter, does not fit the model, or does not name one.
    """
    config = load_config(adapter, **options)
    base_model = base_model or config.base_model_name_or_path
    if not base_model:
        raise ValueError(f"'{adapter}' does not say which base model it is for; name the base model.")
    base = without_weights(base_model, trust_remote_code)
    return PeftModel.from_pretrained(base, str(adapter), config=config, **options).eval()
