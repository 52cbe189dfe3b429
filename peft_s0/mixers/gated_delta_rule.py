"""Gated delta rule: S_t = S_{t-1} diag(a_t) (I - b_t k_t k_t^T) + b_t v_t k_t^T, o_t = S_t q_t.

Gated DeltaNet (arXiv 2412.06464) has one decay a_t for each head, Kimi Delta Attention (arXiv 2510.26692) one for each
key channel. The state is kept as [heads, key dimension, value dimension].

a_t = exp(-exp(A) softplus(logit + bias)) and b_t = sigmoid(logit): at a large negative logit a_t is exactly 1 and b_t
exactly 0. Both are frozen at pads, for the keys and values there are not zero: the convolution in front of them reaches
back to real tokens.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .base import Family, Gate, Mixer, MixerModule, Readout, register_mixer

FAMILY = Family("gated delta rule", alpha=0.07)


def _readout(
    projection: str,
    output: str,
    groups: Callable[[MixerModule], int],
    size: Callable[[MixerModule], int],
    queries: Callable[[MixerModule, Tensor], Tensor] | None = None,
) -> Readout:
    """q_t comes first in the convolution, and as a rule in the projection."""

    def channels(mixer: MixerModule) -> slice:
        return slice(0, groups(mixer) * size(mixer))

    return Readout(
        projection=projection,
        queries=queries or (lambda mixer, projected: projected[..., channels(mixer)]),
        channels=channels,
        groups=groups,
        key_first=True,
        normalize=True,
        output=output,
    )


def _by_key_head(mixer: MixerModule, projected: Tensor) -> Tensor:
    """q_t of a projection whose output has q, k, v and the gate of one key head after the other."""
    return projected.unflatten(-1, (mixer.num_k_heads, -1))[..., : mixer.head_k_dim].flatten(-2)


def _gated_delta_net(
    path: str,
    *projections: str,
    read: tuple[str, str] = ("in_proj_qkv", "norm"),
    queries: Callable[[MixerModule, Tensor], Tensor] | None = None,
) -> None:
    register_mixer(
        Mixer(
            path=f"transformers.models.{path}",
            family=FAMILY,
            state_shape=lambda mixer: (mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim),
            gates=tuple(Gate(projection) for projection in projections),
            kernels="fla.ops.gated_delta_rule",
            reach=lambda mixer: mixer.conv_kernel_size - 1,
            readout=_readout(*read, lambda mixer: mixer.num_k_heads, lambda mixer: mixer.head_k_dim, queries),
        )
    )


def _kimi_delta_attention(path: str) -> None:
    def state_shape(mixer: MixerModule) -> tuple[int, ...]:
        return (mixer.num_heads, mixer.head_dim, mixer.head_dim)

    register_mixer(
        Mixer(
            path=f"transformers.models.{path}",
            family=FAMILY,
            state_shape=state_shape,
            # The forget gate's output is the logarithm of the decay itself.
            gates=(Gate("forget_gate", frozen=0.0), Gate("b_proj")),
            # They take boundaries, too, but these mixers do not hand them on.
            kernels="fla.ops.kda",
            readout=_readout("q_proj", "o_norm", lambda mixer: mixer.num_heads, lambda mixer: mixer.head_dim),
        )
    )


_gated_delta_net(
    "qwen3_next.modeling_qwen3_next.Qwen3NextGatedDeltaNet",
    "in_proj_ba",
    read=("in_proj_qkvz", "norm"),
    queries=_by_key_head,
)
_gated_delta_net("qwen3_5.modeling_qwen3_5.Qwen3_5GatedDeltaNet", "in_proj_a", "in_proj_b")
_gated_delta_net("qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeGatedDeltaNet", "in_proj_a", "in_proj_b")
_gated_delta_net("qwen4_exp.modeling_qwen4_exp.Qwen4ExpTextGatedDeltaNet", "in_proj_a", "in_proj_b")
_gated_delta_net(
    "olmo_hybrid.modeling_olmo_hybrid.OlmoHybridGatedDeltaNet", "a_proj", "b_proj", read=("q_proj", "o_norm")
)
_kimi_delta_attention("kimi_linear.modeling_kimi_linear.KimiLinearDeltaAttention")
_kimi_delta_attention("bailing_hybrid.modeling_bailing_hybrid.BailingHybridDeltaAttention")
_kimi_delta_attention("glm5_next.modeling_glm5_next.Glm5NextTextLinearAttention")
