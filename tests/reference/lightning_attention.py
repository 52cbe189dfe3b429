from __future__ import annotations

import torch
from torch import Tensor

from .base import SlowMixer


class LightningAttention(SlowMixer):
    """S_t = exp(-s) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, with S kept as [heads, K, V]."""

    def forward(self, hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, None]:
        return super().forward(hidden_states, **kwargs), None

    def recur(self, x: Tensor, state: Tensor) -> Tensor:
        m = self.mixer
        mixed = m.qkv_proj(x)
        mixed = mixed * torch.sigmoid(mixed)
        mixed = mixed.view(*x.shape[:2], m.num_attention_heads, 3, m.head_dim)
        q, k, v = mixed.unbind(3)
        base = 2 ** (-8 / m.num_attention_heads)
        share = 1 - m.layer_idx / (m.num_hidden_layers - 1 + 1e-5) + 1e-5
        rate = torch.tensor([base ** (head + 1) * share for head in range(m.num_attention_heads)], dtype=x.dtype)
        outputs = []
        for t in range(x.shape[1]):
            state = torch.exp(-rate)[:, None, None] * state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
        self.final = state
        out = m.norm(torch.stack(outputs, dim=1).flatten(2)).double()
        return m.out_proj(torch.sigmoid(m.output_gate(x)) * out)
