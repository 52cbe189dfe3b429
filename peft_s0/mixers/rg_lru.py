"""RG-LRU: h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t), a_t = exp(-8 softplus(p) sigmoid(W x_t + b))
(arXiv 2402.19427). The state is a vector, [width]: a weak surface for state tuning, as that of a Mamba.

The mixer keeps its state in itself and begins at zero, where the root is 1, at each position that is 0. The recurrence
is linear, so what a state S contributes is added to its output: a_1 ... a_t S, and to the state that the mixer keeps.

The model shows it no mask; S0 does. At pads what goes into the convolution and into the recurrence is zero and nothing
decays, and positions are counted from each row's first token, so that padded rows are right, which the base model has
wrong: its convolution reaches back into the pads.

Limits of RecurrentGemma itself, with S0 or without. Its convolution forgets the past in a call of several tokens on a
cache with a past, which is refused here. And what it keeps in itself is not reordered for beam search, which cannot be
seen from here: search with `use_cache=False`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from ..taps import on_input, on_output
from .base import Call, Courier, Family, Mixer, MixerModule, cache_argument, cache_of, register_mixer

FAMILY = Family("RG-LRU", alpha=1.0)

# The mask that comes with it is that of attention, which the recurrent blocks do not read.
_COURIER = Courier("attention_mask", mask=True)


class _Recurrence:
    """One call of a mixer, and what its states add to it.

    Args:
        mixer: the mixer.
        call: its call.
    """

    def __init__(self, mixer: MixerModule, call: Call) -> None:
        self.mixer = mixer
        # Itself, not the tap that will stand in its place.
        self.lru = mixer.rg_lru
        self.call = call

    def see_projection(self, output: Tensor) -> Tensor | None:
        """Clear the convolution's input [rows, tokens, width] at held positions."""
        self.projected = self._cleared(output)
        return self.projected

    def see_input(self, activations: Tensor) -> Tensor | None:
        """Take what the recurrence reads [rows, tokens, width], cleared at held positions, and let it begin at zero."""
        lru, held = self.lru, self.call.held
        lru.recurrent_states = None
        cleared = self._cleared(activations)
        with torch.autocast(cleared.device.type, enabled=False):
            heads = cleared.float().unflatten(-1, (lru.num_attention_heads, -1))
            logits = torch.einsum("rthi,hij->rthj", heads, lru.recurrent_gate_weight.float())
            gate = torch.sigmoid(logits + lru.recurrent_gate_bias.float()).flatten(2)
            logarithm = -8.0 * gate * softplus(lru.recurrent_param.float())
        if held is not None:
            logarithm = logarithm.masked_fill(held.unsqueeze(-1), 0.0)
        self.decay = torch.exp(logarithm.cumsum(1))
        return cleared

    def add(self, scanned: Tensor) -> Tensor:
        """Add what the states contribute to the recurrence's output [rows, tokens, width], and to what is kept."""
        mixer, call = self.mixer, self.call
        assert call.states is not None
        total = scanned.float() + self.decay * call.states.unsqueeze(1)
        kept = self.lru.recurrent_states + self.decay[:, -1] * call.states
        if call.held is not None:
            # Positions behind the last token have made what the mixer keeps decay.
            held = call.held.expand(total.shape[:2])
            last = (~held).long().cumsum(1).argmax(1).view(-1, 1, 1)
            end = total.take_along_dim(last, dim=1).squeeze(1)
            kept = torch.where(held[:, -1:], end, kept)
        if call.kept is not None:
            kept = kept[call.kept]
            if mixer.conv1d_state is not None:
                end = self.projected[call.kept, call.tokens].transpose(1, 2)
                mixer.conv1d_state = pad(end, (mixer.conv1d_width - 1 - end.shape[-1], 0))
        # Nobody goes on from it without a cache, and a model that holds on to a graph cannot be copied.
        self.lru.recurrent_states = kept if call.arguments["use_cache"] else None
        return total.to(scanned.dtype)

    def _cleared(self, tensor: Tensor) -> Tensor:
        held = self.call.held
        return tensor if held is None else tensor.masked_fill(held.unsqueeze(-1), 0.0)


