"""State offsets (arXiv 2503.03499): what is read from a learnt tensor beside the state, at every step.

An offset D has the shape of the state, is added to it whenever it is read, and never enters the recurrence:
o_t = (S_t + D) q_t. Reading is linear, so D q_t is computed beside the mixer, whatever kernel it runs on, and added to
what the mixer has read before its gated norm. q_t is a share of a projection that the mixer calls anyhow, sent through
that share of the mixer's short convolution. In decoding the convolution's past is in the cache, where it is looked up
before the mixer writes there. So the mixer runs the code that it runs without an offset, step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad
from transformers.activations import ACT2FN

from . import taps
from .mixers import Readout

Product = Callable[[Tensor, Tensor], Tensor]


class Reading:
    """What is read from offsets in one call of a mixer.

    Args:
        mixer: the mixer.
        readout: how it reads its state.
        past: what its convolution has seen before, [rows, channels, tokens]; where these are fewer than it looks back
            on, there were no more. None at the start of a sequence.
        read: from q [rows, tokens, groups, key size] and the product of q and one offset to the sum over all adapters,
            [rows, tokens, heads, value size].
    """

    def __init__(
        self, mixer: Any, readout: Readout, past: Tensor | None, read: Callable[[Tensor, Product], Tensor]
    ) -> None:
        self.mixer = mixer
        self.readout = readout
        self.past = past
        self.read = read
        self.gain: Tensor | None = None

    def engage(self) -> None:
        """Take part in the mixer's next call, until its taps are cleared."""
        taps.also_on_output(self.mixer, self.readout.projection, self.see_projection)
        taps.on_input(self.mixer, self.readout.output_of(self.mixer), self.add)

    def see_projection(self, projected: Tensor) -> None:
        """Compute what is read, from the projection's output [rows, tokens, features]."""
        readout, mixer = self.readout, self.mixer
        query = self._convolve(readout.queries(mixer, projected))
        # In float32, in which kernels keep the state; autocast would undo it.
        with torch.autocast(query.device.type, enabled=False):
            query = query.to(torch.promote_types(query.dtype, torch.float32))
            query = query.unflatten(-1, (readout.groups(mixer), -1))
            if readout.normalize:
                length = query.square().sum(-1, keepdim=True) + 1e-6
                query = query * torch.rsqrt(length) * query.shape[-1] ** -0.5
            gain = self.read(query, _key_first if readout.key_first else _value_first)
            gate = readout.gate(mixer, projected)
            self.gain = gain if gate is None else gain.flatten(-2) * gate

    def add(self, output: Tensor) -> Tensor:
        """What the mixer has read, with the share of the offsets added."""
        assert self.gain is not None, "the projection is called before what it reads for"
        return (output + self.gain.reshape(output.shape)).to(output.dtype)

    def _convolve(self, x: Tensor) -> Tensor:
        """The mixer's convolution of its channels that become q, [rows, tokens, channels], with its activation."""
        convolution, channels = self.mixer.conv1d, self.readout.channels(self.mixer)
        weight = convolution.weight[channels]
        bias = None if convolution.bias is None else convolution.bias[channels]
        back = weight.shape[-1] - 1
        window = x.transpose(1, 2)
        if self.past is not None and back > 0:
            window = torch.cat([self.past[:, channels, -back:].to(window.dtype), window], dim=-1)
        missing = x.shape[1] + back - window.shape[-1]
        if missing > 0:
            window = pad(window, (missing, 0))
        if window.shape[-1] == weight.shape[-1]:
            # A single token, for which convolutions are slow.
            wide = torch.promote_types(weight.dtype, torch.float32)
            out = (window.to(wide) * weight[:, 0].to(wide)).sum(-1, keepdim=True).to(weight.dtype)
            out = out if bias is None else out + bias.unsqueeze(-1)
        else:
            out = conv1d(window.to(weight.dtype), weight, bias, groups=weight.shape[0])
        return ACT2FN[self.mixer.activation](out).to(x.dtype).transpose(1, 2)


def _key_first(query: Tensor, offset: Tensor) -> Tensor:
    """What q [rows, tokens, groups, key] reads from [heads, key, value]: [rows, tokens, heads, value]."""
    heads = offset.to(query.device, query.dtype).unflatten(0, (query.shape[2], -1))
    read = torch.matmul(query.flatten(0, 1).transpose(0, 1).unsqueeze(1), heads)
    return read.flatten(0, 1).transpose(0, 1).unflatten(0, query.shape[:2])


def _value_first(query: Tensor, offset: Tensor) -> Tensor:
    """What q [rows, tokens, groups, key] reads from [heads, value, key]: [rows, tokens, heads, value]."""
    heads = offset.to(query.device, query.dtype).unflatten(0, (query.shape[2], -1)).flatten(1, 2)
    read = torch.matmul(query.flatten(0, 1).transpose(0, 1), heads.mT)
    return read.transpose(0, 1).reshape(*query.shape[:2], *offset.shape[:2])
