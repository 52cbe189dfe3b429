"""Mamba: S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t, with A diagonal (arXiv 2312.00752).

dt_t and A differ for each channel, so the state is [channels, state dimension], Zamba's [heads, head dimension, state
dimension]. A diagonal state is a weak surface for state tuning: LoRA on the projections of a Mamba does better than any
tuning of its states (Galim et al., ICML 2025, arXiv 2410.09016).

The scans begin at zero, whatever the cache holds. But they are linear in the state, so what a state S contributes is
exact without touching them: silu(z_t) C_t exp(A (dt_1 + ... + dt_t)) S is added to what goes into the output
projection, and exp(A (dt_1 + ... + dt_T)) S to the state that the cache keeps. A call of several tokens on a cache with
a past gets the same correction with the cached state, which the base model would lose there. At pads dt counts as 0 for
S; the scan itself holds zero until its first token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..taps import on_input, on_output
from .base import Call, Courier, Family, Mixer, MixerModule, register_mixer
from .views import ScanFromZero

FAMILY = Family("Mamba", alpha=1.0)

# Tokens for which the decays [rows, tokens, channels, state dimension] are held in memory at the same time.
_CHUNK = 64


@dataclass
class Signals:
    """What the input makes of the recurrence, float32. Mixers without heads have one.

    Args:
        dt: [rows, tokens, heads, channels], time steps, 0 at held positions.
        x: [rows, tokens, heads, channels], what is written.
        b: [rows, tokens, heads, state dimension], where it is written.
        c: [rows, tokens, heads, state dimension], where it is read.
    """

    dt: Tensor
    x: Tensor
    b: Tensor
    c: Tensor


class Scan:
    """One call of a mixer: what its parts and its cache are seen to carry, and what the state adds to it.

    Args:
        mixer: the mixer.
        call: its call.
        states: [rows, *state shape], what the rows start from.
    """

    def __init__(self, mixer: MixerModule, call: Call, states: Tensor) -> None:
        self.mixer = mixer
        self.call = call
        self.states = states.float().reshape(states.shape[0], -1, *mixer.A_log.shape[-2:])
        self._signals: Signals | None = None

    @property
    def signals(self) -> Signals:
        """The call's signals, made once, when all that they are made of was seen."""
        if self._signals is None:
            logits, x, b, c = self.project()
            dt = functional.softplus(logits.float())
            if self.call.held is not None:
                dt = dt.masked_fill(self.call.held[..., None, None], 0.0)
            # Not before the mixer runs: if it is offloaded, its parameters are there only then.
            self.a = -torch.exp(self.mixer.A_log.float()).reshape(-1, *self.mixer.A_log.shape[-2:])
            self._signals = Signals(dt, x.float(), b.float(), c.float())
        return self._signals

    def see_input(self, output: Tensor) -> None:
        """Take z [rows, tokens, channels] from the output of `in_proj`."""
        self.z = output.chunk(2, dim=-1)[1]

    def see_values(self, x: Tensor) -> None:
        """Take the input of `x_proj` [rows, tokens, channels]."""
        self.x = x

    def see_parameters(self, output: Tensor) -> None:
        """Take the output of `x_proj`."""
        self.parameters = output

    def see_convolution(self, states: Tensor) -> None:
        """Take the convolution's input [rows, channels, past + tokens]."""

    def project(self) -> tuple[Tensor, ...]:
        """The time step's logits, x, B and C, as in `Signals`."""
        mixer = self.mixer
        size = mixer.ssm_state_size
        parts = self.parameters.split([mixer.time_step_rank, size, size], dim=-1)
        if hasattr(mixer, "dt_layernorm"):
            norms = (mixer.dt_layernorm, mixer.b_layernorm, mixer.c_layernorm)
            parts = tuple(norm(part) for norm, part in zip(norms, parts, strict=True))
        time_step, b, c = parts
        if hasattr(mixer.config, "_is_quantized"):
            logits = mixer.dt_proj(time_step)
        else:
            # As the mixers do: adapters on `dt_proj` have no part in it.
            logits = functional.linear(time_step, mixer.dt_proj.weight).float() + mixer.dt_proj.bias.float()
        return tuple(part.unsqueeze(2) for part in (logits, self.x, b, c))

    def correct(self, scanned: Tensor) -> Tensor:
        """Add what the states contribute to the input of `out_proj` [rows, tokens, channels]."""
        elapsed = self.signals.dt.cumsum(1)
        pieces = zip(elapsed.split(_CHUNK, 1), self.signals.c.split(_CHUNK, 1), strict=True)
        contribution = torch.cat([_sparing(_read, self.states, self.a, *piece) for piece in pieces], dim=1)
        return (scanned + functional.silu(self.z.float()) * contribution.flatten(2)).to(scanned.dtype)

    def end(self, scanned: Tensor) -> Tensor:
        """From the final states of the scan [rows, *state shape] to those that the cache keeps."""
        dt, call = self.signals.dt, self.call
        if call.kept is None:
            return scanned + (torch.exp(dt.sum(1).unsqueeze(-1) * self.a) * self.states).reshape(scanned.shape)
        # Positions behind the last token have made the scanned states decay: the end of these rows is made anew.
        states = self.states[call.kept]
        inputs = (dt, self.signals.x, self.signals.b)
        for piece in zip(*(part[call.kept, call.tokens].split(_CHUNK, 1) for part in inputs), strict=True):
            states = _sparing(_write, states, self.a, *piece)
        return states.reshape(-1, *scanned.shape[1:])


