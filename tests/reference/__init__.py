"""The naive twins, one file for each recurrence."""

from .base import SlowMixer, with_slow_mixers
from .gated_delta_rule import GatedDeltaRule, KimiDeltaAttention, OlmoHybrid, Qwen3Next
from .mamba2 import FalconH1, Mamba2

__all__ = [
    "FalconH1",
    "GatedDeltaRule",
    "KimiDeltaAttention",
    "Mamba2",
    "OlmoHybrid",
    "Qwen3Next",
    "SlowMixer",
    "with_slow_mixers",
]
