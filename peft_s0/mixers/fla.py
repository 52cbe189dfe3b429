"""The layers of flash-linear-attention's own models (`fla.models`), which have a cache of their own.

Such a layer finds what it starts from as a dictionary under its index in the cache, and hands the cache on in the tuple
that it returns. Most of them take the pads out of a batch before their kernels run, and packed rows as `cu_seqlens`; a
kernel then wants one initial state for each sequence, so that neither pads nor packed rows need any care here. Single
tokens need none either: with gradients, these layers choose kernels that have them.

The RWKV layers keep their pads. They zero the inputs and values there, so that only the decay is left to be frozen, and
with right pads RWKV-7's removal rate.

Depending on the layer the state is kept as [heads, value dimension, key dimension] or the other way round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..packing import PACKING_ARGUMENTS
from . import gated_delta_rule
from .base import Call, Courier, Family, Gate, Mixer, MixerModule, register_mixer

_PREFIX = "fla.layers."


class SequenceStart:
    """A view of fla's cache in which one layer has no past, but a state to start from.

    Args:
        cache: the real cache, or None; what the layer stores goes there.
        layer_idx: the layer's index.
        start: the entry that the layer finds: `recurrent_state`, float32 [sequences, heads, ...], and `conv_state`.
    """

    def __init__(self, cache: Any, layer_idx: int, start: dict[str, Any]) -> None:
        self.cache = cache
        self.layer_idx = layer_idx
        self.start = start

    def __len__(self) -> int:
        """The number of layers that have an entry; the layer only looks whether its own is among them."""
        return self.layer_idx + 1

    def __getitem__(self, layer_idx: int) -> dict[str, Any]:
        """The entry to start from."""
        return self.start

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """No token was seen yet."""
        return 0

    def update(self, **states: Any) -> Any:
        """Store what the layer ends with."""
        return None if self.cache is None else self.cache.update(**states)


@dataclass(frozen=True)
class FLAMixer(Mixer):
    """Declaration of a layer of fla's models.

    Args:
        kernels: see `Mixer`.
        conv_state: from the layer and the hidden states to what its convolution or token shift starts from.
        modes: kernels that the layer may be configured with for long sequences and that start from a given state.
        packs: whether the layer runs packed rows that start from states.
        counts_pads: whether the layer has positions that are off by the pads in a call that continues a sequence.
    """

    kernels: str | None = "fla.ops"
    conv_state: Callable[[MixerModule, Tensor], Any] = lambda mixer, states: (None, None, None)
    modes: tuple[str, ...] = ("chunk", "fused_recurrent")
    packs: bool = True
    counts_pads: bool = False

    def refusal(self, mixer: MixerModule) -> str | None:
        """See `Mixer.refusal`."""
        mode = getattr(mixer, "mode", "chunk")
        if mode in self.modes:
            return None
        return (
            f"with mode='{mode}' it loses its initial state, or its layout, on some paths; configure "
            f"{' or '.join(map(repr, self.modes))}"
        )

    def has_past(self, mixer: MixerModule, cache: Any, arguments: dict[str, Any]) -> bool:
        """See `Mixer.has_past`."""
        if cache is None or len(cache) <= mixer.layer_idx:
            return False
        entry = cache[mixer.layer_idx]
        return entry is not None and entry["recurrent_state"] is not None

    def resumes(self, tokens: int, pads: Tensor | None, cache: Any) -> bool:
        """See `Mixer.resumes`. Decoding runs the layer's own code, whatever the mask, which then has no pads.

        Raises:
            ValueError: for pads of a sequence that goes on, if the layer counts positions wrongly there.
        """
        if tokens == 1 or pads is None:
            return False
        if self.counts_pads and bool(pads.any()):
            raise ValueError(
                "fla's rotary positions are wrong, also without S0, in a call that continues a batch and has pads. "
                "Prefill a padded batch in one call."
            )
        return bool(self.gates)

    def sequences(self, mixer: MixerModule, kwargs: dict[str, Any]) -> int:
        """See `Mixer.sequences`.

        Raises:
            ValueError: for packed rows in a form that the layer does not read, or that it cannot run.
        """
        boundaries = kwargs.get("cu_seqlens")
        if boundaries is None:
            unread = [name for name in PACKING_ARGUMENTS if kwargs.get(name) is not None]
            if unread:
                raise ValueError(
                    f"{type(mixer).__name__} does not read {' and '.join(unread)}, so that the documents of a packed "
                    "row would run into each other. Models of fla take packed rows as cu_seqlens."
                )
            return int(kwargs[self.input_argument].shape[0])
        if not self.packs:
            raise ValueError(
                f"{type(mixer).__name__} of fla does not run packed rows (cu_seqlens) that start from a state. Pass "
                "one padded row for each document."
            )
        return int(boundaries.shape[0]) - 1

    def enter(self, mixer: MixerModule, call: Call) -> Any:
        """See `Mixer.enter`."""
        super().enter(mixer, call)
        if call.states is None:
            return call.cache
        start = {"recurrent_state": call.states, "attn_state": None, "conv_state": None, "ffn_state": None}
        start["conv_state"] = self.conv_state(mixer, call.states)
        return SequenceStart(call.cache, mixer.layer_idx, start)

    def cached_state(self, mixer: MixerModule, cache: Any) -> Tensor:
        """See `Mixer.cached_state`."""
        state: Tensor = cache[mixer.layer_idx]["recurrent_state"]
        return state

    def returned(self, call: Call, output: Any) -> Any:
        """See `Mixer.returned`: the real cache takes its place in the tuple again."""
        return tuple(call.cache if isinstance(part, SequenceStart) else part for part in output)


def _layer(path: str, family: Family, state_shape: Callable[[MixerModule], tuple[int, ...]], **declared: Any) -> None:
    register_mixer(FLAMixer(path=f"{_PREFIX}{path}", family=family, state_shape=state_shape, **declared))


def _value_first(mixer: MixerModule) -> tuple[int, ...]:
    return (mixer.num_heads, mixer.head_v_dim, mixer.head_k_dim)


def _key_first(mixer: MixerModule) -> tuple[int, ...]:
    return (mixer.num_heads, mixer.head_k_dim, mixer.head_v_dim)


_GATED_LINEAR_ATTENTION = Family("gated linear attention", alpha=1.0)

_layer(
    "gated_deltanet.GatedDeltaNet",
    gated_delta_rule.FAMILY,
    lambda mixer: (mixer.num_v_heads, mixer.head_v_dim, mixer.head_k_dim),
)
_layer(
    "kda.KimiDeltaAttention",
    gated_delta_rule.FAMILY,
    lambda mixer: (mixer.num_v_heads, mixer.head_v_dim, mixer.head_k_dim),
)
_layer("gla.GatedLinearAttention", _GATED_LINEAR_ATTENTION, _value_first)
_layer(
    "hgrn2.HGRN2Attention",
    _GATED_LINEAR_ATTENTION,
    lambda mixer: (mixer.num_heads, mixer.head_i_dim, mixer.head_f_dim),
)
_layer("delta_net.DeltaNet", Family("delta rule", alpha=1.0), _key_first)
_layer(
    "comba.Comba",
    Family("Comba", alpha=1.0),
    lambda mixer: (mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim),
)
_layer(
    "gated_deltaproduct.GatedDeltaProduct",
    Family("gated delta product", alpha=1.0),
    lambda mixer: (mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim),
)
_layer(
    "multiscale_retention.MultiScaleRetention",
    Family("retention", alpha=1.0),
    _key_first,
    modes=("chunk", "fused_chunk", "fused_recurrent"),
    counts_pads=True,
)
_layer(
    "linear_attn.LinearAttention",
    Family("linear attention", alpha=1.0),
    _key_first,
    modes=("chunk", "fused_chunk", "fused_recurrent"),
    # Its model drops cu_seqlens.
    courier=Courier("attention_mask"),
)
_layer(
    "rwkv7.RWKV7Attention",
    Family("RWKV-7", alpha=1.0),
    lambda mixer: (mixer.num_heads, mixer.head_dim, mixer.head_v_dim),
    # The decay is exp(-c sigmoid(w)), the removal rate sigmoid(a).
    gates=(Gate("w_lora"), Gate("a_lora")),
    conv_state=lambda mixer, states: None,
)
_layer(
    "rwkv6.RWKV6Attention",
    Family("RWKV-6", alpha=1.0),
    _key_first,
    # The decay is exp(-exp(w)).
    gates=(Gate("w_proj"),),
    # Given an entry, the layer expects the token before the first one in it.
    conv_state=lambda mixer, states: torch.zeros(
        states.shape[0], mixer.hidden_size, dtype=mixer.x_bias.dtype, device=states.device
    ),
    packs=False,
)
