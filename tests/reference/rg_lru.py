from __future__ import annotations

import torch
from torch import Tensor

from .base import SlowMixer


class RGLRU(SlowMixer):
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t with a vector h, and no root at the first token."""

    def forward(self, hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, None]:
        return super().forward(hidden_states), None

    def recur(self, x: Tensor, state: Tensor) -> Tensor:
        m, lru = self.mixer, self.mixer.rg_lru
        values = self.convolved(m.linear_x(x))
        by_head = values.view(*x.shape[:2], lru.num_attention_heads, -1)

        def gate(name: str) -> Tensor:
            weight, bias = getattr(lru, f"{name}_gate_weight"), getattr(lru, f"{name}_gate_bias")
            heads = [by_head[:, :, head] @ weight[head] + bias[head] for head in range(lru.num_attention_heads)]
            return torch.sigmoid(torch.cat(heads, dim=-1))

        softplus = torch.log1p(torch.exp(lru.recurrent_param))
        decay, written = torch.exp(-8 * gate("recurrent") * softplus), gate("input") * values
        outputs = []
        for t in range(x.shape[1]):
            root = (1 - decay[:, t].square()).sqrt() if t else 1
            state = decay[:, t] * state + root * written[:, t]
            outputs.append(state)
        self.final = state
        return m.linear_out(torch.stack(outputs, dim=1) * m.act_fn(m.linear_y(x)))

    def convolved(self, x: Tensor) -> Tensor:
        weight = self.mixer.conv_1d.weight.squeeze(1)
        width = weight.shape[-1]
        padded = torch.nn.functional.pad(x, (0, 0, width - 1, 0))
        return sum(padded[:, i : i + x.shape[1]] * weight[:, i] for i in range(width)) + self.mixer.conv_1d.bias
