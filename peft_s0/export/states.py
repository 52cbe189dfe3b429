"""What the sequences of an adapter start from, layer by layer, as other engines need it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn

from ..config import S0Config, check_readable, find_states, load_config
from ..injection import CHILD
from ..layer import S0Layer, check_finite
from ..mixers import Family, Mixer, find_mixer
from ..naming import shared_name

_STATE = f".{CHILD}.s0_state.weight"


@dataclass(frozen=True)
class Start:
    """What an adapter's sequences start from.

    Args:
        source: what the adapter is called in messages.
        states: the effective state of each layer that it tunes, by the layer's index: float32 [heads, ...] on the CPU,
            with `alpha` and `normalize` applied and low rank multiplied out.
        covers: the layers that a model must have recurrent mixers in if the adapter is its; None: not known.
        model_class: the name of the model's class; None: not known, as PEFT does not record it with a `task_type`.
        attributes: what the adapted mixers are called in their layers.
        mixers: the mixers of a live model, by the layer's index; of a saved adapter there are none.
    """

    source: str
    states: dict[int, Tensor]
    covers: frozenset[int] | None
    model_class: str | None
    attributes: frozenset[str]
    mixers: dict[int, nn.Module] = field(default_factory=dict)


def read_start(
    adapter: PeftModel | str | Path, shape: tuple[int, ...], adapter_name: str | None = None, **kwargs: Any
) -> Start:
    """Read an adapter's effective states.

    Args:
        adapter: a live model with S0 adapters in eval mode, or folder or Hub id of a saved adapter.
        shape: the state of one layer [heads, ...], in the order of transformers.
        adapter_name: which adapter of a live model; None: the active one.
        kwargs: `subfolder`, `revision`, `token` and the like, for the Hub.

    Raises:
        TypeError: if the adapter is neither.
        ValueError: if it is more than initial states (another variant, whole modules, tokens), does not have this
            shape, has values that are not finite, or cannot be read.
    """
    if isinstance(adapter, (str, Path)):
        return _saved(str(adapter), shape, **kwargs)
    if not isinstance(adapter, PeftModel):
        raise TypeError(f"Expected a PeftModel, or folder or Hub id of an adapter, got {type(adapter).__name__}.")
    if kwargs:
        raise TypeError(f"{sorted(kwargs)} are for an adapter on the Hub; this one is a live model.")
    return _live(adapter, shape, adapter_name)


def _live(model: PeftModel, shape: tuple[int, ...], adapter_name: str | None) -> Start:
    if adapter_name is None:
        if len(model.active_adapters) != 1:
            raise ValueError(f"Name one of the active adapters {model.active_adapters} with adapter_name=.")
        (adapter_name,) = model.active_adapters
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, S0Config):
        raise ValueError(f"The model has no S0 adapter '{adapter_name}'; it has {sorted(model.peft_config)}.")
    if model.training:
        raise ValueError("The model is in training mode, where states may be scaled by train_alpha; call eval() first.")
    source = f"adapter '{adapter_name}'"
    _check_config(source, config)
    base = model.get_base_model()
    found = _Layers(source)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, S0Layer) and adapter_name in layer.configs:
                state = layer.effective_state(adapter_name).cpu()
                _check_state(source, name, tuple(state.shape), shape, state)
                found.add(name.removesuffix(f".{CHILD}"), state)
    mixers = _Layers(source)
    for name, module in base.named_modules():
        if find_mixer(type(module)) is not None:
            mixers.add(name, module)
    covers = frozenset(mixers.values)
    return Start(source, found.values, covers, type(base).__name__, found.attributes, mixers.values)


def _saved(model_id: str, shape: tuple[int, ...], **kwargs: Any) -> Start:
    config = load_config(model_id, **kwargs)
    source = f"'{model_id}'"
    _check_config(source, config)
    if config.alpha is None:
        raise ValueError(f"The config of {source} has no alpha: it has never met a model. Save the adapter from one.")
    file = find_states(model_id, **kwargs)
    if file is None:
        raise ValueError(f"{source} has no states; save the adapter with save_pretrained.")
    check_readable(file)
    # The tuner layer itself, so that a saved state means here what it means in a model.
    layer = S0Layer(nn.Module(), Mixer("", Family("", 1.0), lambda mixer: shape)).eval()
    layer.update_layer("saved", config, torch.device("meta"))
    expected = tuple(layer.state("saved").weight.shape)
    found = _Layers(source)
    with safe_open(file, framework="pt") as tensors, torch.no_grad():
        for name in tensors.keys():  # noqa: SIM118 - no dict
            if not name.endswith(_STATE):
                raise ValueError(f"{source} holds '{name}' beside its states, which would be lost.")
            stored = tensors.get_tensor(name)
            _check_state(source, name, tuple(stored.shape), expected, stored)
            layer.state("saved").weight = nn.Parameter(stored.float(), requires_grad=False)
            found.add(name.removesuffix(_STATE), layer.effective_state("saved"))
    covers = frozenset(found.values) if _tunes_all(config) else None
    model_class = (config.auto_mapping or {}).get("base_model_class")
    return Start(source, found.values, covers, model_class, found.attributes)


def _check_config(source: str, config: S0Config) -> None:
    if config.variant != "initial":
        raise ValueError(
            f"{source} has variant {config.variant!r}. Only 'initial' enters once, as a state that other engines can "
            "start from."
        )
    if config.modules_to_save or config.trainable_token_indices:
        raise ValueError(
            f"{source} has modules_to_save or trainable_token_indices: those are weights, which an exported state does "
            "not hold."
        )


def _check_state(source: str, name: str, found: tuple[int, ...], expected: tuple[int, ...], state: Tensor) -> None:
    if found != expected:
        raise ValueError(
            f"{source} does not fit the model to export to: the state '{name}' has shape {list(found)}, expected "
            f"{list(expected)}. Export to the base model that the adapter was trained on."
        )
    check_finite(name, state)


def _tunes_all(config: S0Config) -> bool:
    """Whether the config says that the adapter tunes every recurrent layer of its model."""
    targets = config.target_modules
    if config.layers_to_transform is not None or config.exclude_modules or not targets or isinstance(targets, str):
        return False
    return not any(part.isdigit() for target in targets for part in target.split("."))


class _Layers:
    """Values by the layers they are of, which names of mixers say: `layers.<index>.<attribute>` at their end."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.values: dict[int, Any] = {}
        self.attributes: frozenset[str] = frozenset()

    def add(self, name: str, value: Any) -> None:
        parts = shared_name(name).split(".", 2)
        if len(parts) < 3:
            raise ValueError(f"{self.source}: the name '{name}' does not say which layer it is of.")
        index = int(parts[1])
        if index in self.values:
            raise ValueError(f"{self.source} has two mixers in layer {index}, the second one is '{name}'.")
        self.values[index] = value
        self.attributes |= {parts[2]}
