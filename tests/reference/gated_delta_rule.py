from __future__ import annotations

import torch
from torch import Tensor

from .base import SlowMixer


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
