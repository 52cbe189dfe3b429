"""What must fit where states and adapters come together: a file and its model, states and their sum."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper, get_peft_model_state_dict
from torch import Tensor, nn

from .config import S0Config
from .injection import CHILD
from .layer import S0Layer, check_finite

# In the name of a learnt tensor: what stands in front of it is the mixer's name.
LEARNT = re.compile(rf"\.{CHILD}\.({'|'.join(S0Layer.adapter_layer_names)})\.")


def expected_states(model: nn.Module, adapter_name: str) -> dict[str, torch.Size]:
    """Names and shapes of an adapter's states and offsets in a model."""
    return {
        name: parameter.shape
        for name, parameter in model.named_parameters()
        if (match := LEARNT.search(name)) and name[match.end() :].startswith(f"{adapter_name}.")
    }


def check_states(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Compare a file's states with what the model expects.

    Raises:
        ValueError: see `check_fit`; also if only one of them has states, or offsets.
    """
    expected = expected_states(model, adapter_name)
    found = {name: state for name, state in state_dict.items() if LEARNT.search(name)}
    variants = [_variant(names) for names in (expected, found)]
    if None not in variants and variants[0] != variants[1]:
        raise ValueError(
            f"The states do not fit this model: they are of variant='{variants[1]}', but adapter '{adapter_name}' has "
            f"variant='{variants[0]}'. Load them with the config that was saved with them."
        )
    learnt = [any(".s0_alpha." in name for name in names) for names in (expected, found)]
    if None not in variants and learnt[0] != learnt[1]:
        raise ValueError(
            f"The states do not fit this model: they come {'with' if learnt[1] else 'without'} learnt alphas, but "
            f"adapter '{adapter_name}' has learn_alpha={learnt[0]}. Load them with the config that was saved with them."
        )
    check_fit(expected, found)


def _variant(names: Iterable[str]) -> str | None:
    """The variant that learnt tensors of these names are of; None if there are none."""
    kinds = {match.group(1) for match in map(LEARNT.search, names) if match is not None} - {"s0_alpha"}
    return None if not kinds else "both" if len(kinds) > 1 else "initial" if "s0_state" in kinds else "offset"


def check_fit(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], values: bool = True) -> None:
    """Compare states with what a model expects.

    Args:
        expected: the shape of each state, by its name.
        found: the states, by their names.
        values: look at the values, too, which reads them.

    Raises:
        ValueError: for missing or additional layers, other shapes, dtypes that are not floating-point, or values that
            are not finite; the message names the layer, the expected and the found.
    """
    missing, additional = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    advice = "Load the adapter on the base model it was trained on."
    if missing or additional:
        raise ValueError(
            f"The states do not fit this model. Expected {len(expected)} layers, found {len(found)}"
            + (f"; missing in the file: {shortened(missing)}" if missing else "")
            + (f"; not in the model: {shortened(additional)}" if additional else "")
            + f". {advice}"
        )
    for name, state in found.items():
        if tuple(state.shape) != tuple(expected[name]):
            raise ValueError(
                f"The state '{name}' does not fit this model: expected shape {list(expected[name])}, found "
                f"{list(state.shape)}. {advice}"
            )
        if not state.is_floating_point():
            raise ValueError(f"The state '{name}' has dtype {state.dtype}, expected a floating-point dtype.")
        if values:
            check_finite(name, state)


def check_weights(adapters: Sequence[Any], weights: Sequence[Any]) -> None:
    """Refuse what is no sum of adapters.

    Raises:
        ValueError: if there are no adapters, or not one finite number for each.
    """
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(f"Pass one weight for each adapter, got {len(adapters)} adapters and {len(weights)} weights.")
    for weight in weights:
        if not isinstance(weight, Real) or isinstance(weight, bool) or not math.isfinite(weight):
            raise ValueError(f"A weight must be a finite number, got {weight!r}.")


def check_sum(total: Tensor, weights: Sequence[float]) -> None:
    """Refuse a weighted sum of finite states that float32 cannot hold.

    Raises:
        ValueError: naming the weights.
    """
    if not bool(total.float().isfinite().all()):
        raise ValueError(f"The sum of the states is not finite in float32 with the weights {list(weights)}: too large.")


def is_learnt(name: str) -> bool:
    """Whether a name in a file is that of a state, an offset or a learnt alpha, however it is stored."""
    return LEARNT.search(name) is not None


def check_beside_states(model: nn.Module, config: S0Config, adapter_name: str) -> None:
    """Refuse an adapter whose modules or tokens are gone: PEFT takes away those of all methods when one is unloaded.

    Raises:
        ValueError: naming the field and what to do.
    """
    modules = tuple(config.modules_to_save or ())
    # Of modules PEFT passes over names that are not there, such as those that it adds itself for a classifier.
    expected = config.trainable_token_indices or any(name.endswith(modules) for name, _ in model.named_modules())
    if not expected or any(
        isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._get_available_adapters()
        for module in model.modules()
    ):
        return
    field = "modules_to_save" if modules else "trainable_token_indices"
    raise ValueError(
        f"Adapter '{adapter_name}' has {field}={getattr(config, field)!r}, of which this model no longer holds what "
        "was trained: unload() and merge_and_unload() of another method take it away. Save the adapter before that."
    )


def check_other_weights(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Compare what a file holds beside states (`modules_to_save`, tokens) with what an adapter has.

    Raises:
        ValueError: naming what is missing, additional or of another shape.
    """
    held = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    expected, found = (
        {name: list(weight.shape) for name, weight in weights.items() if not LEARNT.search(name)}
        for weights in (held, state_dict)
    )
    if expected != found:
        differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        raise ValueError(
            f"Beside its states the file does not hold what adapter '{adapter_name}' has. Shape of '{differing[0]}': "
            f"expected {expected.get(differing[0], 'none')}, found {found.get(differing[0], 'none')}. Load it with "
            "load_adapter."
        )


def shortened(names: Any) -> str:
    """Names for a message, the first and the last of many."""
    names = list(names)
    return ", ".join(names) if len(names) < 5 else f"{names[0]}, {names[1]}, ... {names[-1]} ({len(names)} in all)"
