"""A model without its weights: enough to know its recurrent layers, and to hold an adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .config import find_states, load_config
from .fit import is_learnt
from .storage import contents


def without_weights(
    base_model: PreTrainedModel | str | Path, trust_remote_code: bool = False, revision: str = "main"
) -> PreTrainedModel:
    """A model's modules with all parameters on the meta device.

    Args:
        base_model: the model, which stays as it is, or its folder or Hub id, of which the config alone is read.
        trust_remote_code: whether code of the model's repository may be run.
        revision: its branch, tag or commit on the Hub.

    Raises:
        TypeError: if it is neither a model of transformers nor a name.
        ValueError: if it already has adapters.
    """
    if isinstance(base_model, (str, Path)):
        config = AutoConfig.from_pretrained(str(base_model), trust_remote_code=trust_remote_code, revision=revision)
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


def base_of(adapter: str | Path, config: PeftConfig) -> tuple[str, str]:
    """The base model that an adapter names, and the branch, tag or commit of it on the Hub.

    Args:
        adapter: folder or Hub id, for the error.
        config: the adapter's.

    Raises:
        ValueError: if it names none.
    """
    if not config.base_model_name_or_path:
        raise ValueError(f"'{adapter}' does not say which base model it is for; name the base model.")
    return config.base_model_name_or_path, config.revision or "main"


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
        A model in eval mode whose only adapter is "default". It has what is learnt of the recurrent layers; whole
        modules, tokens and embeddings that the adapter may have besides would need the weights.

    Raises:
        ValueError: if it is no S0 adapter, does not fit the model, or does not name one.
    """
    config = load_config(adapter, **options)
    base_model, revision = (base_model, "main") if base_model else base_of(adapter, config)
    config.inference_mode = True
    config.task_type = config.modules_to_save = config.trainable_token_indices = None
    model = PeftModel(without_weights(base_model, trust_remote_code, revision), config)
    # PEFT's own function for this asks the Hub once more, and finds no subfolder in the cache.
    file = find_states(str(adapter), **options)
    if file is None:
        raise ValueError(f"'{adapter}' has no {SAFETENSORS_WEIGHTS_NAME}; save the adapter with save_pretrained.")
    weights = load_file(file)
    set_peft_model_state_dict(model, {name: weight for name, weight in weights.items() if is_learnt(name)})
    return model.eval()


def check_states_alone(adapter: str | Path, **options: Any) -> None:
    """Refuse a saved adapter with more in its file than what is learnt of the recurrent layers.

    Args:
        adapter: folder or Hub id of the adapter.
        options: see `load_without_weights`.

    Raises:
        ValueError: naming what else there is; see also `find_states`.
    """
    file = find_states(str(adapter), **options)
    others = [] if file is None else sorted(name for name in contents(file) if not is_learnt(name))
    if others:
        raise ValueError(
            f"'{adapter}' holds '{others[0]}' beside its states, for which there is no place: its states alone would "
            "be another adapter. If they are the base model's own embeddings, leave them out by "
            "save_pretrained(..., save_embedding_layers=False)."
        )
