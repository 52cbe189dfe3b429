"""Gated delta rule: S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T, o_t = S_t q_t (arXiv 2412.06464).

The state is kept as [heads, key dimension, value dimension]. a_t = exp(-exp(A) softplus(logit + bias)) and
b_t = sigmoid(logit): at a large negative logit a_t is exactly 1 and b_t exactly 0.
"""

from __future__ import annotations

from .base import Family, Gate, Mixer, MixerModule, register_mixer

FAMILY = Family("gated delta rule", alpha=0.07)


def _state_shape(mixer: MixerModule) -> tuple[int, ...]:
    return (mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim)


register_mixer(
    Mixer(
        path="transformers.models.qwen3_5.modeling_qwen3_5.Qwen3_5GatedDeltaNet",
        family=FAMILY,
        state_shape=_state_shape,
        gates=(Gate("in_proj_a"), Gate("in_proj_b")),
    )
)
