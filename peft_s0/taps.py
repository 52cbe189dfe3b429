"""Taps: what stands in the place of a mixer's parts for one call, to see and change what goes in and comes out.

A mixer computes its decay, its gates and its read-out in submodules. Freezing a gate at pads, or adding what a state
contributes to the output, is done on the way out of, or into, such a part. A tap is put in the part's place before the
call, and the part back after it. So parts have no hooks, which would cost time in every call, decoding included; and
`torch.compile` can follow, which does not hold for hooks that come and go.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

Action = Callable[[Tensor], "Tensor | None"]


class Tap(nn.Module):
    """A part of a mixer, and what is done with its input and output.

    Args:
        part: the part, with all that other adapters have put around it.
    """

    part: nn.Module
    on_output: Action | None = None
    on_input: Action | None = None
    on_arguments: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        # Its tensors and children are the tap's, under the names they have: a call that was interrupted from the
        # keyboard has hidden none of them. It is no child itself. Not as attributes, which take a module long to set.
        shared = {"_parameters": part._parameters, "_buffers": part._buffers, "_modules": part._modules}
        vars(self).update(shared, part=part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The part's output, as the actions change it."""
        if self.on_input is not None:
            changed = self.on_input(args[0])
            args = args if changed is None else (changed, *args[1:])
        if self.on_arguments is not None:
            kwargs = self.on_arguments(kwargs)
        output = self.part(*args, **kwargs)
        changed = None if self.on_output is None else self.on_output(output)
        return output if changed is None else changed

    def __getattr__(self, name: str) -> Any:
        # A mixer may read a part's weight, or what else it has.
        return getattr(self.part, name)


def on_output(mixer: nn.Module, part: str, action: Action) -> None:
    """Set what is done with a part's output until `clear`; a result takes the output's place."""
    _tap(mixer, part).on_output = action


def also_on_output(mixer: nn.Module, part: str, action: Action) -> None:
    """Like `on_output`, but before what is done with the output already."""
    tap = _tap(mixer, part)
    tap.on_output = action if tap.on_output is None else partial(_both, action, tap.on_output)


def on_input(mixer: nn.Module, part: str, action: Action) -> None:
    """Set what is done with a part's first input until `clear`; a result takes the input's place."""
    _tap(mixer, part).on_input = action


def on_arguments(mixer: nn.Module, part: str, action: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Set what is done with a part's keyword arguments until `clear`; the result takes their place."""
    _tap(mixer, part).on_arguments = action


def clear(mixer: nn.Module) -> None:
    """Put all parts of a mixer back in their places."""
    # Not through named_children: this is asked after every call that starts sequences, most of which tap nothing.
    for name, child in list(mixer._modules.items()):
        if isinstance(child, Tap):
            setattr(mixer, name, child.part)


def _both(first: Action, second: Action, output: Tensor) -> Tensor | None:
    changed = first(output)
    again = second(output if changed is None else changed)
    return changed if again is None else again


def _tap(mixer: nn.Module, part: str) -> Tap:
    present = getattr(mixer, part)
    if isinstance(present, Tap):
        return present
    tap = Tap(present)
    setattr(mixer, part, tap)
    return tap
