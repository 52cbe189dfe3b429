from __future__ import annotations

import torch
from torch import Tensor

from .base import SlowMixer


class Mamba2(SlowMixer):
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t, with S kept as [heads, head_dim, state]; an
    offset is added to S_t in y_t."""

    def project(self, x: Tensor) -> Tensor:
        return self.mixer.in_proj(x)

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
            outputs.append(torch.einsum("bhpn,bhn->bhp", self.read(state), c[:, t]) + m.D[:, None] * values[:, t])
        self.final = state
        out = torch.stack(outputs, dim=1).reshape(batch, tokens, -1)
        return m.out_proj(self.gated_norm(out, gate).double())

    def gated_norm(self, out: Tensor, gate: Tensor) -> Tensor:
        return self.mixer.norm(out, gate)


class FalconH1(Mamba2):
    """Multipliers on both sides of the projection, and a norm that may be absent."""

    def project(self, x: Tensor) -> Tensor:
        return self.mixer.in_proj(x * self.mixer.ssm_in_multiplier) * self.mixer.mup_vector

    def gated_norm(self, out: Tensor, gate: Tensor) -> Tensor:
        if self.mixer.mamba_rms_norm:
            return self.mixer.norm(out, gate)
        return out * gate * torch.sigmoid(gate)
