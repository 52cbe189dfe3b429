"""The layers of fla and mamba-ssm as their formulas: one token at a time, in float64, with an initial state.

Each function takes a layer in float64, hidden states [batch, tokens, features] and a state as the layer's kernels keep
it, and returns what the layer puts out. They share no code with the kernels or with peft_s0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Layer = Any


def scan(state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """S_t = diag(decay_t) S_{t-1} + k_t v_t^T and o_t = q_t S_t.

    Args:
        state: [batch, heads, key dimension, value dimension].
        q: [batch, tokens, heads, key dimension], as k; decay, too, or with one channel.
        k: see q.
        v: [batch, tokens, heads, value dimension].
        decay: see q.
    """
    outputs = []
    for t in range(q.shape[1]):
        state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1)


def delta_scan(state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """S_t = D S_{t-1} + beta k (v - k^T D S_{t-1})^T with D = diag(decay_t), o_t = q_t S_t; shapes as in `scan`."""
    outputs = []
    for t in range(q.shape[1]):
        state = decay[:, t, :, :, None] * state
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1)


def heads(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-1, (-1, size))


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def rms(x: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def normed(x: Tensor, norm: Layer) -> Tensor:
    return rms(x, norm.eps) * norm.weight


def convolve(conv: Layer, x: Tensor) -> Tensor:
    """Causal depthwise convolution and SiLU of [batch, tokens, channels]."""
    weight = conv.weight[:, 0]
    padded = F.pad(x, (0, 0, weight.shape[-1] - 1, 0))
    out = sum(padded[:, i : i + x.shape[1]] * weight[:, i] for i in range(weight.shape[-1]))
    return F.silu(out if conv.bias is None else out + conv.bias)


def projected(m: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values behind their convolutions, by heads."""
    q, k, v = (convolve(getattr(m, f"{n}_conv1d"), getattr(m, f"{n}_proj")(x)) for n in "qkv")
    return heads(q, m.head_k_dim), heads(k, m.head_k_dim), heads(v, m.head_v_dim)


def softplus_decay(m: Layer, logits: Tensor) -> Tensor:
    return torch.exp(-m.A_log.exp() * F.softplus(logits + m.dt_bias))


