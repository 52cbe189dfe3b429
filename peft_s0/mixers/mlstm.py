"""mLSTM: C_t = f_t C_{t-1} + i_t k_t v_t^T, n_t = f_t n_{t-1} + i_t k_t, h_t = C_t^T q_t / max(|n_t^T q_t|, 1)
(arXiv 2405.04517).

The learnt state is the matrix memory C, [heads, key dimension, value dimension]. The normalizer n and the stabilizer m,
the logarithm of the scale that both are kept in, begin at zero as in the base model.

Its model sees no mask, so that pads would be tokens like any other, and tells its layers nothing of packed rows; S0
tells them both. At pads the gates are closed behind their soft caps: i = exp(-1e4) is 0, f = sigmoid(1e4) is 1.

xLSTM's cache cannot be reordered: beam search needs `use_cache=False`, with S0 or without, as the model itself says.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ..packing import PACKING_ARGUMENTS
from ..taps import on_arguments
from .base import Call, Courier, Family, Mixer, MixerModule, register_mixer

FAMILY = Family("mLSTM", alpha=1.0)

_CLOSED = -1e4
_COURIER = Courier("state", mask=True)


def _close(held: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """Close the gates [rows, heads, tokens] of the kernels' arguments at held positions [rows, tokens]."""
    where = held.unsqueeze(1)
    return {
        **arguments,
        "igate": arguments["igate"].masked_fill(where, _CLOSED),
        "fgate": arguments["fgate"].masked_fill(where, -_CLOSED),
    }


@dataclass(frozen=True)
class MLSTM(Mixer):
    """Declaration of an mLSTM layer, which is given its state and returns it. See `Mixer`."""

    cache_argument: str | None = "state"
    input_argument: str = "x"
    courier: Courier | None = _COURIER
    starts_with_one: bool = True
    checks: bool = True

    def has_past(self, mixer: MixerModule, cache: Any, arguments: dict[str, Any]) -> bool:
        """See `Mixer.has_past`. A new cache is all zeros; a token leaves its key in the normalizer."""
        return cache is not None and bool(cache[1].any())

    def check(self, backbone: Any, arguments: dict[str, Any]) -> None:
        """See `Mixer.check`. In evaluation the model cuts long rows into pieces."""
        rows, longest = (
            arguments.get("input_ids", arguments.get("inputs_embeds")),
            backbone.config.max_inference_chunksize,
        )
        if backbone.training or rows is None or rows.shape[1] <= longest:
            return
        mask = arguments.get("attention_mask")
        padded = mask is not None and not bool(mask.all())
        if padded or any(name in arguments for name in PACKING_ARGUMENTS):
            raise ValueError(
                f"xLSTM runs rows of more than max_inference_chunksize={longest} tokens in pieces; these have "
                f"{rows.shape[1]} tokens and are {'padded' if padded else 'packed'}, which the pieces do not show. "
                "Raise model.config.max_inference_chunksize, or pass one sequence after the other."
            )

    def enter(self, mixer: MixerModule, call: Call) -> Any:
        """See `Mixer.enter`."""
        if call.held is not None:
            on_arguments(mixer, "mlstm_backend", partial(_close, call.held))
        if call.states is None:
            return call.cache
        # In the model's dtype the kernels go on in it, as with a cache; they mix it with no float32 scales.
        matrix, dtype = call.states, call.arguments["x"].dtype
        return (
            matrix,
            matrix.new_zeros(matrix.shape[:-1], dtype=dtype),
            matrix.new_zeros((*matrix.shape[:-2], 1), dtype=dtype),
        )

    def final_state(self, mixer: MixerModule, cache: Any) -> Tensor:
        """See `Mixer.final_state`; refused."""
        raise ValueError(
            f"The state that {type(mixer).__name__} ends in is a matrix, a normalizer and their scale, and an initial "
            "state is the matrix alone: read without its normalizer it would stand for something else."
        )

    def given(self, call: Call, arguments: dict[str, Any]) -> dict[str, Any]:
        """See `Mixer.given`."""
        return {name: arguments[name] for name in ("x", "state")}

    def returned(self, call: Call, output: Any) -> Any:
        """See `Mixer.returned`."""
        hidden_states, state = output
        if call.restore is not None:
            hidden_states = call.restore(hidden_states)
        if call.kept is not None:
            # Behind their last tokens the states of documents stand still.
            state = tuple(part[call.kept] for part in state)
        return hidden_states, state


register_mixer(
    MLSTM(
        path="transformers.models.xlstm.modeling_xlstm.xLSTMLayer",
        family=FAMILY,
        state_shape=lambda mixer: (
            mixer.config.num_heads,
            mixer.qk_dim // mixer.config.num_heads,
            mixer.v_dim // mixer.config.num_heads,
        ),
    )
)
