"""A weighted sum of saved adapters as one adapter, made from their files alone.

A model is not needed: the states of a sum are the sum of the states.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from .card import CARD_NAME, update_model_card
from .config import S0Config, check_readable, find_states, load_config, without_start
from .convert import ADAPTER_FILES
from .files import check_place, new_folder
from .fit import check_fit, check_sum, check_weights
from .injection import CHILD
from .naming import match_names
from .storage import decode

# What a state is called in a file: learnt at the start of a sequence, or added where it is read.
_STATE = re.compile(rf"\.{CHILD}\.s0_(state|offset)\.weight$")

# Of a config, what does not say how its states are read: where the layers are is seen from the states themselves.
_FREE = {
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_weights",
    "init_prompt",
    "tokenizer_name_or_path",
    "l2_lambda",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "task_type",
    "storage",
}

_LINEAR = "Load the adapters on one model and use add_weighted_adapter"
_ADVICE = {
    "base_model_name_or_path": "They are of different base models. If it is one model under two names, write the same "
    "name into both adapter_config.json",
    "variant": "They act in different ways and have no sum",
}


def soup(
    adapters: Sequence[str | Path],
    weights: Sequence[float] | None,
    output: str | Path,
    *,
    overwrite: bool = False,
    **kwargs: Any,
) -> Path:
    """Make a new adapter that starts from a weighted sum of the states of saved ones.

    It is what `add_weighted_adapter` makes on a model, in a folder of its own with config and model card. States are
    added in float64, and stored as the first adapter's `storage` says.

    Args:
        adapters: folders or Hub ids of S0 adapters.
        weights: one for each, of any sign and sum; None: their mean.
        output: folder to write to, which is there when all is done, or not at all.
        overwrite: replace an adapter that is there, even if it is one of the ingredients.
        kwargs: `revision`, `token` and the like, for the Hub.

    Returns:
        The folder.

    Raises:
        FileExistsError: if `output` exists and may not be replaced.
        ValueError: for no adapters, weights that are not one finite number for each or too large for a finite sum,
            files that are refused as they would be in loading, and adapters that have no sum: of different base models,
            layers, shapes, variants or scales, with `rank`, `normalize` or `learn_alpha`, or with more in them than
            states. Nothing is written then.

    Example:
        >>> soup(["right", "one-line"], [0.7, 0.3], "mixture")
    """
    if isinstance(adapters, (str, Path)) or not adapters:
        raise ValueError(f"soup: pass a list of adapters, one at least, got {adapters!r}.")
    weights = [1 / len(adapters)] * len(adapters) if weights is None else list(weights)
    check_weights(adapters, weights)
    check_place(output, overwrite, ADAPTER_FILES)
    names = [str(adapter) for adapter in adapters]
    first = _read_config(names[0], kwargs)
    total: dict[str, Tensor] = {}
    for name, weight in zip(names, weights, strict=True):
        config = _read_config(name, kwargs)
        _check_configs(names[0], first, name, config)
        states = _read_states(name, kwargs)
        if not total:
            total = {key: torch.zeros(state.shape, dtype=torch.float64) for key, state in states.items()}
        own = match_names(states, total)
        states = {own[key]: state for key, state in states.items()}
        try:
            check_fit({key: tuple(state.shape) for key, state in total.items()}, states)
        except ValueError as error:
            raise ValueError(f"soup: '{name}' has no sum with '{names[0]}': {error}") from error
        for key, state in states.items():
            total[key] += weight * state.double()
    for state in total.values():
        check_sum(state, weights)
    config = without_start(first, inference_mode=True)
    with new_folder(output, overwrite, ADAPTER_FILES) as folder:
        states = {key: state.float() for key, state in total.items()}
        save_file(states, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        ModelCard(_card(names, weights)).save(folder / CARD_NAME)
        update_model_card(folder)
    return Path(output)


def _read_config(name: str, options: Mapping[str, Any]) -> S0Config:
    config = load_config(name, **options)
    for field, advice in (
        ("rank", f"a sum of low-rank states is not of that rank. {_LINEAR}"),
        ("normalize", f"it is the normalised states that add up. {_LINEAR}"),
        ("learn_alpha", f"it is the scaled states that add up. {_LINEAR}"),
        ("modules_to_save", "states add up, whole modules do not"),
        ("trainable_token_indices", "states add up, token embeddings do not"),
    ):
        if getattr(config, field):
            raise ValueError(f"soup: '{name}' has {field}={getattr(config, field)!r}: {advice}.")
    return config


def _check_configs(first_name: str, first: S0Config, name: str, config: S0Config) -> None:
    """Refuse adapters whose states are not read in the same way."""
    for field in (field.name for field in fields(S0Config) if field.name not in _FREE):
        expected, found = getattr(first, field), getattr(config, field)
        if expected != found:
            advice = _ADVICE.get(field, _LINEAR)
            raise ValueError(
                f"soup: '{first_name}' has {field}={expected!r}, but '{name}' has {field}={found!r}. {advice}."
            )


def _read_states(name: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    file = find_states(name, **options)
    if file is None:
        raise ValueError(f"soup: '{name}' has no {SAFETENSORS_WEIGHTS_NAME}; save the adapter with save_pretrained.")
    check_readable(file)
    states = decode(load_file(file))
    others = sorted(key for key in states if _STATE.search(key) is None)
    if others:
        raise ValueError(f"soup: '{name}' holds '{others[0]}' beside its states, which has no sum.")
    return states


def _card(names: Sequence[str], weights: Sequence[float]) -> str:
    rows = "".join(f"| {name} | {weight:g} |\n" for name, weight in zip(names, weights, strict=True))
    return f"---\nlibrary_name: peft\n---\n\n# A sum of S0 adapters\n\n| adapter | weight |\n| --- | --- |\n{rows}"
