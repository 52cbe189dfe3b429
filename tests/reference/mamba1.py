from __future__ import annotations

import torch
from torch import Tensor

from .base import SlowMixer


class Mamba1(SlowMixer):
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t, with S kept as [channels, state]."""

    def recur(self, x: Tensor, state: Tensor) -> Tensor:
        m = self.mixer
        values, z = m.in_proj(x).chunk(2, dim=-1)
        values = self.convolve(values)
        y, self.final = self.scan(values, *self.parameters(values), -m.A_log.exp(), m.D, state)
        return m.out_proj(y * z * torch.sigmoid(z))

    def parameters(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt [batch, tokens, channels], B and C [batch, tokens, state]."""
        m = self.mixer
        rank, size = m.time_step_rank, m.ssm_state_size
        low, b, c = self.normalize(*m.x_proj(values).split([rank, size, size], dim=-1))
        return torch.log1p(torch.exp(m.dt_proj(low))), b, c

    def normalize(self, *parts: Tensor) -> tuple[Tensor, ...]:
        return parts

    @staticmethod
    def scan(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor, d: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for t in range(x.shape[1]):
            written = torch.einsum("bp,bn->bpn", dt[:, t] * x[:, t], b[:, t])
            state = torch.exp(dt[:, t, :, None] * a) * state + written
            outputs.append(torch.einsum("bpn,bn->bp", state, c[:, t]) + d * x[:, t])
        return torch.stack(outputs, dim=1), state


class NormalizedMamba1(Mamba1):
    """Root-mean-square norms on what dt, B and C are made of."""

    def normalize(self, *parts: Tensor) -> tuple[Tensor, ...]:
        m = self.mixer
        normed = []
        for part, norm in zip(parts, (m.dt_layernorm, m.b_layernorm, m.c_layernorm), strict=True):
            eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
            part = part / (part.square().mean(-1, keepdim=True) + eps).sqrt()
            normed.append(part * norm.weight[: part.shape[-1]])
        return tuple(normed)


class Zamba(Mamba1):
    """Heads with parameters of their own; x and z take turns in the projection's output."""

    def recur(self, x: Tensor, state: Tensor) -> Tensor:
        m = self.mixer
        mixed = m.in_proj(x)
        values, z = self.convolve(mixed[..., 0::2]), mixed[..., 1::2]
        outputs = []
        for head, head_values in enumerate(values.chunk(m.n_mamba_heads, dim=-1)):
            sizes = [m.time_step_rank, m.ssm_state_size, m.ssm_state_size]
            low, b, c = (head_values @ m.x_proj_weight[head].T).split(sizes, dim=-1)
            dt = torch.log1p(torch.exp(low @ m.dt_proj_weight[head].T + m.dt_proj_bias[head]))
            outputs.append(self.scan(head_values, dt, b, c, -m.A_log[head].exp(), m.D[head], state[:, head]))
        y = torch.cat([output for output, _ in outputs], dim=-1)
        self.final = torch.stack([final for _, final in outputs], dim=1)
        return m.out_proj(y * z * torch.sigmoid(z))