@dataclass(frozen=True)
class RGLRU(Mixer):
    """Declaration of a recurrent block around an RG-LRU. See `Mixer`."""

    input_argument: str = "input_states"
    courier: Courier | None = _COURIER
    starts_with_one: bool = True
    reads_rows: bool = True
    checks: bool = True
    takes_chunks: bool = False

    def cache_argument_of(self, mixer: MixerModule) -> str:
        """See `Mixer.cache_argument_of`. It does not read its cache; it is called as the layer around it is."""
        name = cache_argument(vars(sys.modules[type(mixer).__module__])["RecurrentGemmaDecoderLayer"])
        assert name is not None, "layers take a cache"
        return name

    def has_past(self, mixer: MixerModule, cache: Any, arguments: dict[str, Any]) -> bool:
        """See `Mixer.has_past`. Only single tokens continue a sequence."""
        positions = arguments["position_ids"]
        return bool(arguments["use_cache"]) and positions.shape[1] == 1 and bool((positions > 0).all())

    def check(self, backbone: Any, arguments: dict[str, Any]) -> None:
        """See `Mixer.check`."""
        rows, cache = arguments.get("input_ids", arguments.get("inputs_embeds")), cache_of(arguments)
        if rows is not None and cache is not None and rows.shape[1] > 1 and cache.get_seq_length() > 0:
            raise ValueError(
                f"RecurrentGemma cannot continue a sequence by {rows.shape[1]} tokens in one call: its convolution "
                "forgets the tokens before them, also without S0. Pass the whole prompt in one call, then one token at "
                "a time."
            )

    def enter(self, mixer: MixerModule, call: Call) -> Any:
        """See `Mixer.enter`."""
        recurrence, past, arguments = _Recurrence(mixer, call), mixer.conv1d_state, call.arguments
        rows, tokens = arguments["input_states"].shape[:2]
        if past is not None and call.rows is not None and past.shape[0] == rows:
            if tokens == 1 and arguments["use_cache"]:
                # Rows that had nothing but pads before begin here; the others go on.
                assert call.states is not None
                begins = arguments["position_ids"][:, 0] == 0
                call.states = torch.where(begins.unsqueeze(-1), call.states, mixer.rg_lru.recurrent_states)
                call.rows = call.rows & begins
            # What the last sequence left there would be taken for the past of a single first token.
            mixer.conv1d_state = past.masked_fill(call.rows.view(-1, 1, 1), 0.0)
        on_output(mixer, "linear_x", recurrence.see_projection)
        on_input(mixer, "rg_lru", recurrence.see_input)
        on_output(mixer, "rg_lru", recurrence.add)
        return call.cache

    def given(self, call: Call, arguments: dict[str, Any]) -> dict[str, Any]:
        """See `Mixer.given`. The mixer reads from the positions only where a sequence begins."""
        given = arguments["position_ids"]
        if call.held is None:
            positions = torch.arange(arguments[self.input_argument].shape[1], device=given.device).unsqueeze(0)
        else:
            positions = ((~call.held).cumsum(1) - 1).clamp_min(0)
        if call.restore is None and call.rows is not None:
            # Rows without a learnt state keep the base model's own arithmetic.
            positions = torch.where(call.rows.unsqueeze(-1), positions, given)
        return {**arguments, "position_ids": positions}

    def final_state(self, mixer: MixerModule, cache: Any) -> Tensor:
        """See `Mixer.final_state`. It is in the mixer, whatever the cache."""
        state: Tensor = mixer.rg_lru.recurrent_states
        return state


register_mixer(
    RGLRU(
        path="transformers.models.recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaRecurrentBlock",
        family=FAMILY,
        state_shape=lambda mixer: (mixer.lru_width,),
    )
)