class HeadedScan(Scan):
    """A call of Zamba's mixer, whose heads have parameters of their own, and no module that projects to them."""

    def see_input(self, output: Tensor) -> None:
        """Take z from the output of `in_proj`, where x and z take turns."""
        self.z = output[..., 1::2]

    def see_convolution(self, states: Tensor) -> None:
        """Take the convolution's input [rows, channels, past + tokens]."""
        self.convolved = states

    def project(self) -> tuple[Tensor, ...]:
        """See `Scan.project`."""
        mixer, inputs = self.mixer, self.convolved
        weight = mixer.conv1d.weight
        out = functional.conv1d(
            inputs.to(weight.dtype), weight, mixer.conv1d.bias, padding=weight.shape[-1] - 1, groups=weight.shape[0]
        )
        tokens = self.z.shape[1]
        x = mixer.act(out[..., : inputs.shape[-1]])[..., -tokens:].to(inputs.dtype)
        x = x.transpose(1, 2).unflatten(2, (mixer.n_mamba_heads, mixer.mamba_head_dim))
        size = mixer.ssm_state_size
        parameters = torch.einsum("hkp,rthp->rthk", mixer.x_proj_weight, x)
        time_step, b, c = parameters.split([mixer.time_step_rank, size, size], dim=-1)
        logits = torch.einsum("hpk,rthk->rthp", mixer.dt_proj_weight, time_step).float()
        return logits + mixer.dt_proj_bias.float(), x, b, c


class _View(ScanFromZero):
    """Shows the convolution's input to the scan."""

    scan: Scan

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, **kwargs: Any) -> Tensor:
        """Store the convolution's input [rows, channels, tokens]; returns what the convolution is to see."""
        seen = super().update_conv_state(conv_states, layer_idx, **kwargs)
        self.scan.see_convolution(seen)
        return seen


@dataclass(frozen=True)
class Mamba1Mixer(Mixer):
    """Declaration of a Mamba mixer, whose scan begins at zero. See `Mixer`.

    Args:
        scan: what stands for one call.
    """

    scan: type[Scan] = Scan
    takes_chunks: bool = False

    def resumes(self, tokens: int, pads: Tensor | None, cache: Any) -> bool:
        """Several tokens on a cache with a past would lose it. One is a step, which honours it."""
        return tokens > 1

    def enter(self, mixer: MixerModule, call: Call) -> ScanFromZero:
        """See `Mixer.enter`."""
        states = call.states
        if states is None:
            states = call.cache.get_recurrent_state(mixer.layer_idx)
            if call.rows is not None:
                # Rows without a learnt state keep the base model's own arithmetic.
                states = states * call.rows.view(-1, *[1] * (states.ndim - 1))
        scan = self.scan(mixer, call, states)
        on_output(mixer, "in_proj", scan.see_input)
        # Zamba's is a parameter, which its scan reads itself.
        if hasattr(mixer, "x_proj"):
            on_input(mixer, "x_proj", scan.see_values)
            on_output(mixer, "x_proj", scan.see_parameters)
        on_input(mixer, "out_proj", scan.correct)
        view = _View(call.cache, call.states is None, scan.end, call.kept, call.tokens)
        view.scan = scan
        return view


def _read(states: Tensor, a: Tensor, elapsed: Tensor, c: Tensor) -> Tensor:
    """What is read of states after some time.

    Args:
        states: [rows, heads, channels, state dimension].
        a: [heads, channels, state dimension].
        elapsed: [rows, tokens, heads, channels], the sum of the time steps up to each token.
        c: [rows, tokens, heads, state dimension].

    Returns:
        [rows, tokens, heads, channels].
    """
    # A sum of products rather than a matrix product, which autocast would run in half precision.
    return (torch.exp(elapsed.unsqueeze(-1) * a) * states.unsqueeze(1) * c.unsqueeze(-2)).sum(-1)


def _write(states: Tensor, a: Tensor, dt: Tensor, x: Tensor, b: Tensor) -> Tensor:
    """States after some tokens; arguments as in `_read` and `Signals`."""
    # The time from each token to the last, summed from the end so that small times stay exact.
    remaining = functional.pad(dt[:, 1:], (0, 0, 0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
    written = torch.exp(remaining.unsqueeze(-1) * a) * (dt * x).unsqueeze(-1) * b.unsqueeze(-2)
    return torch.exp(dt.sum(1).unsqueeze(-1) * a) * states + written.sum(1)


def _sparing(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Call a function that makes large intermediates; they are made again for the backward pass instead of kept."""
    if not torch.is_grad_enabled():
        return function(*tensors)
    result: Tensor = checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
    return result


def _mamba1(path: str, **fields: Any) -> None:
    def state_shape(mixer: MixerModule) -> tuple[int, ...]:
        return tuple(mixer.A_log.shape)

    register_mixer(Mamba1Mixer(path=f"transformers.models.{path}", family=FAMILY, state_shape=state_shape, **fields))


_mamba1("mamba.modeling_mamba.MambaMixer", courier=Courier("attention_mask"))
_mamba1("falcon_mamba.modeling_falcon_mamba.FalconMambaMixer", courier=Courier("attention_mask"))
_mamba1("jamba.modeling_jamba.JambaMambaMixer", courier=Courier("attention_mask"))
_mamba1("zamba.modeling_zamba.ZambaMambaMixer", scan=HeadedScan)
