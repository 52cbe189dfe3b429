"""Adapters of low rank made from others, without training."""

from __future__ import annotations

import torch
from peft import PeftModel

from .config import S0Config, without_start
from .injection import CHILD
from .layer import S0Layer, check_finite
from .model import S0Model


@torch.no_grad()
def compress_adapter(model: PeftModel, adapter_name: str, rank: int, new_name: str) -> dict[str, float]:
    """Add an adapter whose states, and offsets, are the nearest ones of a rank to those of another.

    Nearest in the Frobenius norm, head by head: the largest singular values and their vectors (Eckart and Young). Each
    factor gets the roots of the singular values, so that both are of one size. All else, such as `alpha`, is as it was.
    The new adapter is not active; it can be trained and saved like any other.

    Args:
        model: a PEFT model with S0 adapters.
        adapter_name: the adapter to start from; it stays as it is. It may have a rank itself, a greater one.
        rank: the new rank.
        new_name: name of the new adapter.

    Returns:
        For each mixer, by its name in the base model, the relative error of its unscaled state S (or offset, or both
        together): `||S - S_rank||_F / ||S||_F` over all heads, 0 where S is zero.

    Raises:
        TypeError: if the model is no PEFT model with S0 adapters.
        ValueError: for an unknown adapter, a name that is taken, a rank that is not below the adapter's own or that no
            head's state can have, values that are not finite, and an adapter that trains more than states.

    Example:
        >>> errors = compress_adapter(model, "task", rank=4, new_name="task-r4")
        >>> model.save_pretrained("small", selected_adapters=["task-r4"])
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, S0Model):
        raise TypeError(
            f"compress_adapter needs a PEFT model with S0 adapters, got {type(model).__name__}. Make one with "
            "peft.get_peft_model or PeftModel.from_pretrained."
        )
    own = {name: config for name, config in tuner.peft_config.items() if isinstance(config, S0Config)}
    if adapter_name not in own:
        raise ValueError(f"Unknown adapter '{adapter_name}'; this model has {sorted(own)}.")
    config = own[adapter_name]
    if config.modules_to_save or config.trainable_token_indices:
        raise ValueError(
            f"States have a rank, whole modules have none: adapter '{adapter_name}' has modules_to_save or "
            "trainable_token_indices, which the new one would lose."
        )
    if config.rank is not None and rank >= config.rank:
        raise ValueError(f"Adapter '{adapter_name}' has rank={config.rank} already; choose a lower one, got {rank}.")
    layers = {
        name.removesuffix(f".{CHILD}"): layer
        for name, layer in tuner.model.named_modules()
        if isinstance(layer, S0Layer) and adapter_name in layer.configs
    }
    states = {
        name: {kind: learnt() for kind, learnt in layer.states(adapter_name).items()} for name, layer in layers.items()
    }
    for name, of_mixer in states.items():
        for state in of_mixer.values():
            check_finite(name, state)
    model.add_adapter(new_name, without_start(config, rank=rank))
    errors = {}
    for name, layer in layers.items():
        differences = []
        for kind, made in layer.states(new_name).items():
            made.write(states[name][kind])
            differences.append(states[name][kind] - made())
        if config.learn_alpha:
            learnt, made = (layer.learnt_tensors(adapter)["s0_alpha"] for adapter in (adapter_name, new_name))
            made.load_state_dict(learnt.state_dict())
        norm = float(torch.stack([*states[name].values()]).double().norm())
        errors[name] = float(torch.stack(differences).double().norm()) / norm if norm > 0 else 0.0
    return errors
