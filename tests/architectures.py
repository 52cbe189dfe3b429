"""The table of architectures that every law is tested on. A new architecture is one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import reference
import torch
from torch import nn
from transformers import FalconH1Config, FalconH1ForCausalLM, PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from peft_s0.mixers import find_mixer

VOCABULARY = 128
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
ATTENTION: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
GATED_DELTA_NET: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Args:
        name: its model type.
        model_class: the model with a language-modelling head.
        config: makes a tiny config.
        slow_mixer: the naive twin of its mixer.
        gain: factor on the mixers' output projections, so that the mixers reach the logits and an error would show.
    """

    name: str
    model_class: type[PreTrainedModel]
    config: Callable[[], Any]
    slow_mixer: type[reference.SlowMixer]
    gain: float = 1.0

    def build(self, seed: int = 0) -> PreTrainedModel:
        """A random model in eval mode whose mixers remember: at transformers' own initialisation tiny models forget
        their state within a few tokens."""
        torch.manual_seed(seed)
        model = self.model_class(self.config()).eval()
        with torch.no_grad():
            for mixer in mixers(model):
                time_step = torch.empty_like(mixer.dt_bias).uniform_(0.01, 0.1)
                mixer.dt_bias.copy_(time_step.expm1().log())
                mixer.A_log.uniform_(-0.7, 0.7)
                mixer.out_proj.weight.mul_(self.gain)
        return model


def mixers(model: nn.Module) -> list[nn.Module]:
    """The recurrent mixers of a model."""
    return [module for module in model.modules() if find_mixer(type(module)) is not None]


ARCHITECTURES = (
    Architecture(
        name="qwen3_5",
        model_class=Qwen3_5ForCausalLM,
        config=lambda: Qwen3_5TextConfig(
            **COMMON, **ATTENTION, **GATED_DELTA_NET, intermediate_size=128, num_hidden_layers=4
        ),
        slow_mixer=reference.GatedDeltaRule,
    ),
    Architecture(
        name="falcon_h1",
        model_class=FalconH1ForCausalLM,
        config=lambda: FalconH1Config(
            **COMMON,
            **ATTENTION,
            intermediate_size=128,
            num_hidden_layers=2,
            mamba_d_ssm=64,
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_n_groups=1,
            mamba_d_state=16,
            mamba_chunk_size=16,
        ),
        slow_mixer=reference.Mamba2,
        gain=8.0,
    ),
)
