"""The Mamba-2 layer of mamba-ssm's own models, which takes no initial state.

The recurrence is linear in its state, so what a state S contributes can be computed beside the scan, which starts from
zero: y_t gains exp(A (dt_1 + ... + dt_t)) S C_t. dt and C are read off the input projection, C through its share of the
short convolution. The gain is added in front of the gated norm, and what is left of the state to the one that a prompt
leaves in the cache. Decoding then runs the layer's own step.

For training the layer has a fused path that calls neither its norm nor its output projection as modules. It is switched
off in calls that start from a state; the other path computes the same in several kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

from ..taps import on_input, on_output
from . import mamba2
from .base import Call, Mixer, MixerModule, register_mixer


class _Gain:
    """What the states of one call contribute.

    Args:
        mixer: the layer.
        call: the call.
    """

    def __init__(self, mixer: MixerModule, call: Call) -> None:
        assert call.states is not None
        self.mixer = mixer
        self.cache = call.cache
        self.states = call.states
        self.documents: Tensor | None = call.arguments.get("seq_idx")

    def read(self, projected: Tensor) -> None:
        """Compute the gain from the input projection's output [batch, tokens, features]."""
        mixer, columns = self.mixer, self.mixer.ngroups * self.mixer.d_state
        # In float32, which autocast would undo.
        with torch.autocast(projected.device.type, enabled=False):
            others, c, dt = projected.float().split(
                [projected.shape[-1] - columns - mixer.nheads, columns, mixer.nheads], dim=-1
            )
            first = self._first(projected)
            decay = self._decay(dt, first)
            c = self._convolve(c, first).unflatten(-1, (mixer.ngroups, mixer.d_state))
            states = self.states.unflatten(1, (mixer.ngroups, -1))
            gain = torch.einsum("btgn,bgrpn->btgrp", c, states).flatten(2, 3) * decay.unsqueeze(-1)
            self.gain = gain.flatten(2)
            if not mixer.rmsnorm:
                # There the scan has applied the gate already.
                gate = others[..., -2 * mixer.d_ssm - columns : -mixer.d_ssm - columns]
                self.gain = self.gain * silu(gate)
            self.end = self.states * decay[:, -1, :, None, None]

    def add(self, hidden: Tensor) -> Tensor:
        """Add the gain to the last columns [batch, tokens, inner], and what is left of the states to the cache's."""
        if self.cache is not None:
            state = self.cache.key_value_memory_dict[self.mixer.layer_idx][1]
            state.add_(self.end.detach().to(state.dtype))
        gain = self.gain.to(hidden.dtype)
        return hidden + pad(gain, (hidden.shape[-1] - gain.shape[-1], 0))

    def _first(self, projected: Tensor) -> Tensor:
        """Where the document of each token begins, long [batch or 1, tokens]."""
        place = torch.arange(projected.shape[1], device=projected.device).unsqueeze(0)
        if self.documents is None:
            return torch.zeros_like(place)
        starts = pad(self.documents.diff(dim=1) != 0, (1, 0), value=True)
        return torch.where(starts, place, 0).cummax(dim=1).values

    def _decay(self, logits: Tensor, first: Tensor) -> Tensor:
        """What is left of a state after each token of its document, [batch, tokens, heads]."""
        dt = softplus(logits + self.mixer.dt_bias.float()).clamp(*self.mixer.dt_limit)
        logarithm = -self.mixer.A_log.float().exp() * dt
        total = logarithm.cumsum(dim=1)
        return torch.exp(total - (total - logarithm).take_along_dim(first.unsqueeze(-1), dim=1))

    def _convolve(self, c: Tensor, first: Tensor) -> Tensor:
        """The short convolution of its last columns, within documents."""
        convolution = self.mixer.conv1d
        weight = convolution.weight[-c.shape[-1] :, 0].float()
        seen = (torch.arange(c.shape[1], device=c.device) - first).unsqueeze(-1)
        out = c * weight[:, -1]
        for back in range(1, weight.shape[-1]):
            earlier = pad(c, (0, 0, back, 0))[:, : c.shape[1]]
            out = out + earlier.masked_fill(seen < back, 0.0) * weight[:, -1 - back]
        if convolution.bias is not None:
            out = out + convolution.bias[-c.shape[-1] :].float()
        return silu(out)


@dataclass(frozen=True)
class Mamba2Mixer(Mixer):
    """Declaration of mamba-ssm's Mamba-2 layer. See `Mixer`."""

    cache_argument: str | None = "inference_params"
    input_argument: str = "u"

    def refusal(self, mixer: MixerModule) -> str | None:
        """See `Mixer.refusal`."""
        return None if mixer.process_group is None else "tensor parallelism splits its heads between processes"

    def has_past(self, mixer: MixerModule, cache: Any, arguments: dict[str, Any]) -> bool:
        """See `Mixer.has_past`."""
        return cache is not None and cache.seqlen_offset > 0

    def sequences(self, mixer: MixerModule, kwargs: dict[str, Any]) -> int:
        """See `Mixer.sequences`.

        Raises:
            ValueError: for rows that are laid end to end.
        """
        given = [name for name in ("seqlen", "cu_seqlens", "cu_seq_lens_q") if kwargs.get(name) is not None]
        if given:
            raise ValueError(
                f"S0 does not run mamba-ssm's Mamba2 with {' and '.join(given)}. Pass rows [batch, tokens], with "
                "seq_idx if they are packed."
            )
        return int(kwargs[self.input_argument].shape[0])

    def enter(self, mixer: MixerModule, call: Call) -> Any:
        """See `Mixer.enter`."""
        gain = _Gain(mixer, call)
        on_output(mixer, "in_proj", gain.read)
        on_input(mixer, "norm" if mixer.rmsnorm else "out_proj", gain.add)
        if mixer.use_mem_eff_path:
            mixer.use_mem_eff_path, mixer.s0_use_mem_eff_path = False, True
        return call.cache

    def final_state(self, mixer: MixerModule, cache: Any) -> Tensor:
        """See `Mixer.final_state`. Its model takes a cache, but does not make one."""
        if cache is None:
            raise ValueError(
                "The models of mamba-ssm keep the state that a sequence ends in only where inference_params are passed "
                "to them, which is not done here. Use the model of the same checkpoint in transformers."
            )
        return self.cached_state(mixer, cache)

    def cached_state(self, mixer: MixerModule, cache: Any) -> Tensor:
        """See `Mixer.cached_state`."""
        state: Tensor = cache.key_value_memory_dict[mixer.layer_idx][1]
        return state

    def leave(self, mixer: MixerModule, call: Call) -> None:
        """See `Mixer.leave`."""
        if mixer.__dict__.pop("s0_use_mem_eff_path", False):
            mixer.use_mem_eff_path = True
        super().leave(mixer, call)


register_mixer(
    Mamba2Mixer(
        path="mamba_ssm.modules.mamba2.Mamba2",
        family=mamba2.FAMILY,
        state_shape=lambda mixer: (mixer.nheads, mixer.headdim, mixer.d_state),
        kernels="mamba_ssm.ops.triton.ssd_combined",
    )
)
