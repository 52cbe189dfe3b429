"""The naive twins: each recurrence written one token at a time, with an initial state, and nothing else.

A twin takes a mixer's weights and stands in its place in a copy of the model. It knows no cache, no chunks, no pads and
no packing, and shares no code with the kernels or with peft_s0. Everything is computed in float64.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SlowMixer(nn.Module):
    """A recurrent mixer as its formula.

    Args:
        mixer: the mixer whose weights it uses.
        state: [heads, ...], what every sequence starts from.
        offset: [heads, ...], added to the state wherever it is read; None: nothing.

    Attributes:
        final: [batch, heads, ...], what the last call's sequences ended in.
    """

    final: Tensor

    def __init__(self, mixer: nn.Module, state: Tensor, offset: Tensor | None = None) -> None:
        super().__init__()
        self.mixer = mixer
        self.state = state
        self.offset = offset

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        state = self.state.to(hidden_states.device).double().expand(hidden_states.shape[0], *self.state.shape)
        return self.recur(hidden_states.double(), state)

    def read(self, state: Tensor) -> Tensor:
        """What is multiplied by q_t: S_t, and the offset where the recurrence takes one."""
        return state if self.offset is None else state + self.offset.to(state)

    def recur(self, x: Tensor, state: Tensor) -> Tensor:
        raise NotImplementedError

    def convolve(self, x: Tensor) -> Tensor:
        """Causal depthwise convolution and SiLU of [batch, tokens, channels]."""
        weight = self.mixer.conv1d.weight.squeeze(1)
        width = weight.shape[-1]
        padded = F.pad(x, (0, 0, width - 1, 0))
        out = sum(padded[:, i : i + x.shape[1]] * weight[:, i] for i in range(width))
        if self.mixer.conv1d.bias is not None:
            out = out + self.mixer.conv1d.bias
        return out * torch.sigmoid(out)


def with_slow_mixers(
    model: nn.Module,
    slow_mixer: type[SlowMixer],
    states: dict[str, Tensor],
    offsets: dict[str, Tensor] | None = None,
) -> nn.Module:
    """A float64 copy of a base model in which each named mixer is its naive twin.

    Args:
        model: the base model.
        slow_mixer: the twin's class.
        states: initial state of each mixer, by the mixer's name in the model.
        offsets: state offset of each mixer, in the same way.
    """
    slow = copy.deepcopy(model).double()
    # The grouped product of experts knows no float64.
    slow.set_experts_implementation("eager")
    for name, state in states.items():
        parent, _, child = name.rpartition(".")
        twin = slow_mixer(slow.get_submodule(name), state, (offsets or {}).get(name))
        setattr(slow.get_submodule(parent), child, twin)
    return slow
