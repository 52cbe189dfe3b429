"""Pads that change nothing.

A base model zeroes its input at pads, which suffices as long as the state is zero: the state then has nothing to lose.
A learnt initial state still decays by its gate at every pad in front of the first token, and right pads write into the
state that the cache keeps. So at pads the gates are frozen: no decay, no write.

The gates come out of projections inside the mixer. Each carries a permanent forward hook that does nothing until the
mixer's own hook leaves a `Freeze` on it for one call; registering hooks for each call would break `torch.compile`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .mixers import Gate, Mixer

_FREEZE = "s0_freeze"


@dataclass
class Freeze:
    """What a projection's hook does during one call of its mixer."""

    gate: Gate
    mixer: nn.Module
    pads: Tensor

    def __call__(self, output: Tensor) -> Tensor:
        """The projection's output with the gate frozen at pads."""
        return self.gate.freeze(self.mixer, output, self.pads)


def pads_of(attention_mask: Tensor | None, tokens: int) -> Tensor | None:
    """Where a mask says pad.

    Args:
        attention_mask: [batch, past + tokens] of any dtype, zero at pads; None or any other rank: no pads known.
        tokens: length of this call's segment.

    Returns:
        bool [batch, tokens], or None.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -tokens:] == 0


def install(mixer: nn.Module, declaration: Mixer) -> list[RemovableHandle]:
    """Hook the projections of a mixer's gates, those that are not hooked yet.

    Called again before each padded call, since a projection may have been exchanged for another module meanwhile
    (quantised, wrapped by another adapter and merged).
    """
    handles = []
    for gate in declaration.gates:
        projection = _projection(mixer, gate)
        if _FREEZE not in projection.__dict__:
            setattr(projection, _FREEZE, None)
            handles.append(projection.register_forward_hook(_apply_freeze))
    return handles


def uninstall(mixer: nn.Module, declaration: Mixer) -> None:
    """Forget the marks that `install` left; the caller removes the handles."""
    for gate in declaration.gates:
        _projection(mixer, gate).__dict__.pop(_FREEZE, None)


def freeze(mixer: nn.Module, declaration: Mixer, pads: Tensor) -> None:
    """Freeze the state at `pads`, bool [batch, tokens], until `release`."""
    for gate in declaration.gates:
        gate.engage(mixer)
        setattr(_projection(mixer, gate), _FREEZE, Freeze(gate, mixer, pads))


def release(mixer: nn.Module, declaration: Mixer) -> None:
    """End what `freeze` began; harmless without it."""
    for gate in declaration.gates:
        projection = _projection(mixer, gate)
        if projection.__dict__.get(_FREEZE) is not None:
            setattr(projection, _FREEZE, None)
            gate.release(mixer)


def frozen_positions(pads: Tensor | None, rows: Tensor | None, added: Tensor | None) -> Tensor | None:
    """Where the state must stay as it is.

    Args:
        pads: bool [batch, tokens], the batch's own pads.
        rows: bool [batch] or [1]: rows whose state is not the base model's zero. The others keep the base model's own
            arithmetic at their pads, to the last bit. None: all rows.
        added: bool [batch or 1, tokens], positions that this package appended; frozen in every row.

    Returns:
        bool [batch, tokens], or None if there are none.
    """
    if pads is not None and rows is not None:
        pads = pads & rows.unsqueeze(-1)
    if pads is None:
        return added
    return pads if added is None else pads | added


def _apply_freeze(projection: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    freeze = getattr(projection, _FREEZE)
    return None if freeze is None else freeze(output)


def _projection(mixer: nn.Module, gate: Gate) -> nn.Module:
    """The innermost module of a gate's projection: adapters on top of it (LoRA) come and go, and add 0 at pads, where
    the input is zero.
    """
    module = getattr(mixer, gate.projection)
    while hasattr(module, "base_layer"):
        module = module.base_layer
    assert isinstance(module, nn.Module)
    return module