def gated_delta_net(m: Layer, x: Tensor, state: Tensor) -> Tensor:
    q, k, v = projected(m, x)
    q, k = (unit(y).repeat_interleave(m.num_v_heads // m.num_heads, dim=2) for y in (q, k))
    decay, beta = softplus_decay(m, m.a_proj(x)).unsqueeze(-1), m.b_proj(x).sigmoid()
    o = delta_scan(state.mT, q * m.head_k_dim**-0.5, k, v, decay, beta)
    return m.o_proj((normed(o, m.o_norm) * F.silu(heads(m.g_proj(x), m.head_v_dim))).flatten(2))


def kimi_delta_attention(m: Layer, x: Tensor, state: Tensor) -> Tensor:
    q, k, v = projected(m, x)
    decay = heads(F.softplus(m.f_proj(x) + m.dt_bias), m.head_k_dim)
    decay = torch.exp(-m.A_log.exp()[:, None] * decay)
    o = delta_scan(state.mT, unit(q) * m.head_k_dim**-0.5, unit(k), v, decay, m.b_proj(x).sigmoid())
    return m.o_proj((normed(o, m.o_norm) * heads(m.g_proj(x), m.head_v_dim).sigmoid()).flatten(2))


def comba(m: Layer, x: Tensor, state: Tensor) -> Tensor:
    """The error is taken before the decay, and with keys of its own."""
    q, k, v = projected(m, x)
    p = k * m.decay.sigmoid()[:, None]
    q, k, p = unit(q - m.D[:, None] * p) * m.head_k_dim**-0.5, unit(k), unit(p)
    decay, beta = softplus_decay(m, m.a_proj(x)), m.b_proj(x).sigmoid()
    outputs = []
    for t in range(x.shape[1]):
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", p[:, t], state)
        state = decay[:, t, :, None, None] * state
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    o = torch.stack(outputs, dim=1)
    return m.o_proj((normed(o, m.o_norm) * heads(m.g_proj(x), m.head_v_dim).sigmoid()).flatten(2))


def delta_net(m: Layer, x: Tensor, state: Tensor) -> Tensor:
    q, k, v = projected(m, x)
    beta = m.b_proj(x).sigmoid()
    o = delta_scan(state, unit(q) * m.head_k_dim**-0.5, unit(k), v, torch.ones_like(q), beta)
    return m.o_proj(normed(o, m.o_norm).flatten(2))


def gated_delta_product(m: Layer, x: Tensor, state: Tensor) -> Tensor:
    """Every token takes several delta steps; it decays in front of the first and is read behind the last."""
    n, tokens = m.num_householder, x.shape[1]
    q, k, v = (convolve(getattr(m, f"{name}_conv1d"), getattr(m, f"{name}_proj")(x)) for name in "qkv")
    q = unit(heads(q, m.head_k_dim)) * m.head_k_dim**-0.5
    k = unit(heads(k.unflatten(-1, (n, -1)), m.head_k_dim).flatten(1, 2))
    v = heads(v.unflatten(-1, (n, -1)), m.head_v_dim).flatten(1, 2)
    beta = m.b_proj(x).sigmoid().unflatten(-1, (n, -1)).flatten(1, 2)
    decay = torch.ones(*beta.shape, 1, dtype=x.dtype)
    if m.use_forget_gate:
        decay[:, ::n] = softplus_decay(m, m.a_proj(x)).unsqueeze(-1)
    o = delta_scan(state, q.repeat_interleave(n, dim=1), k, v, decay, beta)[:, n - 1 :: n]
    assert o.shape[1] == tokens
    return m.o_proj((normed(o, m.o_norm) * F.silu(heads(m.g_proj(x), m.head_v_dim))).flatten(2))


def gated_linear_attention(m: Layer, x: Tensor, state: Tensor) -> Tensor:
    q, k = (heads(p(x), m.head_k_dim) for p in (m.q_proj, m.k_proj))
    decay = heads(torch.exp(F.logsigmoid(m.gk_proj(x)) / m.gate_logit_normalizer), m.head_k_dim)
    o = scan(state.mT, q * m.head_k_dim**-0.5, k, heads(m.v_proj(x), m.head_v_dim), decay)
    return m.o_proj((normed(o, m.g_norm_swish_gate) * F.silu(heads(m.g_proj(x), m.head_v_dim))).flatten(2))


def hgrn2(m: Layer, x: Tensor, state: Tensor) -> Tensor:
    decay = heads(m.f_proj(x).sigmoid(), m.head_f_dim)
    q = heads(F.silu(m.q_proj(x)), m.head_f_dim) * m.head_f_dim**-0.5
    o = scan(state.mT, q, 1 - decay, heads(m.i_proj(x), m.head_i_dim), decay)
    # The layer hands its norm's weight on, but not its eps.
    return m.o_proj(rms(o.flatten(2), 1e-5) * m.g_norm.weight)


def retention(m: Layer, x: Tensor, state: Tensor) -> Tensor:
    half = m.head_k_dim // 2
    angle = torch.arange(x.shape[1])[:, None] * 10000 ** (-torch.arange(half, dtype=x.dtype) / half)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def rotate(y: Tensor) -> Tensor:
        turned = torch.complex(y[..., :half], y[..., half:]) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    q, k = (rotate(heads(p(x), m.head_k_dim)) for p in (m.q_proj, m.k_proj))
    decay = (1 - 2.0 ** (-5 - torch.arange(m.num_heads, dtype=x.dtype)))[:, None].expand(*x.shape[:2], -1, 1)
    o = scan(state, q * m.head_k_dim**-0.5, k, heads(m.v_proj(x), m.head_v_dim), decay)
    return m.o_proj((normed(o, m.g_norm_swish_gate) * F.silu(heads(m.g_proj(x), m.head_v_dim))).flatten(2))


def linear_attention(m: Layer, x: Tensor, state: Tensor) -> Tensor:
    q = m.feature_map_q(heads(m.q_proj(x), m.head_k_dim)) * m.head_k_dim**-0.5
    k = m.feature_map_k(heads(m.k_proj(x), m.head_k_dim))
    o = scan(state, q, k, heads(m.v_proj(x), m.head_v_dim), torch.ones_like(q))
    return m.o_proj(normed(o, m.norm).flatten(2))


def group_norm(o: Tensor, norm: Layer) -> Tensor:
    return F.group_norm(o.flatten(0, 1).flatten(1), o.shape[2], norm.weight, norm.bias, norm.eps).view(*o.shape[:2], -1)


def rwkv7(m: Layer, x: Tensor, state: Tensor) -> Tensor:
    delta = F.pad(x, (0, 0, 1, -1)) - x
    xr, xw, xk, xv, xa, xg = (x + delta * getattr(m, f"x_{n}") for n in "rwkvag")
    k, v, a = m.k_proj(xk), heads(m.v_proj(xv), m.head_v_dim), m.a_lora(xa).sigmoid()
    removal = F.normalize(heads(k * m.k_k, m.head_dim), dim=-1)
    r, a, k = (heads(y, m.head_dim) for y in (m.r_proj(xr), a, k * (1 + (a - 1) * m.k_a)))
    decay = heads(torch.exp(-math.exp(-0.5) * m.w_lora(xw).sigmoid()), m.head_dim)
    outputs = []
    for t in range(x.shape[1]):
        removed = torch.einsum("bhk,bhkv->bhv", removal[:, t], state)
        state = decay[:, t, :, :, None] * state - (removal * a)[:, t, :, :, None] * removed[:, :, None]
        state = state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], state))
    o = group_norm(torch.stack(outputs, dim=1), m.g_norm)
    own = (r * k * m.r_k).sum(-1, keepdim=True) * v
    return m.o_proj((o + own.flatten(2)) * m.g_lora(xg))


