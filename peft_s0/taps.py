"""Taps: permanent hooks on the parts of a mixer that do nothing until a call of the mixer gives them something to do.

A mixer computes its decay, its gates and its read-out in submodules. Freezing a gate at pads, or adding what a state
contributes to the output, is done on the way out of, or into, such a part. The hooks stay; what they do is set for one
call and taken off after it, since registering hooks for each call would break `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Action = Callable[[Tensor], "Tensor | None"]

_OUTPUT, _INPUT = "s0_on_output", "s0_on_input"


def install(mixer: nn.Module, parts: tuple[str, ...]) -> list[RemovableHandle]:
    """Tap parts of a mixer that are not tapped yet.

    Called again before each call that sets an action, for a part may have been exchanged for another module meanwhile:
    wrapped by another adapter, merged, quantised.

    Args:
        mixer: the mixer.
        parts: attributes that hold the parts; a mixer may lack some.

    Returns:
        Handles of the hooks that were added.
    """
    if torch.compiler.is_compiling():
        return []
    handles = []
    for part in parts:
        for module in _wrapped(mixer, part):
            if _OUTPUT not in vars(module):
                setattr(module, _OUTPUT, None)
                setattr(module, _INPUT, None)
                handles.append(module.register_forward_hook(_after_part))
                handles.append(module.register_forward_pre_hook(_before_part))
    return handles


def uninstall(mixer: nn.Module, parts: tuple[str, ...]) -> None:
    """Remove the marks that `install` left; the caller removes the handles."""
    for part in parts:
        for module in _wrapped(mixer, part):
            vars(module).pop(_OUTPUT, None)
            vars(module).pop(_INPUT, None)


def on_output(mixer: nn.Module, part: str, action: Action | None) -> None:
    """Set what is done with a part's output until it is set to None; a result takes the output's place."""
    setattr(_tapped(mixer, part), _OUTPUT, action)


def on_input(mixer: nn.Module, part: str, action: Action | None) -> None:
    """Set what is done with a part's first input until it is set to None."""
    setattr(_tapped(mixer, part), _INPUT, action)


def clear(mixer: nn.Module, parts: tuple[str, ...]) -> None:
    """Take all actions off."""
    for part in parts:
        for module in _wrapped(mixer, part):
            for action in (_OUTPUT, _INPUT):
                if vars(module).get(action) is not None:
                    setattr(module, action, None)


def _before_part(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    action = getattr(module, _INPUT)
    if action is None:
        return None
    changed = action(args[0])
    return None if changed is None else (changed, *args[1:])


def _after_part(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    action = getattr(module, _OUTPUT)
    return None if action is None else action(output)


def _wrapped(mixer: nn.Module, part: str) -> Iterator[nn.Module]:
    """A part and what it wraps: adapters (LoRA) put themselves in a part's place and keep it as `base_layer`."""
    module = getattr(mixer, part, None)
    while isinstance(module, nn.Module):
        yield module
        module = getattr(module, "base_layer", None)


def _tapped(mixer: nn.Module, part: str) -> nn.Module:
    """The outermost module of a part that is tapped, so that other adapters' share is seen, too."""
    for module in _wrapped(mixer, part):
        if _OUTPUT in vars(module):
            return module
    raise RuntimeError(
        f"'{part}' of {type(mixer).__name__} was exchanged for another module after S0 was attached, and the model was "
        "compiled before it ran. Call the model once before torch.compile."
    )
