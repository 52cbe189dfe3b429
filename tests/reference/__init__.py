"""The naive twins, one file for each recurrence."""

from .base import SlowMixer, with_slow_mixers
from .gated_delta_rule import GatedDeltaRule, KimiDeltaAttention, OlmoHybrid, Qwen3Next
from .lightning_attention import LightningAttention
from .mamba1 import Mamba1, NormalizedMamba1, Zamba
from .mamba2 import FalconH1, Mamba2
from .mlstm import MLSTM
from .rg_lru import RGLRU

__all__ = [
    "MLSTM",
    "RGLRU",
    "FalconH1",
    "GatedDeltaRule",
    "KimiDeltaAttention",
    "LightningAttention",
    "Mamba1",
    "Mamba2",
    "NormalizedMamba1",
    "OlmoHybrid",
    "Qwen3Next",
    "SlowMixer",
    "Zamba",
    "with_slow_mixers",
]