def rwkv6(m: Layer, x: Tensor, state: Tensor) -> Tensor:
    delta = F.pad(x, (0, 0, 1, -1)) - x
    mixed = torch.tanh(m.x_proj[0].linear(x + delta * m.x_proj[0].mu)).unflatten(-1, (5, -1))
    mixed = torch.einsum("btnr,hnr->nbth", mixed, m.x_proj[2].weight.unflatten(-1, (5, -1)))
    r, w, k, v, g = (
        getattr(m, f"{n}_proj").linear(x + delta * (mixed[i] + m.x_bias[i])) for i, n in enumerate("rwkvg")
    )
    r, w, k, v = heads(r, m.head_k_dim), heads(w, m.head_k_dim), heads(k, m.head_k_dim), heads(v, m.head_v_dim)
    decay, outputs = torch.exp(-torch.exp(w)), []
    for t in range(x.shape[1]):
        written = k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], state + m.bonus[:, :, None] * written))
        state = decay[:, t, :, :, None] * state + written
    return m.o_proj(group_norm(torch.stack(outputs, dim=1), m.g_norm) * F.silu(g))


def mamba2(m: Layer, x: Tensor, state: Tensor) -> Tensor:
    inner, group = m.d_ssm, m.ngroups * m.d_state
    extra = (m.in_proj.out_features - 2 * inner - 2 * group - m.nheads) // 2
    z0, x0, z, mixed, dt = m.in_proj(x).split([extra, extra, inner, inner + 2 * group, m.nheads], dim=-1)
    values, b, c = convolve(m.conv1d, mixed).split([inner, group, group], dim=-1)
    b, c = (heads(y, m.d_state).repeat_interleave(m.nheads // m.ngroups, dim=2) for y in (b, c))
    values, dt = heads(values, m.headdim), F.softplus(dt + m.dt_bias).clamp(*m.dt_limit)
    y = scan(state.mT, c, dt.unsqueeze(-1) * b, values, torch.exp(-m.A_log.exp() * dt).unsqueeze(-1))
    y = (y + m.D[:, None] * values).flatten(2) * F.silu(z)
    if m.rmsnorm:
        y = rms(y.unflatten(-1, (m.ngroups, -1)), m.norm.eps).flatten(-2) * m.norm.weight
    return m.out_proj(torch.cat([F.silu(z0) * x0, y], dim=-1))
