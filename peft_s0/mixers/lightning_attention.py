"""Lightning attention: S_t = exp(-s) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, with a fixed rate s for each head
(arXiv 2501.08313). The state is [heads, key dimension, value dimension].

The first call of a sequence begins at zero, so what a state S contributes is added to it: exp(-s n) S^T q_t in front of
the norm, where n counts the tokens so far, and exp(-s n) S to the state that the cache keeps. Later calls begin at the
cached state, but let it decay at pads; they are given the difference.

Limits of MiniMax itself, with S0 or without. Its cache does not reorder the states for beam search, which cannot be
seen from here: search with `use_cache=False`. And it takes the number of past tokens from the first layer, which knows
of none if it is recurrent. The attention layers then see a wrong mask in calls of several tokens on a cache with a
past, and when a batch with pads is decoded; both are refused here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..taps import on_input, on_output
from .base import Call, Family, Mixer, MixerModule, cache_of, register_mixer

FAMILY = Family("lightning attention", alpha=1.0)


class _View:
    """A view of a MiniMax cache.

    Args:
        cache: the real cache, or None.
        state: what the mixer finds, [rows, heads, key dimension, value dimension]; None: it begins at zero.
        end: from the final states of the mixer's recurrence to those that the real cache is to keep.
    """

    def __init__(self, cache: Any, state: Tensor | None, end: Callable[[Tensor], Tensor]) -> None:
        self.cache = cache
        self.state = state
        self.end = end

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """The states to begin at."""
        return self.state

    def set_linear_cache(self, layer_idx: int, states: Tensor) -> None:
        """Store the states at the end of the call."""
        if self.cache is not None:
            self.cache.set_linear_cache(layer_idx, self.end(states))


class _Recurrence:
    """One call of a mixer, and what its states add to it.

    Args:
        mixer: the mixer.
        call: its call.
    """

    def __init__(self, mixer: MixerModule, call: Call) -> None:
        self.mixer = mixer
        self.call = call
        self.past: Tensor | None = None
        if call.states is None:
            self.past = call.cache.get_linear_cache(mixer.layer_idx)
        states = self.past if call.states is None else call.states
        assert states is not None
        self.states = states.float()
        self.rate = mixer.slope_rate.float().view(-1)

    def see_projection(self, output: Tensor) -> None:
        """Take q, k and v, float32 [rows, tokens, heads, head dimension], from the output of `qkv_proj`."""
        heads = self.mixer.act_fn(output).unflatten(-1, (self.mixer.num_attention_heads, -1))
        self.q, self.k, self.v = (part.float() for part in heads.chunk(3, dim=-1))
        counted = torch.ones(1, output.shape[1], device=output.device)
        real = counted if self.call.held is None else (~self.call.held).float()
        # What the states decay to, less what the mixer itself lets them contribute, [rows, tokens, heads].
        self.factor = self.decay(real) - (0 if self.past is None else self.decay(counted))

    def decay(self, counted: Tensor) -> Tensor:
        """What is left of a state after each token [rows, tokens, heads], from which tokens count [rows, tokens]."""
        return torch.exp(-self.rate * counted.cumsum(1).unsqueeze(-1))

    def correct(self, attended: Tensor) -> Tensor:
        """Add what the states contribute to the input of `norm` [rows, tokens, heads * head dimension]."""
        with torch.autocast(attended.device.type, enabled=False):
            contribution = self.factor.unsqueeze(-1) * torch.einsum("rthk,rhkv->rthv", self.q, self.states)
        return (attended + contribution.flatten(2)).to(attended.dtype)

    def end(self, final: Tensor) -> Tensor:
        """From the final states of the mixer's recurrence to those that the cache keeps."""
        call = self.call
        if call.kept is None:
            return (final + self.factor[:, -1, :, None, None] * self.states).to(final.dtype)
        # Positions behind the last token have made the states decay: the end of these rows is made anew.
        k, v, states = self.k[call.kept, call.tokens], self.v[call.kept, call.tokens], self.states[call.kept]
        left = torch.arange(k.shape[1] - 1, -1, -1, device=k.device).unsqueeze(-1)
        decay = torch.exp(-self.rate * torch.cat([left[:1] + 1, left]))
        with torch.autocast(k.device.type, enabled=False):
            written = torch.einsum("rthk,rthv,th->rhkv", k, v, decay[1:])
        return (written + decay[0, :, None, None] * states).to(final.dtype)


@dataclass(frozen=True)
class LightningAttention(Mixer):
    """Declaration of a lightning attention. See `Mixer`."""

    checks: bool = True
    takes_chunks: bool = False

    def has_past(self, mixer: MixerModule, cache: Any, arguments: dict[str, Any]) -> bool:
        """See `Mixer.has_past`."""
        return cache is not None and cache.get_linear_cache(mixer.layer_idx) is not None

    def check(self, backbone: Any, arguments: dict[str, Any]) -> None:
        """See `Mixer.check`."""
        rows, cache = arguments.get("input_ids", arguments.get("inputs_embeds")), cache_of(arguments)
        if rows is None or cache is None or cache.get_linear_cache(0) is None or cache.get_seq_length() > 0:
            return
        mask, tokens = arguments.get("attention_mask"), rows.shape[1]
        if tokens > 1 or (isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all())):
            raise ValueError(
                "A MiniMax whose first layer is a lightning attention cannot continue a sequence by several tokens in "
                f"one call, nor a batch that has pads (this call has {tokens} for each row): its cache reports no "
                "past, so its attention layers see a wrong mask, also without S0. Pass the whole prompt in one call, "
                "then one token at a time, in rows of the same length; or generate with use_cache=False."
            )

    def enter(self, mixer: MixerModule, call: Call) -> _View:
        """See `Mixer.enter`."""
        recurrence = _Recurrence(mixer, call)
        on_output(mixer, "qkv_proj", recurrence.see_projection)
        on_input(mixer, "norm", recurrence.correct)
        return _View(call.cache, recurrence.past, recurrence.end)

    def cached_state(self, mixer: MixerModule, cache: Any) -> Tensor:
        """See `Mixer.cached_state`."""
        state: Tensor = cache.get_linear_cache(mixer.layer_idx)
        return state


register_mixer(
    LightningAttention(
        path="transformers.models.minimax.modeling_minimax.MiniMaxLightningAttention",
        family=FAMILY,
        state_shape=lambda mixer: (mixer.num_attention_heads, mixer.head_dim, mixer.head_dim),
    )
)
