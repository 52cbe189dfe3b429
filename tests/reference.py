"""The naive twins: each recurrence written one token at a time, with an initial state, and nothing else.

A twin takes a mixer's weights and stands in its place in a copy of the model. It knows no cache, no chunks, no pads and
no packing, and shares no code with the kernels or with peft_s0. Everything is computed in float64.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SlowMixer(nn.Module):
    """A recurrent mixer as its formula.

    Args:
        mixer: the mixer whose weights it uses.
        state: [heads, ...], what every sequence starts from.
    """

    def __init__(self, mixer: nn.Module, state: Tensor) -> None:
        super().__init__()
        self.mixer = mixer
        self.state = state

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        state = self.state.double().expand(hidden_states.shape[0], *self.state.shape)
        return self.recur(hidden_states.double(), state)

    def recur(self, x: Tensor, state: Tensor) -> Tensor:
        raise NotImplementedError

    def convolve(self, x: Tensor) -> Tensor:
        """Causal depthwise convolution and SiLU of [batch, tokens, channels]."""
        weight = self.mixer.conv1d.weight.squeeze(1)
        width = weight.shape[-1]
        padded = F.pad(x, (0, 0, width - 1, 0))
        out = sum(padded[:, i : i + x.shape[1]] * weight[:, i] for i in range(width))
        if self.mixer.conv1d.bias is not None:
            out = out + self.mixer.conv1d.bias
        return out * torch.sigmoid(out)


class GatedDeltaRule(SlowMixer):
    """S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T, o_t = S_t q_t, with S kept as [heads, K, V]."""

    def recur(self, x: Tensor, state: Tensor) -> Tensor:
        m = self.mixer
        batch, tokens, _ = x.shape
        q, k, v = self.convolve(m.in_proj_qkv(x)).split([m.key_dim, m.key_dim, m.value_dim], dim=-1)
        groups = m.num_v_heads // m.num_k_heads
        q = q.view(batch, tokens, m.num_k_heads, m.head_k_dim).repeat_interleave(groups, dim=2)
        k = k.view(batch, tokens, m.num_k_heads, m.head_k_dim).repeat_interleave(groups, dim=2)
        v = v.view(batch, tokens, m.num_v_heads, m.head_v_dim)
        q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt() / m.head_k_dim**0.5
        k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        a = torch.exp(-m.A_log.exp() * torch.log1p(torch.exp(m.in_proj_a(x) + m.dt_bias)))
        b = torch.sigmoid(m.in_proj_b(x))
        outputs = []
        for t in range(tokens):
            state = a[:, t, :, None, None] * state
            error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], b[:, t, :, None] * error)
            outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
        out = torch.stack(outputs, dim=1)
        out = m.norm(out.reshape(-1, m.head_v_dim), m.in_proj_z(x).reshape(-1, m.head_v_dim))
        return m.out_proj(out.reshape(batch, tokens, -1).double())


class Mamba2(SlowMixer):
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t, with S kept as [heads, head_dim, state]."""

    def project(self, x: Tensor) -> Tensor:
        return self.mixer.in_proj(x * self.mixer.ssm_in_multiplier) * self.mixer.mup_vector

    def recur(self, x: Tensor, state: Tensor) -> Tensor:
        m = self.mixer
        batch, tokens, _ = x.shape
        groups_size = m.n_groups * m.ssm_state_size
        gate, mixed, dt = self.project(x).split([m.intermediate_size, m.conv_dim, m.num_heads], dim=-1)
        values, b, c = self.convolve(mixed).split([m.intermediate_size, groups_size, groups_size], dim=-1)
        values = values.view(batch, tokens, m.num_heads, m.head_dim)
        per_group = m.num_heads // m.n_groups
        b = b.view(batch, tokens, m.n_groups, -1).repeat_interleave(per_group, dim=2)
        c = c.view(batch, tokens, m.n_groups, -1).repeat_interleave(per_group, dim=2)
        dt = torch.log1p(torch.exp(dt + m.dt_bias)).clamp(*m.time_step_limit)
        decay = torch.exp(-m.A_log.exp() * dt)
        outputs = []
        for t in range(tokens):
            written = torch.einsum("bhp,bhn->bhpn", dt[:, t, :, None] * values[:, t], b[:, t])
            state = decay[:, t, :, None, None] * state + written
            outputs.append(torch.einsum("bhpn,bhn->bhp", state, c[:, t]) + m.D[:, None] * values[:, t])
        out = torch.stack(outputs, dim=1).reshape(batch, tokens, -1)
        return m.out_proj(self.gated_norm(out, gate).double())

    def gated_norm(self, out: Tensor, gate: Tensor) -> Tensor:
        if self.mixer.mamba_rms_norm:
            return self.mixer.norm(out, gate)
        return out * gate * torch.sigmoid(gate)


def with_slow_mixers(model: nn.Module, slow_mixer: type[SlowMixer], states: dict[str, Tensor]) -> nn.Module:
    """A float64 copy of a base model in which each named mixer is its naive twin.

    Args:
        model: the base model.
        slow_mixer: the twin's class.
        states: initial state of each mixer, by the mixer's name in the model.
    """
    slow = copy.deepcopy(model).double()
    for name, state in states.items():
        parent, _, child = name.rpartition(".")
        setattr(slow.get_submodule(parent), child, slow_mixer(slow.get_submodule(name), state))
    return slow
