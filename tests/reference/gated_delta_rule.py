from __future__ import annotations

import torch
from torch import Tensor

from .base import SlowMixer


class GatedDeltaRule(SlowMixer):
    """S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T, o_t = (S_t + D) q_t, S kept as [heads, K, V]."""

    def recur(self, x: Tensor, state: Tensor) -> Tensor:
        q, k, v, gate, log_decay, b = self.project(x)
        batch, tokens, heads, _ = v.shape
        q, k = (y.repeat_interleave(heads // y.shape[2], dim=2) for y in (q, k))
        q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt() / q.shape[-1] ** 0.5
        k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        outputs = []
        for t in range(tokens):
            state = log_decay[:, t].exp()[..., None] * state
            error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], b[:, t, :, None] * error)
            outputs.append(torch.einsum("bhkv,bhk->bhv", self.read(state), q[:, t]))
        self.final = state
        out = torch.stack(outputs, dim=1)
        return self.read_out(out.reshape(-1, v.shape[-1]), gate.reshape(-1, v.shape[-1])).view(batch, tokens, -1)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k [batch, tokens, key heads, K], v and output gate [batch, tokens, heads, V], log decay [batch, tokens,
        heads, K or 1] and b [batch, tokens, heads]."""
        m = self.mixer
        qkv = self.convolve(m.in_proj_qkv(x)).split([m.key_dim, m.key_dim, m.value_dim], dim=-1)
        return (*self.heads(*qkv, m.in_proj_z(x)), self.log_decay(m.in_proj_a(x)), torch.sigmoid(m.in_proj_b(x)))

    def heads(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        sizes = (self.mixer.head_k_dim, self.mixer.head_k_dim, self.mixer.head_v_dim, self.mixer.head_v_dim)
        return tuple(y.view(*y.shape[:2], -1, size) for y, size in zip((q, k, v, gate), sizes, strict=True))

    def log_decay(self, logits: Tensor) -> Tensor:
        softplus = torch.log1p(torch.exp(logits + self.mixer.dt_bias))
        return (-self.mixer.A_log.exp() * softplus).unsqueeze(-1)

    def read_out(self, out: Tensor, gate: Tensor) -> Tensor:
        width = self.mixer.out_proj.in_features
        return self.mixer.out_proj(self.mixer.norm(out, gate).double().reshape(-1, width))


class Qwen3Next(GatedDeltaRule):
    """The projections' outputs are laid out by key head."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        m = self.mixer
        groups = m.num_v_heads // m.num_k_heads
        sizes = [m.head_k_dim, m.head_k_dim, groups * m.head_v_dim, groups * m.head_v_dim]
        by_head = m.in_proj_qkvz(x).view(*x.shape[:2], m.num_k_heads, sum(sizes)).split(sizes, dim=-1)
        q, k, v, gate = (y.flatten(2) for y in by_head)
        qkv = self.convolve(torch.cat([q, k, v], dim=-1)).split([m.key_dim, m.key_dim, m.value_dim], dim=-1)
        b, a = m.in_proj_ba(x).view(*x.shape[:2], m.num_k_heads, 2, groups).unbind(3)
        return (*self.heads(*qkv, gate), self.log_decay(a.flatten(2)), torch.sigmoid(b.flatten(2)))


class OlmoHybrid(GatedDeltaRule):
    """b_t goes up to 2, so that the transition may have negative eigenvalues."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        m = self.mixer
        mixed = torch.cat([m.q_proj(x), m.k_proj(x), m.v_proj(x)], dim=-1)
        qkv = self.convolve(mixed).split([m.key_dim, m.key_dim, m.value_dim], dim=-1)
        b = torch.sigmoid(m.b_proj(x)) * (2 if m.allow_neg_eigval else 1)
        return (*self.heads(*qkv, m.g_proj(x)), self.log_decay(m.a_proj(x)), b)

    def read_out(self, out: Tensor, gate: Tensor) -> Tensor:
        return self.mixer.o_proj(self.mixer.o_norm(out, gate).double().reshape(-1, self.mixer.o_proj.in_features))


class KimiDeltaAttention(GatedDeltaRule):
    """One decay for each key channel."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        m = self.mixer
        qkv = self.convolve(torch.cat([m.q_proj(x), m.k_proj(x), m.v_proj(x)], dim=-1)).chunk(3, dim=-1)
        gate = m.g_proj(x) if hasattr(m, "g_proj") else m.g_b_proj(m.g_a_proj(x))
        q, k, v, gate = (y.view(*x.shape[:2], m.num_heads, m.head_dim) for y in (*qkv, gate))
        return q, k, v, gate, self.forget(x), torch.sigmoid(m.b_proj(x))

    def forget(self, x: Tensor) -> Tensor:
        f = self.mixer.forget_gate
        logits = f.f_proj(x) if hasattr(f, "f_proj") else f.f_b_proj(f.f_a_proj(x))
        logits = (logits + f.dt_bias).view(*x.shape[:2], f.num_heads, f.head_dim)
        rate = f.A_log.exp().view(-1, 1)
        lower = f.lower_bound if getattr(f, "safe_gate", False) else getattr(f, "safe_gate_lower_bound", None)
        if lower is not None:
            return lower * torch.sigmoid(rate * logits)
        return -rate * torch.log1p(torch.exp(logits))

    def read_out(self, out: Tensor, gate: Tensor) -> Tensor:
        return self.mixer.o_proj(self.mixer.o_norm(out, gate).double().reshape(-1, self.mixer.o_proj.in_features))
