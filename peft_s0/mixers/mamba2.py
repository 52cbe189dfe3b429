"""Mamba-2: S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t (arXiv 2405.21060).

The state is kept as [heads, head dimension, state dimension]. dt_t = softplus(logit + bias), and the logits are the
last `num_heads` columns of the input projection: at a large negative logit dt_t is exactly 0, so nothing decays and
nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from .base import Family, Gate, Mixer, MixerModule, Readout, register_mixer

FAMILY = Family("Mamba-2", alpha=0.65)


@dataclass(frozen=True)
class TimeStepGate(Gate):
    """The time step's logits: the last `num_heads` columns of `in_proj`.

    Some mixers clamp dt from below (`time_step_limit`), also at pads, where it would let the state decay. While pads
    are frozen the lower limit is therefore taken off, and the real tokens' logits are clamped instead, to the same dt.

    Args:
        scale: from a mixer to the factor [num_heads] between the projection's output and the logit; None: 1.
    """

    projection: str = "in_proj"
    scale: Callable[[MixerModule], Tensor] | None = None

    def freeze(self, mixer: MixerModule, pads: Tensor, output: Tensor) -> Tensor:
        """See `Gate.freeze`; also applies the lower limit to the other positions."""
        heads = mixer.num_heads
        logits = output[..., -heads:]
        limit = mixer.__dict__.get("s0_time_step_limit")
        if limit is not None:
            low = torch.tensor(limit[0], dtype=torch.float64)
            # The inverse of softplus, without the overflow of log(exp(x) - 1) at small x.
            floor = (low + torch.log(-torch.expm1(-low))).float().to(output.device) - mixer.dt_bias.float()
            if self.scale is not None:
                floor = floor / self.scale(mixer)
            logits = torch.maximum(logits, floor.to(logits.dtype))
        logits = logits.masked_fill(pads.unsqueeze(-1), self.frozen)
        return torch.cat([output[..., :-heads], logits], dim=-1)

    def engage(self, mixer: MixerModule) -> None:
        """Take the lower limit off, and keep it for `freeze`."""
        low, high = mixer.time_step_limit
        if low > 0:
            mixer.s0_time_step_limit = (low, high)
            mixer.time_step_limit = (0.0, high)

    def release(self, mixer: MixerModule) -> None:
        """Put the lower limit back."""
        limit = mixer.__dict__.pop("s0_time_step_limit", None)
        if limit is not None:
            mixer.time_step_limit = limit


def _columns(mixer: MixerModule) -> slice:
    """Of the input projection, the columns of C, which come last in the convolution and in front of the time step."""
    return slice(-mixer.num_heads - mixer.n_groups * mixer.ssm_state_size, -mixer.num_heads)


@dataclass(frozen=True)
class InputReadout(Readout):
    """C_t, which is q_t here, comes with all else from `in_proj`, and y_t goes to the gated norm."""

    projection: str = "in_proj"
    queries: Callable[[MixerModule, Tensor], Tensor] = lambda mixer, projected: projected[..., _columns(mixer)]
    channels: Callable[[MixerModule], slice] = lambda mixer: slice(-mixer.n_groups * mixer.ssm_state_size, None)
    groups: Callable[[MixerModule], int] = lambda mixer: mixer.n_groups
    key_first: bool = False
    normalize: bool = False
    output: str = "norm"


@dataclass(frozen=True)
class MultipliedReadout(InputReadout):
    """FalconH1's: the projection's output is multiplied by a vector, and there may be no norm, only the gate."""

    queries: Callable[[MixerModule, Tensor], Tensor] = lambda mixer, projected: (
        projected[..., _columns(mixer)] * mixer.mup_vector[..., _columns(mixer)]
    )

    def output_of(self, mixer: MixerModule) -> str:
        """See `Readout.output_of`."""
        return "norm" if mixer.mamba_rms_norm else "out_proj"

    def gate(self, mixer: MixerModule, projected: Tensor) -> Tensor | None:
        """See `Readout.gate`."""
        if mixer.mamba_rms_norm:
            return None
        size = mixer.intermediate_size
        return silu(projected[..., :size] * mixer.mup_vector[..., :size])


def _mamba2(path: str, gate: TimeStepGate | None = None, readout: InputReadout | None = None) -> None:
    register_mixer(
        Mixer(
            path=f"transformers.models.{path}",
            family=FAMILY,
            state_shape=lambda mixer: (mixer.num_heads, mixer.head_dim, mixer.ssm_state_size),
            gates=(gate or TimeStepGate(),),
            # They take a state for each row, not for each document of a row.
            kernels="mamba_ssm.ops.triton.ssd_combined",
            readout=readout or InputReadout(),
        )
    )


_mamba2("mamba2.modeling_mamba2.Mamba2Mixer")
_mamba2("bamba.modeling_bamba.BambaMixer")
_mamba2(
    "falcon_h1.modeling_falcon_h1.FalconH1Mixer",
    TimeStepGate(scale=lambda mixer: mixer.mup_vector[..., -mixer.num_heads :]),
    MultipliedReadout(),
)
_mamba2("granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMambaLayer")
_mamba2("nemotron_h.modeling_nemotron_h.NemotronHMamba2Mixer")
_mamba2("zamba2.modeling_zamba2.Zamba2MambaMixer")
