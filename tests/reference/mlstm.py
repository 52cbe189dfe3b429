from __future__ import annotations

import torch
from torch import Tensor

from .base import SlowMixer


class MLSTM(SlowMixer):
    """C_t = f_t C_{t-1} + i_t k_t v_t^T, n_t = f_t n_{t-1} + i_t k_t, h_t = C_t^T q_t / (max(|n_t^T q_t|, 1) + eps).

    The mixer keeps C and n in units of exp(m), m being the largest logarithm of a gate so far; only eps shows that.
    """

    def forward(self, hidden_states: Tensor, *args: object) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = super().forward(hidden_states)
        # For its model to put into the cache, which the twin never reads.
        return out, (self.final, self.final[..., 0], self.final[..., :1, 0])

    def recur(self, x: Tensor, state: Tensor) -> Tensor:
        m, config = self.mixer, self.mixer.config
        heads, cap = config.num_heads, config.gate_soft_cap
        q, k, v = (part(x).view(*x.shape[:2], heads, -1) for part in (m.q, m.k, m.v))
        i, f = (cap * torch.tanh(part(x) / cap) for part in (m.igate_preact, m.fgate_preact))
        log_f = -torch.log1p(torch.exp(-f))
        n, scale = torch.zeros_like(state[..., 0]), torch.zeros_like(state[..., 0, 0])
        outputs = []
        for t in range(x.shape[1]):
            scale = torch.maximum(log_f[:, t] + scale, i[:, t])
            keep, write = log_f[:, t].exp()[..., None], i[:, t].exp()[..., None]
            state = keep[..., None] * state + torch.einsum("bhk,bhv->bhkv", write * k[:, t], v[:, t])
            n = keep * n + write * k[:, t]
            scaled_q = q[:, t] / q.shape[-1] ** 0.5
            read = torch.einsum("bhk,bhkv->bhv", scaled_q, state)
            size = (scaled_q * n).sum(-1).abs().clamp_min(1) + config.eps * scale.exp()
            outputs.append(read / size[..., None])
        self.final = state
        h = m.multihead_norm(torch.stack(outputs, dim=1)).double().reshape(*x.shape[:2], -1)
        return m.out_proj(torch.sigmoid(m.ogate_preact(x)) * h)
