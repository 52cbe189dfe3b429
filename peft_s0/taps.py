"""Taps: permanent hooks on the parts of a mixer that do nothing until a call of the mixer gives them something to do.

A mixer computes its decay, its gates and its read-out in submodules. Freezing a gate at pads, or adding what a state
contributes to the output, is done on the way out of, or into, such a part. The hooks stay; what they do is set for one
call and taken off after it, since registering hooks for each call would break `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Action = Callable[[Tensor], "Tensor | None"]

_OUTPUT, _INPUT, _ARGUMENTS = "s0_on_output", "s0_on_input", "s0_on_arguments"


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
                for action in (_OUTPUT, _INPUT, _ARGUMENTS):
                    setattr(module, action, None)
                handles.append(module.register_forward_hook(_after_part))
                handles.append(module.register_forward_pre_hook(_before_part, with_kwargs=True))
    return handles


def uninstall(mixer: nn.Module, parts: tuple[str, ...]) -> None:
    """Remove the marks that `install` left; the caller removes the handles."""
    for part in parts:
        for module in _wrapped(mixer, part):
            for action in (_OUTPUT, _INPUT, _ARGUMENTS):
                vars(module).pop(action, None)


def on_output(mixer: nn.Module, part: str, action: Action | None) -> None:
    """Set what is done with a part's output until it is set to None; a result takes the output's place."""
    setattr(_tapped(mixer, part), _OUTPUT, action)


def also_on_output(mixer: nn.Module, part: str, action: Action) -> None:
    """Like `on_output`, but before what is done with the output already."""
    present = getattr(_tapped(mixer, part), _OUTPUT)
    on_output(mixer, part, action if present is None else partial(_both, action, present))


def on_input(mixer: nn.Module, part: str, action: Action | None) -> None:
    """Set what is done with a part's first input until it is set to None."""
    setattr(_tapped(mixer, part), _INPUT, action)


def on_arguments(mixer: nn.Module, part: str, action: Callable[[dict[str, Any]], dict[str, Any]] | None) -> None:
    """Set what is done with a part's keyword arguments until it is set to None; the result takes their place."""
    setattr(_tapped(mixer, part), _ARGUMENTS, action)


def clear(mixer: nn.Module, parts: tuple[str, ...]) -> None:
    """Take all actions off."""
    for part in parts:
        for module in _wrapped(mixer, part):
            for action in (_OUTPUT, _INPUT, _ARGUMENTS):
                if vars(module).get(action) is not None:
                    setattr(module, action, None)


def _both(first: Action, second: Action, output: Tensor) -> Tensor | None:
    changed = first(output)
    again = second(output if changed is None else changed)
    return changed if again is None else again


def _before_part(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    on_input, on_arguments = getattr(module, _INPUT), getattr(module, _ARGUMENTS)
    if on_input is None and on_arguments is None:
        return None
    changed = None if on_input is None else on_input(args[0])
    if changed is not None:
        args = (changed, *args[1:])
    return args, kwargs if on_arguments is None else on_arguments(kwargs)


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
