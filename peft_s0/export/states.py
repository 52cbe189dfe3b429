"""What the sequences of an adapter start from, layer by layer, as other engines need it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..config import S0Config, load_config
from ..injection import has_layer, layer_of
from ..layer import check_finite
from ..model import recurrent_mixers
from ..naming import shared_name
from ..skeleton import check_states_alone, load_without_weights


@dataclass
class Start:
    """What an adapter's sequences start from, and the model that it is for.

    Args:
        source: what the adapter is called in messages.
        model_class: the name of the model's class.
        config: the config of its text model.
        mixers: the recurrent mixers of the model, by the index of the layer they are in; on the meta device if there is
            no more of the model than its config.
        attributes: what they are called in their layers.
        shapes: the shape of each one's state, [heads, ...].
        states: the effective state of each layer that the adapter tunes: float32 [heads, ...] on the CPU, with alpha
            and `normalize` applied and low rank multiplied out.
    """

    source: str
    model_class: str
    config: Any
    mixers: dict[int, nn.Module] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)


def read_start(adapter: PeftModel | str | Path, adapter_name: str | None = None, **options: Any) -> Start:
    """Read an adapter's effective states.

    Args:
        adapter: a live model with S0 adapters in eval mode, or folder or Hub id of a saved adapter.
        adapter_name: which adapter of a live model; None: the active one.
        options: for a saved adapter, `base_model`, `subfolder` and the like; see `load_without_weights`.

    Raises:
        TypeError: if the adapter is neither.
        ValueError: if it is more than initial states (another variant, whole modules, tokens, embeddings), has values
            that are not finite, or cannot be read.
    """
    if isinstance(adapter, (str, Path)):
        if adapter_name is not None:
            raise ValueError(f"adapter_name={adapter_name!r} is for a live model; name the adapter's own folder.")
        # Before the adapter meets a model, which may not have the weights that it would put others in the place of.
        _check(f"'{adapter}'", load_config(adapter, **_of_files(options)))
        check_states_alone(adapter, **_of_files(options))
        return _read(load_without_weights(adapter, **options), "default", f"'{adapter}'")
    if not isinstance(adapter, PeftModel):
        raise TypeError(f"Expected a PeftModel, or folder or Hub id of an adapter, got {type(adapter).__name__}.")
    if options:
        raise TypeError(f"{sorted(options)} are for a saved adapter; this one is a live model.")
    if adapter.training:
        raise ValueError("The model is in training mode, where states may be scaled by train_alpha; call eval() first.")
    if adapter_name is None:
        if len(adapter.active_adapters) != 1:
            raise ValueError(f"Name one of the active adapters {adapter.active_adapters} with adapter_name=.")
        (adapter_name,) = adapter.active_adapters
    return _read(adapter, adapter_name, f"adapter '{adapter_name}'")


def _read(model: PeftModel, adapter_name: str, source: str) -> Start:
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, S0Config):
        raise ValueError(f"The model has no S0 adapter '{adapter_name}'; it has {sorted(model.peft_config)}.")
    _check(source, config)
    base: Any = model.get_base_model()
    start = Start(source, type(base).__name__, base.config.get_text_config())
    for name, declaration in recurrent_mixers(base).items():
        mixer = base.get_submodule(name)
        # `layers.<index>.<attribute>`, as all models have it whose states can be exported.
        parts = shared_name(name).split(".", 2)
        if len(parts) < 3 or int(parts[1]) in start.mixers:
            raise ValueError(f"The name '{name}' does not say which layer it is of.")
        index = int(parts[1])
        start.mixers[index] = mixer
        start.shapes[index] = declaration.state_shape(mixer)
        start.attributes.add(parts[2])
        if has_layer(mixer) and adapter_name in layer_of(mixer).configs:
            with torch.no_grad():
                start.states[index] = layer_of(mixer).effective_state(adapter_name).cpu()
            check_finite(name, start.states[index])
    return start


def _of_files(options: dict[str, Any]) -> dict[str, Any]:
    """The options that say where an adapter's files are."""
    return {name: value for name, value in options.items() if name not in ("base_model", "trust_remote_code")}


def _check(source: str, config: S0Config) -> None:
    """Refuse an adapter that is more than initial states."""
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
