"""Taps: what stands in the place of a mixer's parts for one call, to see and change what goes in and comes out.

A mixer computes its decay, its gates and its read-out in submodules. Freezing a gate at pads, or adding what a state
contributes to the output, is done on the way out of, or into, such a part. A tap is put in the part's place before the
call, and the part back after it. So parts have no hooks, which would cost time in every call, decoding included; and
`torch.compile` can follow, which does not hold for hooks that come and go.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Action = Callable[[Tensor], "Tensor | None"]
T = TypeVar("T")


@dataclass
class Actions:
    """What is done with a part's input and output in one call of its mixer."""

    on_output: Action | None = None
    on_input: Action | None = None
    on_arguments: Callable[[dict[str, Any]], dict[str, Any]] | None = None


class Tap(nn.Module):
    """A part of a mixer, and what is done with its input and output, for each thread that calls the mixer.

    Args:
        part: the part, with all that other adapters have put around it.
    """

    part: nn.Module
    actions: dict[int, Actions]

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        # Its tensors and children are the tap's, under the names they have: a call that was interrupted from the
        # keyboard has hidden none of them. It is no child itself. Not as attributes, which take a module long to set.
        shared = {"_parameters": part._parameters, "_buffers": part._buffers, "_modules": part._modules}
        vars(self).update(shared, part=part, actions={})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The part's output, as the actions change it."""
        actions = own(self.actions) if self.actions else None
        if actions is None:
            return self.part(*args, **kwargs)
        if actions.on_input is not None:
            changed = actions.on_input(args[0])
            args = args if changed is None else (changed, *args[1:])
        if actions.on_arguments is not None:
            kwargs = actions.on_arguments(kwargs)
        output = self.part(*args, **kwargs)
        changed = None if actions.on_output is None else actions.on_output(output)
        return output if changed is None else changed

    def __getattr__(self, name: str) -> Any:
        # A mixer may read a part's weight, or what else it has.
        return getattr(self.part, name)


def thread() -> int:
    """Which thread this is; compiled code, which cannot ask, is one of its own."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def own(held: dict[int, T]) -> T | None:
    """What is held for this thread, whether the code that put it there was compiled or not.

    Within one call that may differ: a layer may be compiled alone, and what was compiled too often runs uncompiled.
    """
    if torch.compiler.is_compiling():
        return held[0] if 0 in held else _own(held) if held else None
    return held.get(threading.get_ident(), held.get(0))


def take(held: dict[int, T]) -> T | None:
    """`own`, which is held no longer."""
    if torch.compiler.is_compiling():
        return held.pop(0) if 0 in held else _take(held) if held else None
    key = threading.get_ident()
    return held.pop(key if key in held else 0, None)


def on_output(mixer: nn.Module, part: str, action: Action) -> None:
    """Set what is done with a part's output until `clear`; a result takes the output's place."""
    _tap(mixer, part).on_output = action


def also_on_output(mixer: nn.Module, part: str, action: Action) -> None:
    """Like `on_output`, but before what is done with the output already."""
    actions = _tap(mixer, part)
    actions.on_output = action if actions.on_output is None else partial(_both, action, actions.on_output)


def on_input(mixer: nn.Module, part: str, action: Action) -> None:
    """Set what is done with a part's first input until `clear`; a result takes the input's place."""
    _tap(mixer, part).on_input = action


def on_arguments(mixer: nn.Module, part: str, action: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Set what is done with a part's keyword arguments until `clear`; the result takes their place."""
    _tap(mixer, part).on_arguments = action


def clear(mixer: nn.Module) -> None:
    """Forget what this thread does with a mixer's parts; those that no other thread taps return to their places."""
    # Not through named_children: this is asked after every call that starts sequences, most of which tap nothing.
    tapped = [name for name, child in mixer._modules.items() if type(child) is Tap]
    if not tapped:
        return
    if not torch.compiler.is_compiling():
        _put_back(mixer, tapped)
    elif all(0 in getattr(mixer, name).actions for name in tapped):
        for name in tapped:
            setattr(mixer, name, getattr(mixer, name).part)
    else:
        _put_back_uncompiled(mixer, tapped)


def _put_back(mixer: nn.Module, tapped: list[str]) -> None:
    with _PLACING:
        for name in tapped:
            tap = mixer._modules[name]
            if isinstance(tap, Tap):
                take(tap.actions)
                if not tap.actions:
                    mixer._modules[name] = tap.part


def _both(first: Action, second: Action, output: Tensor) -> Tensor | None:
    changed = first(output)
    again = second(output if changed is None else changed)
    return changed if again is None else again


# Only uncompiled code can ask which thread it runs in.
_own, _take, _put_back_uncompiled = (torch.compiler.disable(function) for function in (own, take, _put_back))

# Taps that were in place before. To make a module takes longer than all else that is done with it.
_MADE: WeakKeyDictionary[nn.Module, dict[str, Tap]] = WeakKeyDictionary()
_PLACING = threading.Lock()


def _tap(mixer: nn.Module, part: str) -> Actions:
    """What this thread does with a part that is tapped from now on."""
    if torch.compiler.is_compiling():
        present = getattr(mixer, part)
        if not isinstance(present, Tap):
            present = Tap(present)
            setattr(mixer, part, present)
        return present.actions.setdefault(thread(), Actions())
    # Not as an attribute, which takes a module long to set.
    parts: dict[str, Any] = mixer._modules
    with _PLACING:
        present = parts[part]
        if not isinstance(present, Tap):
            made = _MADE.setdefault(mixer, {})
            tap = made.get(part)
            if tap is None or tap.part is not present:
                tap = made[part] = Tap(present)
            parts[part] = present = tap
        return present.actions.setdefault(thread(), Actions())
